"""Findings about the scales of one layer: their dtype, shape and values."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..files.header import TensorInfo
from ..files.reader import Source
from ..numerics.scaling import SMALLEST_SCALE
from .compatibility import CANNOT_TELL, DEGRADED, EXACT, FAILS, FAILS_LATER, NEW, OLD, WRONG
from .findings import ERROR, QUANTIZE_AGAIN, READ_AGAIN, REPAIR, WARNING, Finding, both
from .layouts import SOURCE_ONLY_SCALE


def weight_scale_findings(source: Source, weight: TensorInfo, name: str) -> Iterator[Finding]:
    """weight: the FP8 weight of the layer. name: the tensor with its scale."""
    info = source.tensors[name]
    if info.elements != 1:
        if not name.endswith(SOURCE_ONLY_SCALE):  # a finding of its own
            yield _fine_scale(weight, info, name)
        if info.elements <= weight.elements:
            yield from _fine_scale_values(source, name)
        return
    if info.dtype != "float32":
        what = f"is {info.dtype} and must be float32: its rounding error is in every weight of the layer, and some "
        what += "versions crash"
        yield Finding(ERROR, "scale_dtype", name, what, REPAIR, True, outcomes=both(DEGRADED))
    elif info.shape:
        what = f"has shape {info.shape} and must be 0-dim: ComfyUI 0.3.75 can fail to load it"
        severe = len(info.shape) > 1
        old = {OLD: FAILS if name.endswith(".scale_weight") else CANNOT_TELL} if severe else {}
        yield Finding(ERROR if severe else WARNING, "scale_shape", name, what, REPAIR, True, outcomes=old)
    yield from _scale_value(source, name)


def input_scale_findings(source: Source, name: str) -> Iterator[Finding]:
    """name: the tensor with the scale of the layer's inputs."""
    info = source.tensors[name]
    if info.elements != 1:
        what = f"has shape {info.shape}, not one number for the layer: GPUs with FP8 matmul fail on it"
        yield Finding(ERROR, "input_scale", name, what, QUANTIZE_AGAIN)
        return
    value = source.read(name).float().item()
    if not (math.isfinite(value) and value > 0):
        what = f"is {value:g}: GPUs with FP8 matmul divide the inputs by it, and the image is black or noise"
        yield Finding(ERROR, "input_scale", name, what, QUANTIZE_AGAIN)


def _fine_scale(weight: TensorInfo, info: TensorInfo, name: str) -> Finding:
    """A scale per row, which newer versions broadcast, or per block, which none can use."""
    old = FAILS if name.endswith(".scale_weight") else EXACT
    if info.shape == (*weight.shape[:1], 1):
        what = f"has shape {info.shape}, one number per row: ComfyUI 0.33 reads it right on a CPU"
        what += ", 0.3.75 fails to load it" if old == FAILS else ", and so does 0.3.75"
        return Finding(WARNING, "scale_rows", name, what, READ_AGAIN, outcomes={OLD: old, NEW: EXACT})
    what = f"has shape {info.shape}, not one number for the layer: loading or sampling fails, or the image is wrong"
    new = FAILS_LATER if len(info.shape) > 1 else WRONG
    failing = {OLD: FAILS if old == FAILS else new, NEW: new}
    return Finding(ERROR, "scale_shape", name, what, READ_AGAIN, outcomes=failing)


def _fine_scale_values(source: Source, name: str) -> Iterator[Finding]:
    scale = source.read(name).float()
    bad = int((~(scale.isfinite() & (scale >= 0))).sum())
    if bad:
        what = f"holds {bad:,} values that are negative or not finite: the image is black or noise"
        yield Finding(ERROR, "scale_value", name, what, QUANTIZE_AGAIN)


def _scale_value(source: Source, name: str) -> Iterator[Finding]:
    value = source.read(name).float().item()
    if not (math.isfinite(value) and value > 0):
        what = f"is {value:g}: the layer outputs {'zeros' if value == 0 else 'garbage'}, the image is black or noise"
        yield Finding(ERROR, "scale_value", name, what, QUANTIZE_AGAIN)
    elif value < SMALLEST_SCALE:
        what = f"is {value:g}: GPUs that multiply in fp16 cannot represent it exactly, and the layer loses precision"
        yield Finding(WARNING, "scale_small", name, what, QUANTIZE_AGAIN)
