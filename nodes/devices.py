"""The device that a node computes on, and free memory there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import comfy.model_management
import torch

from ..kernels.choices import choose

ROOM = 3
"""Memory to free, in sizes of the largest tensor: the one being rounded, the prefetched one, codes (half a size each)
and some spare."""


def devices() -> list[str]:
    """The choices of a device input: auto, cpu, and this machine's GPUs."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["auto", "cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def compute_device(choice: str, auto: torch.device) -> torch.device:
    """The device of a device input. auto: the device that the choice "auto" stands for. Raises UnknownChoiceError."""
    if choice == "auto":
        return auto
    try:
        return torch.device(choice)
    except (RuntimeError, TypeError):
        return choose(dict.fromkeys(devices(), auto), choice, "device")


def pinned(tensor: torch.Tensor) -> Callable[[], object] | None:
    """Pin a tensor in main memory, within ComfyUI's limit. Returns what unpins it; None if it could not be pinned."""
    if comfy.model_management.pin_memory(tensor):
        return partial(comfy.model_management.unpin_memory, tensor)
    return None


def make_room(device: torch.device, sizes: Iterable[int]) -> bool:
    """Ask ComfyUI to free memory for tensors of these sizes in bytes, processed one at a time.

    Returns whether enough is free; on the CPU always True.
    """
    if device.type == "cpu":
        return True
    room = ROOM * max(sizes, default=0)
    comfy.model_management.free_memory(room, device)
    return comfy.model_management.get_free_memory(device) >= room
