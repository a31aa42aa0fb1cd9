"""Asynchronous host-to-device and device-to-host copies (NVIDIA, AMD), overlapped with compute.

Large tensors are copied in pieces through pinned memory, which the GPU reads and writes over the bus by itself. There
are no threads: one memory copy already uses all cores, and two at a time slow each other down.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import cache
from types import TracebackType

import torch

log = logging.getLogger("stochastic_fp8")

STAGED_BYTES = 1 << 20
"""Larger tensors are staged: copied in pieces through pinned memory."""
PIECE_BYTES = 1 << 24
PIECES_IN_FLIGHT = 8
"""Limit for one transfer. With 8 the bus stays busy between two weights. torch keeps the pinned memory of these
pieces, 128 MB per direction, until the program ends."""

PendingTransfer = Callable[[], torch.Tensor]
"""Returns the tensor on its target device. Call it once. A GPU's current stream waits for the data; the host waits only
for a copy to the host."""
Send = Callable[[torch.Tensor, torch.device], torch.Tensor]
"""(tensor, device) -> the tensor on that device: to_device, or a Prefetcher."""


def begin_transfer(x: torch.Tensor, device: torch.device) -> PendingTransfer:
    """Start copying a tensor to a device; a tensor that is already there is returned as it is.

    A staged tensor must not change until it has arrived, and arrives contiguous. Others have arrived on return.
    """
    if not is_staged(x, device):
        arrived = x.to(device)
        return lambda: arrived
    if device.type == "cuda":
        return HostToDevice(x, torch.empty(x.shape, dtype=x.dtype, device=device)).result
    return DeviceToHost(x).result


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a tensor that is already there is returned as it is."""
    return begin_transfer(x, device)()


def copy(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy `source` into `target`, which is contiguous and has the same shape and dtype. Returns `target`."""
    if not is_staged(source, target.device):
        return target.copy_(source)
    return HostToDevice(source, target).result() if target.is_cuda else DeviceToHost(source).into(target)


def is_staged(x: torch.Tensor, device: torch.device) -> bool:
    """Whether a copy to the device goes through pinned memory: a large tensor, between the host and a CUDA device."""
    return x.nbytes > STAGED_BYTES and {x.device.type, device.type} == {"cpu", "cuda"}


class Prefetcher:
    """Copies tensors to a GPU ahead of time. Called like to_device, it hands out each prefetched tensor once.

    A context manager: on exit it waits for the copies still in flight. has_room: whether the GPU has memory for
    prefetched tensors beside the one that is computed.
    """

    LIMIT = 2
    """Prefetched tensors that have not been consumed (current and next)."""

    def __init__(self, device: torch.device, has_room: bool = True):
        self._device = device
        self._has_room = has_room
        self._in_flight: dict[tuple[int, int, torch.dtype], PendingTransfer] = {}

    def prefetch(self, x: torch.Tensor) -> None:
        """Start copying a host tensor. Ignored if it is small, not contiguous, already in flight, or has no room."""
        identity = _identity(x)
        if not self._has_room or identity in self._in_flight:
            return
        if not x.is_contiguous() or not is_staged(x, self._device):
            return
        if len(self._in_flight) == self.LIMIT:
            self._in_flight.pop(next(iter(self._in_flight)))()
        try:
            self._in_flight[identity] = begin_transfer(x, self._device)
        except torch.cuda.OutOfMemoryError:
            self._has_room = False  # tensors are then sent when they are computed, in slices if need be

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        pending = self._in_flight.pop(_identity(x), None) if device == self._device else None
        return pending().view(x.shape) if pending else to_device(x, device)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait, so that nobody else gets the memory of a tensor that is still in flight."""
        for pending in self._in_flight.values():
            pending()
        self._in_flight.clear()


class HostToDevice:
    """A copy from the host to a GPU. The source may be overwritten once this exists, unless it is pinned itself."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor):
        self._source = source.detach()  # keep it: a pinned source is read later, and Prefetcher knows it by its address
        self._target = target
        stream = _stream_after_current(target.device)
        with torch.cuda.stream(stream):
            try:
                if source.is_pinned():
                    target.copy_(self._source, non_blocking=True)
                else:
                    _send_pieces(self._source.reshape(-1), target.view(-1), stream)
            except BaseException:
                stream.synchronize()  # the target's memory is about to be freed
                raise
            self._arrived = stream.record_event()

    def result(self) -> torch.Tensor:
        """The tensor on the GPU, for work on the current stream."""
        torch.cuda.current_stream(self._target.device).wait_event(self._arrived)
        return self._target


class DeviceToHost:
    """A copy from a GPU to the host, into pinned memory first."""

    def __init__(self, source: torch.Tensor):
        self._shape = source.shape
        self._flat = source.detach().reshape(-1)  # keep it while it is read; if it is a copy, the stream waits for that
        self._waiting = deque(_pieces(self._flat))
        self._in_flight: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._stream = _stream_after_current(source.device)
        self._fetch()

    def _fetch(self) -> None:
        """Start copying as many pieces as may be in flight."""
        with torch.cuda.stream(self._stream):
            while self._waiting and len(self._in_flight) < PIECES_IN_FLIGHT:
                piece = self._waiting.popleft()
                staged = _pinned(piece).copy_(piece, non_blocking=True)
                self._in_flight.append((staged, self._stream.record_event()))

    def into(self, target: torch.Tensor) -> torch.Tensor:
        """Copy the values into `target`, which is contiguous. Returns it. Call `into` or `result`, once."""
        for place in _pieces(target.view(-1)):
            staged, arrived = self._in_flight.popleft()
            arrived.synchronize()
            place.copy_(staged)
            del staged  # so that the next piece can have its memory
            if self._waiting:
                self._fetch()
        return target

    def result(self) -> torch.Tensor:
        """The tensor on the host."""
        return self.into(torch.empty(self._shape, dtype=self._flat.dtype, device="cpu"))


def _send_pieces(source: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream) -> None:
    in_flight: deque[torch.cuda.Event] = deque()
    for piece, place in zip(_pieces(source), _pieces(target), strict=True):
        if len(in_flight) == PIECES_IN_FLIGHT:
            in_flight.popleft().synchronize()
        place.copy_(_pinned(piece).copy_(piece), non_blocking=True)
        in_flight.append(stream.record_event())


def _identity(x: torch.Tensor) -> tuple[int, int, torch.dtype]:
    return x.data_ptr(), x.numel(), x.dtype


def _pieces(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(flat, PIECE_BYTES // flat.itemsize)


def _pinned(like: torch.Tensor) -> torch.Tensor:
    """New memory of the same shape and dtype: pinned, or pageable (slower) if the system has no more pinned memory.

    torch reuses pinned memory once it is freed and no copy needs it.
    """
    try:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        _warn_unpinned(str(error))
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")


@cache
def _warn_unpinned(reason: str) -> None:
    """Once per reason, not for every piece."""
    log.warning("no pinned memory left: copies to and from the GPU will be slow (%s)", reason)


def _stream_after_current(device: torch.device) -> torch.cuda.Stream:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
