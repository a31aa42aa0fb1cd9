"""tensor -> amax -> scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .formats import Float8Format

SMALLEST_SCALE = 2.0**-14
"""The smallest normal fp16. Many loaders multiply by the scale in fp16, where a smaller one loses bits or vanishes."""


@dataclass(frozen=True)
class Scaling:
    """How a tensor's scale is chosen. target: the value that amax is scaled to; None for scale 1."""

    name: str
    description: str
    target: Callable[[Float8Format], float] | None


SCALINGS = {
    scaling.name: scaling
    for scaling in (
        Scaling("absmax", "amax lands on the largest FP8 value (ComfyUI's convention)", lambda float8: float8.max),
        Scaling(
            "owlscale",
            "like absmax, with headroom of one FP8 quantum (vanishes in fp32 for E5M2, so the same as absmax there)",
            lambda float8: float8.max - float8.quantum,
        ),
        Scaling("none", "scale 1; values beyond the format's range saturate and are counted", None),
    )
}


def tensor_to_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in a float tensor of any shape: fp32, 0-dim, on its device.

    0 for an empty tensor. NaN or infinity if the tensor holds one; an fp64 value beyond fp32's range is infinite.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def amax_to_scale(amax: float, float8: Float8Format, scaling: Scaling) -> torch.Tensor:
    """The scale that a tensor is divided by: fp32, 0-dim, on the CPU. amax: finite, an fp32 number.

    1 for an all-zero tensor and for scaling "none"; otherwise at least SMALLEST_SCALE. If fp32 rounding leaves
    amax / scale above the largest FP8 value, the next larger float is returned, so that amax does not saturate.
    """
    scale = np.float32(1)
    if scaling.target is not None and amax > 0:
        scale = max(np.float32(amax) / np.float32(scaling.target(float8)), np.float32(SMALLEST_SCALE))
        if np.float32(amax) / scale > float8.max:
            scale = np.nextafter(scale, np.float32(np.inf))
    return torch.tensor(scale, dtype=torch.float32, device="cpu")
