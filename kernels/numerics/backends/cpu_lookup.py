"""Rounding with a lookup table: a 16-bit source has 65,536 values, and each is computed once.

Error statistics are counts, too: how often each value was rounded down and how often up.
"""

from __future__ import annotations

import torch

from ..error_statistics import ErrorStatistics, measure, merge
from ..random_bits import BLOCK, LANE, Words
from ..rounding import FRACTION_BITS, ONE, code_positions, round_to_codes
from .task import Task

VALUES = 1 << 16


class Table:
    """One entry per source value: its position and sign, to which an element's random word is added.

    For a rounding that complements its words, entries are 65535 greater and words are subtracted. For nearest, which
    has no words, entries are the codes.
    """

    def __init__(self, dtype: torch.dtype, task: Task):
        self.task = task
        self.values = torch.arange(VALUES, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)
        self.scaled = self.values.float() / task.scale
        if task.rounding.stochastic:
            positions = code_positions(self.scaled, task.float8, FRACTION_BITS)
            positions.clamp_(max=task.float8.max_code << FRACTION_BITS)
            signs = (self.scaled.view(torch.int32) < 0).int() << (FRACTION_BITS + 7)
            self.entries = positions + signs + (ONE - 1 if task.rounding.complements_words else 0)
        else:
            self.entries = round_to_codes(self.scaled, None, task.float8, task.rounding)

    def codes(self, values: torch.Tensor, last_bit: int) -> torch.Tensor:
        """The codes (uint8) of some values that end in this bit. The two neighbours of a value differ in it."""
        if not self.task.rounding.stochastic:
            return self.entries[values]
        codes = self.entries[values] >> FRACTION_BITS
        carried = (codes & 1) ^ last_bit
        return (codes - carried if self.task.rounding.complements_words else codes + carried).to(torch.uint8)


class Lookup:
    """source -> table entry -> code, one chunk at a time, in buffers that are reused for every chunk."""

    def __init__(self, table: Table, blocks: int, statistics: bool):
        self.table, self.words = table, Words(table.task.stream, blocks, LANE)
        self.index, self.entries, self.sums = torch.empty((3, blocks * BLOCK), dtype=torch.int32, device="cpu")
        self.counts = torch.zeros(2 * VALUES, dtype=torch.int64, device="cpu") if statistics else None

    def quantize(self, source: torch.Tensor, target: torch.Tensor, first_block: int) -> None:
        """Write the codes of one chunk, which starts at `first_block`, to `target`."""
        n, table = source.numel(), self.table
        index, entries, sums = self.index[:n], self.entries[:n], self.sums[:n]
        index.copy_(source.view(torch.uint16))
        if table.task.rounding.stochastic:
            torch.index_select(table.entries, 0, index, out=entries)
            self._add_words(first_block, -(-n // BLOCK))
            if self.counts is not None:
                index.bitwise_or_(torch.bitwise_and(sums, ONE, out=entries))  # the code's last bit
            target.copy_(sums.bitwise_right_shift_(FRACTION_BITS))
        else:
            torch.index_select(table.entries, 0, index, out=target)
        if self.counts is not None:
            self.counts += torch.bincount(index, minlength=2 * VALUES)

    def _add_words(self, first_block: int, blocks: int) -> None:
        combine = torch.sub if self.table.task.rounding.complements_words else torch.add
        entries, sums = (x[: blocks * BLOCK].view(blocks, 2, LANE) for x in (self.entries, self.sums))
        for lane, words in enumerate(self.words.fill(first_block, blocks)):
            combine(entries[:, lane], words, out=sums[:, lane])

    @staticmethod
    def statistics(workers: list[Lookup]) -> ErrorStatistics:
        counts = torch.zeros(2 * VALUES, dtype=torch.int64, device="cpu")
        for worker in workers:
            if worker.counts is not None:
                counts += worker.counts
        ending_in = counts.view(2, VALUES)
        return merge(_measure(workers[0].table, ending_in[last_bit], last_bit) for last_bit in (0, 1))


def _measure(table: Table, counts: torch.Tensor, last_bit: int) -> ErrorStatistics:
    """Statistics of all elements whose codes end in this bit. counts: elements of each value, int64 (VALUES,)."""
    task, values = table.task, counts.nonzero().squeeze(1)
    positions = code_positions(table.scaled[values], task.float8, FRACTION_BITS)
    original, codes = table.values[values].double(), table.codes(values, last_bit)
    return measure(original, codes, positions, task.scale, task.amax, task.float8, counts[values])
