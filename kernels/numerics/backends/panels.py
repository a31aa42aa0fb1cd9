"""The two serial steps of calibrated rounding: rounding a panel of inputs, and choosing a panel of pivots.

Everything between two panels is a few large matrix products. Within a panel each step needs the one before it, so on a
GPU the launches of single operations would take most of the time: there, one kernel does a panel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..formats import Float8Format
from . import choose_backend, nvidia, nvidia_panels

RoundPanel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Float8Format], torch.Tensor
]
FactorPanel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Panels:
    """How the panels of a weight are computed. All tensors are contiguous in their last dimension, on one device.

    `round_panel(scaled, errors, from_others, within, codes, float8)` rounds the inputs of a panel one after the other,
    for all outputs at once. It writes the codes, and returns the changes of the errors: fp32 (blocks, panel, out).
    scaled: weights over their scale, fp32 (blocks, panel, out). errors: those of their present codes. from_others: what
    the inputs outside the panel ask for. within: fp32 (blocks, panel, panel); [:, j, i] is how much of input i's change
    the later input j compensates. codes: float8 (blocks, panel, out), to be written. float8: their format.

    `factor_panel(matrix, pivots, damping, width)` takes `width` pivots of a Cholesky decomposition, each time the
    smallest that is left. It returns the columns of the factor, fp32 (blocks, side, width), and the pivots' places,
    int64 (blocks, width). matrix: symmetric fp32 (blocks, side, side). pivots: its diagonal less what earlier columns
    of the panel explain, fp32 (blocks, side), infinite where taken; updated. damping: fp32 (blocks, 1), the smallest
    divisor. After NaN or overflow, some pivots are not infinite when all should be taken.

    Both are the same function for every entry, up to the order of fp32 sums.
    """

    round_panel: RoundPanel
    factor_panel: FactorPanel
    pivots: int
    """Pivots taken at once. Fewer are faster where the matrix products are fast."""


def choose_panels(device: torch.device) -> Panels:
    """Those of the backend that quantizes on a device."""
    return NVIDIA if choose_backend(device).quantize_slice is nvidia.quantize_slice else REFERENCE


def round_panel(
    scaled: torch.Tensor,
    errors: torch.Tensor,
    from_others: torch.Tensor,
    within: torch.Tensor,
    codes: torch.Tensor,
    float8: Float8Format,
) -> torch.Tensor:
    """See Panels."""
    changes = torch.empty_like(from_others)
    for j in range(within.shape[1]):
        total = torch.baddbmm(from_others[:, j : j + 1], within[:, j : j + 1, :j], changes[:, :j])[:, 0]
        code = to_nearest(scaled[:, j] - total, float8)
        changes[:, j] = code.float() - scaled[:, j] - errors[:, j]
        codes[:, j] = code
    return changes


def factor_panel(
    matrix: torch.Tensor, pivots: torch.Tensor, damping: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See Panels."""
    blocks, side, _ = matrix.shape
    block = torch.arange(blocks, device=matrix.device)
    panel = matrix.new_zeros(blocks, side, width)
    taken = torch.empty(blocks, width, dtype=torch.int64, device=matrix.device)
    for i in range(width):
        smallest, row = pivots.min(1)
        done = panel[:, :, :i] @ panel[block, row, :i, None]
        panel[:, :, i] = (matrix[block, row] - done[:, :, 0]) / smallest[:, None].maximum(damping).sqrt()
        pivots -= panel[:, :, i].square()
        pivots[block, row] = torch.inf
        taken[:, i] = row
    return panel, taken


def to_nearest(scaled: torch.Tensor, float8: Float8Format) -> torch.Tensor:
    """The nearest FP8 code, ties to even, saturating; float8. Equal to rounding.round_to_codes for finite values."""
    return scaled.clamp(-float8.max, float8.max).to(float8.dtype)


REFERENCE = Panels(round_panel, factor_panel, pivots=128)
NVIDIA = Panels(nvidia_panels.round_panel, nvidia_panels.factor_panel, pivots=nvidia_panels.PIVOTS)
