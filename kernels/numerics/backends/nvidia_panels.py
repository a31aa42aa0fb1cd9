"""The panels of calibrated rounding on an NVIDIA GPU, in Triton: one launch per panel."""

from __future__ import annotations

import torch

from ..formats import Float8Format
from .nvidia import current

ROUND_TILE, ROUND_WARPS = 32, 4
"""Outputs per program. PANEL in gptq.py is 128: smaller panels take longer."""
PIVOTS = 64
PIVOT_COLUMNS, PIVOT_WARPS = 8, 16
"""Earlier columns of the panel that are read at once. These are the fastest on an H200, for a side of 3072."""


def round_panel(
    scaled: torch.Tensor,
    errors: torch.Tensor,
    from_others: torch.Tensor,
    within: torch.Tensor,
    codes: torch.Tensor,
    float8: Float8Format,
) -> torch.Tensor:
    """See panels.Panels."""
    from . import triton_panels

    changes = torch.empty_like(from_others)
    blocks, rows, outputs = changes.shape
    with current(scaled.device):
        triton_panels.round_panel[(-(-outputs // ROUND_TILE), blocks)](
            scaled,
            errors,
            from_others,
            within,
            codes.view(torch.uint8),
            changes,
            outputs,
            rows,
            *(x.stride(0) for x in (scaled, errors, from_others, within, codes, changes)),
            FLOAT8=float8,
            LARGEST=float8.max,
            PANEL=_power_of_two(rows),
            TILE=ROUND_TILE,
            num_warps=ROUND_WARPS,
        )
    return changes


def factor_panel(
    matrix: torch.Tensor, pivots: torch.Tensor, damping: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See panels.Panels. One program per block."""
    from . import triton_panels

    blocks, side, _ = matrix.shape
    panel = torch.empty(blocks, width, side, dtype=torch.float32, device=matrix.device)
    taken = torch.empty(blocks, width, dtype=torch.int64, device=matrix.device)
    with current(matrix.device):
        triton_panels.factor_panel[(blocks,)](
            matrix.contiguous(),
            pivots,
            damping.contiguous(),
            panel,
            taken,
            side,
            width,
            LANES=_power_of_two(side),
            COLUMNS=PIVOT_COLUMNS,
            num_warps=PIVOT_WARPS,
        )
    return panel.mT, taken


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
