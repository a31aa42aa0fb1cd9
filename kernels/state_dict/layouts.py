"""The ways in which a file says that a layer is scaled FP8, read and written.

legacy: a marker tensor `scaled_fp8` and `<layer>.scale_weight`. header: safetensors metadata `_quantization_metadata`.
inline: `<layer>.comfy_quant`, a uint8 tensor of JSON. The last two go with `<layer>.weight_scale`, and layout
`native` writes both, since each is read by ComfyUI versions that do not read the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..files.reader import Source, StoredTensor
from ..numerics.formats import FORMATS

HEADER_ENTRY = "_quantization_metadata"
INLINE_SUFFIX = ".comfy_quant"
LEGACY_MARKER = "scaled_fp8"
FULL_PRECISION = "full_precision_matrix_mult"
MAX_INLINE = 1 << 16
"""Bytes; an inline entry is one small JSON object."""

WEIGHT_SCALES = (".weight_scale", ".scale_weight")
INPUT_SCALES = (".input_scale", ".scale_input")
MATMULS = {
    "full": "activations stay in 16 bits",
    "fp8": "activations are cast to FP8 as well, on GPUs that multiply FP8: faster, and visibly less exact",
}


@dataclass(frozen=True)
class ScaledLayer:
    """A layer whose weight is FP8 codes with a scale. `name` is as in the file, `prefix` that of its network."""

    name: str
    format: str
    full_precision: bool = True
    prefix: str = ""

    @property
    def weight(self) -> str:
        """The name of its codes."""
        return f"{self.name}.weight"

    @property
    def entry(self) -> dict:
        """The layer's JSON in header and inline."""
        return {"format": self.format, **({FULL_PRECISION: True} if self.full_precision else {})}


@dataclass(frozen=True)
class Layout:
    """One way to write it: the endings of the scales' names, and what is stored beside codes and scales."""

    description: str
    weight_scale: str
    input_scale: str
    markers: Callable[[Iterable[ScaledLayer]], dict[str, torch.Tensor]]
    metadata: Callable[[Iterable[ScaledLayer]], dict[str, str]]


def _inline_entries(layers: Iterable[ScaledLayer]) -> dict[str, torch.Tensor]:
    return {
        layer.name + INLINE_SUFFIX: torch.frombuffer(bytearray(json.dumps(layer.entry).encode()), dtype=torch.uint8)
        for layer in layers
    }


def _header_entry(layers: Iterable[ScaledLayer]) -> dict[str, str]:
    entries = {layer.name: layer.entry for layer in sorted(layers, key=lambda layer: layer.name)}
    return {HEADER_ENTRY: json.dumps({"format_version": "1.0", "layers": entries})}


def _legacy_markers(layers: Iterable[ScaledLayer]) -> dict[str, torch.Tensor]:
    """One marker a network: its dtype is the format, two elements mean full precision.

    Raises ValueError where layers of a network differ, which this layout cannot say.
    """
    markers: dict[str, torch.Tensor] = {}
    for layer in layers:
        marker = torch.zeros(2 if layer.full_precision else 0).to(FORMATS[layer.format].dtype)
        known = markers.setdefault(layer.prefix + LEGACY_MARKER, marker)
        if (known.dtype, known.shape) != (marker.dtype, marker.shape):
            raise ValueError("the legacy layout holds one format and one matmul for all layers: choose layout native")
    return markers


LAYOUTS = {
    "native": Layout(
        "for ComfyUI 0.3.75 and newer: header and inline entries with weight_scale",
        ".weight_scale",
        ".input_scale",
        _inline_entries,
        _header_entry,
    ),
    "legacy": Layout(
        "for ComfyUI before October 2025: one scaled_fp8 marker with scale_weight",
        ".scale_weight",
        ".scale_input",
        _legacy_markers,
        lambda layers: {},
    ),
}


