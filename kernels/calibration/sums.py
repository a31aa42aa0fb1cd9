"""Sums of xᵀx over rows x, where the memory is: beside the inputs, or in main memory and visiting the GPU."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress

import torch

from ..numerics.transfers import copy
from .moments import Store, add_products, moment_size

Pin = Callable[[torch.Tensor], "Callable[[], object] | None"]
"""Pins a tensor in main memory, and returns what unpins it; None: it is not pinned, which is slower."""

BUFFERS = 3
"""Sums on the GPU at a time: one that arrives, one that is added to, one that leaves."""


def not_pinned(x: torch.Tensor) -> None:
    """A Pin that does nothing."""


class Sums:
    """The packed second moment of one layer, fp32 (moment_size(width),), on `device`.

    store: where the sums lie in the end; None: where they are. On the CPU they lie there from the start.
    """

    def __init__(self, width: int, device: torch.device, store: Store | None = None):
        self.width, self._store = width, store
        if store and device.type == "cpu":
            self._packed, self._store = store(moment_size(width)).zero_(), None
        else:
            self._packed = torch.zeros(moment_size(width), dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor) -> None:
        """x: float (rows, width), on any device."""
        if x.device == self._packed.device:
            add_products(self._packed, self.width, x)
        else:
            here = torch.zeros_like(self._packed, device=x.device)
            add_products(here, self.width, x)
            self._packed += here.to(self._packed.device)

    def stored(self) -> torch.Tensor:
        """The sums, where they lie in the end. Ends the use of this object."""
        packed = self._packed
        self.close()
        return _stored(packed, self._store)

    def close(self) -> None:
        """Give the memory back."""
        self._packed = torch.empty(0, device="cpu")


class FerriedSums:
    """The same in main memory, for inputs on a GPU: pinned, or else in memory of `store` from the start."""

    def __init__(self, width: int, ferry: Ferry, pin: Pin, store: Store | None = None):
        self.width, self._ferry, self._store = width, ferry, store
        self.packed = _own_pages(moment_size(width))
        self._unpin = pin(self.packed)
        if store and not self._unpin:
            self.packed, self._store = store(moment_size(width)).zero_(), None
        self.at_rest: torch.cuda.Event | None = None
        """When the sums are back from the GPU."""

    def add(self, x: torch.Tensor) -> None:
        """x: float (rows, width), on the ferry's GPU."""
        self._ferry.add(self, x)

    def stored(self) -> torch.Tensor:
        """See Sums, once the ferry has finished. Ends the use of this object."""
        packed = self.packed
        self.close()
        return _stored(packed, self._store)

    def close(self) -> None:
        """Unpin the memory, once the ferry has finished: memory that is freed while pinned breaks later transfers."""
        if self._unpin:
            self._unpin()
        self._unpin, self.packed = None, torch.empty(0, device="cpu")


class Ferry:
    """Brings sums to a GPU, where products are added, and back, while the GPU computes.

    The host waits for nothing if the sums are pinned. Three streams take turns on a few buffers, in order of events.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._inbound, self._outbound = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers: list[torch.Tensor] = [torch.empty(0, device=device) for _ in range(BUFFERS)]
        self._free: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._turn = 0

    def add(self, sums: FerriedSums, x: torch.Tensor) -> None:
        """Add the products of x (rows, width) to sums."""
        turn, self._turn = self._turn, (self._turn + 1) % BUFFERS
        size = sums.packed.numel()
        if self._buffers[turn].numel() < size:
            self.finish()
            self._buffers[turn] = torch.empty(size, dtype=torch.float32, device=self._device)
            self._inbound.wait_stream(torch.cuda.current_stream(self._device))
        buffer, current = self._buffers[turn][:size], torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._inbound):
            for event in (self._free[turn], sums.at_rest):
                if event:
                    self._inbound.wait_event(event)
            buffer.copy_(sums.packed, non_blocking=True)
        current.wait_stream(self._inbound)
        add_products(buffer, sums.width, x)
        self._outbound.wait_stream(current)
        with torch.cuda.stream(self._outbound):
            sums.packed.copy_(buffer, non_blocking=True)
            sums.at_rest = self._free[turn] = self._outbound.record_event()

    def finish(self) -> None:
        """Wait until all sums are back."""
        self._inbound.synchronize()
        self._outbound.synchronize()


def _own_pages(count: int) -> torch.Tensor:
    """Zeros, fp32, in pages of their own, large ones if the system has them.

    Memory is pinned by the page, and a page only once. What is freed goes back to the system at once.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, 4 * count, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32)


def _stored(packed: torch.Tensor, store: Store | None) -> torch.Tensor:
    return copy(packed, store(packed.numel())) if store else packed
