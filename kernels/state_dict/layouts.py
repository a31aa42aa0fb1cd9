"""The ways in which a file says that a layer is scaled FP8: every key suffix, marker and metadata entry.

legacy: a marker tensor `scaled_fp8` and `<layer>.scale_weight`. header: safetensors metadata `_quantization_metadata`.
inline: `<layer>.comfy_quant`, a uint8 tensor of JSON. The last two go with `<layer>.weight_scale`. Layout `native`
writes both, because each is read by ComfyUI versions that do not read the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..numerics.formats import FORMATS

HEADER_ENTRY = "_quantization_metadata"
INLINE_SUFFIX = ".comfy_quant"
LEGACY_MARKER = "scaled_fp8"
FULL_PRECISION = "full_precision_matrix_mult"

SOURCE_ONLY_SCALE = ".weight_scale_inv"
"""Read from sources only: ComfyUI does not know it."""
WEIGHT_SCALES = (".weight_scale", ".scale_weight", SOURCE_ONLY_SCALE)
INPUT_SCALES = (".input_scale", ".scale_input")

MARKING_NAMES = frozenset(suffix[1:] for suffix in (*WEIGHT_SCALES, *INPUT_SCALES, INLINE_SUFFIX)) | {LEGACY_MARKER}
"""Last parts of the names of tensors that describe a scaled layer and are not parameters of the model."""


@dataclass(frozen=True, slots=True)
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
    def entry(self) -> dict[str, object]:
        """The layer's JSON in header and inline entries."""
        return {"format": self.format, **({FULL_PRECISION: True} if self.full_precision else {})}


@dataclass(frozen=True)
class Layout:
    """One way to write scaled layers: key suffixes of the scales, and what is stored beside codes and scales."""

    description: str
    weight_scale: str
    input_scale: str
    markers: Callable[[Iterable[ScaledLayer]], dict[str, torch.Tensor]]
    """Layers -> tensors that mark them. Raises ValueError where the layout cannot describe these layers together."""
    metadata: Callable[[Iterable[ScaledLayer]], dict[str, str]]
    """Layers -> entries of the safetensors metadata."""


def _inline_entries(layers: Iterable[ScaledLayer]) -> dict[str, torch.Tensor]:
    return {
        layer.name + INLINE_SUFFIX: torch.frombuffer(bytearray(json.dumps(layer.entry).encode()), dtype=torch.uint8)
        for layer in layers
    }


def _header_entry(layers: Iterable[ScaledLayer]) -> dict[str, str]:
    entries = {layer.name: layer.entry for layer in sorted(layers, key=lambda layer: layer.name)}
    return {HEADER_ENTRY: json.dumps({"format_version": "1.0", "layers": entries})}


def _legacy_markers(layers: Iterable[ScaledLayer]) -> dict[str, torch.Tensor]:
    """One marker per network: its dtype is the format; two elements mean full-precision matmul.

    The layout has one matmul setting for all layers of a network: full precision as soon as one layer asks for it.
    """
    networks: dict[str, list[ScaledLayer]] = {}
    for layer in layers:
        networks.setdefault(layer.prefix, []).append(layer)
    markers = {}
    for prefix, members in networks.items():
        formats = sorted({layer.format for layer in members})
        if len(formats) > 1:
            raise ValueError(
                f"the legacy layout holds one format for all layers of a model, not both "
                f"{' and '.join(formats)}: choose layout native"
            )
        elements = 2 if any(layer.full_precision for layer in members) else 0
        markers[prefix + LEGACY_MARKER] = torch.zeros(elements, device="cpu").to(FORMATS[formats[0]].dtype)
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
