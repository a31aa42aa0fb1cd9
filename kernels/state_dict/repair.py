"""Rewrites a faulty scaled FP8 file as far as that goes without the 16-bit model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..choices import choose
from ..errors import file_error
from ..files.header import TensorInfo
from ..files.reader import Source, open_source
from ..files.writer import check_target, refuse_same_file, writing
from ..numerics.quantized_tensor import dequantize_tensor
from ..selection.presets import UNTOUCHED, Components
from ..selection.selection import is_linear
from .inspection import ERROR, Inspection, inspect_file, inspect_source
from .layouts import (
    FULL_PRECISION,
    HEADER_ENTRY,
    LAYOUTS,
    Markings,
    ScaledLayer,
    read_markings,
    read_scale,
    scaled_layers,
)


def repair_file(
    path: str | os.PathLike, target: str | os.PathLike, *, layout: str = "native", overwrite: bool = False
) -> Inspection:
    """Write a sound copy of a scaled FP8 file: every code bit for bit, scales in fp32 0-dim, markers of one layout.

    Orphan scales and entries are dropped; what ComfyUI cannot take as FP8 (norms, convolutions, embeddings, CLIP-L
    and CLIP-G, VAE) is dequantized to float32. Returns the inspection of the new file.
    Raises CheckpointError where scales are missing or broken, and as quantize_file for files.
    """
    target = Path(target)
    with open_source(path) as source:
        refuse_same_file(source, target)
        check_target(target, overwrite)
        findings = inspect_source(source).findings
        other = [finding for finding in findings if finding.code == "other_format"]
        if other:
            raise file_error(source.path, f"cannot be repaired: {other[0].where} {other[0].what}")
        broken = [finding for finding in findings if finding.severity == ERROR and not finding.repairable]
        if broken:
            raise file_error(source.path, f"cannot be repaired: {broken[0]} ({len(broken)} such findings)")
        _Repair(source, layout).write(target, overwrite)
    return inspect_file(target)


class _Repair:
    def __init__(self, source: Source, layout: str):
        self.source = source
        self.layout = choose(LAYOUTS, layout, "layout")
        self.markings: Markings = read_markings(source)
        parameters = {name: info for name, info in source.tensors.items() if name not in self.markings.tensors}
        self.components = Components(parameters)
        scaled = scaled_layers(source.tensors, self.markings, self.components.prefix_of)
        self.layers = {name: self._declared(layer) for name, layer in scaled.items() if self._allowed(name)}
        self.dequantize = {name: layer for name, layer in scaled.items() if name not in self.layers}
        self.copies = {name: name for name in parameters if name not in self.dequantize} | {
            layer.name + self.layout.input_scale: self.markings.input_scales[layer.name]
            for layer in self.layers.values()
            if layer.name in self.markings.input_scales
        }

    def write(self, target: Path, overwrite: bool) -> None:
        constants = self.layout.markers(self.layers.values()) | {
            layer.name + self.layout.weight_scale: self._scale(layer) for layer in self.layers.values()
        }
        infos = (
            {name: self.source.tensors[original] for name, original in self.copies.items()}
            | {name: TensorInfo("float32", self.source.tensors[name].shape) for name in self.dequantize}
            | {name: TensorInfo.of(tensor) for name, tensor in constants.items()}
        )
        metadata = {name: text for name, text in self.source.metadata.items() if name != HEADER_ENTRY}
        metadata |= self.layout.metadata(self.layers.values())
        with writing(target, infos, metadata, overwrite=overwrite) as writer:
            for name in writer.order:
                if name in constants:
                    writer.write(name, constants[name])
                elif name in self.dequantize:
                    codes = self.source.read(name)
                    writer.write(name, dequantize_tensor(codes, self._scale(self.dequantize[name])))
                else:
                    writer.copy(name, self.source, self.copies[name])

    def _allowed(self, name: str) -> bool:
        component = self.components.of(name)
        untouched = component is not None and component.preset.kind == UNTOUCHED
        return not untouched and is_linear(name, self.source.tensors[name])

    def _declared(self, layer: ScaledLayer) -> ScaledLayer:
        """16-bit activations unless the file says otherwise: a file that says nothing has lost what it said."""
        entry = self.markings.entry(layer.name, layer.prefix)
        said = FULL_PRECISION in entry or layer.name in {*self.markings.header, *self.markings.inline}
        return layer if said else replace(layer, full_precision=True)

    def _scale(self, layer: ScaledLayer):
        return read_scale(self.source, self.markings.weight_scales[layer.name])
