"""scaled state dict -> file: streamed, verified before it appears."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from ..choices import choose
from ..errors import file_error
from ..files.background import Background
from ..files.header import check_count
from ..files.reader import Source
from ..files.staging import alternating_buffers
from ..files.writer import Writer, writing
from ..numerics.quantized_tensor import QuantizedTensor
from ..numerics.transfers import copy
from ..progress import Meter, ProgressCallback
from .findings import ERROR, Finding, Inspection
from .inspection import inspect_source
from .layouts import LAYOUTS, Layout
from .scaled_state_dict import Entry, ScaledStateDict

INLINE_BYTES = 1 << 20
"""Smaller tensors are written by the calling thread: handing them to another one would cost more."""

LEGACY_E5M2 = "legacy_e5m2"
"""The code of a finding that a user asks for with layout legacy and format E5M2."""


def write_state_dict(
    state: ScaledStateDict,
    target: str | os.PathLike[str],
    *,
    layout: str = "native",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    source: Source | None = None,
    accept: Collection[tuple[str, str]] = (),
    progress: ProgressCallback | Meter | None = None,
) -> Inspection:
    """Write a state dict to a .safetensors file, tensor by tensor, and verify it before it appears.

    Pending weights are quantized when their turn comes: while one is rounded, the one before is written. layout: a key
    of LAYOUTS. metadata: entries to add. source: the open file that the state dict reads, which must not change.
    accept: (finding code, tensor name) of errors that are no reason not to write the file. Returns the inspection of
    the written file.

    Raises CheckpointError: the target cannot be written, the layout cannot describe these layers, or ComfyUI could not
    use the file; what the rounding pass raises. The target is then unchanged.
    """
    target, chosen = Path(target), choose(LAYOUTS, layout, "layout")
    try:
        check_count(len(state.tensors) + 2 * len(state.layers))  # every layout writes a scale per weight
        small = state.small_tensors(chosen)
    except ValueError as error:
        raise file_error(target, str(error)) from error
    infos = state.infos(chosen)
    entries = state.metadata | chosen.metadata(state.layers) | dict(metadata or {})
    meter = progress if isinstance(progress, Meter) else Meter(state.source_bytes, progress)
    with writing(target, infos, entries, overwrite=overwrite, source=source) as writer:
        for name, tensor in small.items():
            writer.write(name, tensor)
        del small, infos, entries  # the inspection needs their memory
        _stream(state, writer, chosen, meter)
        with writer.reopen() as written:
            inspection = inspect_source(written)
        _check(inspection, target, accept)
        meter.finish()
    return inspection


def _stream(state: ScaledStateDict, writer: Writer, layout: Layout, meter: Meter) -> None:
    """Write the tensors in the order of the file."""
    stored: dict[str, Entry] = state.tensors | {name: weight.codes for name, weight in state.weights.items()}
    order = [name for name in writer.order if name in stored or name in state.pending]
    names = [name for name in order if name in state.pending]
    buffers = alternating_buffers(max((state.pending[name].info.nbytes for name in names), default=0))
    buffer = next(buffers)
    with Background("write") as background, state.start_pass(names) as rounds:
        for name in order:
            if name in stored:
                nbytes = stored[name].info.nbytes
                meter.start(name, nbytes)
                background.run(stored[name].write, writer, name, here=nbytes < INLINE_BYTES)
                continue
            weight = state.pending[name]
            meter.start(weight.key, weight.source_bytes)
            _, round_weight = next(rounds)
            with torch.inference_mode():  # in which small operations cost less
                q = round_weight(buffer)
            if q is None:
                continue
            small, scale_name = weight.info.nbytes < INLINE_BYTES, weight.layer.name + layout.weight_scale
            background.run(_write_codes, writer, name, scale_name, q, buffer, here=small)
            buffer = next(buffers)


def _write_codes(writer: Writer, name: str, scale_name: str, q: QuantizedTensor, buffer: torch.Tensor) -> None:
    codes = q.codes
    if codes.device != buffer.device:
        codes = copy(codes, buffer[: codes.numel()].view(codes.dtype).view(codes.shape))
    writer.write(name, codes)
    writer.write(scale_name, q.scale.cpu())


def _check(inspection: Inspection, target: Path, accept: Collection[tuple[str, str]]) -> None:
    errors = [
        finding for finding in inspection.findings if finding.severity == ERROR and not _accepted(finding, accept)
    ]
    if errors:
        raise file_error(target, f"was not written, because ComfyUI could not use it: {errors[0]}")


def _accepted(finding: Finding, accept: Collection[tuple[str, str]]) -> bool:
    return finding.code == LEGACY_E5M2 or (finding.code, finding.where) in accept
