"""Tensors on their way between the CPU and a GPU of NVIDIA's or AMD's, which travel while others are worked on.

What is large goes in pieces through pinned memory, which the GPU reads and writes over the bus by itself. No threads:
all cores copy memory at once already, and two threads that do so hinder each other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import cache

import torch

log = logging.getLogger("stochastic_fp8")

STAGED_BYTES = 1 << 20
"""Tensors that are larger go through pinned memory."""
PIECE_BYTES = 1 << 24
PIECES = 8
"""Pieces of one transfer that can be on their way at a time: with so many nobody waits for the bus between two weights.
torch keeps the pinned memory for them, 128 MB a direction, until the program ends."""

Arrival = Callable[[], torch.Tensor]
"""Gives a tensor on the device that it was sent to, where a GPU's current stream waits for it. To be called once."""
Send = Callable[[torch.Tensor, torch.device], torch.Tensor]
"""to_device, or an Ahead that has sent the tensor already."""


def begin_transfer(x: torch.Tensor, device: torch.device) -> Arrival:
    """A tensor begins to travel to a device. Itself if it is there already.

    A large tensor between the CPU and a GPU must stay as it is until it has arrived, and arrives contiguous. Others are
    there when this returns.
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
    """Sends tensors to a GPU before their turn. Called as to_device, it gives each of them once.

    A context manager. has_room: whether the GPU has room for what is ahead beside what is worked on.
    """

    MOST = 2
    """Tensors that nobody has asked for yet: the one whose turn it is, and the next."""

    def __init__(self, device: torch.device, has_room: bool = True):
        self._device = device
        self._has_room = has_room
        self._sent: dict[tuple, Arrival] = {}

    def begin(self, x: torch.Tensor) -> None:
        """Send a CPU tensor ahead, if it is worth it."""
        place = _place(x)
        if not self._has_room or place in self._sent or not x.is_contiguous() or not is_staged(x, self._device):
            return
        if len(self._sent) == self.MOST:
            self._sent.pop(next(iter(self._sent)))()
        try:
            self._sent[place] = begin_transfer(x, self._device)
        except torch.cuda.OutOfMemoryError:
            self._has_room = False  # in their turn, tensors are sent by those who know how to do with less

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
    """A CPU tensor on its way to a GPU. It has left its place when this is made, unless that is pinned itself."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor):
        self._source = source.detach()  # kept until it has arrived: it may be pinned, and Ahead knows it by its place
        self._target = target
        stream = _stream_after_current(target.device)
        with torch.cuda.stream(stream):
            try:
                if source.is_pinned():
                    target.copy_(self._source, non_blocking=True)
                else:
                    _send_pieces(self._source.reshape(-1), target.view(-1), stream)
            except BaseException:
                stream.synchronize()  # the target's memory is about to be free for others
                raise
            self._sent = stream.record_event()

    def result(self) -> torch.Tensor:
        """The tensor on the GPU, for work of the current stream."""
        torch.cuda.current_stream(self._target.device).wait_event(self._sent)
        return self._target


class Fetching:
    """A GPU's tensor on its way to the CPU: in pinned memory, from which it is taken in the end."""

    def __init__(self, source: torch.Tensor):
        self._shape = source.shape
        self._flat = source.detach().reshape(-1)  # kept while it is read; if it is a copy, the stream comes after that
        self._waiting = deque(_pieces(self._flat))
        self._coming: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._stream = _stream_after_current(source.device)
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
            del staged  # whose memory the next piece can have
            if self._waiting:
                self._fetch()
        return target

    def result(self) -> torch.Tensor:
        return self.into(torch.empty(self._shape, dtype=self._flat.dtype))


def _send_pieces(source: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream) -> None:
    on_the_bus: deque[torch.cuda.Event] = deque()
    for piece, place in zip(_pieces(source), _pieces(target), strict=True):
        if len(on_the_bus) == PIECES:
            on_the_bus.popleft().synchronize()
        place.copy_(_pinned(piece).copy_(piece), non_blocking=True)
        on_the_bus.append(stream.record_event())


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
    except RuntimeError as error:
        _log_refusal(str(error))
        return torch.empty(like.shape, dtype=like.dtype)


@cache
def _log_refusal(reason: str) -> None:
    """Once, not for every piece."""
    log.warning("there is no pinned memory left, so that tensors travel slowly to and from the GPU: %s", reason)


def _stream_after_current(device: torch.device) -> torch.cuda.Stream:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
