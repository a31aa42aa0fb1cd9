"""Two jobs, flat tensor -> amax and (flat tensor, scale) -> codes and statistics, on different devices.

The same results, at different speeds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..error_statistics import ErrorStatistics
from . import cpu, nvidia, reference
from .task import Task

log = logging.getLogger("stochastic_fp8")


@dataclass(frozen=True)
class Backend:
    """`round_tensor(flat, codes, task, statistics)` -> ErrorStatistics, or None where no statistics are wanted.

    flat: contiguous float tensor (n,), finite. codes: uint8 (n,) on its device, to be written. task: a Task.
    `tensor_to_amax(flat)` -> float: as scaling.tensor_to_amax, NaN or infinite where the tensor holds such a value.
    `unavailable(x)` says in words why the backend cannot serve a tensor, or returns None.
    """

    name: str
    round_tensor: Callable[[torch.Tensor, torch.Tensor, Task, bool], ErrorStatistics | None]
    unavailable: Callable[[torch.Tensor], str | None]
    tensor_to_amax: Callable[[torch.Tensor], float] = reference.tensor_to_amax


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", cpu.round_tensor, cpu.unavailable),
        Backend("nvidia", nvidia.round_tensor, nvidia.unavailable, nvidia.tensor_to_amax),
        Backend("reference", reference.round_tensor, reference.unavailable),
    )
}
"""In order of preference; the reference serves every device."""


def choose_backend(x: torch.Tensor) -> Backend:
    """The first backend that can serve a tensor. Raises RuntimeError listing each one's reason if none can."""
    refusals = {}
    for backend in BACKENDS.values():
        refusals[backend.name] = backend.unavailable(x)
        if refusals[backend.name] is None:
            return backend
        _log_refusal(backend.name, x.device, refusals[backend.name])
    raise RuntimeError("no backend can quantize this tensor: " + "; ".join(f"{k}: {v}" for k, v in refusals.items()))


@cache
def _log_refusal(name: str, device: torch.device, reason: str) -> None:
    """Once each, not for every tensor."""
    log.debug("backend %s cannot serve %s: %s", name, device, reason)
