"""The fast path on a CPU: the reference's arithmetic in place, in chunks that stay in the cache.

Every intermediate lives in a preallocated buffer, so a chunk costs no allocation and few memory passes. A 16-bit
source has only 65,536 values: its errors are counted by value and turned into statistics once, at the end.
"""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch

from ..error import ErrorStatistics, Scratch, measure, merge
from ..formats import Float8Format
from ..random_bits import BLOCK, LANE, block_keys, fill_words
from ..rounding import FP32_BIAS, FP32_MANTISSA, FRACTION_BITS, ONE, Rounding, code_positions, round_to_codes

CHUNK_BLOCKS = 4
COUNTING_THRESHOLD = 1 << 19
"""From this many elements on, counting a 16-bit tensor's values is cheaper than measuring each element."""

_VALUES = 1 << 16


def unavailable(x: torch.Tensor) -> str | None:
    """Why this backend cannot serve a tensor, or None if it can."""
    return None if x.device.type == "cpu" else "it computes on the CPU only"


def round_tensor(
    flat: torch.Tensor,
    scale: torch.Tensor,
    amax: float,
    format: Float8Format,
    rounding: Rounding,
    stream: int,
    statistics: bool,
) -> tuple[torch.Tensor, ErrorStatistics | None]:
    """See backends.Backend."""
    codes = torch.empty(flat.shape, dtype=torch.uint8)
    size = CHUNK_BLOCKS * BLOCK
    starts = iter(range(0, flat.numel(), size))  # shared: each thread takes the next chunk that nobody has
    inference = torch.is_inference_mode_enabled()

    def work(_) -> _CountingRecorder | _MeasuringRecorder | None:
        with torch.inference_mode(inference):
            chunks = _Chunks(flat.numel(), scale, amax, format, rounding, stream)
            recorder = _recorder(flat, chunks, amax) if statistics else None
            for start in starts:
                chunks.round(flat[start : start + size], codes[start : start + size], start // BLOCK, recorder)
            return recorder

    threads = min(torch.get_num_threads(), -(-flat.numel() // size))
    recorders = list(_pool(torch.get_num_threads()).map(work, range(threads))) if threads > 1 else [work(0)]
    return codes, type(recorders[0]).result(recorders) if statistics else None


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch runs each operation alone.

    Sharing out whole chunks needs no waiting for each other after every operation. With torch's own division of each
    operation, a busy machine makes every one of them wait, spinning, for a thread that has no core: 10 to 100 times.
    """
    pool, all_alone = ThreadPoolExecutor(threads, "round"), Barrier(threads + 1)

    def stay_alone() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that are yet to begin
        all_alone.wait()

    for _ in range(threads):
        pool.submit(stay_alone)
    all_alone.wait()
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


class _Chunks:
    """source -> scaled -> position -> code, one chunk at a time, in buffers that the next chunk overwrites."""

    def __init__(self, count, scale, amax, format, rounding, stream):
        self.scale, self.format, self.rounding, self.stream = scale, format, rounding, stream
        self.fraction_bits = FRACTION_BITS if rounding.stochastic else 0
        self.saturates = bool(torch.tensor(amax) / scale > format.max)
        blocks, width = min(CHUNK_BLOCKS, -(-count // BLOCK)), min(LANE, count)
        self.scaled = torch.empty(2 * blocks * width)
        self.position, self.other = torch.empty((2, 2 * blocks * width), dtype=torch.int32)
        self.low, self.high = torch.empty((2, blocks, width), dtype=torch.int32)

    def round(self, source: torch.Tensor, target: torch.Tensor, first_block: int, recorder) -> None:
        """Write the codes of one chunk, which begins at `first_block`, to `target`."""
        positions = self.positions(source)
        if recorder:
            recorder.record_positions(source, positions)
        self.draw(positions, first_block)
        target.copy_(self.signed(positions))
        if recorder:
            recorder.record_codes(source, target)

    def positions(self, source: torch.Tensor) -> torch.Tensor:
        """rounding.code_positions of source / scale: the sum of a subnormal part, which ends at the smallest normal
        value, and a normal part, which begins there. (Selecting one of the two would cost three times as much.)
        """
        n, format, bits = source.numel(), self.format, self.fraction_bits
        scaled, position, other = self.scaled[:n], self.position[:n], self.other[:n]
        torch.div(source if source.dtype == torch.float32 else scaled.copy_(source), self.scale, out=scaled)
        # Normal part: exponent and mantissa field count up with the value; the surplus bits go, ties to even.
        surplus = FP32_MANTISSA - format.mantissa_bits - bits
        first_normal = 1 << (format.mantissa_bits + bits)
        torch.bitwise_and(scaled.view(torch.int32), 0x7FFFFFFF, out=position)
        position.sub_((FP32_BIAS - format.exponent_bias) << FP32_MANTISSA).clamp_(min=first_normal << surplus)
        torch.bitwise_right_shift(position, surplus, out=other).bitwise_and_(1)
        position.add_(other).add_((1 << (surplus - 1)) - 1).bitwise_right_shift_(surplus)
        # Subnormal part: adding a number whose ulp is one unit of the position rounds to that unit.
        anchor = 1.5 * 2**FP32_MANTISSA * format.quantum / 2**bits
        torch.abs(scaled, out=other.view(torch.float32)).clamp_(max=format.smallest_normal).add_(anchor)
        return position.add_(other.sub_(_float_bits(anchor) + first_normal))

    def draw(self, positions: torch.Tensor, first_block: int) -> None:
        """Turn positions into magnitude codes, in place. `first_block`: the chunk's place in the tensor."""
        if self.rounding.stochastic:
            self._add_words(first_block, -(-positions.numel() // BLOCK))
            positions.bitwise_right_shift_(FRACTION_BITS)
        if self.saturates:
            positions.clamp_(max=self.format.max_code)

    def signed(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Magnitude codes with the signs of the chunk's source, in place."""
        sign = self.scaled.view(torch.int32)[: magnitudes.numel()]
        return magnitudes.bitwise_or_(sign.bitwise_right_shift_(24).bitwise_and_(0x80))

    @property
    def _surplus_bits(self) -> int:
        return FP32_MANTISSA - self.format.mantissa_bits - self.fraction_bits

    def _add_words(self, first_block: int, blocks: int) -> None:
        low, high = self.low[:blocks], self.high[:blocks]
        fill_words(block_keys(self.stream, first_block, blocks), low, high)
        lanes = self.position[: 2 * low.numel()].view(blocks, 2, -1)
        for lane, words in ((0, low), (1, high)):
            lanes[:, lane].add_(words.bitwise_xor_(ONE - 1) if self.rounding.complements_words else words)


def _recorder(flat: torch.Tensor, chunks: _Chunks, amax: float):
    if flat.dtype.itemsize == 2 and flat.numel() >= COUNTING_THRESHOLD:
        return _CountingRecorder(flat.dtype, chunks, amax)
    return _MeasuringRecorder(chunks, amax)


class _MeasuringRecorder:
    """Statistics of each element, summed over the chunks."""

    def __init__(self, chunks: _Chunks, amax: float):
        self.chunks, self.amax, self.parts = chunks, amax, []
        self.positions = torch.empty_like(chunks.position)
        self.scratch = Scratch(len(chunks.position), torch.float32)

    def record_positions(self, source: torch.Tensor, positions: torch.Tensor) -> None:
        if not self.chunks.rounding.stochastic:
            positions = code_positions(source.float() / self.chunks.scale, self.chunks.format, FRACTION_BITS)
        self.positions[: len(source)].copy_(positions)

    def record_codes(self, source: torch.Tensor, codes: torch.Tensor) -> None:
        chunks, positions = self.chunks, self.positions[: len(source)]
        self.parts.append(
            measure(source.float(), codes, positions, chunks.scale, self.amax, chunks.format, scratch=self.scratch)
        )

    @staticmethod
    def result(recorders: list[_MeasuringRecorder]) -> ErrorStatistics:
        return merge(part for recorder in recorders for part in recorder.parts)


class _CountingRecorder:
    """How often each 16-bit value was rounded down and how often up: the exact statistics at the cost of counting."""

    def __init__(self, dtype: torch.dtype, chunks: _Chunks, amax: float):
        self.dtype, self.chunks, self.amax = dtype, chunks, amax
        self.counts = torch.zeros(2 * _VALUES, dtype=torch.int64)
        self.outcome = torch.empty_like(chunks.position)

    def record_positions(self, source: torch.Tensor, positions: torch.Tensor) -> None:
        below = self.outcome[: positions.numel()]
        if self.chunks.rounding.stochastic:
            torch.bitwise_right_shift(positions, FRACTION_BITS, out=below)
            if self.chunks.saturates:
                below.clamp_(max=self.chunks.format.max_code)

    def record_codes(self, source: torch.Tensor, codes: torch.Tensor) -> None:
        n = source.numel()
        outcome, value = self.outcome[:n], self.chunks.position[:n]
        if self.chunks.rounding.stochastic:
            torch.sub(value.bitwise_and_(0x7F), outcome, out=outcome).bitwise_left_shift_(16)
        else:
            outcome.zero_()
        outcome.add_(value.copy_(source.view(torch.int16)).bitwise_and_(_VALUES - 1))
        self.counts += torch.bincount(outcome, minlength=2 * _VALUES)

    @staticmethod
    def result(recorders: list[_CountingRecorder]) -> ErrorStatistics:
        down, up = sum(recorder.counts for recorder in recorders).view(2, _VALUES)
        return merge(recorders[0]._measure(counts, step) for step, counts in enumerate((down, up)))

    def _measure(self, counts: torch.Tensor, step: int) -> ErrorStatistics:
        """Statistics of all values that came out `step` codes above the one below."""
        chunks = self.chunks
        values = counts.nonzero().squeeze(1)
        original = values.to(torch.int16).view(self.dtype)
        scaled = original.float() / chunks.scale
        positions = code_positions(scaled, chunks.format, FRACTION_BITS)
        if chunks.rounding.stochastic:
            magnitude = ((positions >> FRACTION_BITS) + step).clamp(max=chunks.format.max_code)
            codes = (magnitude | ((scaled.view(torch.int32) >> 24) & 0x80)).to(torch.uint8)
        else:
            codes = round_to_codes(scaled, None, chunks.format, chunks.rounding)
        return measure(original.double(), codes, positions, chunks.scale, self.amax, chunks.format, counts[values])


def _float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]
