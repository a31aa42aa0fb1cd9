"""Scales of finer granularity than one per tensor, in sources: per row, per block of a row, per 2-D block.

value = code * scale, always; `weight_scale_inv` multiplies too, in spite of its name. Block sizes follow from the
shapes. Files with such scales come from DeepSeek, Qwen and Mistral (128 x 128 blocks, bf16 or fp32), and from
musubi-tuner and kohya ([out, blocks, 1]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

USUAL_BLOCK = 128
"""Side of the blocks of every published model with two-dimensional blocks."""

_POWERS_OF_TWO = tuple(1 << n for n in range(1, 15))


def dequantize_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes * scale in fp32, each scale over its block.

    codes: float8 (out, in). scale: float, of one element, or (out,), (out, 1), (out, blocks, 1) or (rows of blocks,
    columns of blocks); the last blocks of a row or column may be partial.
    Raises ValueError where the shapes do not tell the block sizes.
    """
    values = codes.float()
    if scale.numel() == 1:
        return values * scale.float().reshape(())
    rows, columns = _block_counts(codes.shape, scale.shape)
    grid = scale.float().to(codes.device).reshape(rows, columns)
    for dim, (side, count) in enumerate(zip(codes.shape, (rows, columns), strict=True)):
        if count not in (1, side):
            grid = grid.repeat_interleave(block_size(side, count), dim).narrow(dim, 0, side)
    return values * grid


def check_shapes(codes: Sequence[int], scale: Sequence[int]) -> None:
    """Raises ValueError where dequantize_blocks would, from the shapes alone."""
    if math.prod(scale) != 1:
        for side, count in zip(codes, _block_counts(codes, scale), strict=True):
            if count not in (1, side):
                block_size(side, count)


def block_size(side: int, count: int) -> int:
    """The size of `count` equal blocks that cover `side` values; the last one may be partial.

    Raises ValueError where several sizes are plausible.
    """
    sizes = {size for size in _POWERS_OF_TWO if -(-side // size) == count}
    if count and side % count == 0:
        sizes.add(side // count)
    if USUAL_BLOCK in sizes:
        return USUAL_BLOCK
    if len(sizes) != 1:
        raise ValueError(f"{count} scales for {side} values do not tell the block size")
    return sizes.pop()


def _block_counts(codes: Sequence[int], scale: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the grid of blocks, from the shapes of a weight and its scale."""
    if len(codes) == 2:
        out, inputs = codes
        shape = tuple(scale)
        if shape == (out,) and out != inputs:
            return out, 1
        if len(shape) == 2 and shape[0] <= out and shape[1] <= inputs:
            return shape
        if len(shape) == 3 and shape[0] == out and shape[2] == 1 and shape[1] <= inputs:
            return out, shape[1]
    raise ValueError(f"shape {tuple(scale)} does not fit a weight of shape {tuple(codes)}")
