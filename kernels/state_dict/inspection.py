"""Verifies scaled FP8 files: every known problem, and what each ComfyUI version makes of the file."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import display
from ..errors import CheckpointError, LimitError
from ..files.header import TensorInfo
from ..files.reader import Source, is_index, is_safetensors, open_source
from ..numerics.formats import FORMATS
from ..numerics.scaling import SMALLEST_SCALE
from ..selection.components import Components
from ..selection.foreign import diffusers_model, foreign_kind, other_quantizer
from ..selection.presets import NEVER_QUANTIZED, PRESETS
from ..selection.selection import QUANTIZABLE_DTYPES, SIDE_MULTIPLE
from .compatibility import (
    CANNOT_TELL,
    DEGRADED,
    EXACT,
    FAILS,
    FAILS_LATER,
    NEW,
    NOT_RECOGNISED,
    OLD,
    WRONG,
    Verdict,
    file_verdicts,
    worst,
)
from .layouts import HEADER_ENTRY, LEGACY_MARKER, SOURCE_ONLY_SCALE, ScaledLayer
from .markings import TOO_LARGE, Markings, read_markings, scaled_layers, unknown_scales

ERROR, WARNING, NOTE = "error", "warning", "note"
MXFP8 = "mxfp8"
"""The format of entries for FP8 codes with a scale per 32 values."""


@dataclass(frozen=True)
class Finding:
    """One problem of a file, or a remark about it."""

    severity: str
    """ERROR (a wrong image, or none), WARNING (loses quality, or fails in some versions) or NOTE."""
    code: str
    """The kind of finding, for programs."""
    where: str
    """Tensor, layer or prefix; "" for the whole file."""
    what: str
    """What is wrong, and what becomes of the image."""
    repair: str
    """How to repair it."""
    repairable: bool = False
    """Whether `repair_file` can repair it."""
    outcomes: Mapping[str, str] = field(default_factory=dict, hash=False)
    """ComfyUI version -> what it makes of the file at best because of this."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.where + ': ' if self.where else ''}{self.what}. {self.repair}."


