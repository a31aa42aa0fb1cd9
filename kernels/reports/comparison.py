"""Every rounding in both formats on the same weights: what each would lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from statistics import median

import torch

from ..error import ErrorStatistics
from ..formats import FORMATS
from ..quantize import dequantize_tensor, quantize_tensor
from ..rounding import ROUNDINGS
from .report_table import number_of

LARGEST_SAMPLE = 1 << 20
"""Of a larger layer, this many evenly spaced values are compared."""


@dataclass(frozen=True)
class Trial:
    """One format and rounding; each list has an entry a layer."""

    format: str
    rounding: str
    errors: tuple[ErrorStatistics, ...]
    repeating: tuple[float, ...]
    """The error that two draws with different seeds have in common, as a share of the layer's RMS: what averaging over
    draws cannot remove. All of it for nearest, none but chance for an unbiased rounding."""

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


def compare_roundings(
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    scaling: str = "absmax",
    seed: int = 0,
    source: str = "",
    total: int | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Comparison:
    """Quantize each weight with every format and rounding.

    weights: (tensor key, float tensor of any shape), read one by one; of one with more than LARGEST_SAMPLE values,
    evenly spaced ones and the largest are taken. total: how many layers the model has, if not all are given.
    progress(done, key) is called before each weight. Raises what quantize_tensor raises, and ValueError for no weights.
    """
    keys, results = [], {choice: [] for choice in product(FORMATS, ROUNDINGS)}
    for done, (key, weight) in enumerate(weights):
        if progress:
            progress(done, key)
        keys.append(key)
        sample = thin(weight)
        for (format, rounding), layers in results.items():
            layers.append(_try(sample, format, rounding, scaling, seed, key))
    if not keys:
        raise ValueError("there are no layers to compare")
    trials = tuple(
        Trial(format, rounding, tuple(error for error, _ in layers), tuple(repeating for _, repeating in layers))
        for (format, rounding), layers in results.items()
    )
    return Comparison(source, scaling, seed, tuple(keys), total or len(keys), trials)


def thin(x: torch.Tensor) -> torch.Tensor:
    """At most LARGEST_SAMPLE + 1 values of a tensor, flat: evenly spaced, and the largest, which decides the scale."""
    flat = x.reshape(-1)
    if flat.numel() <= LARGEST_SAMPLE:
        return flat
    stride = -(-flat.numel() // LARGEST_SAMPLE)
    return torch.cat((flat[::stride], flat[flat.abs().argmax()].reshape(1)))


def recommend(comparison: Comparison) -> str:
    """What to choose and why, from the numbers of this comparison."""
    medians = {(trial.format, trial.rounding): median(trial.relative_rmse) for trial in comparison.trials}
    if not any(medians.values()):
        return "Every rounding in both formats keeps these layers exactly."
    format, rounding = min(medians, key=medians.__getitem__)
    stochastic = ROUNDINGS[rounding].stochastic
    rivals = [medians[format, name] for name in ROUNDINGS if ROUNDINGS[name].stochastic != stochastic]
    rival = "nearest" if stochastic else "a stochastic rounding"
    other_format = next(name for name in FORMATS if name != format)
    return (
        f"Choose {rounding} in {format} for weights closest to the original: its error is "
        f"{_percent(medians[format, rounding])} of a typical weight, against {_percent(median(rivals))} with {rival} "
        f"and {_percent(medians[other_format, rounding])} in {other_format}."
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


def to_markdown(comparison: Comparison) -> str:
    """A table with a row a format and rounding, medians over layers, after the recommendations."""
    lines = [
        recommend(comparison),
        recommend_for_sums(comparison),
        "",
        f"{comparison.source}: {describe_sample(comparison)}, scaling {comparison.scaling}; medians over layers",
        "",
        "| format | rounding | relative RMSE | bias / chance | error that repeats | SQNR (dB) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for trial in comparison.trials:
        sqnr = median(error.sqnr for error in trial.errors)
        lines.append(
            f"| {trial.format} | {trial.rounding} | {_percent(median(trial.relative_rmse))} | "
            f"{median(map(abs, trial.bias_over_chance)):.2f} | {_percent(median(trial.repeating))} | "
            f"{'lossless' if math.isinf(sqnr) else f'{sqnr:.2f}'} |"
        )
    return "\n".join(lines) + "\n"


def _try(sample: torch.Tensor, format: str, rounding: str, scaling: str, seed: int, key: str):
    choices = {"format": format, "rounding": rounding, "scaling": scaling, "key": key}
    first = quantize_tensor(sample, seed=seed, statistics=True, **choices)
    if not ROUNDINGS[rounding].stochastic:
        return first.error, first.error.relative_rmse
    second = quantize_tensor(sample, seed=(seed + 1) % 2**64, **choices)
    errors = [dequantize_tensor(q.codes, q.scale) - sample.float() for q in (first, second)]
    shared = float((errors[0].double() * errors[1].double()).sum())
    return first.error, math.sqrt(max(shared, 0) / first.error.sum_squared) if first.error.sum_squared else 0.0


def _bias_over_chance(error: ErrorStatistics) -> float:
    return error.bias / error.rmse * math.sqrt(error.count) if error.rmse else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
