"""The fast path on a CPU: chunks that stay in the cache, shared out to threads, each with buffers of its own.

A chunk costs no allocation and few passes over its memory. Large 16-bit tensors are looked up (cpu_lookup.py), all
others worked out number by number (cpu_arithmetic.py).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch

from ..error_statistics import ErrorStatistics
from ..random_bits import BLOCK
from .cpu_arithmetic import Arithmetic
from .cpu_lookup import Lookup, Table
from .task import Task

CHUNK_BLOCKS = 4
LOOKUP_THRESHOLD = 1 << 19
"""From this many elements on, a table of all 16-bit values is cheaper than working each element out."""


def unavailable(x: torch.Tensor) -> str | None:
    """Why this backend cannot serve a tensor, or None if it can."""
    return None if x.device.type == "cpu" else "it computes on the CPU only"


def round_tensor(flat: torch.Tensor, codes: torch.Tensor, task: Task, statistics: bool) -> ErrorStatistics | None:
    """See backends.Backend."""
    blocks = min(CHUNK_BLOCKS, -(-flat.numel() // BLOCK))
    size = CHUNK_BLOCKS * BLOCK
    starts = iter(range(0, flat.numel(), size))  # shared: each thread takes the next chunk that nobody has
    inference = torch.is_inference_mode_enabled()
    looked_up = flat.dtype.itemsize == 2 and flat.numel() >= LOOKUP_THRESHOLD
    table = Table(flat.dtype, task) if looked_up else None

    def work(_) -> Lookup | Arithmetic:
        with torch.inference_mode(inference):
            worker = Lookup(table, blocks, statistics) if table else Arithmetic(flat.numel(), task, blocks, statistics)
            for start in starts:
                worker.round(flat[start : start + size], codes[start : start + size], start // BLOCK)
            return worker

    threads = min(torch.get_num_threads(), -(-flat.numel() // size))
    workers = list(_pool(torch.get_num_threads()).map(work, range(threads))) if threads > 1 else [work(0)]
    return type(workers[0]).statistics(workers) if statistics else None


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
