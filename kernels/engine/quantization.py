"""The engine: weights, a recipe and perhaps a calibration -> a scaled state dict and a report.

quantization = Quantization(weights, recipe, calibration)
quantization.report()                      the plan: what will be quantized, and what is kept
state = quantization.state_dict()          weights are pending
write_state_dict(state, ...)               or make_codes(state, ...): the pass over the weights
quantization.report()                      what it did
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import torch

from ..calibration.moments import Calibration
from ..errors import NonFiniteError
from ..numerics.error_statistics import ErrorStatistics
from ..numerics.formats import FORMATS
from ..numerics.nonfinite import count_nonfinite
from ..numerics.placement import Placement
from ..numerics.quantized_tensor import QuantizedTensor
from ..numerics.trace import trace
from ..progress import Meter, ProgressCallback
from ..recipe import Recipe, with_calibration
from ..report.report import KeptTensor, LayerReport, Report
from ..selection.presets import NEVER_QUANTIZED, TEXT_ENCODER
from ..selection.reasons import NO_EFFECT_KNOWN, NON_FINITE, NOT_LINEAR, Reason
from ..selection.selection import MEASURED, Selection, select_layers
from ..state_dict.layouts import ScaledLayer
from ..state_dict.scaled_state_dict import PendingWeight, Round, ScaledStateDict
from ..version import VERSION
from . import notes
from .measured_choice import CHOSEN, MeasuredChoice
from .quantize_weight import check_calibration, input_scale, quantize_weight
from .weights import Read, Weights

log = logging.getLogger("stochastic_fp8")

RECIPE_ENTRY = "stochastic_fp8"
"""The metadata entry that says how a file was made."""

MOST_SAMPLED = 10_000
"""Layers. In a model with more, reports hold no samples: they are most of a report's memory."""

LayerCallback = Callable[[int, int, "ErrorStatistics | None"], None]
"""observe(layers done, layers in total, statistics of the one just done)"""


def select(weights: Weights, recipe: Recipe) -> Selection:
    """The weights that a recipe quantizes. Raises UnknownPatternError for a pattern that matches nothing."""
    return select_layers(
        weights.tensors,
        layers=recipe.layers,
        keep=recipe.keep,
        only=recipe.only,
        suffixes=recipe.suffixes,
        linear_names=weights.linear_names,
        kind=weights.kind,
        fp8_matmul=recipe.matmul == "fp8",
    )


def recipe_entry(report: Report) -> dict[str, object]:
    """What a file says about its quantization, as the JSON of RECIPE_ENTRY."""
    return asdict(report.recipe) | {
        "version": VERSION,
        "source": report.source,
        "family": report.family,
        "quantized": [layer.key for layer in report.layers],
        "kept_layers": [tensor.key for tensor in report.kept if tensor.reason.kind != NOT_LINEAR],
    }


