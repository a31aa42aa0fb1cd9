"""Where the nodes compute, and room for it there."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.model_management
import torch

ROOM = 3
"""Times the largest tensor: one is rounded, the next is there already, each has codes half its size."""


def devices() -> list[str]:
    """What a user can compute on: auto, cpu, and the machine's GPUs."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["auto", "cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def compute_device(choice: str, auto: torch.device) -> torch.device:
    """The device of a user's choice."""
    return auto if choice == "auto" else torch.device(choice)


def make_room(device: torch.device, sizes: Iterable[int]) -> None:
    """Let ComfyUI unload models that are in the way of tensors of so many bytes, which are worked on one by one."""
    if device.type != "cpu":
        comfy.model_management.free_memory(ROOM * max(sizes, default=0), device)
