"""Moving tensors between the CPU and a GPU at the speed of the bus, and making do with less of its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .random_bits import BLOCK

log = logging.getLogger("stochastic_fp8")

PIECE_BYTES = 1 << 24
"""Size of each of the two pinned buffers through which tensors travel."""
SMALLEST_SLICE = 32 * BLOCK
"""A device without the memory for so few elements is of no use."""

T = TypeVar("T")

_refusals: set[tuple[torch.device, str]] = set()
"""Devices, and why they refused: what a warning has told."""


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; itself if it is there already."""
    if x.device == device or not _staged(x, device):
        return x.to(device)
    return copy(x, torch.empty_like(x, device=device, memory_format=torch.contiguous_format))


def copy(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`target`, contiguous and of the same shape and dtype, with the values of `source`.

    What is large goes between the CPU and an NVIDIA GPU through two pinned buffers: while one is on the bus, the other
    is filled or emptied.
    """
    if not _staged(source, target.device) or target.is_pinned():
        return target.copy_(source)
    send = _upload if target.is_cuda else _download
    send(source.reshape(-1), target.view(-1))
    return target


def _staged(source: torch.Tensor, device: torch.device) -> bool:
    crosses = {source.device.type, device.type} == {"cpu", "cuda"}
    return crosses and source.nbytes > PIECE_BYTES and not source.is_pinned()


def slices(flat: torch.Tensor, device: torch.device, size: int) -> Slices | list[tuple[int, torch.Tensor]]:
    """(start, slice on the device) of a flat tensor, to go through any number of times.

    A tensor of one slice is sent once and stays there; the slices of a larger one are sent each time.
    """
    if flat.numel() <= size:
        return [(0, to_device(flat, device))]
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
    than an NVIDIA GPU cannot do. Every step down is a warning that names the tensor. The second refusal for the same
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


def _upload(source: torch.Tensor, target: torch.Tensor) -> None:
    stream, buffers, copied = _staging(source, target.device)
    for i, (piece, place) in enumerate(_pieces(source, target)):
        copied[i % 2].synchronize()
        staged = buffers[i % 2][: len(piece)].copy_(piece)
        with torch.cuda.stream(stream):
            place.copy_(staged, non_blocking=True)
            copied[i % 2].record()
    torch.cuda.current_stream(target.device).wait_stream(stream)


def _download(source: torch.Tensor, target: torch.Tensor) -> None:
    stream, buffers, copied = _staging(source, source.device)
    waiting = None
    for i, (piece, place) in enumerate(_pieces(source, target)):
        staged = buffers[i % 2][: len(piece)]
        with torch.cuda.stream(stream):
            staged.copy_(piece, non_blocking=True)
            copied[i % 2].record()
        if waiting:
            _empty(*waiting)
        waiting = copied[i % 2], staged, place
    _empty(*waiting)


def _empty(copied: torch.cuda.Event, staged: torch.Tensor, target: torch.Tensor) -> None:
    copied.synchronize()
    target.copy_(staged)


def _staging(flat: torch.Tensor, device: torch.device):
    """A stream that begins after the current one's work, two pinned buffers, and an event for each."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    buffers = [torch.empty(PIECE_BYTES // flat.itemsize, dtype=flat.dtype, pin_memory=True) for _ in range(2)]
    return stream, buffers, [torch.cuda.Event(), torch.cuda.Event()]


def _pieces(source: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size = PIECE_BYTES // source.itemsize
    return zip(source.split(size), target.split(size), strict=True)