@dataclass(frozen=True)
class Inspection:
    """What was found in one file. Plain data, JSON-able."""

    source: str
    """File name, no path."""
    family: str
    scaled: int
    """Number of scaled FP8 layers."""
    formats: tuple[str, ...]
    ways: tuple[str, ...]
    """Those of "legacy", "header" and "inline" that cover every scaled layer."""
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == ERROR for finding in self.findings)

    @property
    def repairable(self) -> bool:
        return any(finding.repairable for finding in self.findings)

    @property
    def kinds(self) -> list[tuple[Finding, int]]:
        """The first finding of each kind, and how many of that kind there are."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.code, finding.repair), []).append(finding)
        return [(findings[0], len(findings)) for findings in groups.values()]

    @property
    def summary(self) -> str:
        """A line about the file, one per ComfyUI version, then one per kind of finding."""
        title = f"{PRESETS[self.family].title}, {display.count(self.scaled, 'scaled FP8 layer')}"
        kinds = Counter(finding.severity for finding in self.findings)
        counts = ", ".join(display.count(kinds[kind], kind) for kind in (ERROR, WARNING) if kinds[kind])
        lines = [
            f"{self.source}: {title} ({', '.join(self.formats) or 'no FP8'}; "
            f"marked: {', '.join(self.ways) or 'not at all'}): {counts or 'no problems'}",
            *(f"{v.generation}: {v.outcome}{' (' + v.text + ')' if v.text else ''}" for v in self.verdicts),
            *(f"{finding}{f' ({count - 1:,} more like this)' if count > 1 else ''}" for finding, count in self.kinds),
        ]
        return "\n".join(map(display.printable, lines))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def inspect_file(path: str | os.PathLike[str], deep: bool = False) -> Inspection:
    """Look for every known problem of scaled FP8 files. Reads header, entries and scales; with `deep`, all weights.

    A file that is damaged, or is not a safetensors file, has the finding `unreadable`; one beyond the limits of this
    library has `beyond_limits`. Raises CheckpointError if there is no such file, or its name does not end in
    .safetensors, .sft or .safetensors.index.json.
    """
    path = Path(path)
    if not path.is_file() or not (is_safetensors(path.name) or is_index(path.name)):
        open_source(path).close()  # raises
    try:
        with open_source(path) as source:
            return inspect_source(source, deep, path.name)
    except LimitError as error:
        parts = _parts(path.name, str(error))
        return _not_read(path.name, Finding(ERROR, "beyond_limits", "", *parts, outcomes=_both(CANNOT_TELL)))
    except CheckpointError as error:
        parts = _parts(path.name, str(error))
        return _not_read(path.name, Finding(ERROR, "unreadable", "", *parts, outcomes=_both(FAILS)))


def inspect_source(source: Source, deep: bool = False, file_name: str = "") -> Inspection:
    """inspect_file for an open file. file_name: where it tells something about the file, e.g. a shard of a set."""
    inspector = _Inspector(source, file_name)
    found = inspector.findings(deep)
    findings = tuple(sorted(found, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity)))
    formats = tuple(sorted({layer.format for layer in inspector.layers.values()}))
    ways = inspector.ways()
    return Inspection(
        source.name,
        inspector.components.main.family,
        len(inspector.layers),
        formats,
        ways,
        findings,
        _verdicts(file_verdicts(ways, formats, inspector.components) if formats else (), findings),
    )


def _parts(name: str, message: str) -> tuple[str, str]:
    """What is wrong, and the way out, from the one line of an error about a file."""
    text = message.removeprefix(f"{display.printable(name)}: ")
    parts = re.fullmatch(r"(.*)[;:] ((?:convert|download|give|start|try) .*)", text)
    what, way_out = parts.groups() if parts else (text, "download the file again")
    return what, way_out[:1].upper() + way_out[1:]


def _not_read(name: str, finding: Finding) -> Inspection:
    """The inspection of a file of which nothing else is known."""
    return Inspection(name, "unknown", 0, (), (), (finding,), _verdicts((), (finding,)))


def _verdicts(of_layers: Collection[Verdict], findings: Iterable[Finding]) -> tuple[Verdict, ...]:
    """The verdicts on the scaled layers, or what the findings make of them where that is worse."""
    base = {verdict.generation: verdict for verdict in of_layers}
    for finding in findings:
        for version, outcome in finding.outcomes.items():
            where = f"{finding.where}: " if finding.where else ""
            verdict = Verdict(version, outcome, where + finding.what)
            known = base.get(version, verdict)
            base[version] = verdict if known == Verdict(version, outcome, "") else worst(known, [verdict])
    return tuple(base[version] for version in (OLD, NEW) if version in base)


def _both(outcome: str) -> dict[str, str]:
    return {OLD: outcome, NEW: outcome}


class _Inspector:
    def __init__(self, source: Source, file_name: str = ""):
        self.source, self.file_name = source, file_name
        self.tensors = source.tensors
        self.markings: Markings = read_markings(source)
        parameters = {name: info for name, info in self.tensors.items() if name not in self.markings.tensors}
        self.components = Components(parameters)
        layers = scaled_layers(self.tensors, self.markings, self.components.prefix_of)
        self.other = {layer.name for layer in layers.values() if self.is_mxfp8(layer)}
        """Layers whose FP8 codes have another meaning."""
        self.layers: dict[str, ScaledLayer] = {
            name: layer for name, layer in layers.items() if layer.name not in self.other
        }
        self.names = {layer.name for layer in self.layers.values()}
        self.unknown = unknown_scales(self.tensors, self.markings)
        """FP8 weight -> a tensor beside it that looks like a scale of an unknown kind."""
        self.fp8 = {
            name: info
            for name, info in parameters.items()
            if info.dtype in FORMATS and name.removesuffix(".weight") not in self.other
        }

    def is_mxfp8(self, layer: ScaledLayer) -> bool:
        """Whether a layer is declared as MXFP8, and has the scales of that format: powers of two, one per block."""
        scale = self.tensors[self.markings.weight_scales[layer.name]]
        declared = self.markings.entry(layer.name, layer.prefix).get("format") == MXFP8
        return declared and scale.dtype in ("uint8", "float8_e8m0fnu") and scale.elements > 1

    def ways(self) -> tuple[str, ...]:
        marks = self.markings
        covering = {
            "legacy": all(
                layer.prefix in marks.legacy and marks.weight_scales[layer.name].endswith(".scale_weight")
                for layer in self.layers.values()
            ),
            "header": self.names <= marks.header.keys() and self._new_scales(),
            "inline": self.names <= marks.inline.keys() and self._new_scales(),
        }
        return tuple(way for way, covers in covering.items() if covers and self.names)

    def _new_scales(self) -> bool:
        return all(self.markings.weight_scales[name].endswith(".weight_scale") for name in self.names)

    def findings(self, deep: bool) -> list[Finding]:
        found = [*self.file(), *self.entries(), *self.scales(), *self.orphans(), *self.weights()]
        if deep:
            found += self.values()
        return [_with_outcomes(finding) for finding in found]

    def file(self) -> Iterator[Finding]:
        for where, text in self.markings.faults.items():
            if text == TOO_LARGE:
                what, failing = f"{text}, and was not read", _both(CANNOT_TELL)
            else:
                what, failing = f"{text}, so ComfyUI fails to load the file", _both(FAILS)
            if where != HEADER_ENTRY:
                failing.pop(OLD)
            yield Finding(ERROR, "unreadable_entry", where, what, _REPAIR, True, outcomes=failing)
        if other := other_quantizer(self.tensors):
            what = f"is quantized by {other[0]}, which is not FP8 and is not inspected"
            yield Finding(NOTE, "other_format", other[1], what, _NOTHING, outcomes=_both(CANNOT_TELL))
        foreign = foreign_kind(self.tensors, self.file_name)
        if foreign and not other:
            what = f"this is {foreign[0]}: ComfyUI does not load it as a model"
            way_out = foreign[1][:1].upper() + foreign[1][1:]
            yield Finding(ERROR, "not_a_model", "", what, way_out, outcomes=_both(NOT_RECOGNISED))
        prefix = self.components.undetected_prefix
        if prefix and not foreign:
            what = f"the names begin with {prefix!r}, under which ComfyUI detects no model"
            way_out = "Remove this prefix from the names"
            yield Finding(WARNING, "undetected_prefix", "", what, way_out, outcomes=_both(NOT_RECOGNISED))
        if self.components.renamed and self.layers and "legacy" not in self.ways():
            what = "ComfyUI 0.3.75 renames this weight while it loads it, but not its header entry: the image is wrong"
            yield Finding(WARNING, "renamed_layers", self.components.renamed, what, _LEGACY, outcomes={OLD: WRONG})
        model = diffusers_model(self.tensors)
        if model and self.fp8:
            what = f"{model} in the diffusers layout: ComfyUI's loader drops the scales, and the image is noise"
            yield Finding(ERROR, "diffusers_layout", "", what, "Quantize the ComfyUI version of this model instead")
        if self.components.main.family == "unknown" and not foreign:
            yield Finding(NOTE, "unknown_family", "", "the model family is unknown", _NOTHING)
        if not self.fp8 and not self.other:
            yield Finding(NOTE, "no_fp8", "", "the file has no FP8 weights", _NOTHING)
        for prefix, marker in self.markings.legacy.items():
            yield from self.legacy_marker(prefix, marker.dtype)

    def legacy_marker(self, prefix: str, dtype: str) -> Iterator[Finding]:
        where = prefix + "scaled_fp8"
        formats = {layer.format for layer in self.layers.values() if layer.prefix == prefix}
        if formats and dtype not in formats and dtype != "float32":
            what = f"the marker says {dtype}, the weights are {', '.join(sorted(formats))}: the image is garbage"
            yield Finding(ERROR, "marker_dtype", where, what, _REPAIR, True, outcomes={OLD: WRONG})
        if "float8_e5m2" in formats and not self.names <= self.markings.header.keys():
            what = "newer ComfyUI versions read legacy E5M2 as E4M3, without an error: the image is garbage"
            yield Finding(ERROR, "legacy_e5m2", where, what, _REPAIR, True, outcomes={NEW: WRONG})

    def entries(self) -> Iterator[Finding]:
        marks = self.markings
        for layer in self.layers.values():
            scale = marks.weight_scales[layer.name]
            legacy_scale = scale.endswith(".scale_weight")
            if scale.endswith(SOURCE_ONLY_SCALE):
                yield self.unread_scale(scale)
            elif legacy_scale and layer.prefix not in marks.legacy:
                what = "has a scale_weight, but the file has no scaled_fp8 marker: ComfyUI ignores the scale (noise)"
                yield Finding(ERROR, "missing_marker", layer.name, what, _REPAIR, True)
            elif legacy_scale and layer.name in marks.header:
                what = "has a scale_weight and a header entry: newer versions ignore the scale and fail to load it"
                yield Finding(ERROR, "mixed_layouts", layer.name, what, _REPAIR, True, outcomes=_both(FAILS))
            elif not legacy_scale:
                yield from self.native_entries(layer)

    def unread_scale(self, scale: str) -> Finding:
        what = "ComfyUI does not read this scale: the image is noise"
        if self.tensors[scale].elements == 1:
            return Finding(ERROR, "unread_scale", scale, what, _REPAIR, True)
        return Finding(ERROR, "unread_scale", scale, what, _READ_AGAIN)

    def native_entries(self, layer: ScaledLayer) -> Iterator[Finding]:
        marks = self.markings
        bare = layer.name.removeprefix(layer.prefix)
        if layer.prefix and bare in marks.header:
            what = f"is named in the header without {layer.prefix!r}: its scale is not found, and the image is noise"
            noise = {OLD: WRONG} if layer.name in marks.inline else _both(WRONG)
            yield Finding(ERROR, "unprefixed_name", layer.name, what, _REPAIR, True, outcomes=noise)
        elif layer.name not in marks.header and layer.name not in marks.inline:
            what = "has a scale, but no header entry and no inline entry: ComfyUI ignores the scale (noise)"
            yield Finding(ERROR, "missing_entry", layer.name, what, _REPAIR, True)
        elif layer.name not in marks.header:
            what = "has only an inline entry: ComfyUI 0.3.75 ignores the scale, and the image is wrong"
            yield Finding(WARNING, "inline_only", layer.name, what, _REPAIR, True)
        # The header overrides inline entries, which 0.3.75 does not read at all.
        if layer.name in marks.header:
            yield from self.entry(layer, marks.header[layer.name], HEADER_ENTRY, [OLD, NEW])
        if layer.name in marks.inline:
            readers = [] if layer.name in marks.header else [NEW]
            yield from self.entry(layer, marks.inline[layer.name], "comfy_quant", readers)

    def entry(self, layer: ScaledLayer, entry: object, place: str, readers: list[str]) -> Iterator[Finding]:
        """readers: the versions that read this entry."""
        if not isinstance(entry, dict):
            what = f'its {place} entry is {entry!r}, not {{"format": …}}: loading fails (AttributeError)'
            failing = dict.fromkeys(readers, FAILS)
            yield Finding(ERROR, "entry_not_object", layer.name, what, _REPAIR, True, outcomes=failing)
        elif entry.get("format") != layer.format:
            what = f"its {place} entry says {entry.get('format')}, the weight is {layer.format}: the image is garbage"
            garbage = dict.fromkeys(readers, WRONG)
            yield Finding(ERROR, "entry_format", layer.name, what, _REPAIR, True, outcomes=garbage)

    def scales(self) -> Iterator[Finding]:
        for layer in self.layers.values():
            name = self.markings.weight_scales[layer.name]
            info = self.tensors[name]
            if info.elements != 1:
                if not name.endswith(SOURCE_ONLY_SCALE):  # a finding of its own
                    yield self.fine_scale(layer, name, info)
                if info.elements <= self.tensors[layer.weight].elements:
                    yield from self.fine_scale_values(name)
                continue
            if info.dtype != "float32":
                what = f"is {info.dtype} and must be float32: its rounding error is in every weight of the layer, and "
                what += "some versions crash"
                yield Finding(ERROR, "scale_dtype", name, what, _REPAIR, True, outcomes=_both(DEGRADED))
            elif info.shape:
                what = f"has shape {info.shape} and must be 0-dim: ComfyUI 0.3.75 can fail to load it"
                severe = len(info.shape) > 1
                old = {OLD: FAILS if name.endswith(".scale_weight") else CANNOT_TELL} if severe else {}
                yield Finding(ERROR if severe else WARNING, "scale_shape", name, what, _REPAIR, True, outcomes=old)
            yield from self.scale_value(name)
        for name, names in self.markings.doubled.items():
            if name not in self.names:
                continue
            what = f"has two scales, {' and '.join(names)}: which one counts depends on the program"
            yield Finding(ERROR, "two_scales", name, what, "Delete the wrong one, or quantize the 16-bit model again")
        for layer in self.layers.values():
            if layer.name in self.markings.input_scales:
                yield from self.input_scale(self.markings.input_scales[layer.name])

    def fine_scale(self, layer: ScaledLayer, name: str, info: TensorInfo) -> Finding:
        """A scale per row, which newer versions broadcast, or per block, which none can use."""
        rows = self.tensors[layer.weight].shape[:1]
        old = FAILS if name.endswith(".scale_weight") else EXACT
        if info.shape == (*rows, 1):
            what = f"has shape {info.shape}, one number per row: ComfyUI 0.33 reads it right on a CPU"
            what += ", 0.3.75 fails to load it" if old == FAILS else ", and so does 0.3.75"
            return Finding(WARNING, "scale_rows", name, what, _READ_AGAIN, outcomes={OLD: old, NEW: EXACT})
        what = f"has shape {info.shape}, not one number for the layer: loading or sampling fails, or the image is wrong"
        new = FAILS_LATER if len(info.shape) > 1 else WRONG
        failing = {OLD: FAILS if old == FAILS else new, NEW: new}
        return Finding(ERROR, "scale_shape", name, what, _READ_AGAIN, outcomes=failing)

    def fine_scale_values(self, name: str) -> Iterator[Finding]:
        scale = self.source.read(name).float()
        bad = int((~(scale.isfinite() & (scale >= 0))).sum())
        if bad:
            what = f"holds {bad:,} values that are negative or not finite: the image is black or noise"
            yield Finding(ERROR, "scale_value", name, what, _QUANTIZE_AGAIN)

    def input_scale(self, name: str) -> Iterator[Finding]:
        info = self.tensors[name]
        if info.elements != 1:
            what = f"has shape {info.shape}, not one number for the layer: GPUs with FP8 matmul fail on it"
            yield Finding(ERROR, "input_scale", name, what, _QUANTIZE_AGAIN)
            return
        value = self.source.read(name).float().item()
        if not (math.isfinite(value) and value > 0):
            what = f"is {value:g}: GPUs with FP8 matmul divide the inputs by it, and the image is black or noise"
            yield Finding(ERROR, "input_scale", name, what, _QUANTIZE_AGAIN)

    def scale_value(self, name: str) -> Iterator[Finding]:
        value = self.source.read(name).float().item()
        if not (math.isfinite(value) and value > 0):
            what = (
                f"is {value:g}: the layer outputs {'zeros' if value == 0 else 'garbage'}, the image is black or noise"
            )
            yield Finding(ERROR, "scale_value", name, what, _QUANTIZE_AGAIN)
        elif value < SMALLEST_SCALE:
            what = (
                f"is {value:g}: GPUs that multiply in fp16 cannot represent it exactly, and the layer loses precision"
            )
            yield Finding(WARNING, "scale_small", name, what, _QUANTIZE_AGAIN)

    def orphans(self) -> Iterator[Finding]:
        marks = self.markings
        for layer, name in marks.weight_scales.items():
            if layer in self.names or layer in self.other or _other_format(marks.entry(layer)):
                continue
            weight = self.tensors.get(f"{layer}.weight")
            if weight and weight.dtype not in QUANTIZABLE_DTYPES:
                what = f"is a scale of {weight.dtype} codes without an entry that names their format: they are not FP8 "
                what += "and not inspected, and ComfyUI reads them with a custom node only"
                yield Finding(NOTE, "other_scale", name, what, _NOTHING, outcomes=_both(CANNOT_TELL))
                continue
            if weight:
                what = f"is a scale, but the layer's weight is {weight.dtype}"
                yield Finding(WARNING, "orphan_scale", name, what, _REPAIR, True)
            else:
                what = "looks like a scale, but no weight has its name"
                yield Finding(NOTE, "orphan_scale", name, what, _STAYS)
        bare = {layer.name.removeprefix(layer.prefix) for layer in self.layers.values()}
        for place, entries, known in (
            (HEADER_ENTRY, marks.header, self.names | bare),
            ("comfy_quant", marks.inline, self.names),
        ):
            for layer, entry in entries.items():
                # An FP8 weight without a scale is a finding of its own; inline entries repeat those of the header.
                repeated = entries is marks.inline and layer in marks.header and _other_format(entry)
                if layer not in known and f"{layer}.weight" not in self.fp8 and not repeated:
                    yield self.orphan_entry(layer, entry, place)
        prefixes = {layer.prefix for layer in self.layers.values()}
        foreign = marks.foreign_markers([*prefixes, *(component.prefix for component in self.components.all)])
        for prefix in sorted(marks.legacy.keys() - prefixes):
            what = "marks scaled layers, but there are none"
            if (name := prefix + LEGACY_MARKER) in foreign:
                yield Finding(NOTE, "orphan_marker", name, what, _STAYS)
            else:
                what += ": old versions cast Linear weights to FP8 without a scale"
                yield Finding(WARNING, "orphan_marker", name, what, _REPAIR, True)

    def orphan_entry(self, layer: str, entry: object, place: str) -> Finding:
        header = place == HEADER_ENTRY
        if other := _other_format(entry):
            what = f"is quantized as {other}, which is not scaled FP8 and is not inspected"
            unread = {OLD: FAILS if header else WRONG, NEW: CANNOT_TELL}
            return Finding(NOTE, "other_format", layer, what, _NOTHING, outcomes=unread)
        if f"{layer}.weight" in self.tensors:
            what = f"has a {place} entry, but its weight is not FP8: loading fails"
            failing = _both(FAILS) if header else {NEW: FAILS}
            return Finding(ERROR, "orphan_entry", layer, what, _REPAIR, True, outcomes=failing)
        what = f"has a {place} entry, but no weight"
        if not header:
            return Finding(NOTE, "orphan_entry", layer, what, _STAYS)
        return Finding(WARNING, "orphan_entry", layer, what, _REPAIR, True)

    def weights(self) -> Iterator[Finding]:
        for name, info in self.fp8.items():
            scaled = name in self.layers
            component = self.components.of(name)
            if name in self.unknown and not scaled:
                yield self.weight_without_scale(name)
            elif component and component.preset.kind == NEVER_QUANTIZED and scaled:
                what = f"is quantized, but {component.preset.reason}"
                yield Finding(ERROR, "quantized_untouchable", name, what, _DEQUANTIZE, True)
            elif not self.components.is_linear(name, info):
                if scaled:
                    what = "is quantized, but is not a Linear weight: its scale is ignored, and the image is wrong"
                    yield Finding(ERROR, "quantized_no_linear", name, what, _DEQUANTIZE, True)
            elif not scaled and (self.layers or self._declared(name)):
                yield self.weight_without_scale(name)
            elif any(side % SIDE_MULTIPLE for side in info.shape) and not (scaled and self.layers[name].full_precision):
                what = f"has a side not divisible by {SIDE_MULTIPLE}: FP8 GPUs cannot multiply it and may fail"
                yield Finding(WARNING, "odd_side", name, what, "Quantize the 16-bit model again, without this layer")
        if self.fp8 and not self.layers and not self.unknown and not any(map(self._declared, self.fp8)):
            what = "the FP8 weights have no scales: values beyond the format's range and very small values are lost"
            yield Finding(WARNING, "unscaled", "", what, "Quantize the 16-bit model with scales for a better image")

    def weight_without_scale(self, name: str) -> Finding:
        if name in self.unknown:
            what = f"is FP8, and {self.unknown[name]!r} beside it looks like a scale that ComfyUI does not read: noise"
            return Finding(ERROR, "unknown_scale", name, what, _QUANTIZE_AGAIN)
        if self._declared(name):
            what = "is marked as scaled FP8, but has no scale: noise, or loading fails (TypeError)"
            failing = _both(WRONG if self.prefix_of(name) in self.markings.legacy else FAILS)
            return Finding(ERROR, "missing_scale", name, what, _QUANTIZE_AGAIN, outcomes=failing)
        what = "is FP8 without a scale or entry, beside scaled layers: noise, unless it was made without a scale"
        return Finding(WARNING, "unscaled_weight", name, what, _QUANTIZE_AGAIN, outcomes=_both(CANNOT_TELL))

    def _declared(self, name: str) -> bool:
        """Whether a marking says that an FP8 weight is scaled."""
        return self.markings.declares(name.removesuffix(".weight"), self.prefix_of(name))

    def prefix_of(self, name: str) -> str:
        """The prefix of the network of a tensor."""
        return self.markings.prefix_of(name, self.components.prefix_of(name))

    def values(self) -> Iterator[Finding]:
        """Codes that are NaN or infinite, of which a saturating quantizer produces none, and NaN in other tensors."""
        for name in self.fp8:
            bad = int((~self.source.read(name).float().isfinite()).sum())
            if bad:
                what = f"holds {bad} NaN or infinite codes: the image is black"
                yield Finding(ERROR, "nan_codes", name, what, _QUANTIZE_AGAIN)
        for name, info in self.tensors.items():
            if name in self.markings.tensors or info.dtype not in ("float64", "float32", "bfloat16", "float16"):
                continue
            bad = int(torch.isnan(self.source.read(name)).sum())
            if bad:
                what = f"holds {bad:,} NaN: the image is black"
                yield Finding(ERROR, "nan_values", name, what, "Start from a sound copy of the 16-bit model")


_REPAIR = "Repair rewrites it"
_NOTHING = "Nothing needs to be done"
_STAYS = "Nothing needs to be done: repairing and quantizing leave it as it is"
_QUANTIZE_AGAIN = "Quantize the 16-bit model again"
_READ_AGAIN = "Quantize this file again: its scales are read, and the error of its first rounding stays"
_LEGACY = "For ComfyUI 0.3.75, write the file in layout legacy"
_DEQUANTIZE = "Repair dequantizes it; quantizing the 16-bit model again gives a better image"


def _with_outcomes(finding: Finding) -> Finding:
    """An error gives a wrong image in every version, unless it says otherwise."""
    unclear = finding.severity == ERROR and not finding.outcomes and finding.code not in _READ_BY_NONE
    return replace(finding, outcomes=_both(WRONG)) if unclear else finding


_READ_BY_NONE = ("entry_not_object", "entry_format")
"""Errors in entries that another entry overrides."""


def _other_format(entry: object) -> str:
    """The format of an entry that is not FP8, or ""."""
    format = entry.get("format") if isinstance(entry, dict) else None
    return format if isinstance(format, str) and format not in FORMATS else ""
