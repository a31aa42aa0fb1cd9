"""Matrix products in the dtype of their operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which torch.autocast of the caller does not lower the precision of matrix products on `device`."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # a type of device that has no autocast
        return nullcontext()
