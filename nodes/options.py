"""Inputs and outputs that several nodes share, and the Recipe that a node's inputs stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..kernels import ROUNDINGS, Recipe
from ..kernels.calibration.moments import Calibration
from ..kernels.choices import choose
from ..kernels.errors import PatternError, UnknownChoiceError
from ..kernels.numerics.formats import FORMATS
from ..kernels.numerics.rounding import CALIBRATED
from ..kernels.numerics.scaling import SCALINGS
from ..kernels.recipe import MATMULS, NONFINITE
from ..kernels.selection.presets import PRESETS
from ..kernels.selection.selection import MEASURED, PRESET_LAYERS
from ..kernels.state_dict.layouts import LAYOUTS
from .devices import devices
from .schema import FP8Calibration, FP8Report, rare

MATMUL_NAMES = {"full precision": "full", "fp8": "fp8"}
"""The nodes' name of a choice of `matmul` -> the library's."""

LARGEST_SEED = 2**64 - 1

HINT = "(one pattern per line)"
"""In the empty boxes for patterns: ComfyUI's page shows the placeholder, and Nodes 2.0 the display name instead."""


def with_choices(tooltip: str, table: Mapping[str, Any]) -> str:
    """A tooltip that ends with one line per choice. The table's values are descriptions, or have a `description`."""
    lines = [f"{name}: {entry if isinstance(entry, str) else entry.description}" for name, entry in table.items()]
    return "\n".join([tooltip, *lines])


def rounding_inputs(roundings: Mapping[str, Any] = ROUNDINGS) -> list[io.Input]:
    """format, rounding, scaling, seed. roundings: METHODS for a node with an input `calibration`."""
    calibrates = CALIBRATED.name in roundings
    closest = "calibrated if you have a calibration, nearest otherwise" if calibrates else "nearest"
    seedless = "nearest and calibrated ignore" if calibrates else "nearest ignores"
    return [
        io.Combo.Input(
            "format",
            options=list(FORMATS),
            default="float8_e4m3fn",
            tooltip="float8_e4m3fn keeps finer detail and suits almost every model. float8_e5m2 holds a wider range "
            "with coarser steps, which adds grain to the image. ComfyUI 0.3.75 runs float8_e5m2 only from files in "
            "layout legacy.",
        ),
        io.Combo.Input(
            "rounding",
            options=list(roundings),
            default="stochastic",
            tooltip=with_choices(
                f"How weights are rounded to FP8. Closest to the original: {closest}. The stochastic ones have twice "
                "the squared error of nearest, but no bias.",
                roundings,
            ),
        ),
        rare(
            io.Combo.Input(
                "scaling",
                options=list(SCALINGS),
                default="absmax",
                tooltip=with_choices(
                    "How each layer is scaled to the FP8 range before rounding. Without a scale, small weights become "
                    "zero and large ones are cut off, which costs detail.",
                    SCALINGS,
                ),
            )
        ),
        rare(
            seed_input(
                "Another seed rounds the same weights differently. The image changes slightly, its quality does not. "
                f"The same seed always gives the same model. {seedless} the seed."
            )
        ),
    ]


