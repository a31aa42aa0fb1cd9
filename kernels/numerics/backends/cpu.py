"""The fast path on a CPU: cache-sized chunks, distributed over threads that each have their own buffers.

A chunk takes no allocation and few passes over its memory. Large 16-bit tensors use a lookup table (cpu_lookup.py), all
others are computed number by number (cpu_arithmetic.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

from ..error_statistics import ErrorStatistics
from ..random_bits import BLOCK
from .cpu_arithmetic import Arithmetic
from .cpu_lookup import Lookup, Table
from .task import Task

CHUNK_BLOCKS = 4
LOOKUP_THRESHOLD = 1 << 19
"""From this many elements on, a table of all 16-bit values is cheaper than computing each element."""

W = TypeVar("W", Lookup, Arithmetic)


def unavailable(device: torch.device) -> str | None:
    """See backends.Backend."""
    return None if device.type == "cpu" else "it runs on the CPU only"


def quantize_slice(flat: torch.Tensor, codes: torch.Tensor, task: Task, statistics: bool) -> ErrorStatistics | None:
    """See backends.Backend."""
    blocks = min(CHUNK_BLOCKS, -(-flat.numel() // BLOCK))
    if flat.dtype.itemsize == 2 and flat.numel() >= LOOKUP_THRESHOLD:
        table = Table(flat.dtype, task)
        lookups = _quantize_chunks(lambda: Lookup(table, blocks, statistics), flat, codes)
        return Lookup.statistics(lookups) if statistics else None
    arithmetics = _quantize_chunks(lambda: Arithmetic(flat.numel(), task, blocks, statistics), flat, codes)
    return Arithmetic.statistics(arithmetics) if statistics else None


def _quantize_chunks(new_worker: Callable[[], W], flat: torch.Tensor, codes: torch.Tensor) -> list[W]:
    """Distribute the chunks over threads, each with a new worker. Returns the workers, which hold the statistics."""
    size = CHUNK_BLOCKS * BLOCK
    starts = iter(range(0, flat.numel(), size))  # shared: each thread takes the next chunk
    inference = torch.is_inference_mode_enabled()

    def work(_: int) -> W:
        with torch.inference_mode(inference):
            worker = new_worker()
            for start in starts:
                worker.quantize(flat[start : start + size], codes[start : start + size], start // BLOCK)
            return worker

    threads = min(torch.get_num_threads(), -(-flat.numel() // size))
    return list(_pool(torch.get_num_threads()).map(work, range(threads))) if threads > 1 else [work(0)]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch runs each operation on one core.

    Threads that process whole chunks need not wait for each other after every operation. When torch splits each
    operation itself, on a busy machine all threads spin at the end of each one until the last gets a core, which makes
    it 10 to 100 times slower.
    """
    pool, all_started = ThreadPoolExecutor(threads, "round"), Barrier(threads + 1)

    def use_one_core() -> None:
        torch.set_num_threads(1)  # for this thread, and for threads that start later
        all_started.wait()

    for _ in range(threads):
        pool.submit(use_one_core)
    all_started.wait()
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
