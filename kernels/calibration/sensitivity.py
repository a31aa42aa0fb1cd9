"""Sensitivity: how much the picture changes when one layer is rounded, and what other roundings would do.

A layer's effect is the mean squared change of the final latents when it alone is rounded to nearest E4M3. The effects
of several layers add up. Errors of a layer are proportional to the error of its output, so the effect of another
rounding is the measured one times the square of a ratio of errors.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..numerics.error_statistics import evenly_spaced
from ..numerics.formats import E4M3FN, FORMATS
from ..numerics.quantized_tensor import quantize_tensor
from ..numerics.rounding import CALIBRATED, METHODS
from .calibrate_tensor import calibrate_tensor
from .moments import LayerCalibration

SAMPLED_VALUES = 1 << 20
"""Values of a weight on which its errors are predicted: whole rows, evenly spaced."""

VERSION = 1
"""Of the JSON."""


@dataclass(frozen=True)
class RoundingErrors:
    """Errors of one weight in several roundings, each relative to what it is an error of."""

    nearest: Mapping[str, float]
    """Format -> RMS error of the weight, rounded to nearest."""
    stochastic: Mapping[str, float]
    """Format -> the same for stochastic rounding; all stochastic roundings have the same distribution."""
    output: tuple[float, float] | None = None
    """Predicted RMS error of the layer's output in E4M3: nearest, calibrated. None without recorded inputs."""

    def ratio(self, format: str, rounding: str) -> float:
        """The error of a rounding over that of nearest E4M3; 0 if the weight is exact in E4M3.

        For calibrated rounding it is the ratio of predicted output errors (without recorded inputs, calibrated counts
        as nearest). Everything else is the ratio of the weight's errors.
        """
        unit = self.nearest[E4M3FN.name]
        if not unit > 0:
            return 0.0
        ratio = (self.stochastic if METHODS[rounding].stochastic else self.nearest)[format] / unit
        if rounding == CALIBRATED.name and self.output and self.output[0] > 0:
            ratio *= self.output[1] / self.output[0]
        return ratio


@dataclass(frozen=True)
class LayerEffect:
    """What one layer does to the picture."""

    change: float
    """Mean squared change of the final latents when this layer alone is rounded to nearest E4M3."""
    errors: RoundingErrors
    alone: bool = True
    """Whether it was measured alone. False: its share of what a group of layers changes together."""

    def with_rounding(self, format: str, rounding: str) -> float:
        """The mean squared change with another rounding or format."""
        return self.change * self.errors.ratio(format, rounding) ** 2


@dataclass(frozen=True)
class Sensitivity:
    """The measured effects of a model's layers."""

    layers: Mapping[str, LayerEffect]
    """By tensor key. Layers that were not used while measuring are left out."""
    power: float
    """Mean square of the final latents."""
    renders: int
    """Renders of the unchanged model over which effects and power are means."""
    how: str = ""
    """How it was measured, for people."""
    gain: float = 1.0
    """What layers that are rounded to nearest change together in a long render, over the sum of their effects, both
    relative to the power."""
    calibrated_gain: float | None = None
    """The same for calibrated rounding, which leaves other errors; None: not measured, taken to be `gain`."""

    def gain_of(self, rounding: str) -> float:
        """The gain that predictions for this rounding use."""
        calibrated = self.calibrated_gain if rounding == CALIBRATED.name else None
        return self.gain if calibrated is None else calibrated

    def level(self, rounding: str) -> float:
        """The sum of effects that is predicted to change the latents of a long render as much as they are, 0 dB."""
        return self.power / self.gain_of(rounding)

    def __add__(self, other: Sensitivity) -> Sensitivity:
        """Both measurements together, weighted by their renders."""
        layers = dict(self.layers)
        for key, effect in other.layers.items():
            layers[key] = self._mean(layers[key], effect, other.renders) if key in layers else effect
        renders = self.renders + other.renders
        power = (self.power * self.renders + other.power * other.renders) / renders
        how = " + ".join(filter(None, (self.how, other.how)))
        known = any(each.calibrated_gain is not None for each in (self, other))
        gains = [self._mean_gain(other, rounding) for rounding in ("nearest", CALIBRATED.name)]
        return Sensitivity(layers, power, renders, how, gains[0], gains[1] if known else None)

    def _mean_gain(self, other: Sensitivity, rounding: str) -> float:
        share = self.renders / (self.renders + other.renders)
        return self.gain_of(rounding) ** share * other.gain_of(rounding) ** (1 - share)

    def _mean(self, one: LayerEffect, other: LayerEffect, renders: int) -> LayerEffect:
        change = (one.change * self.renders + other.change * renders) / (self.renders + renders)
        errors = one.errors if one.errors.output and not other.errors.output else other.errors
        return LayerEffect(change, errors, one.alone and other.alone)

    @property
    def predicts_calibrated(self) -> bool:
        """Whether the output errors of calibrated rounding are known, of at least one layer."""
        return any(layer.errors.output for layer in self.layers.values())


