"""The Triton kernels of nvidia_panels.py, which imports this module on first use."""

# No `from __future__ import annotations`: Triton reads the annotations.

import triton
import triton.language as tl

from .triton_kernels import BIAS, CODE_MASK, MANTISSA, POSITION_BITS, SIGN_MASK, _bits, _encode, _float, _positions

INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["rows"])
def round_panel(
    scaled,
    errors,
    from_others,
    within,
    codes,
    changes,
    outputs,
    rows,
    scaled_block,
    errors_block,
    others_block,
    within_block,
    codes_block,
    changes_block,
    FLOAT8: tl.constexpr,
    LARGEST: tl.constexpr,
    PANEL: tl.constexpr,
    TILE: tl.constexpr,
):
    """panels.round_panel for TILE outputs of one block. `*_block`: elements from one block to the next.

    The changes so far stay in registers, so a step is one small sum per output.
    """
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = column < outputs
    block = tl.program_id(1).to(tl.int64)
    scaled += block * scaled_block
    errors += block * errors_block
    from_others += block * others_block
    within += block * within_block
    codes += block * codes_block
    changes += block * changes_block
    row = tl.arange(0, PANEL)
    made = tl.zeros((PANEL, TILE), tl.float32)
    at = column.to(tl.int64)
    for j in range(rows):
        x = tl.load(scaled + at, mask=inside, other=0.0)
        before = tl.load(errors + at, mask=inside, other=0.0)
        others = tl.load(from_others + at, mask=inside, other=0.0)
        shares = tl.load(within + j * rows + row, mask=row < j, other=0.0)
        wanted = x - (others + tl.sum(shares[:, None] * made, axis=0))
        drawn = _positions(tl.minimum(tl.abs(wanted), LARGEST), FLOAT8, 0)
        change = _value(drawn, wanted, FLOAT8) - x - before
        tl.store(codes + at, _encode(drawn, wanted), mask=inside)
        tl.store(changes + at, change, mask=inside)
        made = tl.where(row[:, None] == j, change[None, :], made)
        at += outputs


@triton.jit
def _value(drawn, x, FLOAT8: tl.constexpr):
    """The FP8 value of a position, with the sign of x.

    A code moved to fp32's exponent and mantissa fields is too small by a power of two.
    """
    shift: tl.constexpr = POSITION_BITS - MANTISSA + FLOAT8.mantissa_bits
    signed = drawn | (_bits(x) & SIGN_MASK)
    return _float((signed >> shift) & (SIGN_MASK | (CODE_MASK >> shift))) * (2.0 ** (BIAS - FLOAT8.exponent_bias))


@triton.jit(do_not_specialize=["width"])
def factor_panel(matrix, pivots, damping, panel, taken, side, width, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """panels.factor_panel for one block: one program, which reads earlier columns of the panel back from the cache.

    matrix: (blocks, side, side). pivots: (blocks, side). damping: (blocks, 1). panel: (blocks, width, side). taken:
    (blocks, width).
    """
    block = tl.program_id(0).to(tl.int64)
    matrix += block * side * side
    pivots += block * side
    panel += block * width * side
    taken += block * width
    lane = tl.arange(0, LANES)
    inside = lane < side
    least = tl.load(damping + block)
    left = tl.load(pivots + lane, mask=inside, other=INFINITY)
    for i in range(width):
        smallest, row = tl.min(tl.where(tl.abs(left) < INFINITY, left, INFINITY), axis=0, return_indices=True)
        done = tl.zeros((COLUMNS, LANES), tl.float32)
        for start in range(0, i, COLUMNS):
            earlier = start + tl.arange(0, COLUMNS)
            shares = tl.load(panel + earlier * side + row, mask=earlier < i, other=0.0)
            known = (earlier < i)[:, None] & inside[None, :]
            columns = tl.load(panel + earlier[:, None] * side + lane[None, :], mask=known, other=0.0)
            done += shares[:, None] * columns
        rest = tl.load(matrix + row.to(tl.int64) * side + lane, mask=inside, other=0.0) - tl.sum(done, axis=0)
        column = rest / tl.sqrt_rn(tl.maximum(smallest, least))
        tl.store(panel + i * side + lane, column, mask=inside)
        tl.store(taken + i, row.to(tl.int64))
        left = tl.where(lane == row, INFINITY, left - column * column)
        tl.debug_barrier()  # the column must be in memory before other threads read it
    tl.store(pivots + lane, left, mask=inside)
