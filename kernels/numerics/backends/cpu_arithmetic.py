"""Rounding number by number: the reference's arithmetic done in place, for any dtype and size."""

from __future__ import annotations

import struct

import numpy as np
import torch

from ..error_statistics import ErrorStatistics, Scratch, measure, merge
from ..random_bits import BLOCK, LANE, Words
from ..rounding import FP32_BIAS, FP32_MANTISSA, FRACTION_BITS, ONE
from .task import Task


class Arithmetic:
    """source -> scaled -> position -> code, one chunk at a time, in buffers that are reused for every chunk."""

    def __init__(self, count: int, task: Task, blocks: int, statistics: bool):
        self.task = task
        self.saturates = bool(np.float32(task.amax) / np.float32(task.scale.item()) > task.float8.max)
        self.words = Words(task.stream, blocks, min(LANE, count))
        size = 2 * blocks * min(LANE, count)
        self.scaled = torch.empty(size, dtype=torch.float32, device="cpu")
        self.position, self.other = torch.empty((2, size), dtype=torch.int32, device="cpu")
        self.measured = torch.empty(size, dtype=torch.int32, device="cpu") if statistics else None
        self.scratch = Scratch(size, torch.float32) if statistics else None
        self.parts: list[ErrorStatistics] = []

    def quantize(self, source: torch.Tensor, target: torch.Tensor, first_block: int) -> None:
        """Write the codes of one chunk, which starts at `first_block`, to `target`."""
        n, task = source.numel(), self.task
        scaled, position = self.scaled[:n], self.position[:n]
        torch.div(source if source.dtype == torch.float32 else scaled.copy_(source), task.scale, out=scaled)
        self._write_positions(position, FRACTION_BITS if task.rounding.stochastic else 0)
        if self.measured is not None and task.rounding.stochastic:
            self.measured[:n].copy_(position)
        elif self.measured is not None:
            self._write_positions(self.measured[:n], FRACTION_BITS)
        if task.rounding.stochastic:
            self._add_words(first_block, -(-n // BLOCK))
            position.bitwise_right_shift_(FRACTION_BITS)
        if self.saturates:
            position.clamp_(max=task.float8.max_code)
        sign = scaled.view(torch.int32).bitwise_right_shift_(24).bitwise_and_(0x80)
        target.copy_(position.bitwise_or_(sign))
        if self.measured is not None:
            self._measure(source.float(), target, self.measured[:n])

    def _measure(self, original: torch.Tensor, codes: torch.Tensor, positions: torch.Tensor) -> None:
        task = self.task
        self.parts.append(measure(original, codes, positions, task.scale, task.amax, task.float8, scratch=self.scratch))

    def _write_positions(self, position: torch.Tensor, fraction_bits: int) -> None:
        """Write rounding.code_positions of the chunk's scaled values to `position`.

        It is the sum of a subnormal part, clamped at the smallest normal value, and a normal part, which starts there.
        (Selecting one of the two would take three times as long.)
        """
        n, float8 = len(position), self.task.float8
        scaled, other = self.scaled[:n], self.other[:n]
        # Normal part: the exponent and mantissa fields count up with the value. Drop the surplus bits, ties to even.
        surplus = FP32_MANTISSA - float8.mantissa_bits - fraction_bits
        first_normal = 1 << (float8.mantissa_bits + fraction_bits)
        torch.bitwise_and(scaled.view(torch.int32), 0x7FFFFFFF, out=position)
        position.sub_((FP32_BIAS - float8.exponent_bias) << FP32_MANTISSA).clamp_(min=first_normal << surplus)
        torch.bitwise_right_shift(position, surplus, out=other).bitwise_and_(1)
        position.add_(other).add_((1 << (surplus - 1)) - 1).bitwise_right_shift_(surplus)
        # Subnormal part: adding a number whose last place is one unit of the position rounds to that unit.
        anchor = 1.5 * 2**FP32_MANTISSA * float8.quantum / 2**fraction_bits
        torch.abs(scaled, out=other.view(torch.float32)).clamp_(max=float8.smallest_normal).add_(anchor)
        position.add_(other.sub_(_float_bits(anchor) + first_normal))

    def _add_words(self, first_block: int, blocks: int) -> None:
        low, high = self.words.fill(first_block, blocks)
        lanes = self.position[: 2 * low.numel()].view(blocks, 2, -1)
        for lane, words in ((0, low), (1, high)):
            lanes[:, lane].add_(words.bitwise_xor_(ONE - 1) if self.task.rounding.complements_words else words)

    @staticmethod
    def statistics(workers: list[Arithmetic]) -> ErrorStatistics:
        return merge(part for worker in workers for part in worker.parts)


def _float_bits(x: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", x))[0])
