"""The readable path: rounding.py as it stands, on any device that torch has integer arithmetic for."""

from __future__ import annotations

import torch

from .. import scaling
from ..error import ErrorStatistics, measure, merge
from ..formats import Float8Format
from ..random_bits import BLOCK, random_words
from ..rounding import FRACTION_BITS, Rounding, code_positions, round_to_codes

CHUNK = 32 * BLOCK
"""Bounds the memory of intermediates; random words depend on an element's index alone, so it changes no byte."""


def unavailable(x: torch.Tensor) -> str | None:
    """Why this backend cannot serve a tensor: it always can."""
    return None


def tensor_to_amax(flat: torch.Tensor) -> float:
    """See backends.Backend."""
    return scaling.tensor_to_amax(flat).item()


def round_tensor(
    flat: torch.Tensor,
    scale: torch.Tensor,
    amax: float,
    format: Float8Format,
    rounding: Rounding,
    stream: int,
    statistics: bool,
) -> tuple[torch.Tensor, ErrorStatistics | None]:
    """See backends.Backend."""
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    scale = scale.to(flat.device)
    parts = []
    for start in range(0, flat.numel(), CHUNK):
        source = flat[start : start + CHUNK]
        scaled = source.float() / scale
        words = random_words(stream, start, source.numel(), flat.device) if rounding.stochastic else None
        codes[start : start + CHUNK] = round_to_codes(scaled, words, format, rounding)
        if statistics:
            positions = code_positions(scaled, format, FRACTION_BITS)
            parts.append(measure(source.float(), codes[start : start + CHUNK], positions, scale, amax, format))
    return codes, merge(parts) if statistics else None
