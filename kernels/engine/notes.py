"""What a user should know about a quantization, one plain sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from ..calibration.gptq import IMAGES, MANY_PROMPTS, TRUSTED_ROWS
from ..display import count
from ..numerics.output_error import CONTRADICTORY, WEIGHT_ERROR
from ..numerics.rounding import CALIBRATED
from ..recipe import Recipe
from ..report.report import KeptTensor, LayerReport
from ..selection.reasons import NON_FINITE
from ..state_dict.scaled_state_dict import PendingWeight, ScaledWeight

FEW_ROWS = 100
"""A layer that sees fewer rows than the others by this factor gets a row per step, not per position: it sees few
different ones, and no number of runs would give it thousands."""

MOST_NAMED = 20
"""Layers that one note lists."""


def source_notes(*, dequantized: int, staying: int, unpacked: int, unscaled: int, patched: int) -> Iterator[str]:
    """How many weights were scaled FP8 already and are quantized again, stay so, or are kept in high precision because
    a patch changes them; how many were FP8 without a scale; how many carry patches."""
    if dequantized:
        already = count(dequantized, "layer")
        yield f"{already} already in scaled FP8: dequantized first, so the error of the first rounding stays"
    if staying:
        yield f"{count(staying, 'layer')} already in scaled FP8: left unchanged, bit for bit"
    if unpacked:
        yield f"{count(unpacked, 'layer')} already in scaled FP8, but patched: kept in high precision, patches applied"
    if unscaled:
        yield f"{count(unscaled, 'layer')} in FP8 without a scale: what that lost cannot be recovered"
    if patched:
        yield f"{count(patched, 'weight')} with patches (LoRA): applied in full precision, before any rounding"


def renamed_note(name: str) -> str:
    """name: a tensor that ComfyUI renames while it loads the file."""
    return (
        f"ComfyUI renames tensors of this file while it loads them, e.g. {name}. In the graph they have the new names: "
        "there, roundings with random numbers give other codes"
    )


def finely_scaled_note(layers: int) -> str:
    """How many weights of the source were FP8 with a scale per row or block."""
    return (
        f"{count(layers, 'layer')} in FP8 with a scale per row or block: dequantized first, so the error of the first "
        "rounding stays"
    )


def copied_nonfinite_notes(counts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """counts: tensors that are kept for other reasons -> how many of their values are NaN and infinite."""
    for name, (nan, inf) in islice(counts.items(), 1):
        example = f"{name} ({nan:,} NaN, {inf:,} infinite)"
        yield (
            f"{count(len(counts), 'kept tensor')} with values that are not finite, copied as they are: {example}"
            f"{' and others' if len(counts) > 1 else ''}. Images can be black: start from a sound copy of the model"
        )


def nonfinite_notes(kept: Iterable[KeptTensor]) -> Iterator[str]:
    """Weights that are kept because of NaN or infinite values."""
    for tensor in kept:
        if tensor.reason.kind == NON_FINITE:
            yield f"{tensor.key} is kept: it {tensor.reason.text}"


def matmul_notes(recipe: Recipe, weights: Sequence[ScaledWeight | PendingWeight]) -> Iterator[str]:
    """FP8 matmul without input scales, or with weights that were rounded for exact inputs."""
    if recipe.matmul == "fp8" and not any(weight.input_scale is not None for weight in weights):
        yield "matmul fp8 without input scales: FP8 GPUs clamp activations at ±448, which costs quality"
    if recipe.matmul == "fp8" and recipe.rounding == CALIBRATED.name:
        yield (
            "matmul fp8 loses what calibrated rounding gains, because it rounds the inputs of the layers to FP8 too: "
            "choose matmul full precision for images closest to the original"
        )


def calibration_notes(recipe: Recipe, layers: Iterable[LayerReport]) -> Iterator[str]:
    """Layers that calibrated rounding could not improve, or knows little about."""
    if recipe.rounding != CALIBRATED.name:
        return
    errors = {layer.key: layer.output_error for layer in layers}
    few = max((error.rows for error in errors.values() if error), default=0) / FEW_ROWS
    groups = (
        (
            [key for key, error in errors.items() if error is None],
            "rounded to nearest, because the calibration has no inputs of this width for them",
        ),
        (
            [
                key
                for key, error in errors.items()
                if error and not error.fallback and error.chosen == error.nearest > 0
            ],
            "rounded to nearest, because calibrated rounding would not be better",
        ),
        (
            [key for key, error in errors.items() if error and error.fallback == WEIGHT_ERROR],
            "rounded to nearest, because calibrated rounding would lower the SQNR of their weights by more than 10 dB",
        ),
        (
            [key for key, error in errors.items() if error and error.fallback == CONTRADICTORY],
            "rounded to nearest, because their recorded inputs contradict each other: calibrate again",
        ),
        (
            [key for key, error in errors.items() if error and few <= error.rows < TRUSTED_ROWS],
            f"calibrated with more damping, on fewer than {TRUSTED_ROWS:,} rows: calibrate on {IMAGES} images, or a "
            f"text encoder on {MANY_PROMPTS} prompts",
        ),
    )
    for keys, text in groups:
        if keys:
            more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
            yield f"{len(keys)} of {count(len(errors), 'layer')} were {text}: {', '.join(keys[:MOST_NAMED])}{more}"