def seed_input(tooltip: str, optional: bool = False) -> io.Int.Input:
    """A seed that stays as it is from one run to the next."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=LARGEST_SEED,
        control_after_generate=False,
        optional=optional,
        tooltip=tooltip,
    )


def layers_input(tooltip: str, kind: str | None = None, layers: Mapping[str, str] = PRESET_LAYERS) -> io.Combo.Input:
    """layers. kind: DIFFUSION or TEXT_ENCODER for a node that quantizes only networks of that kind.

    The list has the presets that fit. The node's validate_inputs must call layers_problem, because workflows that were
    saved with the whole list have other values, too.
    """
    return io.Combo.Input(
        "layers",
        options=[name for name in layers if kind is None or name not in PRESETS or PRESETS[name].kind == kind],
        default="auto",
        tooltip=f"{tooltip} The names of model families are presets, for models that auto does not recognize. unknown "
        "guesses by the names of the layers.",
    )


def layers_problem(layers: Any, known: Mapping[str, str] = PRESET_LAYERS) -> str | None:
    """What is wrong with a value of the input `layers`; None if it can be used. None as value: it is linked."""
    try:
        if layers is not None:
            choose(known, layers, "layers")
    except UnknownChoiceError as error:
        return str(error)
    return None


def layer_inputs(kind: str | None = None, layers: Mapping[str, str] = PRESET_LAYERS) -> list[io.Input]:
    """layers, keep, only: which layers are quantized. kind: as in layers_input. layers: LAYERS for a node with
    limit_inputs."""
    by_limit = " measured finds the best layers for a size or a quality." if MEASURED in layers else ""
    return [
        layers_input(
            "Which layers become FP8. auto recognizes the model and leaves out the layers where FP8 would show in the "
            f"image. all_linear saves the most memory and costs the most quality.{by_limit}",
            kind,
            layers,
        ),
        io.String.Input(
            "keep",
            default="",
            multiline=True,
            display_name=f"keep {HINT}, e.g. blocks.0.attn",
            placeholder=f"keep {HINT}\nblocks.0.attn",
            optional=True,
            tooltip="Layers that are not quantized, one pattern per line, e.g. blocks.0.attn or *modulation*. Keeping "
            "more layers brings the image closer to the original and makes the model larger.",
        ),
        rare(
            io.String.Input(
                "only",
                default="",
                multiline=True,
                display_name=f"only {HINT}, e.g. blocks.*.mlp",
                placeholder=f"only {HINT}\nblocks.*.mlp",
                optional=True,
                tooltip="Quantizes only these layers, one pattern per line. Leave it empty to quantize every layer "
                "that 'layers' selects.",
            )
        ),
    ]


def limit_inputs() -> list[io.Input]:
    """size_limit, target_quality: what layers measured aims at."""
    return [
        io.Float.Input(
            "size_limit",
            default=0.0,
            min=0.0,
            max=10000.0,
            step=0.001,
            round=0.001,
            optional=True,
            tooltip="For layers measured: the largest file in GB (of 1,000,000,000 bytes). The layers that matter most "
            "stay in 16 bits as long as they fit. A larger file is closer to the original. 0: no limit. "
            "target_quality sets a quality instead.",
        ),
        rare(
            io.Float.Input(
                "target_quality",
                default=0.0,
                min=0.0,
                max=200.0,
                step=0.1,
                round=0.1,
                optional=True,
                tooltip="For layers measured: the smallest predicted quality of the latent image in dB. The file is as "
                "small as this allows. 6 dB more mean half the error. 0: no target.",
            )
        ),
    ]


def matmul_input() -> io.Combo.Input:
    return rare(
        io.Combo.Input(
            "matmul",
            options=list(MATMUL_NAMES),
            default="full precision",
            optional=True,
            tooltip=with_choices(
                "How the quantized layers compute. full precision keeps the detail of the image. fp8 is faster on GPUs "
                "that multiply FP8, with visible losses, and loses what rounding calibrated gains.",
                {name: MATMULS[key] for name, key in MATMUL_NAMES.items()},
            ),
        )
    )


def nonfinite_input() -> io.Combo.Input:
    return rare(
        io.Combo.Input(
            "nonfinite",
            options=list(NONFINITE),
            default="error",
            optional=True,
            tooltip=with_choices("What to do with weights that are NaN or infinite, as in a damaged model.", NONFINITE),
        )
    )


def device_input() -> io.Combo.Input:
    return rare(
        io.Combo.Input(
            "device",
            options=devices(),
            default="auto",
            optional=True,
            tooltip="Where the rounding is computed. The result is the same on every device (calibrated: nearly the "
            "same). Only the time differs.",
        )
    )


def calibration_input(
    tooltip: str = "What FP8 Calibration recorded for this model. Rounding calibrated needs it: the error of the "
    "layers' outputs is then about a third of that of nearest. With matmul fp8 it also sets the range of each "
    "layer's inputs, so that large ones are not cut off. Layers measured needs what Layer Sensitivity adds to it.",
) -> io.Input:
    return FP8Calibration.Input("calibration", optional=True, tooltip=tooltip)


def layout_input() -> io.Combo.Input:
    return rare(
        io.Combo.Input(
            "layout",
            options=list(LAYOUTS),
            default="native",
            tooltip=with_choices(
                "How the file stores its scales. native loads in ComfyUI 0.3.75 and newer. legacy is for versions "
                "before October 2025, and in 0.3.75 for E5M2, all-in-one checkpoints and most text encoders. A file in "
                "a layout that your ComfyUI cannot read gives noise or does not load.",
                LAYOUTS,
            ),
        )
    )


def another_comfyui_input() -> io.Boolean.Input:
    return rare(
        io.Boolean.Input(
            "for_another_comfyui",
            default=False,
            optional=True,
            tooltip="Writes the file even if this ComfyUI would not load it or would show a wrong image. Turn it on "
            "only for a file that another ComfyUI will load.",
        )
    )


def scene_inputs(which_size: str = "") -> list[io.Input]:
    """positive, negative, latent_image, as in KSampler. which_size: the end of the last tooltip."""
    return [
        io.Conditioning.Input("positive", tooltip="What to render: a prompt like those you will use later."),
        io.Conditioning.Input("negative", tooltip="What to leave out, as in KSampler."),
        io.Latent.Input("latent_image", tooltip=f"The size and number of the images, as in KSampler.{which_size}"),
    ]


def sampler_inputs(
    steps: int = 20, steps_tooltip: str = "Use the number of steps you will render with."
) -> list[io.Input]:
    """steps, cfg, sampler_name, scheduler, denoise, as in KSampler."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=10000, tooltip=steps_tooltip),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Use the guidance scale you will render with.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=list(comfy.samplers.KSampler.SAMPLERS),
            tooltip="Use the sampler you will render with.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(comfy.samplers.KSampler.SCHEDULERS),
            tooltip="Use the scheduler you will render with.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 renders from pure noise. Lower values keep part of the latent image.",
        ),
    ]