@dataclass
class Markings:
    """Everything that a file says about scaling, as it says it, be it right or wrong."""

    weight_scales: dict[str, str] = field(default_factory=dict)
    """layer -> the name of its scale."""
    input_scales: dict[str, str] = field(default_factory=dict)
    header: dict[str, object] = field(default_factory=dict)
    """layer -> its entry, which ought to be a dict with a "format"."""
    inline: dict[str, object] = field(default_factory=dict)
    legacy: dict[str, StoredTensor] = field(default_factory=dict)
    """prefix -> marker tensor."""
    faults: dict[str, str] = field(default_factory=dict)
    """Where something cannot be read at all -> why."""
    tensors: set[str] = field(default_factory=set)
    """Names of all the tensors above, which are no parameters of the model."""

    def entry(self, layer: str, prefix: str = "") -> dict:
        """What is declared of a layer, its name taken without the prefix if need be; the header overrides inline."""
        for entries, name in ((self.header, layer), (self.header, layer.removeprefix(prefix)), (self.inline, layer)):
            if name in entries:
                entry = entries[name]
                return entry if isinstance(entry, dict) else {"format": entry}
        if prefix in self.legacy:
            return {FULL_PRECISION: self.legacy[prefix].elements == 2}
        return {}


def read_markings(source: Source) -> Markings:
    """Gather what a file says about scaling. Reads the header and the inline entries."""
    markings = Markings()
    for name, tensor in source.tensors.items():
        layer, dot, ending = name.rpartition(".")
        if dot + ending in WEIGHT_SCALES:
            markings.weight_scales[layer] = name
        elif dot + ending in INPUT_SCALES:
            markings.input_scales[layer] = name
        elif dot + ending == INLINE_SUFFIX:
            markings.inline[layer] = _read_inline(source, name, markings.faults)
        elif ending == LEGACY_MARKER:
            markings.legacy[layer + dot] = tensor
        else:
            continue
        markings.tensors.add(name)
    if HEADER_ENTRY in source.metadata:
        markings.header = _read_header_entry(source.metadata[HEADER_ENTRY], markings.faults)
    return markings


def scaled_layers(tensors: Mapping[str, StoredTensor], markings: Markings, prefix_of) -> dict[str, ScaledLayer]:
    """weight name -> layer, of every FP8 weight that has a scale. prefix_of(name): the prefix of its network."""
    layers = {}
    for name in markings.weight_scales:
        weight = f"{name}.weight"
        if weight in tensors and tensors[weight].dtype in FORMATS:
            prefix = prefix_of(weight)
            full_precision = markings.entry(name, prefix).get(FULL_PRECISION, False) is True
            layers[weight] = ScaledLayer(name, tensors[weight].dtype, full_precision, prefix)
    return layers


def read_scale(source: Source, name: str) -> torch.Tensor:
    """A scale of any float dtype and any shape of one element, as fp32 0-dim.

    Raises ValueError: more than one element, or not finite and above zero.
    """
    info = source.tensors[name]
    if info.elements != 1:
        raise ValueError(f"scale {name!r} has shape {info.shape}, where FP8 layers have one number")
    scale = source.read(name).float().reshape(())
    if not (torch.isfinite(scale) and scale > 0):
        raise ValueError(f"scale {name!r} is {scale.item()}")
    return scale


def _read_inline(source: Source, name: str, faults: dict[str, str]) -> object:
    if source.tensors[name].nbytes > MAX_INLINE:
        faults[name] = "is too large for an inline entry"
        return {}
    return _parse_json(source.read_bytes(name), name, faults)


def _read_header_entry(text: str, faults: dict[str, str]) -> dict[str, object]:
    entry = _parse_json(text, HEADER_ENTRY, faults)
    layers = entry.get("layers") if isinstance(entry, dict) else None
    if not isinstance(layers, dict):
        faults.setdefault(HEADER_ENTRY, "lists no layers")
        return {}
    return layers


def _parse_json(text: str | bytes, where: str, faults: dict[str, str]) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        faults[where] = f"is not JSON: {error}"
        return {}
