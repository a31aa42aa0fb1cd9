"""Compare every rounding in both formats on the same weights.

With a calibration, `calibrated` is one of the roundings, and the error of the layer outputs is measured too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch

from ..calibration.moments import Calibration
from ..engine.quantize_weight import quantize_weight
from ..numerics.error_statistics import ErrorStatistics, evenly_spaced
from ..numerics.formats import FORMATS
from ..numerics.output_error import relative_output_error
from ..numerics.quantized_tensor import dequantize_tensor
from ..numerics.rounding import METHODS, ROUNDINGS
from ..recipe import Recipe

LARGEST_SAMPLE = 1 << 20
"""Values compared per layer. Of larger layers, evenly spaced values are taken; with a calibration, whole rows."""


@dataclass(frozen=True)
class Trial:
    """One format and rounding. The tuples have one entry per layer."""

    format: str
    rounding: str
    errors: tuple[ErrorStatistics, ...]
    systematic: tuple[float, ...]
    """RMS of the error that is common to draws with different seeds, relative to the layer's RMS. Averaging over seeds
    cannot remove it. For nearest it is the whole error; for an unbiased rounding it is 0, up to chance."""
    output_errors: tuple[float, ...] = ()
    """Relative error of the layer outputs, only of layers that are in the calibration."""

    @property
    def relative_rmse(self) -> tuple[float, ...]:
        return tuple(error.relative_rmse for error in self.errors)

    @property
    def bias_in_standard_errors(self) -> tuple[float, ...]:
        """Mean error of each layer over RMSE / sqrt(n), its spread if signs were random; 0 without errors."""
        return tuple(error.bias / error.rmse * math.sqrt(error.count) if error.rmse else 0.0 for error in self.errors)


@dataclass(frozen=True)
class Comparison:
    """Trials of every format and rounding on the same layers."""

    source: str
    scaling: str
    seed: int
    keys: tuple[str, ...]
    """The layers that were compared."""
    total: int
    """Number of layers in the model."""
    trials: tuple[Trial, ...]
    calibration: str | None = None
    """Name of the calibration; None without one."""
    unseen: tuple[str, ...] = ()
    """Layers that are not in the calibration. Calibrated rounding falls back to nearest for them."""

    @property
    def roundings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trial.rounding for trial in self.trials))

    @property
    def calibrated_layers(self) -> tuple[bool, ...]:
        """For each of `keys`, whether it is in the calibration."""
        return tuple(self.calibration is not None and key not in self.unseen for key in self.keys)


def compare_roundings(
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    scaling: str = "absmax",
    seed: int = 0,
    source: str = "",
    total: int | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Comparison:
    """Quantize each weight with every format and rounding.

    weights: (tensor key, float tensor of any shape), consumed one by one; see `thin` and `thin_rows` for weights with
    more than LARGEST_SAMPLE values. total: number of layers in the model, if not all are given. calibration: adds
    calibrated rounding and the output errors. progress(done, key) is called before each weight.
    Raises what quantize_weight raises, and ValueError without weights.
    """
    roundings = METHODS if calibration else ROUNDINGS
    keys: list[str] = []
    unseen: list[str] = []
    results: dict[tuple[str, str], list[_Result]] = {choice: [] for choice in product(FORMATS, roundings)}
    for done, (key, weight) in enumerate(weights):
        if progress:
            progress(done, key)
        keys.append(key)
        layer = calibration.layer_of(key, weight) if calibration else None
        if calibration and not layer:
            unseen.append(key)
        sample = thin_rows(weight) if layer else thin(weight)
        moment = layer.moment(weight.device) if layer else None
        for (format, rounding), of_layers in results.items():
            recipe = Recipe(format=format, rounding=rounding, scaling=scaling, seed=seed)
            of_layers.append(_try(sample, key, recipe, calibration, moment))
    if not keys:
        raise ValueError("there are no layers to compare")
    return Comparison(
        source=source,
        scaling=scaling,
        seed=seed,
        keys=tuple(keys),
        total=total or len(keys),
        trials=tuple(_trial(*choice, of_layers) for choice, of_layers in results.items()),
        calibration=calibration.source if calibration else None,
        unseen=tuple(unseen),
    )


def thin(x: torch.Tensor) -> torch.Tensor:
    """At most LARGEST_SAMPLE + 1 values of a tensor, flat: evenly spaced, and the largest, which sets the scale."""
    flat = x.reshape(-1)
    if flat.numel() <= LARGEST_SAMPLE:
        return flat
    stride = -(-flat.numel() // LARGEST_SAMPLE)
    return torch.cat((flat[::stride], flat[flat.abs().argmax()].reshape(1)))


def thin_rows(weight: torch.Tensor) -> torch.Tensor:
    """Evenly spaced rows of a weight (out, in), at most LARGEST_SAMPLE values, and the row of the largest value.

    Each row makes one output, so output errors can be measured on them.
    """
    rows = max(1, LARGEST_SAMPLE // weight.shape[1])
    if len(weight) <= rows:
        return weight
    largest = int(weight.abs().amax(1).argmax())
    return weight[sorted({*evenly_spaced(len(weight), rows), largest})]


@dataclass(frozen=True)
class _Result:
    """One layer in one format and rounding."""

    error: ErrorStatistics
    systematic: float
    output_error: float | None


def _try(
    sample: torch.Tensor, key: str, recipe: Recipe, calibration: Calibration | None, moment: torch.Tensor | None
) -> _Result:
    first = quantize_weight(sample, key, recipe, calibration, statistics=True)
    rounded = dequantize_tensor(first.codes, first.scale)
    error = first.error or ErrorStatistics()
    output_error = None if moment is None else relative_output_error(sample, rounded, moment)
    if not METHODS[recipe.rounding].stochastic:
        return _Result(error, error.relative_rmse, output_error)
    other_seed = replace(recipe, seed=(recipe.seed + 1) % 2**64)
    second = quantize_weight(sample, key, other_seed, calibration, statistics=False)
    original = sample.float()
    errors = [draw - original for draw in (rounded, dequantize_tensor(second.codes, second.scale))]
    common = float((errors[0].double() * errors[1].double()).sum())
    systematic = math.sqrt(max(common, 0) / error.sum_squared) if error.sum_squared else 0.0
    return _Result(error, systematic, output_error)


def _trial(format: str, rounding: str, results: list[_Result]) -> Trial:
    return Trial(
        format,
        rounding,
        errors=tuple(result.error for result in results),
        systematic=tuple(result.systematic for result in results),
        output_errors=tuple(result.output_error for result in results if result.output_error is not None),
    )
