"""Where a tensor is quantized, slice by slice, and where its codes are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from .memory import with_enough_memory
from .transfers import Send, copy, to_device

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Where a tensor is quantized and where its codes are stored."""

    device: torch.device | str | None = None
    """Compute device. None: where the tensor is."""
    codes: torch.Tensor | None = None
    """Staging buffer for the codes: contiguous uint8 (n,), n >= x.numel(), on the tensor's device. None: new memory,
    which is slower, because the operating system clears every page of it."""
    leave_on_device: bool = False
    """Leave the codes on the GPU that computed them when it had memory for all of them. The caller can then fetch them
    while it computes the next tensor. False: the codes return to the tensor's device."""
    send: Send = to_device
    """How the tensor gets to the device; a Prefetcher may have sent it already."""

    def run(self, compute: Callable[[Slices], T], flat: torch.Tensor, key: str) -> T:
        """compute(slices) of a flat, contiguous tensor, in as few slices as the device has memory for.

        `compute` is called again with smaller slices, and finally on the CPU, when the device runs out of memory.
        Raises ValueError for an unsuitable staging buffer, naming the tensor by `key`.
        """
        self._check_codes(flat, key)

        def attempt(device: torch.device, slice_size: int) -> T:
            return compute(Slices(flat, self, device, slice_size))

        return with_enough_memory(attempt, torch.device(self.device or flat.device), flat.numel(), key)

    def _check_codes(self, flat: torch.Tensor, key: str) -> None:
        codes = self.codes
        if codes is None:
            return
        fits = codes.dtype == torch.uint8 and codes.ndim == 1 and codes.is_contiguous() and len(codes) >= flat.numel()
        if not fits or codes.device != flat.device:
            raise ValueError(
                f"the staging buffer for the codes of tensor '{key}' is {codes.dtype} {tuple(codes.shape)} on "
                f"{codes.device}; expected contiguous torch.uint8 ({flat.numel()} or more,) on {flat.device}"
            )


class Slices:
    """A flat tensor in slices on the compute device, and its codes at their destination.

    Iterate any number of times over the slices. A tensor of one slice is sent once and stays on the device; the slices
    of a larger one are sent each time.
    """

    codes: torch.Tensor
    """uint8 (n,), complete after a pass over `with_codes`."""

    def __init__(self, flat: torch.Tensor, placement: Placement, device: torch.device, size: int):
        self.device = device
        self._flat, self._placement, self._size = flat, placement, size
        self._whole = placement.send(flat, device) if flat.numel() <= size else None

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._whole is not None:
            yield self._whole
            return
        for start in range(0, self._flat.numel(), self._size):
            yield to_device(self._flat[start : start + self._size], self.device)

    def with_codes(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(start, slice, memory for its codes) on the device. The codes are stored when the next slice is requested."""
        self.codes, start = self._destination(), 0
        for part in self:
            stored = self.codes[start : start + part.numel()]
            computed = stored if stored.device == part.device else torch.empty_like(stored, device=part.device)
            yield start, part, computed
            if computed is not stored:
                copy(computed, stored)
            start += part.numel()

    def _destination(self) -> torch.Tensor:
        stays = self._placement.leave_on_device and self.device.type == "cuda" and self._whole is not None
        device = self.device if stays else self._flat.device
        buffer = self._placement.codes
        if buffer is not None and buffer.device == device:
            return buffer[: self._flat.numel()]
        return torch.empty(self._flat.shape, dtype=torch.uint8, device=device)
