"""Matrix products in the full precision of their operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """A context in which matrix products on `device` are not lowered in precision.

    torch.autocast and torch.set_float32_matmul_precision apply to the whole process, and another pack may have set
    them. The second one is restored at the end.
    """
    try:
        autocast: AbstractContextManager[object] = torch.autocast(device.type, enabled=False)
    except RuntimeError:  # a type of device that has no autocast
        autocast = nullcontext()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
