"""The two operations of quantizing, on different devices: flat tensor -> amax, and (flat tensor, scale) -> codes.

Every backend gives the same bytes, at a different speed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ...choices import choose
from ..error_statistics import ErrorStatistics
from . import cpu, nvidia, reference
from .task import Task

__all__ = ["BACKENDS", "BACKEND_VARIABLE", "Backend", "Task", "choose_backend", "list_backends"]

log = logging.getLogger("stochastic_fp8")

BACKEND_VARIABLE = "STOCHASTIC_FP8_BACKEND"
"""Environment variable that names the backend to use, for example "reference" if Triton misbehaves."""


@dataclass(frozen=True)
class Backend:
    """Quantizes tensors on some kinds of device.

    `quantize_slice(flat, codes, task, statistics)` scales, rounds and encodes in one operation, and returns the
    ErrorStatistics if `statistics`, else None. flat: contiguous float (n,), finite. codes: uint8 (n,) on its device, to
    be written.
    `unavailable(device)` returns why the backend cannot run on a device, or None if it can.
    `tensor_to_amax(flat)` is scaling.tensor_to_amax as a float: NaN or infinite if the tensor holds such a value.
    """

    name: str
    quantize_slice: Callable[[torch.Tensor, torch.Tensor, Task, bool], ErrorStatistics | None]
    unavailable: Callable[[torch.device], str | None]
    tensor_to_amax: Callable[[torch.Tensor], float] = reference.tensor_to_amax


REFERENCE = Backend("reference", reference.quantize_slice, reference.unavailable)

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", cpu.quantize_slice, cpu.unavailable),
        Backend("nvidia", nvidia.quantize_slice, nvidia.unavailable, nvidia.tensor_to_amax),
        REFERENCE,
    )
}
"""In order of preference. The reference runs on every device."""


@cache
def choose_backend(device: torch.device) -> Backend:
    """The backend that STOCHASTIC_FP8_BACKEND names; by default the first of BACKENDS that can run on a device.

    If the named backend cannot run there, the reference does, with a warning. Cached, so the variable is read and the
    warning logged once per device. Raises UnknownChoiceError for an unknown name.
    """
    forced = os.environ.get(BACKEND_VARIABLE)
    candidates = (choose(BACKENDS, forced, BACKEND_VARIABLE),) if forced else BACKENDS.values()
    for backend in candidates:
        reason = backend.unavailable(device)
        if reason is None:
            return backend
        log.debug("backend %s cannot run on %s: %s", backend.name, device, reason)
        if forced:
            log.warning("%s=%s cannot run on %s (%s); using the reference", BACKEND_VARIABLE, forced, device, reason)
    return REFERENCE


def list_backends() -> dict[str, dict[str, str | None]]:
    """Each backend's availability: backend name -> device -> None if it can run there, else the reason why not.

    Devices are those of this machine, such as "cpu" and "cuda:0". STOCHASTIC_FP8_BACKEND is not considered.
    """
    accelerators = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    devices = [torch.device("cpu")]
    devices += [torch.device(kind, i) for kind, module in accelerators.items() for i in range(module.device_count())]
    return {
        backend.name: {str(device): backend.unavailable(device) for device in devices} for backend in BACKENDS.values()
    }
