"""Rounding that knows what a layer is fed: each weight goes up or down so that the layer's output changes least.

For a weight W (out, in), its rounded version W + E and inputs with second moment H = XᵀX / n, the mean squared change
of the output is tr(E H Eᵀ). The inputs are rounded one after the other, for all outputs at once. Each is first moved
by what best makes up for the errors made so far, which is GPTQ (Frantar et al., 2022); written with H = R Rᵀ, R upper
triangular, in place of the Cholesky factor of the inverse, it needs no inverse (Chee et al., QuIP, 2023, prove that
they are the same). Then coordinate descent: each input once more, given all the others.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from ..errors import CalibrationError
from ..numerics.formats import Float8Format
from ..numerics.output_error import OutputError
from ..numerics.scaling import SMALLEST_SCALE
from .moments import LayerCalibration

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean: what was seen is only a sample of what the layer will be fed."""
TRUSTED_ROWS = 3000
"""With fewer rows the damping grows in proportion."""

COLUMNS = 128
"""Inputs whose effect on the rest is gathered in one matrix multiplication."""
SHRINKING = 0.75
"""What is done is cut off a matrix when less than this share of it is left."""
CHUNK_ELEMENTS = 1 << 26
"""Outputs are independent of each other: as many are rounded at once as bound the memory of intermediates."""

MEASURED_OUTPUTS = 1024
"""The error is predicted on about so many outputs, evenly spaced: all of them would cost a third of the time."""

SCALE_CANDIDATES = tuple(2 ** (i / 4) for i in range(-4, 4))
SCALE_SAMPLE = 64
"""Outputs on which the candidates are compared."""


