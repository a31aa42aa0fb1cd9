"""layers `measured`: which layers of these weights stay as they are, to meet a size or a quality."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from .. import display
from ..calibration.moments import Calibration
from ..calibration.sensitivity import allowed_change, quality, rounding_errors
from ..errors import CalibrationError, ChoiceError
from ..numerics.rounding import CALIBRATED
from ..progress import Meter, ProgressCallback
from ..recipe import Recipe
from ..selection.measured import Candidate, effect_of, keep_until, keep_within
from ..selection.presets import DIFFUSION
from ..selection.reasons import EFFECT, NO_EFFECT_KNOWN, Reason
from ..selection.selection import Selection
from ..state_dict.scaled_state_dict import ScaledStateDict
from ..state_dict.size import scaled_bytes, state_dict_bytes, tensor_bytes
from .weights import Weights

GB = 1e9
"""Bytes, as in `size_limit`."""

CHOSEN = (EFFECT, NO_EFFECT_KNOWN)
"""The kinds of reasons that come from a choice."""


@dataclass(frozen=True)
class Choice:
    """Which layers stay as they are, and what that gives."""

    kept: frozenset[str]
    """Names of the candidates that are not quantized."""
    candidates: int
    nbytes: int
    """Bytes of the file, counted from above."""
    decibels: float | None
    """Predicted latent dB; None where the effects were not measured."""


@dataclass(frozen=True)
class Choices:
    """All that can be chosen: the candidates, and the file in which every one of them is quantized."""

    candidates: tuple[Candidate, ...]
    smallest: int
    """Bytes of that file, counted from above."""
    level: float | None
    """The change that would be 0 dB, in the unit of the effects; None where the effects were not measured."""

    @cached_property
    def largest(self) -> int:
        """Bytes of the file in which every candidate stays as it is."""
        return self.smallest + sum(candidate.nbytes for candidate in self.candidates)

    def within(self, nbytes: int) -> Choice:
        """The best file of at most this size. Raises ChoiceError if there is none."""
        if nbytes < self.smallest:
            least = math.ceil(self.smallest / GB * 1000) / 1000
            raise ChoiceError(
                f"a size limit of {nbytes / GB:g} GB is too small: the smallest possible file takes "
                f"{least:.3f} GB; set size_limit to at least {least:.3f}"
            )
        return self.choice(keep_within(self.candidates, nbytes - self.smallest))

    def reaching(self, decibels: float) -> Choice:
        """The smallest file of at least this quality. The effects must have been measured."""
        assert self.level is not None, "the effects were not measured"
        return self.choice(keep_until(self.candidates, allowed_change(self.level, decibels)))

    def choice(self, kept: Collection[str]) -> Choice:
        """What keeping these layers gives."""
        quantized = [candidate for candidate in self.candidates if candidate.name not in kept]
        nbytes = self.largest - sum(candidate.nbytes for candidate in quantized)
        decibels = None if self.level is None else quality(self.level, effect_of(quantized))
        return Choice(frozenset(kept), len(self.candidates), nbytes, decibels)


def effects_of(
    weights: Weights,
    names: Mapping[str, str],
    recipe: Recipe,
    calibration: Calibration,
    device: torch.device,
    progress: ProgressCallback | None = None,
) -> dict[str, float]:
    """Name -> the effect of quantizing this layer as the recipe says, of those whose effect is known.

    names: name -> tensor key. Measured effects, or else the squares of predicted relative output errors, for which the
    weights are read. Raises CalibrationError if no effect is known.
    """
    if calibration.sensitivity is not None:
        layers = calibration.sensitivity.layers
        known = {
            name: layers[key].with_rounding(recipe.format, recipe.rounding)
            for name, key in names.items()
            if key in layers
        }
    else:
        known = dict(_predicted(weights, names, recipe, calibration, device, progress))
    if names and not known:
        raise CalibrationError(
            f"none of the layers of {weights.name} is in this calibration: it was made with another model; calibrate "
            "and measure this one"
        )
    return known


def _predicted(
    weights: Weights,
    names: Mapping[str, str],
    recipe: Recipe,
    calibration: Calibration,
    device: torch.device,
    progress: ProgressCallback | None,
) -> Iterator[tuple[str, float]]:
    seen = [name for name, key in names.items() if key in calibration.layers]
    meter = Meter(sum(weights.tensors[name].nbytes for name in seen), progress)
    with weights.reading(seen, device) as reads:
        for name, read in zip(seen, reads, strict=True):
            meter.start(names[name], weights.tensors[name].nbytes)
            x, send = read()
            layer = calibration.layer_of(names[name], x)
            if layer is None:
                continue
            errors = rounding_errors(send(x, device), layer)
            if errors.output:
                yield name, (errors.output[0] * errors.ratio(recipe.format, recipe.rounding)) ** 2
    meter.finish()


def choices(
    weights: Weights, state: ScaledStateDict, effects: Mapping[str, float], level: float | None, reserved: int = 0
) -> Choices:
    """What can be chosen. state: every candidate in it is pending. effects: name of a candidate -> its effect."""
    candidates = []
    for name, effect in effects.items():
        kept = tensor_bytes(name, weights.entry(name).info)
        candidates.append(Candidate(name, effect, kept - scaled_bytes(state.pending[name])))
    return Choices(tuple(candidates), state_dict_bytes(state) + reserved, level)


class MeasuredChoice:
    """The choice that a recipe with layers `measured` asks for."""

    def __init__(
        self,
        weights: Weights,
        selection: Selection,
        recipe: Recipe,
        calibration: Calibration | None,
        device: torch.device,
        progress: ProgressCallback | None = None,
    ):
        """progress: called while weights are read, where no effects were measured.

        Raises CalibrationError for a calibration that is missing, was made with another model, or has no measured
        effects where a quality is asked for; the source's error for anything but a diffusion model.
        """
        self._weights, self._recipe = weights, recipe
        self._calibration = _checked(weights, selection, recipe, calibration)
        names = candidate_names(weights, selection)
        self._effects = effects_of(weights, names, recipe, self._calibration, device, progress)
        self.unknown = [name for name in names if name not in self._effects]
        """Candidates without a known effect. They stay as they are."""
        self.choice: Choice | None = None

    def reasons(self, state: ScaledStateDict, reserved: int = 0) -> dict[str, Reason]:
        """Name -> why a weight stays as it is.

        state: what the job would make if it kept nothing because of this choice but `unknown`. reserved: bytes of what
        else will be in the file. Raises ChoiceError for a size limit that is too small.
        """
        known = {name: effect for name, effect in self._effects.items() if name in state.pending}
        sensitivity = self._calibration.sensitivity
        level = sensitivity.level(self._recipe.rounding) if sensitivity else None
        self.choices = choices(self._weights, state, known, level, reserved)
        if self._recipe.size_limit:
            self.choice = self.choices.within(math.floor(self._recipe.size_limit * GB))
        else:
            self.choice = self.choices.reaching(self._recipe.target_quality)
        return {name: Reason(EFFECT) for name in known if name in self.choice.kept}

    def notes(self) -> Iterator[str]:
        """What a user should know about the choice."""
        assert self.choice, "nothing was chosen"
        choice, sensitivity = self.choice, self._calibration.sensitivity
        by = "measured effect" if sensitivity else "predicted output error"
        layers = display.count(choice.candidates, "layer")
        text = f"{len(choice.kept):,} of {layers} stay as they are, chosen by {by} per byte"
        if choice.decibels is not None:
            text += f": predicted latent quality {display.decibels(choice.decibels)}"
        yield f"{text}. The file takes at most {display.bytes(choice.nbytes)}"
        if sensitivity is None:
            yield "the effects on the picture were not measured: Layer Sensitivity would choose better layers"
        elif self._recipe.rounding == CALIBRATED.name and not sensitivity.predicts_calibrated:
            yield (
                "Layer Sensitivity measured without recorded inputs, so calibrated rounding counts as nearest in this "
                "choice: connect a calibration to Layer Sensitivity"
            )
        if self.unknown:
            layers = display.count(len(self.unknown), "layer")
            yield f"{layers} without a known effect stay as they are: nothing was measured or recorded for them"


def candidate_names(weights: Weights, selection: Selection) -> dict[str, str]:
    """Name -> tensor key of the weights that can be chosen: those of the diffusion model that are not scaled FP8."""
    components = selection.components
    scaled = weights.scaled
    return {
        name: selection.tensor_key(name)
        for name in selection.quantize
        if components.of(name) == components.main and name not in scaled
    }


def _checked(weights: Weights, selection: Selection, recipe: Recipe, calibration: Calibration | None) -> Calibration:
    if calibration is None:
        raise CalibrationError(
            "layers 'measured' needs to know what each layer does: connect Layer Sensitivity or Load Calibration to "
            "the input 'calibration' (on the command line: --calibration FILE)"
        )
    if selection.components.main.preset.kind != DIFFUSION:
        raise weights.error("is not a diffusion model, and layers 'measured' works for diffusion models only")
    if recipe.target_quality and calibration.sensitivity is None:
        raise CalibrationError(
            "target_quality needs measured effects, and this calibration has none: measure them with Layer "
            "Sensitivity, or set size_limit instead"
        )
    return calibration
