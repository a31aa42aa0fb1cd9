"""Falling back to smaller slices, then to the CPU, when a device cannot hold or compute a tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from .random_bits import BLOCK

log = logging.getLogger("stochastic_fp8")

SMALLEST_SLICE = 32 * BLOCK
"""Elements. Below this size, give up on the device."""

T = TypeVar("T")


def with_enough_memory(compute: Callable[[torch.device, int], T], device: torch.device, count: int, key: str) -> T:
    """compute(device, slice size), with all `count` elements in one slice if the device has the memory.

    Otherwise fall back to smaller slices, a quarter of the size each time, and below SMALLEST_SLICE to the CPU. Devices
    other than CUDA also fall back to the CPU when they cannot run an operation. Every fallback is logged with the
    tensor's `key`: as a warning when memory is short. An operation that cannot run is one warning per device.
    """
    size = count
    while device.type != "cpu":
        try:
            return compute(device, size)
        except torch.cuda.OutOfMemoryError:
            if size <= SMALLEST_SLICE:
                log.warning("tensor '%s': %s is out of memory; falling back to the CPU", key, device)
                break
            size = max(SMALLEST_SLICE, size // 4 // BLOCK * BLOCK)
            log.warning("tensor '%s': %s is out of memory; falling back to slices of %d elements", key, device, size)
        except (RuntimeError, TypeError) as error:
            if device.type == "cuda":
                raise
            _warn_unsupported(device, str(error))
            log.debug("tensor '%s': falling back to the CPU", key)
            break
    return compute(torch.device("cpu"), count)


@cache
def _warn_unsupported(device: torch.device, reason: str) -> None:
    """Once per device and reason, not for every tensor."""
    log.warning("%s cannot quantize some tensors (%s); they are quantized on the CPU", device, reason)