def size_inputs(width: int, height: int) -> list[io.Input]:
    """width and height of a figure in pixels."""
    return [
        rare(
            io.Int.Input(
                "width",
                default=width,
                min=256,
                max=4096,
                step=8,
                optional=True,
                tooltip="Width in pixels. A wider image is sharper and has larger text.",
            )
        ),
        rare(
            io.Int.Input(
                "height",
                default=height,
                min=256,
                max=4096,
                step=8,
                optional=True,
                tooltip="Height in pixels. A taller image gives the panels more room.",
            )
        ),
    ]


def report_input() -> io.Input:
    return FP8Report.Input("report", tooltip="The report of a quantize node.")


def report_output() -> io.Output:
    return FP8Report.Output(
        id="FP8_REPORT",
        display_name="report",
        tooltip="What was quantized, and the error it caused. Connect it to Error Histogram or Layer Report.",
    )


def filename_output() -> io.String.Output:
    return io.String.Output(
        id="filename", display_name="filename", tooltip="The name under which ComfyUI's loader lists the file."
    )


def patterns(text: str) -> tuple[str, ...]:
    """The patterns of a text box, separated by lines, commas or blanks. Repeated patterns count once.

    Raises PatternError for a value that is not a string, which another node can send.
    """
    if not isinstance(text, str):
        raise PatternError(f"patterns must be text, one per line; this is of type {type(text).__name__}")
    return tuple(dict.fromkeys(part for part in re.split(r"[\s,]+", text) if part))


def recipe(
    *,
    keep: str = "",
    only: str = "",
    matmul: str = "full precision",
    calibration: Calibration | None = None,
    **choices: Any,
) -> Recipe:
    """The Recipe that a node's inputs stand for.

    Raises UnknownChoiceError naming the valid choices: ComfyUI does not check values that come from another node.
    """
    return Recipe(
        keep=patterns(keep),
        only=patterns(only),
        matmul=choose(MATMUL_NAMES, matmul, "matmul"),
        calibration=calibration.source if calibration else "",
        **choices,
    )
