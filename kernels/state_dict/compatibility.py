"""What each ComfyUI generation makes of a scaled FP8 file, as found by loading and sampling in both."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..selection.presets import TEXT_ENCODER

EXACT, DEGRADED, WRONG, FAILS = "exact", "degraded", "wrong image", "fails to load"


@dataclass(frozen=True)
class Verdict:
    """`generation` of ComfyUI, `outcome` (EXACT, DEGRADED, WRONG or FAILS) and what happens, in plain words."""

    generation: str
    outcome: str
    text: str


def verdicts(ways: Collection[str], formats: Collection[str], family: str, kind: str, all_in_one: bool):
    """The Verdict of each generation.

    ways: those of "legacy", "header" and "inline" that cover every scaled layer. formats: those of the layers.
    family, kind: of the main network. all_in_one: whether its layers carry a prefix.
    """
    old = _of_0_3_75(set(ways), "float8_e5m2" in formats, family, kind, all_in_one)
    new = _of_0_33(set(ways), "float8_e5m2" in formats)
    return Verdict("ComfyUI 0.3.75", *old), Verdict("ComfyUI 0.33", *new)


def _of_0_3_75(ways: set[str], e5m2: bool, family: str, kind: str, all_in_one: bool) -> tuple[str, str]:
    if "legacy" in ways:
        return DEGRADED, "every unquantized Linear weight and every bias is cast to FP8 without a scale as well"
    if "header" not in ways:
        return WRONG, "inline entries are not read: the codes are taken for the weights"
    if family == "t5xxl":
        return WRONG, "T5 is read in the legacy layout only"
    if e5m2:
        return FAILS, "it knows no float8_e5m2 entry (KeyError)"
    if all_in_one:
        return WRONG, "all-in-one checkpoints are read in the legacy layout only: the image is noise"
    if kind == TEXT_ENCODER:
        return DEGRADED, (
            "it reads those of Flux.2 and Z-Image; those of Qwen-Image, Lumina 2, OmniGen2, HunyuanVideo and HiDream "
            "need the legacy layout"
        )
    return EXACT, (
        "on an FP8 GPU or with little memory, whatever is not in Linear layers is cast to FP8 without a scale, "
        "and activations stay in 16 bits whatever matmul says"
    )


def _of_0_33(ways: set[str], e5m2: bool) -> tuple[str, str]:
    if ways & {"header", "inline"}:
        return EXACT, "if its comfy.quant_ops.QUANT_ALGOS lists float8_e5m2" if e5m2 else ""
    if "legacy" not in ways:
        return WRONG, "nothing says that the codes are scaled: they are taken for the weights"
    if e5m2:
        return WRONG, "legacy E5M2 is silently read as E4M3: garbage"
    return EXACT, ""
