"""tensor -> amax -> scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .formats import Float8Format

SMALLEST_SCALE = 2.0**-14
"""The smallest normal fp16: loaders multiply by the scale in fp16 on many GPUs, where a smaller one loses its bits."""


@dataclass(frozen=True)
class Scaling:
    """A way to choose a tensor's scale: the scaled amax that it aims at, or None for no scale at all."""

    name: str
    description: str
    target: Callable[[Float8Format], float] | None


SCALINGS = {
    scaling.name: scaling
    for scaling in (
        Scaling("absmax", "amax lands on the largest FP8 value (ComfyUI's convention)", lambda format: format.max),
        Scaling(
            "owlscale",
            "as absmax, with headroom of one FP8 quantum (for E5M2 that vanishes in fp32: the same as absmax)",
            lambda format: format.max - format.quantum,
        ),
        Scaling("none", "scale 1: values beyond the format's range saturate, and are counted", None),
    )
}


def tensor_to_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in a float tensor of any shape, fp32 0-dim on its device.

    0 for an empty tensor; NaN or infinity where the tensor holds one (or an fp64 value beyond fp32's range).
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def amax_to_scale(amax: float, format: Float8Format, scaling: Scaling) -> torch.Tensor:
    """The scale to divide a tensor by, fp32 0-dim on the CPU. amax: finite, an fp32 number.

    Never below SMALLEST_SCALE; 1 for an all-zero tensor. Where fp32 rounding would leave amax / scale above the
    largest value of the format, the scale is the next float up, so that nothing saturates falsely.
    """
    scale = np.float32(1)
    if scaling.target is not None and amax > 0:
        scale = max(np.float32(amax) / np.float32(scaling.target(format)), np.float32(SMALLEST_SCALE))
        if np.float32(amax) / scale > format.max:
            scale = np.nextafter(scale, np.float32(np.inf))
    return torch.tensor(scale, dtype=torch.float32)
