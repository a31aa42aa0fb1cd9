"""The fast path on an NVIDIA GPU, in Triton: one pass for amax, one for everything else."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from ..error_statistics import RELATIVE_BINS, STEP_BINS, ErrorStatistics, squares_fit
from ..formats import Float8Format
from ..random_bits import BLOCK, LANE
from . import reference
from .task import Task

AMAX_TILE_BYTES, AMAX_WARPS, AMAX_PROGRAMS = 1 << 15, 8, 4
ROUND_TILE, ROUND_WARPS = 1024, 2
MEASURE_TILE, MEASURE_WARPS, MEASURE_PROGRAMS = 8192, 16, 1
"""The fastest on an H100 and an H200. PROGRAMS are per multiprocessor. Rounding without statistics runs one per pair of
tiles."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def unavailable(device: torch.device) -> str | None:
    """See backends.Backend."""
    if device.type != "cuda" or torch.version.hip:
        return "it runs on NVIDIA GPUs only"
    return _why_triton_fails(device)


@cache
def _why_triton_fails(device: torch.device) -> str | None:
    """Why Triton cannot compile and run a kernel on this device (for example no C compiler), or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        tensor_to_amax(torch.ones(1, device=device))
    except Exception as error:  # Triton, its compilers and the driver have no common base class
        return f"Triton fails: {error!r}"
    return None


def tensor_to_amax(flat: torch.Tensor) -> float:
    """See backends.Backend. One pass: the bits of magnitudes, as integers, are ordered finite < infinite < NaN.

    flat: contiguous float (n,).
    """
    from . import triton_kernels

    integers = _INTEGERS[flat.dtype.itemsize]
    largest = torch.zeros(1, dtype=max(integers, torch.int32, key=lambda dtype: dtype.itemsize), device=flat.device)
    tile = AMAX_TILE_BYTES // flat.dtype.itemsize
    programs = _programs(flat, -(-flat.numel() // tile), AMAX_PROGRAMS)
    with current(flat.device):
        triton_kernels.largest_magnitude[(programs,)](
            flat.view(integers),
            largest,
            flat.numel(),
            SIGNLESS=torch.iinfo(integers).max,
            TILE=tile,
            num_warps=AMAX_WARPS,
        )
    return largest.cpu().to(integers).view(flat.dtype).float().item()


def quantize_slice(flat: torch.Tensor, codes: torch.Tensor, task: Task, statistics: bool) -> ErrorStatistics | None:
    """See backends.Backend."""
    with current(flat.device):
        if not statistics:
            _quantize(flat, codes, task)
            return None
        if not squares_fit(task.amax):
            return reference.quantize_slice(flat, codes, task, statistics)
        return _quantize_and_measure(flat, codes, task)


def _quantize(flat: torch.Tensor, codes: torch.Tensor, task: Task) -> None:
    from . import triton_kernels

    for first_pair, pairs, masked in _launches(flat.numel(), ROUND_TILE):
        triton_kernels.quantize_slice[(pairs,)](
            flat,
            codes,
            task.scale.item(),
            flat.numel(),
            _signed_64(task.stream),
            first_pair,
            **_choices(task),
            MASKED=masked,
            TILE=ROUND_TILE,
            num_warps=ROUND_WARPS,
            enable_fp_fusion=True,
        )


def _quantize_and_measure(flat: torch.Tensor, codes: torch.Tensor, task: Task) -> ErrorStatistics:
    from . import triton_kernels

    launches = list(_launches(flat.numel(), MEASURE_TILE))
    programs = [_programs(flat, pairs, MEASURE_PROGRAMS) for _, pairs, _ in launches]
    counters, columns = triton_kernels.COUNTERS.value, triton_kernels.SUMS.value
    results = torch.zeros(counters + sum(programs) * columns, dtype=torch.int64, device=flat.device)
    counts, sums = results[:counters], results[counters:].view(torch.float64).view(-1, columns)
    for (first_pair, pairs, masked), rows in zip(launches, torch.split(sums, programs), strict=True):
        triton_kernels.quantize_and_measure[(len(rows),)](
            flat,
            codes,
            task.scale.item(),
            task.amax or 1.0,
            flat.numel(),
            _signed_64(task.stream),
            first_pair,
            pairs,
            counts,
            rows,
            **_choices(task),
            SHARED_COUNTERS=flat.is_cuda,
            MASKED=masked,
            TILE=MEASURE_TILE,
            num_warps=MEASURE_WARPS,
            enable_fp_fusion=True,
        )
    padding = sum(2 * MEASURE_TILE * pairs for _, pairs, _ in launches) - flat.numel()
    return _statistics(results.cpu(), counters, columns, flat.numel(), padding, task.amax)


def _choices(task: Task) -> dict[str, object]:
    """Compile-time arguments of a kernel."""
    float8, rounding = task.float8, task.rounding
    in_range = task.amax == 0 or float8.quantum < task.amax / task.scale.item() <= float8.max
    return {
        "FLOAT8": float8,
        "STOCHASTIC": rounding.stochastic,
        "COMPLEMENT": rounding.complements_words,
        "CEILING": None if in_range else ceiling(float8),
    }


def _launches(n: int, tile: int) -> Iterator[tuple[int, int, bool]]:
    """(first pair of tiles, pairs, masked) for the whole blocks of a tensor, and for the remainder after them."""
    blocks, rest = divmod(n, BLOCK)
    whole = blocks * (LANE // tile)
    if whole:
        yield 0, whole, False
    if rest:
        yield whole, -(-min(rest, LANE) // tile), True


def _statistics(
    results: torch.Tensor, counters: int, columns: int, count: int, padding: int, amax: float
) -> ErrorStatistics:
    """The results of quantize_and_measure as statistics."""
    table = results[: counters - 1].view(STEP_BINS, -1)
    exact = int(results[counters - 1]) - padding
    steps = table.sum(1)
    steps[STEP_BINS // 2] += exact
    sums = results[counters:].view(torch.float64).view(-1, columns)
    error, squared_error, squared, _, flushed, saturated = sums.sum(0).tolist()
    return ErrorStatistics(
        count=count,
        sum_error=-error,
        sum_squared_error=squared_error,
        sum_squared=squared,
        max_error=float(sums[:, 3].max()) if len(sums) else 0.0,
        amax=amax,
        saturated=int(saturated),
        flushed=int(flushed),
        exact=exact,
        step_histogram=tuple(steps.tolist()),
        relative_histogram=tuple(table.sum(0)[:RELATIVE_BINS].tolist()),
    )


def ceiling(float8: Float8Format) -> float:
    """The value 1.25 codes above the largest. Clamping larger values to it keeps their errors in the outermost bins."""
    exponent, mantissa = divmod(float8.max_code + 1, 1 << float8.mantissa_bits)
    return math.ldexp(1 + (mantissa + 0.25) / (1 << float8.mantissa_bits), exponent - float8.exponent_bias)


def _programs(flat: torch.Tensor, tiles: int, per_multiprocessor: int) -> int:
    """The number of programs that share some tiles: enough to fill the GPU."""
    multiprocessors = torch.cuda.get_device_properties(flat.device).multi_processor_count if flat.is_cuda else 1
    return max(1, min(tiles, multiprocessors * per_multiprocessor))


def current(device: torch.device) -> AbstractContextManager[None]:
    """Make a GPU current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _signed_64(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
