"""Size and quality: what layers `measured` would make of a model, from all FP8 to 16 bits."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from .. import display
from ..calibration.moments import Calibration
from ..engine.measured_choice import Choice, Choices, candidate_names, choices, effects_of
from ..engine.quantization import Quantization
from ..engine.weights import Weights
from ..errors import CalibrationError
from ..recipe import Recipe
from ..report.table import layer_kind
from ..selection.measured import by_effect_per_byte

CURVES = ("nearest", "calibrated")
"""The roundings that are drawn."""

MOST_POINTS = 400
"""Points of a curve."""

ROWS = 12
"""Sizes in the table."""
NAMED = 10
"""Layers that the table names."""


@dataclass(frozen=True)
class Point:
    """One file."""

    nbytes: int
    """Counted from above, with METADATA_BYTES."""
    decibels: float
    """Predicted latent dB; infinite where every layer stays in 16 bits."""
    kept: int
    """Layers that stay in 16 bits."""
    share: float
    """Share of the parameters of all layers that stay in 16 bits."""
    shares: Mapping[str, float]
    """The same for the layers of each kind, by KINDS."""


@dataclass(frozen=True)
class Curve:
    """The files that one rounding makes."""

    rounding: str
    points: tuple[Point, ...]
    """From all FP8 to all 16 bits, each with one more layer kept, or several more in a model of many."""
    preset: Point
    """The file that layers `auto` makes."""
    order: tuple[str, ...]
    """Tensor keys in the order in which they are kept."""


@dataclass(frozen=True)
class Kind:
    """The layers of one kind, such as attention."""

    name: str
    layers: int
    parameters: float
    """Share of the parameters of all layers."""
    effect: float
    """Share of the predicted change of the picture if all layers are in FP8."""


@dataclass(frozen=True)
class SizeQuality:
    """What can be made of one model in one format."""

    source: str
    family: str
    format: str
    how: str
    """How the effects were measured."""
    curves: tuple[Curve, ...]
    kinds: tuple[Kind, ...]
    """With the last curve's rounding, those with the largest effect per parameter first."""
    unknown: int
    """Layers without a known effect, which stay in 16 bits in all files."""

    @property
    def best(self) -> Curve:
        """The curve of the best rounding that the calibration allows."""
        return self.curves[-1]


def study_sizes(weights: Weights, calibration: Calibration, format: str = "float8_e4m3fn") -> SizeQuality:
    """Predict size and quality of every file that layers `measured` can make.

    Calibrated rounding is left out where the calibration has no recorded inputs for it. Raises CalibrationError for a
    calibration without measured effects, or of another model, and what Quantization raises.
    """
    sensitivity = calibration.sensitivity
    if sensitivity is None:
        raise CalibrationError(
            "this calibration has no measured effects: measure them with Layer Sensitivity, and connect its output"
        )
    recipe = Recipe(format=format, rounding="nearest", layers="all_linear")
    job = Quantization(weights, recipe, calibration)
    preset = Quantization(weights, replace(recipe, layers="auto"), calibration)
    names = candidate_names(weights, job.selection)
    known = [name for name, key in names.items() if key in sensitivity.layers]
    state = job.state_dict()
    for name in names.keys() - set(known):
        state.keep(name, weights.entry(name))
    roundings = [each for each in CURVES if each == "nearest" or sensitivity.predicts_calibrated]
    everything = {
        rounding: choices(
            weights,
            state,
            effects_of(weights, names, replace(recipe, rounding=rounding), calibration, torch.device("cpu")),
            sensitivity.level(rounding),
        )
        for rounding in roundings
    }
    in_preset = frozenset(name for name in known if name not in set(preset.quantized))
    layers = _Layers(weights, {name: names[name] for name in known})
    curves = tuple(layers.curve(rounding, every, in_preset) for rounding, every in everything.items())
    kinds = layers.kinds(everything[roundings[-1]])
    how = sensitivity.how
    return SizeQuality(weights.name, job.selection.family, format, how, curves, kinds, unknown=len(names) - len(known))


