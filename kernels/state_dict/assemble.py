"""Writes a checkpoint of weights that are already scaled FP8: nothing is rounded, everything is verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..choices import choose
from ..errors import file_error
from ..files.header import TensorInfo
from ..files.writer import writing
from .inspection import ERROR, Inspection, inspect_source
from .layouts import LAYOUTS, ScaledLayer

ACCEPTED = ("legacy_e5m2",)
"""Codes of errors that a user asked for and was told of: they are no reason not to write."""

Progress = Callable[[int, int, str], None]
"""progress(bytes done, bytes in all, tensor name); an exception raised in it cancels and leaves nothing behind."""


def write_scaled(
    target: str | os.PathLike,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    layers: Mapping[str, ScaledLayer],
    scales: Mapping[str, torch.Tensor],
    *,
    input_scales: Mapping[str, torch.Tensor] | None = None,
    layout: str = "native",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Write codes, scales and everything else to a file, and verify it before it appears.

    tensors: all but scales and markers, by the names in the file; read(name) gives one of them, on the CPU, when its
    turn comes. layers, scales: the scaled layers and their scales (fp32, 0-dim) by weight name. input_scales: by layer
    name. layout: a key of LAYOUTS. Returns what the verification found.
    Raises CheckpointError: the target cannot be written, or ComfyUI could not use the file; ValueError: layout.
    """
    target = Path(target)
    chosen = choose(LAYOUTS, layout, "layout")
    small = chosen.markers(layers.values())
    small |= {layer.name + chosen.weight_scale: scales[weight].cpu() for weight, layer in layers.items()}
    small |= {name + chosen.input_scale: scale.cpu() for name, scale in (input_scales or {}).items()}
    infos = {**tensors, **{name: TensorInfo.of(tensor) for name, tensor in small.items()}}
    entries = {**(metadata or {}), **chosen.metadata(layers.values())}
    total, done = sum(info.nbytes for info in tensors.values()), 0
    with writing(target, infos, entries, overwrite=overwrite) as writer:
        for name in writer.order:
            if name in small:
                writer.write(name, small[name])
                continue
            if progress:
                progress(done, total, name)
            writer.write(name, read(name))
            done += tensors[name].nbytes
        with writer.reopen(target) as written:
            inspection = inspect_source(written)
        _check(inspection, target)
    return inspection


def _check(inspection: Inspection, target: Path) -> None:
    errors = [finding for finding in inspection.findings if finding.severity == ERROR and finding.code not in ACCEPTED]
    if errors:
        raise file_error(target, f"was not written, since ComfyUI could not use it: {errors[0]}")
