"""The choices that several nodes share: inputs generated from the library's tables, and what they stand for."""

from __future__ import annotations

import re
from dataclasses import asdict

from comfy_api.latest import io

from ..kernels import FORMATS, ROUNDINGS, SCALINGS, Recipe
from ..kernels.calibration.moments import Calibration
from ..kernels.choices import choose
from ..kernels.engine.file_job import NONFINITE
from ..kernels.numerics.rounding import METHODS
from ..kernels.selection.selection import LAYERS
from ..kernels.state_dict.layouts import LAYOUTS, MATMULS
from .devices import devices
from .schema import FP8Calibration, fit

MATMUL_NAMES = {"full precision": "full", "fp8": "fp8"}
"""What the nodes call the library's MATMULS."""

LARGEST_SEED = 2**64 - 1

_TABLES = {
    "format": FORMATS,
    "rounding": METHODS,
    "scaling": SCALINGS,
    "layers": LAYERS,
    "layout": LAYOUTS,
    "nonfinite": NONFINITE,
}

_FORMAT_TOOLTIP = (
    "E4M3 keeps finer detail and is right for almost every model. E5M2 is coarser (more grain in the image) but holds "
    "a wider range; it needs a recent ComfyUI."
)
_ROUNDING_TOOLTIP = (
    "How each weight finds its place on the coarse FP8 grid. For an image closest to the original choose calibrated, "
    "where there is a calibration, or else nearest. The stochastic methods have twice its squared error but no bias: "
    "for sums over many weights, repeated quantization and research."
)
_SCALING_TOOLTIP = (
    "How each layer is stretched over the FP8 range before rounding. Without a scale, small weights vanish and large "
    "ones are cut off, which costs detail."
)
_SEED_TOOLTIP = (
    "Another seed rounds the same weights another way: the image changes a little, its quality does not. The same seed "
    "always gives the same model."
)
_LAYERS_TOOLTIP = (
    "Which layers become FP8. auto knows the model and leaves alone those that would show in the image; all_linear "
    "saves the most memory and costs the most quality."
)
_KEEP_TOOLTIP = (
    "Layers that stay in full precision, one pattern a line, e.g. blocks.0.attn or *norm*. More of them: closer to the "
    "original image, larger model."
)
_ONLY_TOOLTIP = "Only these layers become FP8, one pattern a line. Empty: all that the setting above chooses."
_MATMUL_TOOLTIP = (
    "full precision keeps the image's detail. fp8 also rounds what flows through the layers, on GPUs that can multiply "
    "FP8: faster, with visible losses."
)
_NONFINITE_TOOLTIP = "Weights that are NaN or infinite (a damaged model): stop and name them, or leave those layers be."
_CALIBRATION_TOOLTIP = (
    "What FP8 Calibration recorded of this model: for rounding calibrated, which then loses about a third of what "
    "nearest loses, and for the range of activations where matmul is fp8."
)
_DEVICE_TOOLTIP = (
    "Where the rounding is computed. The result is the same everywhere (calibrated: nearly), only the time differs."
)
_LAYOUT_TOOLTIP = (
    "How the file says that its weights are scaled. native loads in ComfyUI 0.3.75 and newer; legacy is for versions "
    "before October 2025, and for E5M2 or all-in-one files in 0.3.75. Loaded by a version that does not read it, a "
    "file gives noise."
)


def combo(name: str, table, tooltip: str, **keywords) -> io.Combo.Input:
    """A drop-down of a table's keys; the tooltip ends with each entry's description."""
    lines = [f"{key}: {_description(entry)}" for key, entry in table.items()]
    return fit(io.Combo.Input, name, options=list(table), tooltip="\n".join([tooltip, *lines]), **keywords)


def _description(entry) -> str:
    return entry if isinstance(entry, str) else getattr(entry, "description", "")


def rounding_inputs(roundings=ROUNDINGS) -> list:
    """format, rounding, scaling, seed: what becomes of a number. roundings: METHODS where there is a calibration."""
    return [
        fit(io.Combo.Input, "format", options=list(FORMATS), default="float8_e4m3fn", tooltip=_FORMAT_TOOLTIP),
        combo("rounding", roundings, _ROUNDING_TOOLTIP, default="stochastic"),
        combo("scaling", SCALINGS, _SCALING_TOOLTIP, default="absmax"),
        fit(
            io.Int.Input,
            "seed",
            default=0,
            min=0,
            max=LARGEST_SEED,
            control_after_generate=False,
            tooltip=_SEED_TOOLTIP,
        ),
    ]


def layer_inputs() -> list:
    """layers, keep, only: which layers are quantized."""
    pattern = {"multiline": True, "optional": True, "default": ""}
    return [
        combo("layers", LAYERS, _LAYERS_TOOLTIP, default="auto"),
        fit(io.String.Input, "keep", tooltip=_KEEP_TOOLTIP, **pattern),
        fit(io.String.Input, "only", tooltip=_ONLY_TOOLTIP, **pattern),
    ]


def matmul_input() -> io.Combo.Input:
    table = {name: MATMULS[key] for name, key in MATMUL_NAMES.items()}
    return combo("matmul", table, _MATMUL_TOOLTIP, default="full precision", optional=True, advanced=True)


def nonfinite_input() -> io.Combo.Input:
    return combo("nonfinite", NONFINITE, _NONFINITE_TOOLTIP, default="error", optional=True, advanced=True)


def device_input() -> io.Combo.Input:
    return fit(
        io.Combo.Input,
        "device",
        options=devices(),
        default="auto",
        tooltip=_DEVICE_TOOLTIP,
        optional=True,
        advanced=True,
    )


def calibration_input(tooltip: str = _CALIBRATION_TOOLTIP) -> io.Custom.Input:
    return fit(FP8Calibration.Input, "calibration", optional=True, tooltip=tooltip)


def layout_input() -> io.Combo.Input:
    return combo("layout", LAYOUTS, _LAYOUT_TOOLTIP, default="native")


def patterns(text: str) -> tuple[str, ...]:
    """The patterns of a text box, separated by lines, commas or blanks, each once."""
    return tuple(dict.fromkeys(part for part in re.split(r"[\s,]+", text) if part))


def recipe(
    *,
    keep: str = "",
    only: str = "",
    matmul: str = "full precision",
    calibration: Calibration | None = None,
    **choices,
) -> Recipe:
    """The Recipe that a node's inputs stand for.

    Raises ValueError naming the valid choices: ComfyUI lets anything through that arrives over a wire.
    """
    for name, choice in choices.items():
        if name in _TABLES:
            choose(_TABLES[name], choice, name)
    return Recipe(
        keep=patterns(keep),
        only=patterns(only),
        matmul=choose(MATMUL_NAMES, matmul, "matmul"),
        calibration=calibration.source if calibration else "",
        **choices,
    )


def keywords(recipe: Recipe) -> dict:
    """A Recipe as keywords of quantize_file and plan_file, which take a calibration itself and not its name."""
    return {name: value for name, value in asdict(recipe).items() if name != "calibration"}