class Quantization:
    """One quantization: planned when it is made, carried out when its state dict is written or its codes are made."""

    def __init__(
        self,
        weights: Weights,
        recipe: Recipe,
        calibration: Calibration | None = None,
        *,
        device: torch.device | str | None = None,
        statistics: bool = True,
        observe: LayerCallback | None = None,
        progress: ProgressCallback | None = None,
        reserved: int = 0,
    ):
        """device: where to compute; None: on the CPU. statistics: gather error statistics for the report. progress:
        called where layers `measured` has to read the weights, as no effects were measured. reserved: bytes of what
        else will be in the file, which a size limit counts.

        Raises CalibrationError where the recipe needs a calibration and there is none; UnknownPatternError; ChoiceError
        where a size limit cannot be met; and the source's error for weights that cannot be quantized from there.
        """
        check_calibration(recipe, calibration)
        self.weights, self.calibration = weights, calibration
        self.recipe = with_calibration(recipe, calibration.source) if calibration else recipe
        self.selection = select(weights, recipe)
        self._device = torch.device(device or "cpu")
        self._statistics, self._observe = statistics, observe
        self._scaled = weights.scaled
        self._kept: dict[str, Reason] = dict(self.selection.kept)
        self._results: dict[str, LayerReport] = {}
        self._nonfinite: list[NonFiniteError] = []
        weights.check(self.quantized, recipe)
        self.measured: MeasuredChoice | None = None
        """What layers `measured` chose."""
        if recipe.layers == MEASURED:
            self.measured = MeasuredChoice(weights, self.selection, recipe, calibration, self._device, progress)
            self._reserved = reserved
            self._choose()

    @property
    def quantized(self) -> list[str]:
        """Names of the weights that are quantized."""
        return [name for name in self.selection.quantize if name not in self._kept]

    @property
    def formats(self) -> list[str]:
        """The FP8 formats of the result: that of the recipe, and those of scaled layers that are kept."""
        return sorted({self.recipe.format, *self.kept_formats})

    @property
    def kept_formats(self) -> set[str]:
        """The FP8 formats of scaled layers that are kept."""
        quantized = set(self.quantized)
        return {weight.layer.format for name, weight in self._scaled.items() if name not in quantized}

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(info.nbytes for info in self.weights.tensors.values())

    @property
    def quantized_bytes(self) -> int:
        """Bytes, in the source, of the weights that are quantized."""
        return sum(self.weights.tensors[name].nbytes for name in self.quantized)

    def check_anything_left(self) -> None:
        """Raises the source's error where no weight is left to quantize, with the reasons."""
        if not self.quantized and not self.measured:  # whose limit can be above the size in 16 bits
            reasons = dict.fromkeys(reason.text for reason in self._kept.values() if reason.kind != NOT_LINEAR)
            text = "; ".join(reasons) or "there is no Linear layer that FP8 can hold"
            raise self.weights.error(f"has nothing to quantize: {text}")

    def keep_nonfinite(self, meter: Meter) -> None:
        """Read every weight once, and keep those with NaN or infinite values.

        A file needs this before its first byte is written, since its header holds all sizes.
        """
        names = self.quantized
        with self.weights.reading(names, self._device) as reads:
            for name, read in zip(names, reads, strict=True):
                meter.start(self.selection.tensor_key(name), self.weights.tensors[name].nbytes)
                x, _ = read()
                nan, inf = count_nonfinite(x)
                if nan or inf:
                    self._keep(name, nan, inf)
        if self.measured:
            self._choose()

    def state_dict(self) -> ScaledStateDict:
        """The scaled state dict, whose quantized weights are pending."""
        state = ScaledStateDict(metadata=dict(self.weights.metadata))
        staying = set(self._staying)
        for name in self.weights.tensors:
            if name in staying:
                state.add_weight(name, self._scaled[name])
            else:
                state.tensors[name] = self.weights.entry(name)
        for name in self.quantized:
            state.add_pending(name, self._pending_weight(name))
        state.rounding_pass = partial(self._rounding_pass, state)
        return state

    def report(self, extra_notes: Sequence[str] = ()) -> Report:
        """The report; before the pass a plan, with amax and scale 0. extra_notes: what else the user should know."""
        return Report(
            self.weights.name,
            self.selection.family,
            self.recipe,
            tuple(self._results.get(name) or self._layer_report(name) for name in self.quantized),
            tuple(self._kept_tensor(name, reason) for name, reason in self._kept.items()),
            self.selection.pattern_hits,
            (*self.selection.notes, *self.weights.notes, *self._notes(), *extra_notes),
        )

    @property
    def _staying(self) -> list[str]:
        """Scaled weights that stay as they are, bit for bit: kept, and not changed by a patch."""
        patched = set(self.weights.patched)
        return [name for name in self._scaled if name in self._kept and name not in patched]

    def _pending_weight(self, name: str) -> PendingWeight:
        """Text encoders do not ask for full precision, which ComfyUI chooses for most of them: 0.3.75 cannot load a T5
        that asks for it."""
        component = self.selection.components.of(name)
        assert component, f"{name} was selected, so it belongs to a network"
        full_precision = self.recipe.matmul == "full" and component.preset.kind != TEXT_ENCODER
        layer = ScaledLayer(name.removesuffix(".weight"), self.recipe.format, full_precision, component.prefix)
        measured = input_scale(self.calibration, self.selection.tensor_key(name), self.recipe)
        info = self.weights.tensors[name]
        return PendingWeight(
            layer,
            info.shape,
            input_scale=self.weights.input_scale(name) if measured is None else measured,
            source_bytes=info.nbytes,
        )

    @contextmanager
    def _rounding_pass(self, state: ScaledStateDict, names: Sequence[str]) -> Iterator[Iterator[tuple[str, Round]]]:
        with self.weights.reading(names, self._device) as reads:
            yield ((name, partial(self._round, state, name, read)) for name, read in zip(names, reads, strict=True))
        if self._nonfinite:
            tensors = "; ".join(f"{error.key} ({error.nan} NaN, {error.inf} infinite)" for error in self._nonfinite)
            raise self.weights.error(
                f"holds values that are not finite: {tensors}; nonfinite 'keep' leaves these tensors unchanged"
            )

    def _round(
        self, state: ScaledStateDict, name: str, read: Read, buffer: torch.Tensor | None
    ) -> QuantizedTensor | None:
        """One weight; None for one with NaN or infinite values, which is kept or reported when the pass ends."""
        key = self.selection.tensor_key(name)
        x, send = read()
        placement = Placement(self._device, buffer, leave_on_device=True, send=send)
        try:
            q = quantize_weight(x, key, self.recipe, self.calibration, statistics=self._statistics, placement=placement)
        except NonFiniteError as error:
            if self.recipe.nonfinite == "keep":
                self._keep(name, error.nan, error.inf)
                if name in self._staying:
                    state.keep_scaled(name, self._scaled[name])
                else:
                    state.keep(name, self.weights.entry(name))
            else:
                self._nonfinite.append(error.with_traceback(None))  # the traceback would hold on to the tensor
            return None
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", trace(key, x, q, rounding=self.recipe.rounding, seed=self.recipe.seed))
        self._results[name] = self._layer_report(name, q)
        if self._observe:
            left = len(self.selection.quantize) + len(self.selection.kept) - len(self._kept)
            self._observe(len(self._results), left, q.error)
        return q

    def _choose(self) -> None:
        """Keep what layers `measured` keeps; again when it turns out that other layers are kept as well."""
        assert self.measured, "the recipe does not ask for a choice"
        self._kept = {name: reason for name, reason in self._kept.items() if reason.kind not in CHOSEN}
        self._kept |= {name: Reason(NO_EFFECT_KNOWN) for name in self.measured.unknown if name not in self._kept}
        self._kept |= self.measured.reasons(self.state_dict(), self._reserved)

    def _keep(self, name: str, nan: int, inf: int) -> None:
        self._kept[name] = Reason(NON_FINITE, detail=f"{nan} NaN and {inf} infinite values")

    def _layer_report(self, name: str, q: QuantizedTensor | None = None) -> LayerReport:
        """q: what the pass made of the weight; None in a plan."""
        info, key = self.weights.tensors[name], self.selection.tensor_key(name)
        amax, scale = (q.amax, q.scale.item()) if q else (0.0, 0.0)
        error, output_error = (q.error, q.output_error) if q else (None, None)
        if error and len(self.selection.quantize) > MOST_SAMPLED:
            error = replace(error, samples=())
        return LayerReport(key, info.shape, info.dtype, info.nbytes, amax, scale, error, output_error)

    def _kept_tensor(self, name: str, reason: Reason) -> KeptTensor:
        info = self.weights.tensors[name]
        return KeptTensor(self.selection.tensor_key(name), info.shape, info.dtype, info.nbytes, reason)

    def _notes(self) -> Iterator[str]:
        preset = self.selection.components.main.preset
        if preset.kind == NEVER_QUANTIZED:
            yield f"{self.weights.name} stays unchanged: {preset.reason}"
        if self.selection.components.renamed:
            yield notes.renamed_note(self.selection.components.renamed)
        infos, scaled, patched = self.weights.tensors, self._scaled, self.weights.patched
        quantized, staying = self.quantized, self._staying
        yield from notes.source_notes(
            dequantized=sum(name in scaled for name in quantized),
            staying=len(staying),
            unpacked=len(scaled) - sum(name in scaled for name in quantized) - len(staying),
            unscaled=sum(infos[name].dtype in FORMATS and name not in scaled for name in quantized),
            patched=len(patched),
        )
        if self.measured:
            yield from self.measured.notes()
        yield from notes.nonfinite_notes(self._kept_tensor(name, reason) for name, reason in self._kept.items())
        yield from notes.copied_nonfinite_notes(
            {
                self.selection.tensor_key(name): counts
                for name, counts in self.weights.nonfinite.items()
                if self._kept[name].kind != NON_FINITE
            }
        )
        weights = [self._scaled[name] for name in staying] + [self._pending_weight(name) for name in quantized]
        yield from notes.matmul_notes(self.recipe, weights)
        if self._results:
            yield from notes.calibration_notes(self.recipe, self._results.values())
