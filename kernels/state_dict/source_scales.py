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
    columns of blocks); the last blocks of a row or column may be partial. A grid of blocks is taken as one of 128 x 128
    where that fits. Raises ValueError where the shapes do not tell the block sizes, as (192, 2, 1) does not for 192
    inputs: the blocks may have 96 or 128 values.
    """
    values = codes.float()
    if scale.numel() == 1:
        return values * scale.float().reshape(())
    counts = _block_counts(codes.shape, scale.shape)
    grid = scale.float().to(codes.device).reshape(counts)
    for dim, size in enumerate(_block_sizes(codes.shape, counts)):
        if counts[dim] not in (1, codes.shape[dim]):
            grid = grid.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
    return values * grid


def check_shapes(codes: Sequence[int], scale: Sequence[int]) -> None:
    """Raises ValueError where dequantize_blocks would, from the shapes alone."""
    if math.prod(scale) != 1:
        _block_sizes(codes, _block_counts(codes, scale))


def block_size(side: int, count: int) -> int:
    """The size of `count` equal blocks that cover `side` values; the last one may be partial.

    Plausible are powers of two, and the size that leaves no block partial. Raises ValueError unless there is just one.
    """
    sizes = {size for size in _POWERS_OF_TWO if _blocks(side, size) == count}
    if count and side % count == 0:
        sizes.add(side // count)
    if len(sizes) != 1:
        raise ValueError(f"{count} scales for {side} values do not tell the block size")
    return sizes.pop()


def _block_sizes(codes: Sequence[int], counts: Sequence[int]) -> list[int]:
    """(rows, columns) of one block. A grid that blocks of 128 x 128 fit has these blocks, as all published grids have.

    Raises ValueError where the counts do not tell the size.
    """
    if counts[0] != codes[0] and all(_blocks(side, USUAL_BLOCK) == n for side, n in zip(codes, counts, strict=True)):
        return [min(side, USUAL_BLOCK) for side in codes]
    return [
        side if count == 1 else 1 if count == side else block_size(side, count)
        for side, count in zip(codes, counts, strict=True)
    ]


def _blocks(side: int, size: int) -> int:
    """How many blocks of this size cover `side` values."""
    return -(-side // size)


def _block_counts(codes: Sequence[int], scale: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the grid of blocks, from the shapes of a weight and its scale."""
    if len(codes) == 2:
        out, inputs = codes
        shape = tuple(scale)
        if shape == (out,) and out != inputs:
            return out, 1
        if len(shape) == 2 and shape[0] <= out and shape[1] <= inputs:
            if shape[0] < out and shape[1] == inputs > 1:  # nobody has a scale per column: it may be one per row
                raise ValueError(f"shape {shape} does not tell rows from columns of a weight of shape {(out, inputs)}")
            return shape
        if len(shape) == 3 and shape[0] == out and shape[2] == 1 and shape[1] <= inputs:
            return out, shape[1]
    raise ValueError(f"shape {tuple(scale)} does not fit a weight of shape {tuple(codes)}")
