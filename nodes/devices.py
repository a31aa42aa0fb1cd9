"""Where the nodes compute, and room for it there."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.model_management
import torch

ROOM = 3
"""Times the largest tensor: one is rounded, the next is there already, codes take half as much, and some to spare."""


def devices() -> list[str]:
    """What a user can compute on: auto, cpu, and the machine's GPUs."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["auto", "cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def compute_device(choice: str, auto: torch.device) -> torch.device:
    """The device of a user's choice."""
    return auto if choice == "auto" else torch.device(choice)


def make_room(device: torch.device, sizes: Iterable[int]) -> bool:
    """Let ComfyUI unload models that are in the way of tensors of so many bytes, which are worked on one by one.

    Whether there is the room then.
    """
    if device.type == "cpu":
        return True
    room = ROOM * max(sizes, default=0)
    comfy.model_management.free_memory(room, device)
    return comfy.model_management.get_free_memory(device) >= room
