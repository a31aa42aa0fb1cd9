"""GPTQ-style rounding: each weight goes up or down so that the layer's output changes least for recorded inputs.

For a weight W (out, in), its rounding error E and inputs with second moment H = XᵀX / n, the mean squared change of the
output is tr(E H Eᵀ). GPTQ (Frantar et al., 2022) rounds the inputs one after the other, for all outputs at once. Error
feedback moves each input, before it is rounded, to best compensate for the errors made so far. It is computed here from
H = R Rᵀ, R upper triangular, and needs no inverse of H (Chee et al., QuIP, 2023, prove that both are the same). Then
coordinate descent rounds each input again, given all the others.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from ..errors import CalibrationError
from ..numerics.backends.panels import choose_panels, to_nearest
from ..numerics.formats import Float8Format
from ..numerics.matrix_precision import full_precision_products
from ..numerics.output_error import CONTRADICTORY, WEIGHT_ERROR, OutputError, unit_of
from ..numerics.scaling import SMALLEST_SCALE
from .moments import LayerCalibration

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean, because recorded inputs are only a sample."""
TRUSTED_ROWS = 3000
"""Rows of recorded inputs. With fewer rows, the damping grows in proportion."""

IMAGES = 32
"""How many images to calibrate a diffusion model on. The figures of the README are from as many."""
MANY_PROMPTS = 20
"""How many prompts to calibrate a text encoder on, at least."""

INDEFINITE = 1e-3
"""How negative a variance may become, as a share of the largest. Rounding errors of the moment stay far below."""

PANEL = 128
"""Inputs whose effect on all others is computed in one matrix product."""
GPU_BAND = 1024
"""Rows of the moment that are multiplied at once on a GPU, to predict errors; elsewhere PANEL."""
SHRINK_BELOW = 0.75
"""Drop finished rows from the working matrix when fewer than this share remain."""
CHUNK_ELEMENTS = 1 << 26
"""Elements rounded at once. Outputs are independent, so this bounds the memory of intermediates and changes nothing."""

MEASURED_OUTPUTS = 1024
"""Outputs, evenly spaced, from which the error is predicted. All of them would take a third of the total time."""

LARGEST_WEIGHT_ERROR = 10
"""Squared error of the weight over that of rounding to nearest: 10 dB of SQNR. Codes further away than that rely on the
recorded inputs too much."""

SCALE_CANDIDATES = tuple(2 ** (i / 4) for i in range(-4, 4))
"""Multiples of the scale that are tried."""
SCALE_SAMPLE = 64
"""Outputs on which the candidates are compared."""


