"""Verifies scaled FP8 files: every known problem, and what each ComfyUI version makes of the file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .. import display
from ..files.reader import Source, open_source
from ..numerics.formats import FORMATS
from ..numerics.scaling import SMALLEST_SCALE
from ..selection.presets import NEVER_QUANTIZED, PRESETS, Components, diffusers_model
from ..selection.selection import SIDE_MULTIPLE, is_linear
from .compatibility import Verdict, verdicts
from .layouts import HEADER_ENTRY, ScaledLayer
from .markings import Markings, read_markings, scaled_layers

ERROR, WARNING, NOTE = "error", "warning", "note"


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
    def summary(self) -> str:
        """A line about the file, one per ComfyUI version and one per finding."""
        title = f"{PRESETS[self.family].title}, {display.count(self.scaled, 'scaled FP8 layer')}"
        kinds = Counter(finding.severity for finding in self.findings)
        counts = ", ".join(display.count(kinds[kind], kind) for kind in (ERROR, WARNING) if kinds[kind])
        lines = [
            f"{self.source}: {title} ({', '.join(self.formats) or 'no FP8'}; "
            f"marked: {', '.join(self.ways) or 'not at all'}): {counts or 'no problems'}",
            *(f"{v.generation}: {v.outcome}{' (' + v.text + ')' if v.text else ''}" for v in self.verdicts),
            *map(str, self.findings),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def inspect_file(path: str | os.PathLike[str], deep: bool = False) -> Inspection:
    """Look for every known problem of scaled FP8 files. Reads header, entries and scales; with `deep`, all FP8 codes.

    Raises CheckpointError if the file is not a valid safetensors file.
    """
    with open_source(path) as source:
        return inspect_source(source, deep)


def inspect_source(source: Source, deep: bool = False) -> Inspection:
    """inspect_file for an open file."""
    inspector = _Inspector(source)
    findings = inspector.findings(deep)
    formats = tuple(sorted({layer.format for layer in inspector.layers.values()}))
    main = inspector.components.main
    ways = inspector.ways()
    return Inspection(
        source.name,
        main.family,
        len(inspector.layers),
        formats,
        ways,
        tuple(sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity))),
        verdicts(ways, formats, main.family, main.preset.kind, inspector.components.all_in_one) if formats else (),
    )


class _Inspector:
    def __init__(self, source: Source):
        self.source = source
        self.tensors = source.tensors
        self.markings: Markings = read_markings(source)
        parameters = {name: info for name, info in self.tensors.items() if name not in self.markings.tensors}
        self.components = Components(parameters)
        self.layers: dict[str, ScaledLayer] = scaled_layers(self.tensors, self.markings, self.components.prefix_of)
        self.names = {layer.name for layer in self.layers.values()}
        self.fp8 = {name: info for name, info in parameters.items() if info.dtype in FORMATS}

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
            found += self.codes()
        return found

    def file(self) -> Iterator[Finding]:
        for where, text in self.markings.faults.items():
            yield Finding(ERROR, "unreadable_entry", where, f"{text}, so ComfyUI fails to load the file", _REPAIR, True)
        model = diffusers_model(self.tensors)
        if model and self.fp8:
            what = f"{model} in the diffusers layout: ComfyUI's loader drops the scales, and the image is noise"
            yield Finding(ERROR, "diffusers_layout", "", what, "Quantize the ComfyUI version of this model instead")
        if self.components.main.family == "unknown":
            yield Finding(NOTE, "unknown_family", "", "the model family is unknown", "Nothing needs to be done")
        if not self.fp8:
            yield Finding(NOTE, "no_fp8", "", "the file has no FP8 weights", "Nothing needs to be done")
        for prefix, marker in self.markings.legacy.items():
            yield from self.legacy_marker(prefix, marker.dtype)

    def legacy_marker(self, prefix: str, dtype: str) -> Iterator[Finding]:
        where = prefix + "scaled_fp8"
        formats = {layer.format for layer in self.layers.values() if layer.prefix == prefix}
        if formats and dtype not in formats and dtype != "float32":
            what = f"the marker says {dtype}, the weights are {', '.join(sorted(formats))}: the image is garbage"
            yield Finding(ERROR, "marker_dtype", where, what, _REPAIR, True)
        if "float8_e5m2" in formats and not self.names <= self.markings.header.keys():
            what = "newer ComfyUI versions read legacy E5M2 as E4M3, without an error: the image is garbage"
            yield Finding(ERROR, "legacy_e5m2", where, what, _REPAIR, True)

    def entries(self) -> Iterator[Finding]:
        marks = self.markings
        for layer in self.layers.values():
            legacy_scale = marks.weight_scales[layer.name].endswith(".scale_weight")
            if legacy_scale and layer.prefix not in marks.legacy:
                what = "has a scale_weight, but the file has no scaled_fp8 marker: ComfyUI ignores the scale (noise)"
                yield Finding(ERROR, "missing_marker", layer.name, what, _REPAIR, True)
            elif legacy_scale and layer.name in marks.header:
                what = "has a scale_weight and a header entry: newer versions ignore the scale and fail to load it"
                yield Finding(ERROR, "mixed_layouts", layer.name, what, _REPAIR, True)
            elif not legacy_scale:
                yield from self.native_entries(layer)

    def native_entries(self, layer: ScaledLayer) -> Iterator[Finding]:
        marks = self.markings
        bare = layer.name.removeprefix(layer.prefix)
        if layer.prefix and bare in marks.header:
            what = f"is named in the header without {layer.prefix!r}: its scale is not found, and the image is noise"
            yield Finding(ERROR, "unprefixed_name", layer.name, what, _REPAIR, True)
        elif layer.name not in marks.header and layer.name not in marks.inline:
            what = "has a scale, but no header entry and no inline entry: ComfyUI ignores the scale (noise)"
            yield Finding(ERROR, "missing_entry", layer.name, what, _REPAIR, True)
        elif layer.name not in marks.header:
            what = "has only an inline entry: ComfyUI 0.3.75 ignores the scale, and the image is wrong"
            yield Finding(WARNING, "inline_only", layer.name, what, _REPAIR, True)
        for entries, place in ((marks.header, HEADER_ENTRY), (marks.inline, "comfy_quant")):
            if layer.name in entries:
                yield from self.entry(layer, entries[layer.name], place)

    def entry(self, layer: ScaledLayer, entry: object, place: str) -> Iterator[Finding]:
        if not isinstance(entry, dict):
            what = f'its {place} entry is {entry!r}, not {{"format": …}}: loading fails (AttributeError)'
            yield Finding(ERROR, "entry_not_object", layer.name, what, _REPAIR, True)
        elif entry.get("format") != layer.format:
            what = f"its {place} entry says {entry.get('format')}, the weight is {layer.format}: the image is garbage"
            yield Finding(ERROR, "entry_format", layer.name, what, _REPAIR, True)

    def scales(self) -> Iterator[Finding]:
        for layer in self.layers.values():
            name = self.markings.weight_scales[layer.name]
            info = self.tensors[name]
            if info.elements != 1:
                what = f"has shape {info.shape}, not one number for the layer: loading fails or the image is wrong"
                yield Finding(ERROR, "scale_shape", name, what, _QUANTIZE_AGAIN)
                continue
            if info.dtype != "float32":
                what = f"is {info.dtype} and must be float32: its rounding error is in every weight of the layer, and "
                what += "some versions crash"
                yield Finding(ERROR, "scale_dtype", name, what, _REPAIR, True)
            elif info.shape:
                what = f"has shape {info.shape} and must be 0-dim: ComfyUI 0.3.75 can fail to load it"
                yield Finding(ERROR if len(info.shape) > 1 else WARNING, "scale_shape", name, what, _REPAIR, True)
            yield from self.scale_value(name)

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
            if layer not in self.names and not _other_format(marks.entry(layer)):
                weight = self.tensors.get(f"{layer}.weight")
                state = f"is {weight.dtype}" if weight else "is not in the file"
                what = f"is a scale, but the layer's weight {state}"
                yield Finding(WARNING, "orphan_scale", name, what, _REPAIR, True)
        bare = {layer.name.removeprefix(layer.prefix) for layer in self.layers.values()}
        for place, entries, known in (
            (HEADER_ENTRY, marks.header, self.names | bare),
            ("comfy_quant", marks.inline, self.names),
        ):
            for layer, entry in entries.items():
                # An FP8 weight without a scale is a finding of its own.
                if layer not in known and f"{layer}.weight" not in self.fp8:
                    yield self.orphan_entry(layer, entry, place)
        prefixes = {layer.prefix for layer in self.layers.values()}
        for prefix in sorted(marks.legacy.keys() - prefixes):
            what = "marks scaled layers, but there are none: old versions cast Linear weights to FP8 without a scale"
            yield Finding(WARNING, "orphan_marker", prefix + "scaled_fp8", what, _REPAIR, True)

    def orphan_entry(self, layer: str, entry: object, place: str) -> Finding:
        if other := _other_format(entry):
            what = f"is quantized as {other}, which is not FP8 and is not inspected"
            return Finding(NOTE, "other_format", layer, what, "Nothing needs to be done")
        if f"{layer}.weight" in self.tensors:
            what = f"has a {place} entry, but its weight is not FP8: loading fails"
            return Finding(ERROR, "orphan_entry", layer, what, _REPAIR, True)
        return Finding(WARNING, "orphan_entry", layer, f"has a {place} entry, but no weight", _REPAIR, True)

    def weights(self) -> Iterator[Finding]:
        for name, info in self.fp8.items():
            scaled = name in self.layers
            component = self.components.of(name)
            if component and component.preset.kind == NEVER_QUANTIZED and scaled:
                what = f"is quantized, but {component.preset.reason}"
                yield Finding(ERROR, "quantized_untouchable", name, what, _DEQUANTIZE, True)
            elif not is_linear(name, info):
                if scaled:
                    what = "is quantized, but is not a Linear weight: its scale is ignored, and the image is wrong"
                    yield Finding(ERROR, "quantized_no_linear", name, what, _DEQUANTIZE, True)
            elif not scaled and self.layers:
                yield self.weight_without_scale(name)
            elif any(side % SIDE_MULTIPLE for side in info.shape):
                what = f"has a side not divisible by {SIDE_MULTIPLE}: FP8 GPUs cannot multiply it and may fail"
                yield Finding(WARNING, "odd_side", name, what, "Quantize the 16-bit model again, without this layer")
        if self.fp8 and not self.layers:
            what = "the FP8 weights have no scales: values beyond the format's range and very small values are lost"
            yield Finding(WARNING, "unscaled", "", what, "Quantize the 16-bit model with scales for a better image")

    def weight_without_scale(self, name: str) -> Finding:
        layer = name.removesuffix(".weight")
        marks = self.markings
        if layer in marks.header or layer in marks.inline or self.components.prefix_of(name) in marks.legacy:
            what = "is marked as scaled FP8, but has no scale: noise, or loading fails (TypeError)"
            return Finding(ERROR, "missing_scale", name, what, _QUANTIZE_AGAIN)
        what = "is FP8 without a scale or entry, beside scaled layers: noise, unless it was made without a scale"
        return Finding(WARNING, "unscaled_weight", name, what, _QUANTIZE_AGAIN)

    def codes(self) -> Iterator[Finding]:
        """Codes that are NaN or infinite. A saturating quantizer produces none."""
        for name in self.fp8:
            bad = int((~self.source.read(name).float().isfinite()).sum())
            if bad:
                what = f"holds {bad} NaN or infinite codes: the image is black"
                yield Finding(ERROR, "nan_codes", name, what, _QUANTIZE_AGAIN)


_REPAIR = "Repair rewrites it"
_QUANTIZE_AGAIN = "Quantize the 16-bit model again"
_DEQUANTIZE = "Repair dequantizes it; quantizing the 16-bit model again gives a better image"


def _other_format(entry: object) -> str:
    """The format of an entry that is not FP8, or ""."""
    format = entry.get("format") if isinstance(entry, dict) else None
    return format if isinstance(format, str) and format not in FORMATS else ""
