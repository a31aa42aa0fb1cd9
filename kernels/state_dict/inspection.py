"""Verifies scaled FP8 files: every known problem, and what each ComfyUI version makes of the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from .. import display
from ..errors import CheckpointError, LimitError
from ..files.reader import Source, is_index, is_safetensors, open_source
from ..numerics.formats import FORMATS
from ..selection.blocks import incomplete_blocks
from ..selection.components import Components
from ..selection.foreign import diffusers_model, foreign_kind, other_quantizer
from ..selection.presets import NEVER_QUANTIZED
from ..selection.selection import QUANTIZABLE_DTYPES, SIDE_MULTIPLE
from .compatibility import CANNOT_TELL, FAILS, NEW, NOT_RECOGNISED, OLD, WRONG, file_verdicts
from .findings import (
    DELETE_ONE,
    DEQUANTIZE,
    ERROR,
    LEGACY,
    NOTE,
    NOTHING,
    QUANTIZE_AGAIN,
    QUANTIZE_WHOLE,
    READ_AGAIN,
    REPAIR,
    STAYS,
    WARNING,
    Finding,
    Inspection,
    both,
    sentence,
    verdicts_with,
)
from .layouts import HEADER_ENTRY, LEGACY_MARKER, SOURCE_ONLY_SCALE, ScaledLayer
from .markings import TOO_LARGE, Markings, read_markings, scaled_layers, unknown_scales
from .scale_findings import input_scale_findings, weight_scale_findings

MXFP8 = "mxfp8"
"""The format of entries for FP8 codes with a scale per 32 values."""


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
        return _not_read(path.name, Finding(ERROR, "beyond_limits", *_parts(path, error), outcomes=both(CANNOT_TELL)))
    except CheckpointError as error:
        return _not_read(path.name, Finding(ERROR, "unreadable", *_parts(path, error), outcomes=both(FAILS)))


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
        verdicts_with(file_verdicts(ways, formats, inspector.components) if formats else (), findings),
    )


def _parts(path: Path, error: CheckpointError) -> tuple[str, str, str]:
    """The file of a set that an error is about, what is wrong, and the way out."""
    other = "" if error.file == display.printable(path.name) else error.file
    return other, error.fault, sentence(error.way_out or "check that the file is complete and can be read")


def _not_read(name: str, finding: Finding) -> Inspection:
    """The inspection of a file of which nothing else is known."""
    return Inspection(name, "unknown", 0, (), (), (finding,), verdicts_with((), (finding,)))


class _Inspector:
    def __init__(self, source: Source, file_name: str = ""):
        self.source, self.file_name = source, file_name
        self.tensors = source.tensors
        self.markings: Markings = read_markings(source)
        self.parameters = {name: info for name, info in self.tensors.items() if name not in self.markings.tensors}
        self.components = Components(self.parameters)
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
            for name, info in self.parameters.items()
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
        found = [*self.file(), *self.blocks(), *self.entries(), *self.scales(), *self.orphans(), *self.weights()]
        if deep:
            found += self.values()
        return [_with_outcomes(finding) for finding in found]

    def file(self) -> Iterator[Finding]:
        for where, text in self.markings.faults.items():
            if text == TOO_LARGE:
                what, failing = f"{text}, and was not read", both(CANNOT_TELL)
            else:
                what, failing = f"{text}, so ComfyUI fails to load the file", both(FAILS)
            if where != HEADER_ENTRY:
                failing.pop(OLD)
            yield Finding(ERROR, "unreadable_entry", where, what, REPAIR, True, outcomes=failing)
        if other := other_quantizer(self.tensors):
            what = f"is quantized by {other[0]}, which is not FP8 and is not inspected"
            yield Finding(NOTE, "other_format", other[1], what, NOTHING, outcomes=both(CANNOT_TELL))
        foreign = foreign_kind(self.tensors, self.file_name)
        if foreign and not other:
            what = f"this is {foreign[0]}: ComfyUI does not load it as a model"
            yield Finding(ERROR, "not_a_model", "", what, sentence(foreign[1]), outcomes=both(NOT_RECOGNISED))
        prefix = self.components.undetected_prefix
        if prefix and not foreign:
            what = f"the names begin with {prefix!r}, under which ComfyUI detects no model"
            way_out = "Remove this prefix from the names"
            yield Finding(WARNING, "undetected_prefix", "", what, way_out, outcomes=both(NOT_RECOGNISED))
        if self.components.renamed and self.layers and "legacy" not in self.ways():
            what = "ComfyUI 0.3.75 renames this weight while it loads it, but not its header entry: the image is wrong"
            yield Finding(WARNING, "renamed_layers", self.components.renamed, what, LEGACY, outcomes={OLD: WRONG})
        model = diffusers_model(self.tensors)
        if model and self.fp8:
            what = f"{model} in the diffusers layout: ComfyUI's loader drops the scales, and the image is noise"
            yield Finding(ERROR, "diffusers_layout", "", what, "Quantize the ComfyUI version of this model instead")
        if self.components.main.family == "unknown" and not foreign:
            yield Finding(NOTE, "unknown_family", "", "the model family is unknown", NOTHING)
        if not self.fp8 and not self.other:
            yield Finding(NOTE, "no_fp8", "", "the file has no FP8 weights", NOTHING)
        for prefix, marker in self.markings.legacy.items():
            yield from self.legacy_marker(prefix, marker.dtype)

    def blocks(self) -> Iterator[Finding]:
        if foreign_kind(self.tensors, self.file_name):  # such as one file of a set
            return
        for block, fault in incomplete_blocks(self.components, self.parameters):
            what = f"{fault}: ComfyUI gives no error, and the image is wrong"
            yield Finding(ERROR, "incomplete_block", block, what, QUANTIZE_WHOLE)

    def legacy_marker(self, prefix: str, dtype: str) -> Iterator[Finding]:
        where = prefix + "scaled_fp8"
        formats = {layer.format for layer in self.layers.values() if layer.prefix == prefix}
        if formats and dtype not in formats and dtype != "float32":
            what = f"the marker says {dtype}, the weights are {', '.join(sorted(formats))}: the image is garbage"
            yield Finding(ERROR, "marker_dtype", where, what, REPAIR, True, outcomes={OLD: WRONG})
        if "float8_e5m2" in formats and not self.names <= self.markings.header.keys():
            what = "newer ComfyUI versions read legacy E5M2 as E4M3, without an error: the image is garbage"
            yield Finding(ERROR, "legacy_e5m2", where, what, REPAIR, True, outcomes={NEW: WRONG})

    def entries(self) -> Iterator[Finding]:
        marks = self.markings
        for layer in self.layers.values():
            scale = marks.weight_scales[layer.name]
            legacy_scale = scale.endswith(".scale_weight")
            if scale.endswith(SOURCE_ONLY_SCALE):
                yield self.unread_scale(scale)
            elif legacy_scale and layer.prefix not in marks.legacy:
                what = "has a scale_weight, but the file has no scaled_fp8 marker: ComfyUI ignores the scale (noise)"
                yield Finding(ERROR, "missing_marker", layer.name, what, REPAIR, True)
            elif legacy_scale and layer.name in marks.header:
                what = "has a scale_weight and a header entry: newer versions ignore the scale and fail to load it"
                yield Finding(ERROR, "mixed_layouts", layer.name, what, REPAIR, True, outcomes=both(FAILS))
            elif not legacy_scale:
                yield from self.native_entries(layer)

    def unread_scale(self, scale: str) -> Finding:
        what = "ComfyUI does not read this scale: the image is noise"
        if self.tensors[scale].elements == 1:
            return Finding(ERROR, "unread_scale", scale, what, REPAIR, True)
        return Finding(ERROR, "unread_scale", scale, what, READ_AGAIN)

    def native_entries(self, layer: ScaledLayer) -> Iterator[Finding]:
        marks = self.markings
        bare = layer.name.removeprefix(layer.prefix)
        if layer.prefix and bare in marks.header:
            what = f"is named in the header without {layer.prefix!r}: its scale is not found, and the image is noise"
            noise = {OLD: WRONG} if layer.name in marks.inline else both(WRONG)
            yield Finding(ERROR, "unprefixed_name", layer.name, what, REPAIR, True, outcomes=noise)
        elif layer.name not in marks.header and layer.name not in marks.inline:
            what = "has a scale, but no header entry and no inline entry: ComfyUI ignores the scale (noise)"
            yield Finding(ERROR, "missing_entry", layer.name, what, REPAIR, True)
        elif layer.name not in marks.header:
            what = "has only an inline entry: ComfyUI 0.3.75 ignores the scale, and the image is wrong"
            yield Finding(WARNING, "inline_only", layer.name, what, REPAIR, True)
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
            yield Finding(ERROR, "entry_not_object", layer.name, what, REPAIR, True, outcomes=failing)
        elif entry.get("format") != layer.format:
            what = f"its {place} entry says {entry.get('format')}, the weight is {layer.format}: the image is garbage"
            garbage = dict.fromkeys(readers, WRONG)
            yield Finding(ERROR, "entry_format", layer.name, what, REPAIR, True, outcomes=garbage)

    def scales(self) -> Iterator[Finding]:
        marks = self.markings
        for layer in self.layers.values():
            yield from weight_scale_findings(self.source, self.tensors[layer.weight], marks.weight_scales[layer.name])
            if layer.name in marks.input_scales:
                yield from input_scale_findings(self.source, marks.input_scales[layer.name])
        for name, names in marks.doubled.items():
            if name in self.names:
                what = f"has two scales, {' and '.join(names)}: which one counts depends on the program"
                yield Finding(ERROR, "two_scales", name, what, DELETE_ONE)

    def orphans(self) -> Iterator[Finding]:
        marks = self.markings
        for layer, name in marks.weight_scales.items():
            if layer in self.names or layer in self.other or _other_format(marks.entry(layer)):
                continue
            weight = self.tensors.get(f"{layer}.weight")
            if weight and weight.dtype not in QUANTIZABLE_DTYPES:
                what = f"is a scale of {weight.dtype} codes without an entry that names their format: they are not FP8 "
                what += "and not inspected, and ComfyUI reads them with a custom node only"
                yield Finding(NOTE, "other_scale", name, what, NOTHING, outcomes=both(CANNOT_TELL))
                continue
            if weight:
                what = f"is a scale, but the layer's weight is {weight.dtype}"
                yield Finding(WARNING, "orphan_scale", name, what, REPAIR, True)
            else:
                what = "looks like a scale, but no weight has its name"
                yield Finding(NOTE, "orphan_scale", name, what, STAYS)
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
                yield Finding(NOTE, "orphan_marker", name, what, STAYS)
            else:
                what += ": old versions cast Linear weights to FP8 without a scale"
                yield Finding(WARNING, "orphan_marker", name, what, REPAIR, True)

    def orphan_entry(self, layer: str, entry: object, place: str) -> Finding:
        header = place == HEADER_ENTRY
        if other := _other_format(entry):
            what = f"is quantized as {other}, which is not scaled FP8 and is not inspected"
            unread = {OLD: FAILS if header else WRONG, NEW: CANNOT_TELL}
            return Finding(NOTE, "other_format", layer, what, NOTHING, outcomes=unread)
        if f"{layer}.weight" in self.tensors:
            what = f"has a {place} entry, but its weight is not FP8: loading fails"
            failing = both(FAILS) if header else {NEW: FAILS}
            return Finding(ERROR, "orphan_entry", layer, what, REPAIR, True, outcomes=failing)
        what = f"has a {place} entry, but no weight"
        if not header:
            return Finding(NOTE, "orphan_entry", layer, what, STAYS)
        return Finding(WARNING, "orphan_entry", layer, what, REPAIR, True)

    def weights(self) -> Iterator[Finding]:
        for name, info in self.fp8.items():
            scaled = name in self.layers
            component = self.components.of(name)
            if name in self.unknown:
                yield self.unknown_scale(name)
            elif component is None:
                if scaled:
                    what = "is outside the networks that ComfyUI loads: what becomes of it is not known"
                    yield Finding(WARNING, "outside_networks", name, what, NOTHING, outcomes=both(CANNOT_TELL))
            elif component.preset.kind == NEVER_QUANTIZED and scaled:
                what = f"is quantized, but {component.preset.reason}"
                yield Finding(ERROR, "quantized_untouchable", name, what, DEQUANTIZE, True)
            elif not self.components.is_linear(name, info):
                if scaled:
                    what = "is quantized, but is not a Linear weight: its scale is ignored, and the image is wrong"
                    yield Finding(ERROR, "quantized_no_linear", name, what, DEQUANTIZE, True)
            elif not scaled and (self.layers or self._declared(name)):
                yield self.weight_without_scale(name)
            elif any(side % SIDE_MULTIPLE for side in info.shape) and not (scaled and self.layers[name].full_precision):
                what = f"has a side not divisible by {SIDE_MULTIPLE}: FP8 GPUs cannot multiply it and may fail"
                yield Finding(WARNING, "odd_side", name, what, "Quantize the 16-bit model again, without this layer")
        if self.fp8 and not self.layers and not self.unknown and not any(map(self._declared, self.fp8)):
            what = "the FP8 weights have no scales: values beyond the format's range and very small values are lost"
            yield Finding(WARNING, "unscaled", "", what, "Quantize the 16-bit model with scales for a better image")

    def unknown_scale(self, name: str) -> Finding:
        beside = self.unknown[name]
        if name in self.layers:
            what = f"has a scale, and {beside!r} beside it looks like a second one, which ComfyUI does not read"
            return Finding(WARNING, "second_scale", name, what, QUANTIZE_AGAIN, outcomes=both(CANNOT_TELL))
        what = f"is FP8, and {beside!r} beside it looks like a scale that ComfyUI does not read: noise"
        return Finding(ERROR, "unknown_scale", name, what, QUANTIZE_AGAIN)

    def weight_without_scale(self, name: str) -> Finding:
        if self._declared(name):
            what = "is marked as scaled FP8, but has no scale: noise, or loading fails (TypeError)"
            failing = both(WRONG if self.prefix_of(name) in self.markings.legacy else FAILS)
            return Finding(ERROR, "missing_scale", name, what, QUANTIZE_AGAIN, outcomes=failing)
        what = "is FP8 without a scale or entry, beside scaled layers: noise, unless it was made without a scale"
        return Finding(WARNING, "unscaled_weight", name, what, QUANTIZE_AGAIN, outcomes=both(CANNOT_TELL))

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
                yield Finding(ERROR, "nan_codes", name, what, QUANTIZE_AGAIN)
        for name, info in self.tensors.items():
            if name in self.markings.tensors or info.dtype not in ("float64", "float32", "bfloat16", "float16"):
                continue
            bad = int(torch.isnan(self.source.read(name)).sum())
            if bad:
                what = f"holds {bad:,} NaN: the image is black"
                yield Finding(ERROR, "nan_values", name, what, "Start from a sound copy of the 16-bit model")


def _with_outcomes(finding: Finding) -> Finding:
    """An error gives a wrong image in every version, unless it says otherwise."""
    unclear = finding.severity == ERROR and not finding.outcomes and finding.code not in _READ_BY_NONE
    return replace(finding, outcomes=both(WRONG)) if unclear else finding


_READ_BY_NONE = ("entry_not_object", "entry_format")
"""Errors in entries that another entry overrides."""


def _other_format(entry: object) -> str:
    """The format of an entry that is not FP8, or ""."""
    format = entry.get("format") if isinstance(entry, dict) else None
    return format if isinstance(format, str) and format not in FORMATS else ""
