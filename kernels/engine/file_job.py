"""The file job: one streamed pass from a 16-bit checkpoint to a scaled FP8 one."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from ..calibration.file import load_calibration
from ..calibration.moments import Calibration
from ..choices import choose
from ..errors import CheckpointError, NonFiniteError, file_error
from ..files.background import Background
from ..files.header import TensorInfo
from ..files.reader import Source, open_source
from ..files.writer import Writer, check_target, refuse_same_file, writing
from ..numerics.error_statistics import ErrorStatistics
from ..numerics.formats import FORMATS
from ..numerics.output_error import OutputError
from ..numerics.quantized_tensor import QuantizedTensor, dequantize_tensor
from ..numerics.rounding import CALIBRATED, METHODS
from ..numerics.scaling import SCALINGS, tensor_to_amax
from ..numerics.trace import trace
from ..numerics.transfers import copy
from ..recipe import Recipe
from ..report.report import KeptTensor, LayerReport, Report
from ..selection.presets import TEXT_ENCODER, diffusers_model
from ..selection.reasons import NON_FINITE, NOT_LINEAR, Reason
from ..selection.selection import Selection, select_layers
from ..state_dict.compatibility import EXACT, verdicts
from ..state_dict.inspection import ERROR, Finding, inspect_source
from ..state_dict.layouts import (
    HEADER_ENTRY,
    LAYOUTS,
    MATMULS,
    Markings,
    ScaledLayer,
    read_markings,
    read_scale,
    scaled_layers,
)
from ..version import VERSION
from .quantize_weight import calibration_notes, check_calibration, input_scale, quantize_weight

log = logging.getLogger("stochastic_fp8")

RECIPE_ENTRY = "stochastic_fp8"
"""The metadata entry that says how a file was made."""

NONFINITE = {
    "error": "stop, and name every tensor with NaN or infinite values",
    "keep": "leave such a tensor as it is, and list it",
}

SMALL = 1 << 20
"""Bytes of a tensor that is read and written sooner than it is handed over to another thread."""

Progress = Callable[[int, int, str], None]
"""progress(bytes done, bytes in all, tensor key); an exception raised in it cancels the job and leaves nothing."""

Observer = Callable[[int, int, ErrorStatistics | None], None]
"""observe(layers done, layers in all, statistics of the one just done)"""


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    format: str = "float8_e4m3fn",
    rounding: str = "stochastic",
    scaling: str = "absmax",
    seed: int = 0,
    layers: str = "auto",
    keep: Collection[str] = (),
    only: Collection[str] = (),
    suffixes: Collection[str] = (".weight",),
    layout: str = "native",
    matmul: str = "full",
    nonfinite: str = "error",
    requantize: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    calibration: Calibration | str | os.PathLike | None = None,
    statistics: bool = True,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    observe: Observer | None = None,
) -> Report:
    """Quantize a checkpoint file to a new scaled FP8 file, which is verified before it appears.

    source: a .safetensors file, or the .safetensors.index.json of several. format, rounding, scaling, layers, layout,
    matmul, nonfinite: keys of FORMATS, METHODS, SCALINGS, LAYERS, LAYOUTS, MATMULS, NONFINITE. keep, only,
    suffixes: see select_layers. requantize: allow layers that are already in this format. metadata: entries to add.
    calibration: what the layers were seen to get, or its file: for rounding "calibrated", and for the scales of the
    inputs that matmul "fp8" casts. Weights that are scaled FP8 are dequantized first. Tensors that are not quantized
    keep every bit. The same source and choices give the same file, byte for byte (with calibrated rounding: on one
    device and version of torch).

    Raises CheckpointError: files that cannot be read, used or written, and non-finite weights; ValueError: unknown
    choices and patterns; CalibrationError: rounding "calibrated" without a calibration. Whatever is raised, the target
    is as it was.
    """
    calibration = _opened(calibration)
    recipe = Recipe(
        format=format,
        rounding=rounding,
        scaling=scaling,
        seed=seed,
        layers=layers,
        keep=tuple(keep),
        only=tuple(only),
        suffixes=tuple(suffixes),
        layout=layout,
        matmul=matmul,
        nonfinite=nonfinite,
        calibration=calibration.source if calibration else "",
    )
    target = Path(target)
    with open_source(source) as opened:
        refuse_same_file(opened, target)
        check_target(target, overwrite)
        job = _Job(opened, recipe, calibration)
        job.check(requantize)
        if nonfinite == "keep":
            job.keep_nonfinite()
        results = job.write(
            target, overwrite, device, statistics, metadata or {}, progress or _no_progress, observe or _no_progress
        )
        log.info("%s: %d layers quantized to %s, %d tensors kept", target, len(results), format, len(job.kept))
        return job.report(results)


def plan_file(
    source: str | os.PathLike,
    *,
    requantize: bool = False,
    calibration: Calibration | str | os.PathLike | None = None,
    **choices,
) -> Report:
    """What quantize_file would do, from the header alone: layers with amax and scale 0, kept tensors, notes, sizes.

    choices: as quantize_file's, those of Recipe. Raises as quantize_file does before it begins to write.
    """
    choices |= {name: tuple(choices[name]) for name in ("keep", "only", "suffixes") if name in choices}
    with open_source(source) as opened:
        job = _Job(opened, Recipe(**choices), _opened(calibration))
        job.check(requantize)
        return job.report({})


def read_weights(source: str | os.PathLike, **choices) -> Iterator[tuple[str, torch.Tensor]]:
    """(tensor key, weight) of each layer that quantize_file would quantize, each valid until the next is asked for.

    choices: as plan_file's. Raises as plan_file does, and for weights that cannot be read.
    """
    choices |= {name: tuple(choices[name]) for name in ("keep", "only", "suffixes") if name in choices}
    with open_source(source) as opened:
        job = _Job(opened, Recipe(**choices))
        job.check(requantize=True)
        with ThreadPoolExecutor(1, "read") as reader:
            for name, weight in zip(job.quantized, job.load_ahead(reader, job.quantized), strict=True):
                yield job.selection.tensor_key(name), weight


@dataclass(frozen=True)
class _Result:
    amax: float
    scale: float
    error: ErrorStatistics | None
    output_error: OutputError | None


@dataclass
class _Job:
    """One file's quantization: what becomes of each tensor, then the pass over them."""

    source: Source
    recipe: Recipe
    calibration: Calibration | None = None
    markings: Markings = field(init=False)
    selection: Selection = field(init=False)
    scaled: dict[str, ScaledLayer] = field(init=False)
    """The source's own scaled FP8 layers by weight name."""
    kept: dict[str, Reason] = field(init=False)
    """Tensor -> why it stays as it is."""
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.recipe
        for table, choice, what in (
            (FORMATS, recipe.format, "format"),
            (METHODS, recipe.rounding, "rounding"),
            (SCALINGS, recipe.scaling, "scaling"),
            (LAYOUTS, recipe.layout, "layout"),
            (MATMULS, recipe.matmul, "matmul"),
            (NONFINITE, recipe.nonfinite, "nonfinite"),
        ):
            choose(table, choice, what)
        check_calibration(recipe, self.calibration)
        self.markings = read_markings(self.source)
        self.selection = select_layers(
            {name: info for name, info in self.source.tensors.items() if name not in self.markings.tensors},
            layers=recipe.layers,
            keep=recipe.keep,
            only=recipe.only,
            suffixes=recipe.suffixes,
        )
        self.kept = dict(self.selection.kept)
        self.scaled = scaled_layers(self.source.tensors, self.markings, self.selection.components.prefix_of)
        self.notes = [*self.selection.notes, *self._source_notes(), *self._loading_notes()]

    @property
    def quantized(self) -> list[str]:
        return [name for name in self.selection.quantize if name not in self.kept]

    # What may be done

    def check(self, requantize: bool) -> None:
        """Raises CheckpointError for a file that cannot be quantized as asked."""
        tensors = self.source.tensors
        model = diffusers_model(tensors)
        if model:
            text = f"holds {model} in the diffusers layout, of which ComfyUI drops the scales; quantize the ComfyUI "
            text += "version of this model, or load it in ComfyUI and save it as a checkpoint first"
            raise file_error(self.source.path, text)
        for layer, entry in (self.markings.inline | self.markings.header).items():
            format = entry.get("format") if isinstance(entry, dict) else entry
            if format not in FORMATS:
                text = f"layer {layer!r} is already quantized as {format}; start from the 16-bit file"
                raise file_error(self.source.path, text)
        same = [name for name in self.quantized if tensors[name].dtype == self.recipe.format]
        if same and not requantize:
            text = (
                f"{len(same)} layers are already {self.recipe.format}, e.g. {same[0]!r}; start from the 16-bit file, "
            )
            raise file_error(self.source.path, text + "or ask to requantize, which loses quality a second time")
        self._check_anything_left()
        for name in self.scaled:
            self._source_scale(name)

    def keep_nonfinite(self) -> None:
        """Move every tensor with NaN or infinite values from the quantized to the kept ones."""
        for name in self.quantized:
            x = self._load(name)
            if not math.isfinite(tensor_to_amax(x)):
                values = x.float()
                counts = f"holds {int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite values"
                self.kept[name] = Reason(NON_FINITE, detail=counts.removeprefix("holds "))
                self.notes.append(f"{name} is kept: it {counts}")
        self._check_anything_left()

    def _check_anything_left(self) -> None:
        if not self.quantized:
            reasons = dict.fromkeys(reason.text for reason in self.kept.values() if reason.kind != NOT_LINEAR)
            text = "; ".join(reasons) or "there is no Linear weight in it"
            raise file_error(self.source.path, f"has nothing to quantize: {text}")

    # What is written

    def _output_layers(self) -> dict[str, ScaledLayer]:
        """The scaled layers of the new file by weight name: those quantized now, and those that stay scaled."""
        made = {name: self._output_layer(name) for name in self.quantized}
        return {**{name: layer for name, layer in self.scaled.items() if name in self.kept}, **made}

    def _output_layer(self, name: str) -> ScaledLayer:
        """Text encoders multiply in full precision anyway, and ComfyUI 0.3.75 cannot load a T5 that asks for it."""
        component = self.selection.components.of(name)
        full_precision = self.recipe.matmul == "full" and component.preset.kind != TEXT_ENCODER
        return ScaledLayer(name.removesuffix(".weight"), self.recipe.format, full_precision, component.prefix)

    def _input_scales(self) -> dict[str, torch.Tensor]:
        """Those that the calibration gives, by weight name."""
        keys = {name: self.selection.tensor_key(name) for name in self.quantized}
        scales = {name: input_scale(self.calibration, key, self.recipe) for name, key in keys.items()}
        return {name: scale for name, scale in scales.items() if scale is not None}

    def write(
        self,
        target: Path,
        overwrite: bool,
        device: torch.device | str | None,
        statistics: bool,
        metadata: Mapping[str, str],
        progress: Progress,
        observe: Observer,
    ) -> dict[str, _Result]:
        layout = LAYOUTS[self.recipe.layout]
        layers = self._output_layers()
        try:
            constants = layout.markers(layers.values())
        except ValueError as error:
            raise file_error(self.source.path, str(error)) from error
        scales = {layer.name + layout.weight_scale: weight for weight, layer in layers.items()}
        constants |= {scale: self._source_scale(weight) for scale, weight in scales.items() if weight in self.kept}
        constants |= {layers[name].name + layout.input_scale: scale for name, scale in self._input_scales().items()}
        copies = {name: name for name in self.kept} | {
            layer + layout.input_scale: name
            for layer, name in self.markings.input_scales.items()
            if layer + layout.input_scale not in constants
        }
        infos = {
            **{name: TensorInfo(self.recipe.format, self.source.tensors[name].shape) for name in self.quantized},
            **{name: TensorInfo("float32", ()) for name in scales},
            **{name: self.source.tensors[original] for name, original in copies.items()},
            **{name: TensorInfo.of(tensor) for name, tensor in constants.items()},
        }
        entries = self._metadata() | layout.metadata(layers.values()) | dict(metadata)
        total = sum(self.source.tensors[name].nbytes for name in (*self.quantized, *copies.values()))

        def tell(done: int, key: str) -> None:
            progress(done, total, key)

        with writing(target, infos, entries, overwrite=overwrite) as writer:
            for name, tensor in constants.items():
                writer.write(name, tensor)
            scale_names = {weight: scale for scale, weight in scales.items()}
            results = self._stream(writer, copies, scale_names, device, statistics, tell, observe)
            self._verify(writer, target)
            tell(total, "")  # the last moment for a cancel
        return results

    def _stream(
        self,
        writer: Writer,
        copies: Mapping[str, str],
        scale_names: Mapping[str, str],
        device: torch.device | str | None,
        statistics: bool,
        tell: Callable[[int, str], None],
        observe: Observer,
    ) -> dict[str, _Result]:
        """The pass: while one tensor is rounded, the next is read and the one before is written.

        copies: new name -> name in the source, of all that keeps its bits. scale_names: weight -> its scale.
        """
        quantized = set(self.quantized)
        order = [name for name in writer.order if name in quantized or name in copies]
        done = 0
        results: dict[str, _Result] = {}
        nonfinite: list[NonFiniteError] = []
        with ThreadPoolExecutor(1, "read") as reader, Background("write") as writing_thread:
            loaded = self.load_ahead(reader, [name for name in order if name in quantized])
            buffers = _two_buffers(max(math.prod(self.source.tensors[name].shape) for name in quantized))
            for name in order:
                key, nbytes = self.selection.tensor_key(name), self.source.tensors[copies.get(name, name)].nbytes
                tell(done, key)
                done += nbytes
                if name in copies:
                    writing_thread.run(writer.copy, name, self.source, copies[name], here=nbytes < SMALL)
                    continue
                buffer = next(buffers)
                try:
                    q = self._quantize(next(loaded), key, device, statistics, buffer)
                except NonFiniteError as error:
                    nonfinite.append(error.with_traceback(None))  # the traceback would keep the tensor
                    writing_thread.wait()  # the next one gets the buffer that it writes from
                    continue
                results[name] = _Result(q.amax, q.scale.item(), q.error, q.output_error)
                observe(len(results), len(quantized), q.error)
                writing_thread.run(_write_layer, writer, name, q, scale_names[name], buffer, here=nbytes < SMALL)
        if nonfinite:
            raise file_error(self.source.path, _nonfinite_text(nonfinite))
        return results

    def _quantize(
        self, x: torch.Tensor, key: str, device: torch.device | str | None, statistics: bool, buffer: torch.Tensor
    ) -> QuantizedTensor:
        """The codes lie in the buffer, or on the CUDA device that made them, if it had the memory for all of them."""
        recipe = self.recipe
        choices = {"statistics": statistics, "device": device, "out": buffer, "bring_back": False}
        with torch.inference_mode():  # in which small operations cost less
            q = quantize_weight(x, key, recipe, self.calibration, **choices)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", trace(key, x, q, rounding=recipe.rounding, seed=recipe.seed))
        return q

    def load_ahead(self, reader: ThreadPoolExecutor, names: list[str]) -> Iterator[torch.Tensor]:
        """Each weight, valid until the next is asked for, while that one is being read."""
        scratch = _two_buffers(max(self.source.tensors[name].nbytes for name in names))
        following = None
        for name in names:
            load = partial(self._load, name, next(scratch))
            small = self.source.tensors[name].nbytes < SMALL
            current, following = following, load if small else reader.submit(load).result
            if current:
                yield current()
        yield following()

    def _load(self, name: str, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """A weight to quantize; FP8 is widened to a dtype that holds its values."""
        x = self.source.read(name, scratch)
        if name in self.scaled:
            return dequantize_tensor(x, self._source_scale(name))
        return x.to(torch.bfloat16) if self.source.tensors[name].dtype in FORMATS else x

    def _source_scale(self, weight: str) -> torch.Tensor:
        try:
            return read_scale(self.source, self.markings.weight_scales[self.scaled[weight].name])
        except ValueError as error:
            raise file_error(self.source.path, f"{error}; start from the 16-bit file") from error

    def _verify(self, writer: Writer, target: Path) -> None:
        with writer.reopen(target) as written:
            inspection = inspect_source(written)
        errors = [f for f in inspection.findings if f.severity == ERROR and not self._foreseen(f)]
        if errors:
            raise file_error(target, f"was not written, since ComfyUI could not use it: {errors[0]}")

    def _foreseen(self, finding: Finding) -> bool:
        """Legacy E5M2 was asked for, with a note; kept FP8 weights without a scale never had one."""
        return finding.code == "legacy_e5m2" or finding.code == "missing_scale" and finding.where in self.kept

    # What is said

    def _metadata(self) -> dict[str, str]:
        entries = {name: text for name, text in self.source.metadata.items() if name != HEADER_ENTRY}
        key = self.selection.tensor_key
        recipe = asdict(self.recipe) | {
            "version": VERSION,
            "source": self.source.name,
            "family": self.selection.family,
            "quantized": [key(name) for name in self.quantized],
            "kept_layers": [key(name) for name, reason in self.kept.items() if reason.kind != NOT_LINEAR],
        }
        return entries | {RECIPE_ENTRY: json.dumps(recipe, sort_keys=True)}

    def report(self, results: Mapping[str, _Result]) -> Report:
        """The report; without results (a plan) amax and scale are 0."""
        tensors, key = self.source.tensors, self.selection.tensor_key
        unknown = _Result(0.0, 0.0, None, None)
        layers = []
        for name in self.quantized:
            info, result = tensors[name], results.get(name, unknown)
            layers.append(LayerReport(key(name), info.shape, info.dtype, info.nbytes, **vars(result)))
        kept = [
            KeptTensor(key(name), tensors[name].shape, tensors[name].dtype, tensors[name].nbytes, reason)
            for name, reason in self.kept.items()
        ]
        return Report(
            self.source.name,
            self.selection.family,
            self.recipe,
            tuple(layers),
            tuple(kept),
            self.selection.pattern_hits,
            (*self.notes, *self._calibration_notes(results)),
        )

    def _calibration_notes(self, results: Mapping[str, _Result]) -> Iterator[str]:
        if self.recipe.rounding == CALIBRATED.name:
            key = self.selection.tensor_key
            yield from calibration_notes({key(name): result.output_error for name, result in results.items()})

    def _source_notes(self) -> Iterator[str]:
        tensors = self.source.tensors
        quantized = set(self.quantized)
        dequantized = sum(name in quantized for name in self.scaled)
        if dequantized:
            yield f"{dequantized} layers were already scaled FP8: dequantized first, so their first error stays"
        if len(self.scaled) > dequantized:
            yield f"{len(self.scaled) - dequantized} layers were already scaled FP8 and stay so, bit for bit"
        unscaled = sum(tensors[name].dtype in FORMATS and name not in self.scaled for name in quantized)
        if unscaled:
            yield f"{unscaled} layers were FP8 without a scale: what that lost is not brought back"

    def _loading_notes(self) -> Iterator[str]:
        components = self.selection.components
        ways = ("legacy",) if self.recipe.layout == "legacy" else ("header", "inline")
        main = components.main
        for verdict in verdicts(ways, [self.recipe.format], main.family, main.preset.kind, components.all_in_one):
            if verdict.outcome != EXACT or verdict.text:
                yield f"{verdict.generation}: {verdict.outcome}; {verdict.text}"
        if self.recipe.matmul == "fp8" and not (self.markings.input_scales or self._input_scales()):
            yield "matmul fp8 without input scales: FP8 GPUs clamp activations at ±448, which costs quality"


def _opened(calibration: Calibration | str | os.PathLike | None) -> Calibration | None:
    return load_calibration(calibration) if isinstance(calibration, (str, os.PathLike)) else calibration


def _two_buffers(nbytes: int) -> Iterator[torch.Tensor]:
    """Two of uint8, in turns without end: while one is worked on, the other is filled or emptied."""
    with torch.inference_mode(False):  # which each thread is in, or not, for itself
        return cycle([torch.empty(nbytes, dtype=torch.uint8) for _ in range(2)])


def _write_layer(writer: Writer, name: str, q: QuantizedTensor, scale_name: str, buffer: torch.Tensor) -> None:
    codes = q.codes
    if codes.device != buffer.device:
        codes = copy(codes, buffer[: codes.numel()].view(codes.dtype).view(codes.shape))
    writer.write(name, codes)
    writer.write(scale_name, q.scale.cpu())


def _nonfinite_text(errors: list[NonFiniteError]) -> str:
    tensors = "; ".join(f"{error.key} ({error.nan} NaN, {error.inf} infinite)" for error in errors)
    return f"holds values that are not finite: {tensors}; nonfinite 'keep' leaves these tensors as they are"


def _no_progress(done: int, total: int, what: object) -> None:
    pass


__all__ = ["CheckpointError", "plan_file", "quantize_file", "read_weights"]
