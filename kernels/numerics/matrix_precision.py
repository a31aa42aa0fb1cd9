"""Matrix products in the full precision of their operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def full_precision_products(device: torch.device) -> AbstractContextManager[None]:
    """A context in which matrix products on `device` are not lowered in precision."""
    return _products(device, "highest")


def exact_products(x: torch.Tensor) -> AbstractContextManager[None]:
    """A context in which every product of two values of x, as fp32, is exact or rounded to fp32; sums are in fp32.

    A GPU multiplies 16-bit values in TF32, several times as fast: its 11 significant bits hold theirs.
    """
    return _products(x.device, "high" if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else "highest")


@contextmanager
def _products(device: torch.device, precision: str) -> Iterator[None]:
    """The context of a precision of torch.set_float32_matmul_precision.

    torch.autocast and torch.set_float32_matmul_precision apply to the whole process, and another pack may have set
    them. The second one is restored at the end.
    """
    try:
        autocast: AbstractContextManager[object] = torch.autocast(device.type, enabled=False)
    except RuntimeError:  # a type of device that has no autocast
        autocast = nullcontext()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(before)
