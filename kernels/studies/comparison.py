"""Every rounding in both formats on the same weights: what each would lose.

With a calibration `calibrated` is among them, and what each would do to the layers' outputs is measured too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import compress, product
from statistics import median

import torch

from ..calibration.moments import Calibration
from ..engine.quantize_weight import quantize_weight
from ..numerics.error_statistics import ErrorStatistics, evenly_spaced
from ..numerics.formats import FORMATS
from ..numerics.output_error import relative_output_error
from ..numerics.quantized_tensor import dequantize_tensor
from ..numerics.rounding import CALIBRATED, METHODS, ROUNDINGS
from ..recipe import Recipe
from ..report.table import number_of

LARGEST_SAMPLE = 1 << 20
"""Of a larger layer, this many evenly spaced values are compared; with a calibration, whole rows of so many values."""

COLUMNS = ("format", "rounding", "relative RMSE", "bias / chance", "error that repeats", "SQNR (dB)")
OUTPUT_COLUMN = "output error"
"""Beside the others where there is a calibration."""


@dataclass(frozen=True)
class Trial:
    """One format and rounding; each list has an entry a layer."""

    format: str
    rounding: str
    errors: tuple[ErrorStatistics, ...]
    repeating: tuple[float, ...]
    """The error that two draws with different seeds have in common, as a share of the layer's RMS: what averaging over
    draws cannot remove. All of it for nearest, none but chance for an unbiased rounding."""
    output_errors: tuple[float, ...] = ()
    """Error of the layer's output, a share of the output, of those layers alone that the calibration saw."""

    @property
    def relative_rmse(self) -> tuple[float, ...]:
        return tuple(error.relative_rmse for error in self.errors)

    @property
    def bias_over_chance(self) -> tuple[float, ...]:
        """Each layer's mean error over RMSE / sqrt(n), which errors of random sign would give; 0 for no error."""
        return tuple(_bias_over_chance(error) for error in self.errors)