class _Layers:
    """The layers that can be chosen, with their kinds and sizes."""

    def __init__(self, weights: Weights, names: Mapping[str, str]):
        """names: name -> tensor key."""
        self._names = names
        self._elements = {name: weights.tensors[name].elements for name in names}
        self._kinds = {name: layer_kind(key) for name, key in names.items()}
        self._of_kind = Counter[str]()
        for name, kind in self._kinds.items():
            self._of_kind[kind] += self._elements[name]

    def curve(self, rounding: str, every: Choices, in_preset: Collection[str]) -> Curve:
        order = [candidate.name for candidate in by_effect_per_byte(every.candidates)]
        step = max(1, -(-len(order) // MOST_POINTS))
        counts = [*range(0, len(order), step), len(order)]
        points = tuple(self._point(every.choice(order[:count])) for count in counts)
        preset = self._point(every.choice(in_preset))
        return Curve(rounding, points, preset, tuple(self._names[name] for name in order))

    def kinds(self, every: Choices) -> tuple[Kind, ...]:
        layers, effects = Counter(self._kinds.values()), dict.fromkeys(self._of_kind, 0.0)
        for candidate in every.candidates:
            effects[self._kinds[candidate.name]] += candidate.effect
        whole, parameters = sum(effects.values()) or 1.0, self._of_kind.total()
        kinds = [Kind(kind, layers[kind], n / parameters, effects[kind] / whole) for kind, n in self._of_kind.items()]
        return tuple(sorted(kinds, key=lambda kind: -kind.effect / kind.parameters))

    def _point(self, choice: Choice) -> Point:
        assert choice.decibels is not None, "the effects were measured"
        kept = Counter[str]()
        for name in choice.kept:
            kept[self._kinds[name]] += self._elements[name]
        shares = {kind: kept[kind] / elements for kind, elements in self._of_kind.items()}
        return Point(choice.nbytes, choice.decibels, len(choice.kept), kept.total() / self._of_kind.total(), shares)


def to_markdown(study: SizeQuality) -> str:
    """Two tables: sizes with their predicted quality, and the kinds of layers; then the layers that are kept first."""
    roundings = [curve.rounding for curve in study.curves]
    lines = [
        f"{display.markdown(study.source)}, {study.format}: predicted latent quality by file size",
        "",
        f"| file | layers in 16 bits | parameters in 16 bits | {' | '.join(roundings)} |",
        f"|---:|---:|---:|{'---:|' * len(roundings)}",
        *(_row(study, point) for point in _evenly_sized(study.best.points)),
        "",
        f"Layers auto (preset {study.family}): {_described(study.best.preset)}, "
        + ", ".join(f"{curve.rounding} {display.decibels(curve.preset.decibels)}" for curve in study.curves),
        "",
        "| kind | layers | parameters | share of the change |",
        "|---|---:|---:|---:|",
        *(
            f"| {kind.name} | {kind.layers:,} | {display.share(kind.parameters)} | {display.share(kind.effect)} |"
            for kind in study.kinds
        ),
        "",
        f"Kept first ({study.best.rounding}): {', '.join(display.markdown(key) for key in study.best.order[:NAMED])}",
        "",
        f"Measured with {study.how}. Sizes include 1 MB for metadata.",
    ]
    return "\n".join(lines) + "\n"


def to_json(study: SizeQuality) -> str:
    """The whole study. Infinite decibels are null."""

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(each) for each in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    return json.dumps(finite(asdict(study)), indent=1)


def quality_at(curve: Curve, nbytes: int) -> float:
    """Predicted latent dB of the largest file of a curve of at most this size."""
    return max((point.decibels for point in curve.points if point.nbytes <= nbytes), default=-math.inf)


def _row(study: SizeQuality, point: Point) -> str:
    levels = (display.decibels(quality_at(curve, point.nbytes)) for curve in study.curves)
    cells = display.bytes(point.nbytes), f"{point.kept:,}", display.share(round(point.share, 3)), *levels
    return f"| {' | '.join(cells)} |"


def _described(point: Point) -> str:
    return f"{display.bytes(point.nbytes)}, {display.share(round(point.share, 3))} of the parameters in 16 bits"


def _evenly_sized(points: Sequence[Point]) -> list[Point]:
    """At most ROWS points, evenly spaced in size, with the first and the last."""
    low, high = points[0].nbytes, points[-1].nbytes
    wanted = [low + (high - low) * i / (ROWS - 1) for i in range(ROWS)]
    chosen = {min(points, key=lambda point: abs(point.nbytes - size)).nbytes for size in wanted}
    return [point for point in {point.nbytes: point for point in points}.values() if point.nbytes in chosen]