def calibrate(
    weight: torch.Tensor,
    scale: torch.Tensor,
    calibration: LayerCalibration,
    format: Float8Format,
    *,
    search_scale: bool = True,
    descents: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, OutputError]:
    """Codes (float8, of the weight's shape), scale and predicted error of a weight, for the inputs in `calibration`.

    weight: float (out, in), finite. scale: fp32 0-dim, the one to round to nearest with and, unless `search_scale`,
    the result's. descents: passes of coordinate descent. Where nearest is no worse, its codes and scale are returned.
    The same bytes on one device and version of torch. Raises CalibrationError where the weight does not have the
    calibration's width.
    """
    if weight.ndim != 2 or weight.shape[1] != calibration.width:
        raise CalibrationError(f"a weight of shape {tuple(weight.shape)} cannot take {calibration.width} inputs")
    problem = _Problem(calibration, weight.device)
    chosen = _search_scale(problem, weight, scale, format) if search_scale else scale
    codes, nearest = torch.empty_like(weight, dtype=format.dtype), torch.empty_like(weight, dtype=format.dtype)
    output = error = nearest_error = 0.0
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    sample = slice(None, None, -(-len(weight) // MEASURED_OUTPUTS))
    for part in (slice(start, start + step) for start in range(0, len(weight), step)):
        columns = problem.columns(weight[part])
        rounded = _round(problem, columns / chosen, format, descents)
        plain = _to_grid(columns / scale, format)
        output += problem.energy(columns[..., sample]).sum().item()
        error += problem.energy((_decode(rounded) * chosen - columns)[..., sample]).sum().item()
        nearest_error += problem.energy((_decode(plain) * scale - columns)[..., sample]).sum().item()
        codes[part], nearest[part] = problem.rows(rounded), problem.rows(plain)
    if nearest_error <= error:
        codes, chosen, error = nearest, scale, nearest_error
    return codes, chosen, OutputError(calibration.rows, _relative(nearest_error, output), _relative(error, output))


def damping_share(rows: int) -> float:
    """The damping for a moment of `rows` rows, as a share of its mean diagonal."""
    return DAMPING * max(1.0, TRUSTED_ROWS / rows)


class _Problem:
    """A layer's second moment, ready for rounding: blocks with their inputs in the order in which they are rounded."""

    def __init__(self, calibration: LayerCalibration, device: torch.device):
        moment = calibration.moment(device)
        power = moment.diagonal(dim1=1, dim2=2).mean(1)
        self.damping = (damping_share(calibration.rows) * power).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        self.order, factor = _factor(moment, self.damping)
        self.back = self.order.argsort(dim=1)
        self.moment = torch.stack([h[order][:, order] for h, order in zip(moment, self.order, strict=True)])
        self.feed_forward = factor / factor.diagonal(dim1=1, dim2=2)[:, None]
        """[:, i, j]: the share of input i's error that a later input j makes up for; fp32 (blocks, side, side)."""

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in) as fp32 (blocks, side, out)."""
        columns = weight.float().T.reshape(*self.order.shape, -1)
        return columns.gather(1, self.order[:, :, None].expand_as(columns))

    def rows(self, columns: torch.Tensor) -> torch.Tensor:
        """Codes (blocks, side, out) as (out, in)."""
        values = columns.view(torch.uint8)
        values = values.gather(1, self.back[:, :, None].expand_as(values))
        return values.flatten(0, 1).T.view(columns.dtype)

    def energy(self, columns: torch.Tensor) -> torch.Tensor:
        """tr(C H Cᵀ), for each output: float64 (out,). H being symmetric, half of it is multiplied."""
        total = torch.zeros(columns.shape[2], dtype=torch.float64, device=columns.device)
        for start in range(0, columns.shape[1], COLUMNS):
            stop = start + COLUMNS
            band, here = self.moment[:, start:stop], columns[:, start:stop]
            product = band[:, :, start:stop] @ here + 2 * (band[:, :, stop:] @ columns[:, stop:])
            total += (product * here).sum((0, 1), dtype=torch.float64)
        return total.clamp(min=0)

    @cached_property
    def descent(self) -> torch.Tensor:
        """[:, i, j]: the share of input i's error that input j alone would best make up for."""
        return self.moment / (self.moment.diagonal(dim1=1, dim2=2) + self.damping)[:, None]


def _factor(moment: torch.Tensor, damping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, R): R upper triangular with R Rᵀ = D[order][:, order] for each block D of the damped moment.

    The error that nothing can make up for any more is R's squared diagonal: of all inputs that could be rounded last,
    the one is taken with the least of it, then the last but one, and so on (min-pivot order: Chen et al., The Geometry
    of LLM Quantization, 2025). A Cholesky decomposition with pivoting, from the last row up, in panels of COLUMNS.

    moment: fp32 (blocks, side, side). damping: (blocks, 1). order: int64 (blocks, side). fp32 suffices: no pivot is
    below the damping, which is far above its rounding errors.
    """
    matrix = moment + torch.diag_embed(damping.expand(-1, moment.shape[1]))
    blocks, side, _ = matrix.shape
    block = torch.arange(blocks, device=matrix.device)
    order = torch.empty(blocks, side, dtype=torch.int64, device=matrix.device)
    factor = torch.zeros_like(matrix)
    names = torch.arange(side, device=matrix.device).repeat(blocks, 1)
    pivots = matrix.diagonal(dim1=1, dim2=2).clone()
    for start in range(0, side, COLUMNS):
        stop = min(start + COLUMNS, side)
        panel = matrix.new_zeros(*names.shape, stop - start)
        for i in range(stop - start):
            least, pick = pivots.min(1)
            known = panel[:, :, :i] @ panel[block, pick, :i, None]
            panel[:, :, i] = (matrix[block, pick] - known[:, :, 0]) / least[:, None].maximum(damping).sqrt()
            pivots -= panel[:, :, i].square()
            pivots[block, pick] = torch.inf
            order[:, start + i] = names[block, pick]
        factor[:, :, start:stop].scatter_(1, names[:, :, None].expand_as(panel), panel)
        if (side - stop) < SHRINKING * names.shape[1]:
            left = pivots.isfinite()
            matrix = torch.stack([m[rest][:, rest] for m, rest in zip(matrix, left, strict=True)])
            panel = panel[left].view(blocks, side - stop, stop - start)
            names, pivots = (x[left].view(blocks, side - stop) for x in (names, pivots))
        matrix.baddbmm_(panel, panel.mT, alpha=-1)
    factor = factor.gather(1, order[:, :, None].expand_as(factor))
    return order.flip(1), factor.flip(1, 2).triu_()


def _round(problem, scaled: torch.Tensor, format: Float8Format, descents: int) -> torch.Tensor:
    """Codes of scaled columns (blocks, side, out)."""
    errors = torch.zeros_like(scaled)
    codes = _sweep(scaled, errors, problem.feed_forward, format, triangular=True)
    for _ in range(descents):
        codes = _sweep(scaled, errors, problem.descent, format)
    return codes


def _sweep(scaled, errors, coupling, format: Float8Format, triangular: bool = False) -> torch.Tensor:
    """Round each input once, moved against the errors of the others; the codes, with `errors` updated in place.

    scaled, errors: (blocks, side, out). coupling[:, i, j]: the share of input i's error that input j makes up for;
    triangular: it is zero for i > j. The diagonal counts for nothing.
    """
    codes = torch.empty_like(scaled, dtype=format.dtype)
    for start in range(0, scaled.shape[1], COLUMNS):
        here = slice(start, start + COLUMNS)
        known = start if triangular else scaled.shape[1]
        taken_over = coupling[:, :known, here].mT @ errors[:, :known]
        inside = coupling[:, here, here].mT.contiguous()
        if not triangular:
            taken_over -= inside.diagonal(dim1=1, dim2=2)[:, :, None] * errors[:, here]
        changes = torch.empty_like(taken_over)
        for j in range(inside.shape[1]):
            total = torch.baddbmm(taken_over[:, j : j + 1], inside[:, j : j + 1, :j], changes[:, :j])[:, 0]
            code = _to_grid(scaled[:, start + j] - total, format)
            changes[:, j] = _decode(code) - scaled[:, start + j] - errors[:, start + j]
            codes[:, start + j] = code
        errors[:, here] += changes
    return codes


def _search_scale(problem: _Problem, weight: torch.Tensor, scale: torch.Tensor, format: Float8Format) -> torch.Tensor:
    """The best of some multiples of a scale, by predicted output error on a sample of outputs.

    The sample is spread evenly over the outputs in order of their amax and holds the largest, which saturates first.
    """
    by_amax = weight.abs().amax(1).argsort(descending=True, stable=True)
    sample = problem.columns(weight[by_amax[:: -(-len(by_amax) // SCALE_SAMPLE)]])
    candidates = (scale * torch.tensor(SCALE_CANDIDATES, device=scale.device)).clamp(min=SMALLEST_SCALE)
    columns = sample.repeat(1, 1, len(candidates))
    scales = candidates.repeat_interleave(sample.shape[2])
    rounded = _round(problem, columns / scales, format, descents=0)
    errors = problem.energy(_decode(rounded) * scales - columns).view(len(candidates), -1)
    return candidates[errors.sum(1).argmin()]


def _to_grid(scaled: torch.Tensor, format: Float8Format) -> torch.Tensor:
    """The nearest FP8 code, ties to even, saturating; float8. The same as rounding.round_to_codes, in two steps."""
    return scaled.clamp(-format.max, format.max).to(format.dtype)


def _decode(codes: torch.Tensor) -> torch.Tensor:
    return codes.float()


def _relative(error: float, output: float) -> float:
    return math.sqrt(error / output) if output > 0 else 0.0
