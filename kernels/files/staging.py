"""Staging buffers: memory that is reused, because fresh pages cost several times as much as the copy into them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch


def alternating_buffers(nbytes: int) -> Iterator[torch.Tensor]:
    """Two alternating uint8 buffers (double buffering), without end."""
    with torch.inference_mode(False):  # each thread decides for itself whether it is in inference mode
        return cycle([torch.empty(nbytes, dtype=torch.uint8, device="cpu") for _ in range(2)])
