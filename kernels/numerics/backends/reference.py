"""The readable path: scale, round, encode as in rounding.py, on any device that torch has integer arithmetic for."""

from __future__ import annotations

import torch

from .. import scaling
from ..error_statistics import ErrorStatistics, measure, merge
from ..random_bits import BLOCK, random_words
from ..rounding import FRACTION_BITS, code_positions, encode, round_magnitudes
from .task import Task

CHUNK = 32 * BLOCK
"""Bounds the memory of intermediates. It changes no byte: random words depend on an element's index alone."""


def unavailable(device: torch.device) -> str | None:
    """See backends.Backend. The reference is available on every device."""
    return None


def tensor_to_amax(flat: torch.Tensor) -> float:
    """See backends.Backend."""
    return scaling.tensor_to_amax(flat).item()


def quantize_slice(flat: torch.Tensor, codes: torch.Tensor, task: Task, statistics: bool) -> ErrorStatistics | None:
    """See backends.Backend."""
    scale, parts = task.scale.to(flat.device), []
    for start in range(0, flat.numel(), CHUNK):
        source, target = flat[start : start + CHUNK], codes[start : start + CHUNK]
        scaled = source.float() / scale
        words = random_words(task.stream, start, source.numel(), flat.device) if task.rounding.stochastic else None
        magnitudes = round_magnitudes(scaled, words, task.float8, task.rounding)
        target.copy_(encode(magnitudes, scaled))
        if statistics:
            positions = code_positions(scaled, task.float8, FRACTION_BITS)
            parts.append(measure(source.float(), target, positions, scale, task.amax, task.float8))
    return merge(parts) if statistics else None
