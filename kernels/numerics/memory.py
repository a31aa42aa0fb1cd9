"""Computing on a device as far as its memory goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .random_bits import BLOCK
from .transfers import Send, to_device

log = logging.getLogger("stochastic_fp8")

SMALLEST_SLICE = 32 * BLOCK
"""A device without the memory for so few elements is of no use."""

T = TypeVar("T")

_refusals: set[tuple[torch.device, str]] = set()
"""Devices, and why they refused: what a warning has told."""


def slices(
    flat: torch.Tensor, device: torch.device, size: int, send: Send = to_device
) -> Slices | list[tuple[int, torch.Tensor]]:
    """(start, slice on the device) of a flat tensor, to go through any number of times.

    A tensor of one slice is sent once and stays there; the slices of a larger one are sent each time.
    """
    if flat.numel() <= size:
        return [(0, send(flat, device))]
    return Slices(flat, device, size)


class Slices:
    def __init__(self, flat: torch.Tensor, device: torch.device, size: int):
        self.flat, self.device, self.size = flat, device, size

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.flat.numel(), self.size):
            yield start, to_device(self.flat[start : start + self.size], self.device)


def with_enough_memory(compute: Callable[[torch.device, int], T], device: torch.device, count: int, name: str) -> T:
    """compute(device, slice size) with all `count` elements in one slice, if the device has the memory.

    If not, with slices of a quarter of that, and so on; in the end on the CPU. There also goes what a device other
    than a CUDA device cannot do. Every step down is a warning that names the tensor. The second refusal for the same
    reason is no news: it is said at debug level.
    """
    size = count
    while device.type != "cpu":
        try:
            return compute(device, size)
        except torch.cuda.OutOfMemoryError:
            if size <= SMALLEST_SLICE:
                reason = "is out of memory"
                break
            size = max(SMALLEST_SLICE, size // 4 // BLOCK * BLOCK)
            log.warning("tensor '%s': %s is out of memory; trying slices of %d elements", name, device, size)
        except (RuntimeError, TypeError) as error:
            if device.type == "cuda":
                raise
            reason = f"refuses ({error})"
            break
    else:
        return compute(device, count)
    level = logging.DEBUG if (device, reason) in _refusals else logging.WARNING
    log.log(level, "tensor '%s': %s %s; computing on the CPU", name, device, reason)
    if device.type != "cuda":
        _refusals.add((device, reason))
    return compute(torch.device("cpu"), count)
