"""Rewrites a faulty scaled FP8 file as far as that is possible without the 16-bit model."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..errors import file_error
from ..files.header import TensorInfo
from ..files.reader import Source, open_source
from ..files.writer import check_target, refuse_same_file
from ..numerics.quantized_tensor import dequantize_tensor
from ..selection.components import Components
from ..selection.presets import NEVER_QUANTIZED
from ..selection.selection import QUANTIZABLE_DTYPES
from .findings import ERROR, Inspection
from .inspection import inspect_source
from .layouts import FULL_PRECISION, HEADER_ENTRY, ScaledLayer
from .markings import Markings, read_markings, read_scale, scaled_layers
from .scaled_state_dict import FileEntry, ScaledStateDict, ScaledWeight, TensorEntry
from .write import write_state_dict

SCALE_ROWS = "scale_rows"
"""The code of a finding about scales that no layout of the pack can hold."""


def repair_file(
    path: str | os.PathLike[str], target: str | os.PathLike[str], *, layout: str = "native", overwrite: bool = False
) -> Inspection:
    """Write a sound copy of a scaled FP8 file: every code bit for bit, scales in fp32 0-dim, markers of one layout.

    Scales and entries of 16-bit weights are dropped; those without a weight stay, since nobody knows what they scale.
    Weights that ComfyUI cannot use in FP8 (norms, convolutions, embeddings, CLIP-L and CLIP-G, VAE) are dequantized to
    fp32. Returns the inspection of the new file.
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
        broken = [
            finding
            for finding in findings
            if (finding.severity == ERROR or finding.code == SCALE_ROWS) and not finding.repairable
        ]
        if broken:
            raise file_error(source.path, f"cannot be repaired: {broken[0]} ({len(broken)} such findings)")
        state = repaired_state_dict(source)
        return write_state_dict(state, target, layout=layout, overwrite=overwrite, source=source)


def repaired_state_dict(source: Source) -> ScaledStateDict:
    """The state dict that a file means, whatever its markings say wrongly."""
    markings = read_markings(source)
    kept = {name: info for name, info in source.tensors.items() if not _is_obsolete(name, source, markings)}
    components = Components(kept)
    scaled = scaled_layers(source.tensors, markings, components.prefix_of)
    state = ScaledStateDict(metadata={name: text for name, text in source.metadata.items() if name != HEADER_ENTRY})
    for name, info in kept.items():
        if name not in scaled:
            state.tensors[name] = FileEntry(source, name)
            continue
        scale = read_scale(source, markings.weight_scales[scaled[name].name])
        component = components.of(name)
        untouched = component is not None and component.preset.kind == NEVER_QUANTIZED
        if untouched or not components.is_linear(name, info):
            dequantized = partial(_dequantized, source, name, scale)
            state.tensors[name] = TensorEntry(TensorInfo("float32", info.shape), dequantized)
        else:
            state.add_weight(name, _weight(source, markings, scaled[name], scale))
    prefixes = [*(layer.prefix for layer in scaled.values()), *(component.prefix for component in components.all)]
    for name in markings.foreign_markers(prefixes):
        state.tensors[name] = FileEntry(source, name)
    return state


def _is_obsolete(name: str, source: Source, markings: Markings) -> bool:
    """Whether a tensor is a marking that is written anew or dropped: of a weight that FP8 can hold, or a marker."""
    if name not in markings.tensors:
        return False
    layer = markings.tensors[name]
    weight = source.tensors.get(f"{layer}.weight")
    return layer is None or weight is not None and weight.dtype in QUANTIZABLE_DTYPES


def _weight(source: Source, markings: Markings, layer: ScaledLayer, scale: torch.Tensor) -> ScaledWeight:
    """full_precision: on, unless the file says otherwise. A file that says nothing has lost what it said."""
    entry = markings.entry(layer.name, layer.prefix)
    declared = FULL_PRECISION in entry or layer.name in markings.header or layer.name in markings.inline
    input_scale = markings.input_scales.get(layer.name)
    return ScaledWeight(
        layer if declared else replace(layer, full_precision=True),
        source.tensors[layer.weight].shape,
        FileEntry(source, layer.weight),
        scale,
        read_scale(source, input_scale) if input_scale else None,
        source_bytes=source.tensors[layer.weight].nbytes,
    )


def _dequantized(source: Source, name: str, scale: torch.Tensor) -> torch.Tensor:
    return dequantize_tensor(source.read(name), scale)
