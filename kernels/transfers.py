"""Tensors on their way between the CPU and an NVIDIA GPU, which travel while others are worked on.

What is large goes in pieces through pinned memory, which the bus reads and writes by itself. No threads: memory is
copied by all cores at once already, and two threads that do so hinder each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

STAGED_BYTES = 1 << 20
"""Tensors that are larger go through pinned memory."""
PIECE_BYTES = 1 << 24
PIECES = 8
"""Pinned memory of a transfer: so many pieces can be on their way at a time, without anyone waiting for the bus."""

Arrival = Callable[[], torch.Tensor]
"""Waits for a tensor, and gives it on the device that it was sent to. To be called once."""
Send = Callable[[torch.Tensor, torch.device], torch.Tensor]
"""to_device, or an Ahead that has sent the tensor already."""


def begin_transfer(x: torch.Tensor, device: torch.device) -> Arrival:
    """A tensor begins to travel to a device, and must stay as it is meanwhile. Itself if it is there already.

    Between the CPU and an NVIDIA GPU a large tensor arrives contiguous; others have arrived when this returns.
    """
    if not is_staged(x, device):
        there = x.to(device)
        return lambda: there
    if device.type == "cuda":
        return Sending(x, torch.empty(x.shape, dtype=x.dtype, device=device)).result
    return Fetching(x).result


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; itself if it is there already."""
    return begin_transfer(x, device)()


def copy(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`target`, contiguous and of the same shape and dtype, with the values of `source`."""
    if not is_staged(source, target.device):
        return target.copy_(source)
    return Sending(source, target).result() if target.is_cuda else Fetching(source).into(target)


def is_staged(x: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor goes to a device in pieces."""
    return x.nbytes > STAGED_BYTES and {x.device.type, device.type} == {"cpu", "cuda"}


class Ahead:
    """Sends tensors to an NVIDIA GPU before their turn. Called as to_device, it gives each of them once.

    A context manager.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._sent: dict[tuple, Arrival] = {}

    def begin(self, x: torch.Tensor) -> None:
        """Send a CPU tensor ahead, if it is worth it and the GPU has the room now."""
        if _place(x) in self._sent or not (x.is_contiguous() and is_staged(x, self._device)):
            return
        with suppress(torch.cuda.OutOfMemoryError):  # it is sent in its turn, by those who know how to do with less
            self._sent[_place(x)] = begin_transfer(x, self._device)

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        arrival = self._sent.pop(_place(x), None) if device == self._device else None
        return arrival().view(x.shape) if arrival else to_device(x, device)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exception) -> None:
        """Nothing else gets the memory of a tensor that is still on its way."""
        for arrival in self._sent.values():
            arrival()
        self._sent.clear()


class Sending:
    """A CPU tensor on its way to a GPU. It has left its place, unless that is pinned, when this is made."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor):
        self._source, self._target = source, target
        stream, on_the_bus = _stream_after_current(target.device), deque()
        with torch.cuda.stream(stream):
            for piece, place in zip(_pieces(source.reshape(-1)), _pieces(target.view(-1)), strict=True):
                if len(on_the_bus) == PIECES:
                    on_the_bus.popleft().synchronize()
                staged = piece if piece.is_pinned() else _pinned(piece).copy_(piece)
                place.copy_(staged, non_blocking=True)
                on_the_bus.append(stream.record_event())
        self._sent = on_the_bus[-1]

    def result(self) -> torch.Tensor:
        """The tensor on the GPU, for work of the current stream."""
        torch.cuda.current_stream(self._target.device).wait_event(self._sent)
        return self._target


class Fetching:
    """A GPU's tensor on its way to the CPU: in pinned memory, from which it is taken in the end."""

    def __init__(self, source: torch.Tensor):
        self._source = source
        self._stream = _stream_after_current(source.device)
        self._waiting = deque(_pieces(source.reshape(-1)))
        self._coming: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._fetch()

    def _fetch(self) -> None:
        """Fetch what the pinned memory has room for."""
        with torch.cuda.stream(self._stream):
            while self._waiting and len(self._coming) < PIECES:
                piece = self._waiting.popleft()
                staged = _pinned(piece).copy_(piece, non_blocking=True)
                self._coming.append((staged, self._stream.record_event()))

    def into(self, target: torch.Tensor) -> torch.Tensor:
        """`target`, contiguous, with the values that have been fetched."""
        for place in _pieces(target.view(-1)):
            staged, arrived = self._coming.popleft()
            arrived.synchronize()
            place.copy_(staged)
            if self._waiting:
                self._fetch()
        return target

    def result(self) -> torch.Tensor:
        return self.into(torch.empty(self._source.shape, dtype=self._source.dtype))


def _place(x: torch.Tensor) -> tuple:
    return x.data_ptr(), x.numel(), x.dtype


def _pieces(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return flat.split(PIECE_BYTES // flat.itemsize)


def _pinned(like: torch.Tensor) -> torch.Tensor:
    """Memory of the same shape and dtype, pinned if the system has any left: ordinary memory will do, but slowly.

    torch keeps it for the next one, once it is free and nothing on the bus needs it.
    """
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(like.shape, dtype=like.dtype)


def _stream_after_current(device: torch.device) -> torch.cuda.Stream:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
