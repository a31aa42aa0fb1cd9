"""What a comparison of roundings means in words: which layers it covers, and what to choose for which purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress
from statistics import median

from .. import display
from ..numerics.formats import FORMATS
from ..numerics.rounding import CALIBRATED, ROUNDINGS
from .comparison import Comparison, Trial


def recommendations(comparison: Comparison) -> list[str]:
    """What to choose for images, for weights and for sums; one or two sentences each."""
    texts = (advise_for_outputs(comparison), advise_for_weights(comparison), advise_for_sums(comparison))
    return [text for text in texts if text]


def advise_for_outputs(comparison: Comparison) -> str:
    """Whether calibrated rounding is worth it, from the output errors; "" without a calibration."""
    if comparison.calibration is None:
        return ""
    seen = comparison.calibrated_layers
    if not any(seen):
        return "None of these layers is in the calibration. It was probably recorded from another model."
    outputs = _medians(comparison.trials, lambda trial: trial.output_errors)
    weights = _medians(comparison.trials, lambda trial: compress(trial.relative_rmse, seen))
    format = min(FORMATS, key=lambda name: outputs[name, CALIBRATED.name])
    calibrated, nearest = (format, CALIBRATED.name), (format, "nearest")
    errors = f"{display.share(outputs[calibrated])} (nearest: {display.share(outputs[nearest])})"
    if outputs[calibrated] >= outputs[nearest]:
        return f"Calibrated rounding does not help here: the output error of a layer is {errors}."
    text = f"Choose calibrated in {format} for images closest to the original: the output error of a layer is {errors}."
    if weights[calibrated] <= weights[nearest]:
        return text
    return (
        f"{text} Its weights are further from the original ({display.share(weights[calibrated])}, nearest: "
        f"{display.share(weights[nearest])}), but their errors cancel out in the output."
    )


def advise_for_weights(comparison: Comparison) -> str:
    """The format and rounding whose weights are closest to the original."""
    trials = [trial for trial in comparison.trials if trial.rounding in ROUNDINGS]
    errors = _medians(trials, lambda trial: trial.relative_rmse)
    if not any(errors.values()):
        return "Every rounding in both formats keeps these layers exactly."
    format, rounding = min(errors, key=errors.__getitem__)
    stochastic = ROUNDINGS[rounding].stochastic
    rivals = [errors[format, name] for name in ROUNDINGS if ROUNDINGS[name].stochastic != stochastic]
    rival = "nearest" if stochastic else "stochastic rounding"
    other_format = next(name for name in FORMATS if name != format)
    choose = "Choose" if comparison.calibration is None else "Without a calibration, choose"
    return (
        f"{choose} {rounding} in {format} for weights closest to the original: its error is "
        f"{display.share(errors[format, rounding])} of a typical weight ({rival}: "
        f"{display.share(median(rivals))}, {other_format}: {display.share(errors[other_format, rounding])})."
    )


def advise_for_sums(comparison: Comparison) -> str:
    """Whether stochastic rounding is worth it where errors add up."""
    errors = _medians(comparison.trials, lambda trial: trial.systematic)
    format = min(FORMATS, key=lambda name: errors[name, "nearest"])
    nearest = errors[format, "nearest"]
    remains = max(errors[format, name] for name in ROUNDINGS if ROUNDINGS[name].stochastic)
    if not nearest:
        return "There is no error that averaging over many seeds could reduce."
    if remains < nearest / 2:
        return (
            "Choose a stochastic rounding for sums and repeated quantization: averaged over seeds, at most "
            f"{display.share(remains)} of error remains (nearest: {display.share(nearest)})."
        )
    return (
        "Stochastic rounding does not help these layers: even averaged over many seeds, "
        f"{display.share(remains)} of error remains (nearest: {display.share(nearest)})."
    )


def describe_sample(comparison: Comparison) -> str:
    """How many layers were compared: "8 layers", "3 of 30 layers, evenly spaced"."""
    compared = len(comparison.keys)
    if compared == comparison.total:
        return display.count(compared, "layer")
    return f"{compared:,} of {display.count(comparison.total, 'layer')}, evenly spaced"


def describe_unseen(comparison: Comparison) -> str:
    """How many layers are not in the calibration; "" if all are, or none."""
    unseen = len(comparison.unseen)
    if unseen in (0, len(comparison.keys)):
        return ""
    these = f"{unseen:,} of these {display.count(len(comparison.keys), 'layer')}"
    if unseen == 1:
        return f"{these} is not in the calibration. Its output is left out, and calibrated rounds it to nearest."
    return f"{these} are not in the calibration. Their outputs are left out, and calibrated rounds them to nearest."


def _medians(trials: Iterable[Trial], values: Callable[[Trial], Iterable[float]]) -> dict[tuple[str, str], float]:
    """(format, rounding) -> median over the layers."""
    return {(trial.format, trial.rounding): median(values(trial)) for trial in trials}