def gptq_round(
    weight: torch.Tensor,
    scale: torch.Tensor,
    calibration: LayerCalibration,
    float8: Float8Format,
    *,
    search_scale: bool = True,
    descents: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, OutputError]:
    """Codes (float8, in the weight's shape), scale and predicted output error of a weight.

    weight: float (out, in), finite. scale: fp32 0-dim, the scale for rounding to nearest; the result has the same scale
    unless `search_scale` finds a better one. descents: passes of coordinate descent. The codes are finite. They and the
    scale are those of nearest if nearest is no worse, or for a reason in OutputError.fallback. The bytes are the same
    on one device and version of torch, whatever torch's default dtype and autocast are. Raises CalibrationError if the
    weight does not have the calibration's width.
    """
    if weight.ndim != 2 or weight.shape[1] != calibration.width:
        raise CalibrationError(
            f"a weight of shape {tuple(weight.shape)} does not fit a calibration of {calibration.width} inputs"
        )
    with full_precision_products(weight.device):
        layer, unit = _Layer(calibration, weight.device), unit_of(weight)
        chosen = _search_scale(layer, weight, scale, float8, unit) if search_scale else scale
        codes, nearest = torch.empty_like(weight, dtype=float8.dtype), torch.empty_like(weight, dtype=float8.dtype)
        output = error = nearest_error = weight_error = nearest_weight_error = 0.0
        step = max(1, CHUNK_ELEMENTS // weight.shape[1])
        sample = slice(None, None, -(-len(weight) // MEASURED_OUTPUTS))
        for part in (slice(start, start + step) for start in range(0, len(weight), step)):
            columns = layer.permute(weight[part])
            rounded = _round(layer, columns / chosen, float8, descents)
            plain = to_nearest(columns / scale, float8)
            output += layer.energy(columns[..., sample] * unit).sum().item()
            change = (rounded.float() * chosen - columns).mul_(unit)
            error += layer.energy(change[..., sample]).sum().item()
            weight_error += change.square_().sum(dtype=torch.float64).item()
            change = (plain.float() * scale - columns).mul_(unit)
            nearest_error += layer.energy(change[..., sample]).sum().item()
            nearest_weight_error += change.square_().sum(dtype=torch.float64).item()
            codes[part], nearest[part] = layer.restore(rounded), layer.restore(plain)
    fallback = ""
    if layer.contradictory:
        fallback = CONTRADICTORY
    elif error < nearest_error and not weight_error <= LARGEST_WEIGHT_ERROR * nearest_weight_error:
        fallback = WEIGHT_ERROR
    if fallback or not error < nearest_error:  # also if an error is NaN
        codes, chosen, error = nearest, scale, nearest_error
    rows = calibration.rows
    return codes, chosen, OutputError(rows, _relative(nearest_error, output), _relative(error, output), fallback)


def damping_share(rows: int) -> float:
    """The damping for a second moment of `rows` rows, as a share of its mean diagonal."""
    return DAMPING * max(1.0, TRUSTED_ROWS / rows)


class _Layer:
    """A layer's second moment, factorized, with the inputs of each block in the order in which they are rounded."""

    def __init__(self, calibration: LayerCalibration, device: torch.device):
        moment = calibration.moment(device)
        mean = moment.diagonal(dim1=1, dim2=2).mean(1)
        self.damping = (damping_share(calibration.rows) * mean).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        self.order, factor = _pivoted_cholesky(moment, self.damping)
        lowest = factor.diagonal(dim1=1, dim2=2).amin(1, keepdim=True) * self.damping.sqrt()
        largest = moment.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
        self.contradictory = not bool((lowest >= -self.damping - INDEFINITE * largest).all())
        """Whether no inputs have this second moment: the variance of one, given others, is negative or NaN."""
        if self.contradictory:
            self.order = torch.arange(moment.shape[1], device=device).expand_as(self.order)
            factor = torch.eye(moment.shape[1], dtype=torch.float32, device=device).expand_as(moment)
        self.inverse_order = self.order.argsort(dim=1)
        self.moment = torch.stack([h[order][:, order] for h, order in zip(moment, self.order, strict=True)])
        self.feedback = factor / factor.diagonal(dim1=1, dim2=2)[:, None]
        """[:, i, j]: how much of input i's error the later input j compensates; fp32 (blocks, side, side)."""

    def permute(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in) as fp32 (blocks, side, out), in rounding order."""
        columns = weight.float().T.reshape(*self.order.shape, -1)
        return columns.gather(1, self.order[:, :, None].expand_as(columns))

    def restore(self, columns: torch.Tensor) -> torch.Tensor:
        """Codes (blocks, side, out), in rounding order, as (out, in)."""
        values = columns.view(torch.uint8)
        values = values.gather(1, self.inverse_order[:, :, None].expand_as(values))
        return values.flatten(0, 1).T.view(columns.dtype)

    def energy(self, columns: torch.Tensor) -> torch.Tensor:
        """tr(C H Cᵀ) for each output: float64 (out,). H is symmetric, so only half of it is multiplied."""
        total = torch.zeros(columns.shape[2], dtype=torch.float64, device=columns.device)
        size = GPU_BAND if columns.is_cuda else PANEL
        for start in range(0, columns.shape[1], size):
            stop = start + size
            band, here = self.moment[:, start:stop], columns[:, start:stop]
            product = band[:, :, start:stop] @ here + 2 * (band[:, :, stop:] @ columns[:, stop:])
            total += (product * here).sum((0, 1), dtype=torch.float64)
        return total.clamp(min=0)

    @cached_property
    def descent(self) -> torch.Tensor:
        """[:, i, j]: how much of input i's error input j compensates best, if no other input does."""
        return self.moment / (self.moment.diagonal(dim1=1, dim2=2) + self.damping)[:, None]


def _pivoted_cholesky(moment: torch.Tensor, damping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, R) with R upper triangular and R Rᵀ = D[order][:, order], for each block D of the damped moment.

    A Cholesky decomposition with pivoting, from the last row up, panel by panel. R's squared diagonal is the error that
    no later input can compensate. The last input is the one with the smallest such error among all inputs, the second
    to last has the smallest among the rest, and so on (min-pivot order: Chen et al., The Geometry of LLM Quantization,
    2025).

    moment: fp32 (blocks, side, side). damping: (blocks, 1). order: int64 (blocks, side). fp32 is enough: no pivot is
    smaller than the damping, which is far above the rounding errors. If no inputs have this moment, a pivot is
    negative, and R's diagonal has pivot / √damping there; R is NaN if it overflows.
    """
    panels = choose_panels(moment.device)
    matrix = moment + torch.diag_embed(damping.expand(-1, moment.shape[1]))
    blocks, side, _ = matrix.shape
    order = torch.empty(blocks, side, dtype=torch.int64, device=matrix.device)
    factor = torch.zeros_like(matrix)
    inputs = torch.arange(side, device=matrix.device).repeat(blocks, 1)
    pivots = matrix.diagonal(dim1=1, dim2=2).clone()
    for start in range(0, side, panels.pivots):
        stop = min(start + panels.pivots, side)
        panel, taken = panels.factor_panel(matrix, pivots, damping, stop - start)
        order[:, start:stop] = inputs.gather(1, taken)
        factor[:, :, start:stop].scatter_(1, inputs[:, :, None].expand_as(panel), panel)
        if (side - stop) < SHRINK_BELOW * inputs.shape[1]:
            rest = ~pivots.isposinf()
            if not bool((rest.sum(1) == side - stop).all() & pivots[rest].isfinite().all()):  # NaN or overflow
                return order, factor.fill_(torch.nan)
            matrix = torch.stack([m[kept][:, kept] for m, kept in zip(matrix, rest, strict=True)])
            panel = panel[rest].view(blocks, side - stop, stop - start)
            inputs, pivots = (x[rest].view(blocks, side - stop) for x in (inputs, pivots))
        matrix.baddbmm_(panel, panel.mT, alpha=-1)
    factor = factor.gather(1, order[:, :, None].expand_as(factor))
    return order.flip(1), factor.flip(1, 2).triu_()


def _round(layer: _Layer, scaled: torch.Tensor, float8: Float8Format, descents: int) -> torch.Tensor:
    """Codes of scaled weights (blocks, side, out): GPTQ, then `descents` passes of coordinate descent."""
    errors = torch.zeros_like(scaled)
    codes = _sweep(scaled, errors, layer.feedback, float8, triangular=True)
    for _ in range(descents):
        codes = _sweep(scaled, errors, layer.descent, float8)
    return codes


def _sweep(
    scaled: torch.Tensor,
    errors: torch.Tensor,
    feedback: torch.Tensor,
    float8: Float8Format,
    triangular: bool = False,
) -> torch.Tensor:
    """Round each input once, with error feedback from the others. Returns the codes and updates `errors` in place.

    scaled, errors: (blocks, side, out). feedback[:, i, j]: how much of input i's error input j compensates; its
    diagonal is not used. triangular: feedback is zero for i > j.
    """
    panels = choose_panels(scaled.device)
    codes = torch.empty_like(scaled, dtype=float8.dtype)
    for start in range(0, scaled.shape[1], PANEL):
        here = slice(start, start + PANEL)
        stop = start if triangular else scaled.shape[1]
        from_others = feedback[:, :stop, here].mT @ errors[:, :stop]
        within = feedback[:, here, here].mT.contiguous()
        if not triangular:
            from_others -= within.diagonal(dim1=1, dim2=2)[:, :, None] * errors[:, here]
        errors[:, here] += panels.round_panel(
            scaled[:, here], errors[:, here], from_others, within, codes[:, here], float8
        )
    return codes


def _search_scale(
    layer: _Layer, weight: torch.Tensor, scale: torch.Tensor, float8: Float8Format, unit: float
) -> torch.Tensor:
    """The candidate scale with the smallest predicted output error on a sample of outputs.

    The sample is evenly spaced over the outputs sorted by amax. It contains the largest, which saturates first. unit:
    unit_of(weight).
    """
    by_amax = weight.abs().amax(1).argsort(descending=True, stable=True)
    sample = layer.permute(weight[by_amax[:: -(-len(by_amax) // SCALE_SAMPLE)]])
    multiples = torch.tensor(SCALE_CANDIDATES, dtype=torch.float32, device=scale.device)
    candidates = (scale * multiples).clamp(min=SMALLEST_SCALE)
    columns = sample.repeat(1, 1, len(candidates))
    scales = candidates.repeat_interleave(sample.shape[2])
    rounded = _round(layer, columns / scales, float8, descents=0)
    errors = layer.energy((rounded.float() * scales - columns) * unit).view(len(candidates), -1)
    return candidates[errors.sum(1).argmin()]


def _relative(error: float, output: float) -> float:
    return math.sqrt(error / output) if output > 0 and math.isfinite(error) else 0.0