def quality(power: float, change: float) -> float:
    """Latent dB: 10 log10(mean squared latent / mean squared change); infinite without a change."""
    return 10 * math.log10(power / change) if change > 0 and power > 0 else math.inf


def allowed_change(power: float, decibels: float) -> float:
    """The largest mean squared change with this quality."""
    return float(power * 10 ** (-decibels / 10))


def rounding_errors(weight: torch.Tensor, layer: LayerCalibration | None = None) -> RoundingErrors:
    """Errors of a Linear weight (out, in), float, on any device; of a large one, from a sample of its outputs.

    layer: its recorded inputs, for the error of its output. Raises NonFiniteError.
    """
    sample = _sample(weight)
    nearest, stochastic = ({f: _weight_error(sample, f, each) for f in FORMATS} for each in ("nearest", "stochastic"))
    output = None
    if layer is not None:
        predicted = calibrate_tensor(sample, layer).output_error
        output = (predicted.nearest, predicted.chosen) if predicted else None
    return RoundingErrors(nearest, stochastic, output)


def _weight_error(sample: torch.Tensor, format: str, rounding: str) -> float:
    error = quantize_tensor(sample, format=format, rounding=rounding, statistics=True).error
    return error.relative_rmse if error else 0.0


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Evenly spaced rows, and that of the largest value, which sets the scale."""
    rows = max(1, SAMPLED_VALUES // max(weight.shape[1], 1))
    if len(weight) <= rows:
        return weight
    largest = int(weight.abs().amax(1).argmax())
    return weight[sorted({*evenly_spaced(len(weight), rows), largest})]


# The JSON of a file


def to_json(sensitivity: Sensitivity) -> dict[str, object]:
    """A sensitivity as JSON data."""
    return {
        "version": VERSION,
        "power": sensitivity.power,
        "renders": sensitivity.renders,
        "how": sensitivity.how,
        "gain": sensitivity.gain,
        **({} if sensitivity.calibrated_gain is None else {"calibrated_gain": sensitivity.calibrated_gain}),
        "layers": {key: _layer_to_json(layer) for key, layer in sensitivity.layers.items()},
    }


def _layer_to_json(layer: LayerEffect) -> dict[str, object]:
    errors = layer.errors
    entry: dict[str, object] = {
        "change": layer.change,
        "nearest": dict(errors.nearest),
        "stochastic": dict(errors.stochastic),
    }
    if errors.output:
        entry["output"] = list(errors.output)
    return entry if layer.alone else entry | {"alone": False}


def from_json(stated: Mapping[str, object]) -> Sensitivity:
    """The sensitivity of JSON data. Raises ValueError for what to_json never writes; entries it does not know are
    ignored."""
    version = stated.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"the version of its sensitivities is {reprlib.repr(version)}")
    layers, renders, gain = stated.get("layers"), stated.get("renders"), _gain("gain", stated.get("gain", 1.0))
    calibrated_gain = stated.get("calibrated_gain")
    if not isinstance(layers, dict) or not isinstance(renders, int) or isinstance(renders, bool) or renders < 1:
        raise ValueError("its sensitivities lack layers or renders")
    return Sensitivity(
        {key: _layer_from_json(key, entry) for key, entry in layers.items()},
        _number("power", stated.get("power")),
        renders,
        str(stated.get("how", "")),
        gain,
        None if calibrated_gain is None else _gain("calibrated_gain", calibrated_gain),
    )


def _layer_from_json(key: str, entry: object) -> LayerEffect:
    if not isinstance(entry, dict):
        raise ValueError(f"the sensitivity of layer {key!r} is not an object")
    change = _number(f"effect of layer {key!r}", entry.get("change"))
    nearest, stochastic = (_errors(key, entry.get(name)) for name in ("nearest", "stochastic"))
    output = entry.get("output")
    if output is not None:
        if not isinstance(output, list) or len(output) != 2:
            raise ValueError(f"the output errors of layer {key!r} are {reprlib.repr(output)}")
        output = (_number(f"output error of layer {key!r}", output[0]), _number("output error", output[1]))
    return LayerEffect(change, RoundingErrors(nearest, stochastic, output), entry.get("alone", True) is not False)


def _errors(key: str, entry: object) -> dict[str, float]:
    """Format -> error of a weight."""
    if not isinstance(entry, dict):
        raise ValueError(f"the sensitivity of layer {key!r} lacks the errors of its weight")
    return {format: _number(f"error of layer {key!r} in {format}", entry.get(format)) for format in FORMATS}


def _gain(what: str, value: object) -> float:
    gain = _number(f"{what} of its sensitivities", value)
    if not gain:
        raise ValueError(f"the {what} of its sensitivities is 0")
    return gain


def _number(what: str, value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ValueError(f"the {what} is {reprlib.repr(value)}")
