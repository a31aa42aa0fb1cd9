"""The readable path: rounding.py as it stands, on any device that torch has integer arithmetic for."""

from __future__ import annotations

import torch

from .. import scaling
from ..error_statistics import ErrorStatistics, measure, merge
from ..random_bits import BLOCK, random_words
from ..rounding import FRACTION_BITS, code_positions, round_to_codes
from .task import Task

CHUNK = 32 * BLOCK
"""Bounds the memory of intermediates; random words depend on an element's index alone, so it changes no byte."""


def unavailable(x: torch.Tensor) -> str | None:
    """Why this backend cannot serve a tensor: it always can."""
    return None


def tensor_to_amax(flat: torch.Tensor) -> float:
    """See backends.Backend."""
    return scaling.tensor_to_amax(flat).item()


def round_tensor(flat: torch.Tensor, codes: torch.Tensor, task: Task, statistics: bool) -> ErrorStatistics | None:
    """See backends.Backend."""
    scale, parts = task.scale.to(flat.device), []
    for start in range(0, flat.numel(), CHUNK):
        source, target = flat[start : start + CHUNK], codes[start : start + CHUNK]
        scaled = source.float() / scale
        words = random_words(task.stream, start, source.numel(), flat.device) if task.rounding.stochastic else None
        target.copy_(round_to_codes(scaled, words, task.format, task.rounding))
        if statistics:
            positions = code_positions(scaled, task.format, FRACTION_BITS)
            parts.append(measure(source.float(), target, positions, scale, task.amax, task.format))
    return merge(parts) if statistics else None