@dataclass(frozen=True)
class Comparison:
    """Trials of every format and rounding on the same layers."""

    source: str
    scaling: str
    seed: int
    keys: tuple[str, ...]
    """The layers that were compared."""
    total: int
    """The layers of the model."""
    trials: tuple[Trial, ...]
    calibration: str | None = None
    """What the calibration is called; None without one."""
    unseen: tuple[str, ...] = ()
    """Layers that the calibration does not know: calibrated rounding takes them to nearest."""

    @property
    def roundings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trial.rounding for trial in self.trials))


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

    weights: (tensor key, float tensor of any shape), read one by one; of one with more than LARGEST_SAMPLE values,
    evenly spaced ones and the largest are taken, see thin and thin_rows. total: how many layers the model has, if not
    all are given. calibration: adds calibrated rounding and the errors of outputs. progress(done, key) is called before
    each weight. Raises what quantize_tensor raises, and ValueError for no weights.
    """
    roundings = METHODS if calibration else ROUNDINGS
    keys, unseen, results = [], [], {choice: [] for choice in product(FORMATS, roundings)}
    for done, (key, weight) in enumerate(weights):
        if progress:
            progress(done, key)
        keys.append(key)
        layer = calibration.layer_of(key, weight) if calibration else None
        if calibration and not layer:
            unseen.append(key)
        sample = thin_rows(weight) if layer else thin(weight)
        moment = layer.moment(weight.device) if layer else None
        for (format, rounding), trials in results.items():
            recipe = Recipe(format=format, rounding=rounding, scaling=scaling, seed=seed)
            trials.append(_try(sample, key, recipe, calibration, moment))
    if not keys:
        raise ValueError("there are no layers to compare")
    return Comparison(
        source,
        scaling,
        seed,
        tuple(keys),
        total or len(keys),
        tuple(Trial(*choice, *_gather(trials)) for choice, trials in results.items()),
        calibration.source if calibration else None,
        tuple(unseen),
    )


def thin(x: torch.Tensor) -> torch.Tensor:
    """At most LARGEST_SAMPLE + 1 values of a tensor, flat: evenly spaced, and the largest, which decides the scale."""
    flat = x.reshape(-1)
    if flat.numel() <= LARGEST_SAMPLE:
        return flat
    stride = -(-flat.numel() // LARGEST_SAMPLE)
    return torch.cat((flat[::stride], flat[flat.abs().argmax()].reshape(1)))


def thin_rows(weight: torch.Tensor) -> torch.Tensor:
    """The same of a weight (out, in) in whole rows, each of which makes one output."""
    rows = max(1, LARGEST_SAMPLE // weight.shape[1])
    if len(weight) <= rows:
        return weight
    largest = int(weight.abs().amax(1).argmax())
    return weight[sorted({*evenly_spaced(len(weight), rows), largest})]


def recommend(comparison: Comparison) -> str:
    """What to choose for the weights and why, from the numbers of this comparison."""
    trials = [trial for trial in comparison.trials if trial.rounding in ROUNDINGS]
    medians = {(trial.format, trial.rounding): median(trial.relative_rmse) for trial in trials}
    if not any(medians.values()):
        return "Every rounding in both formats keeps these layers exactly."
    format, rounding = min(medians, key=medians.__getitem__)
    stochastic = ROUNDINGS[rounding].stochastic
    rivals = [medians[format, name] for name in ROUNDINGS if ROUNDINGS[name].stochastic != stochastic]
    rival = "nearest" if stochastic else "a stochastic rounding"
    other_format = next(name for name in FORMATS if name != format)
    choose = "Choose" if comparison.calibration is None else "Without a calibration, choose"
    return (
        f"{choose} {rounding} in {format} for weights closest to the original: its error is "
        f"{_percent(medians[format, rounding])} of a typical weight, against {_percent(median(rivals))} with {rival} "
        f"and {_percent(medians[other_format, rounding])} in {other_format}."
    )


def recommend_for_outputs(comparison: Comparison) -> str:
    """Whether calibrated rounding pays, from the numbers of this comparison; "" without a calibration."""
    if comparison.calibration is None:
        return ""
    if len(comparison.unseen) == len(comparison.keys):
        return "The calibration knows none of these layers, so it says nothing about them: is it another model's?"
    seen = [key not in comparison.unseen for key in comparison.keys]
    outputs, weights = (
        {(trial.format, trial.rounding): median(values(trial)) for trial in comparison.trials}
        for values in (lambda trial: trial.output_errors, lambda trial: compress(trial.relative_rmse, seen))
    )
    format = min(FORMATS, key=lambda name: outputs[name, CALIBRATED.name])
    calibrated, nearest = (format, CALIBRATED.name), (format, "nearest")
    if outputs[calibrated] >= outputs[nearest]:
        return (
            "Calibrated rounding gains nothing here: the error of a layer's output is "
            f"{_percent(outputs[calibrated])}, and {_percent(outputs[nearest])} with nearest."
        )
    text = (
        f"Choose calibrated in {format} for images closest to the original: the error of a layer's output is "
        f"{_percent(outputs[calibrated])}, against {_percent(outputs[nearest])} with nearest"
    )
    if weights[calibrated] <= weights[nearest]:
        return f"{text}."
    return (
        f"{text}. That its weights are further from the original ({_percent(weights[calibrated])}, against "
        f"{_percent(weights[nearest])}) is how it works: their errors cancel out in the output."
    )


def recommend_for_sums(comparison: Comparison) -> str:
    """Whether stochastic rounding pays where errors add up, from the numbers of this comparison."""
    repeating = {(trial.format, trial.rounding): median(trial.repeating) for trial in comparison.trials}
    format = min(FORMATS, key=lambda name: repeating[name, "nearest"])
    nearest = repeating[format, "nearest"]
    remains = max(repeating[format, name] for name in ROUNDINGS if ROUNDINGS[name].stochastic)
    if not nearest:
        return "Nothing is lost that averaging could bring back."
    if remains < nearest / 2:
        return (
            f"Averaged over many draws, at most {_percent(remains)} of error would remain with the stochastic "
            f"roundings, and all {_percent(nearest)} with nearest: choose a stochastic one for sums and repeated "
            "quantization."
        )
    return (
        f"Averaged over many draws, {_percent(remains)} of error would remain even with the stochastic roundings "
        f"({_percent(nearest)} with nearest): they do not help these layers."
    )


def describe_sample(comparison: Comparison) -> str:
    compared = len(comparison.keys)
    which = number_of(compared, "layer") if compared == comparison.total else f"{compared} of {comparison.total} layers"
    return f"{which}, evenly spaced" if compared < comparison.total else which


def recommendations(comparison: Comparison) -> list[str]:
    """What to choose, a sentence or two for each purpose."""
    each = (recommend_for_outputs, recommend, recommend_for_sums)
    return [text for text in (sentence(comparison) for sentence in each) if text]


def describe_unseen(comparison: Comparison) -> str:
    """Of which layers the errors of outputs are not known; "" where they are of all, or of none."""
    unseen = len(comparison.unseen)
    if unseen in (0, len(comparison.keys)):
        return ""
    return (
        f"{unseen} of these {number_of(len(comparison.keys), 'layer')} the calibration does not know: their outputs "
        "are left out, and calibrated means nearest for them."
    )


def to_markdown(comparison: Comparison) -> str:
    """A table with a row a format and rounding, medians over layers, after the recommendations."""
    calibrated = comparison.calibration is not None
    unseen = describe_unseen(comparison)
    calibration = f", calibration {comparison.calibration or 'without a name'}" if calibrated else ""
    lines = [
        *recommendations(comparison),
        *([unseen] if unseen else []),
        "",
        f"{comparison.source}: {describe_sample(comparison)}, scaling {comparison.scaling}{calibration}; medians over "
        "layers",
        "",
        f"| {' | '.join((*COLUMNS, OUTPUT_COLUMN) if calibrated else COLUMNS)} |",
        f"|---|---|---:|---:|---:|---:|{'---:|' if calibrated else ''}",
    ]
    for trial in comparison.trials:
        lines.append(f"| {' | '.join(_cells(trial) + ([typical_output_error(trial)] if calibrated else []))} |")
    return "\n".join(lines) + "\n"


def typical_output_error(trial: Trial) -> str:
    """The median over layers, "" where there is none."""
    return _percent(median(trial.output_errors)) if trial.output_errors else ""


def _cells(trial: Trial) -> list[str]:
    sqnr = median(error.sqnr for error in trial.errors)
    return [
        trial.format,
        trial.rounding,
        _percent(median(trial.relative_rmse)),
        f"{median(map(abs, trial.bias_over_chance)):.2f}",
        _percent(median(trial.repeating)),
        "lossless" if math.isinf(sqnr) else f"{sqnr:.2f}",
    ]


def _try(sample, key: str, recipe: Recipe, calibration: Calibration | None, moment: torch.Tensor | None):
    """The error, its share that repeats, and the error of the output (None without a moment)."""
    first = quantize_weight(sample, key, recipe, calibration)
    rounded = dequantize_tensor(first.codes, first.scale)
    output_error = None if moment is None else relative_output_error(sample, rounded, moment)
    if not METHODS[recipe.rounding].stochastic:
        return first.error, first.error.relative_rmse, output_error
    other = replace(recipe, seed=(recipe.seed + 1) % 2**64)
    second = quantize_weight(sample, key, other, calibration, statistics=False)
    errors = [draw - sample.float() for draw in (rounded, dequantize_tensor(second.codes, second.scale))]
    shared = float((errors[0].double() * errors[1].double()).sum())
    repeating = math.sqrt(max(shared, 0) / first.error.sum_squared) if first.error.sum_squared else 0.0
    return first.error, repeating, output_error


def _gather(trials) -> tuple[tuple, tuple, tuple]:
    """A Trial's lists, from what _try returned of each layer."""
    errors, repeating, output_errors = zip(*trials, strict=True)
    return errors, repeating, tuple(error for error in output_errors if error is not None)


def _bias_over_chance(error: ErrorStatistics) -> float:
    return error.bias / error.rmse * math.sqrt(error.count) if error.rmse else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
