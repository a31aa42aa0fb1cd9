"""The nodes that compare roundings: Compare FP8 Roundings on a model's weights, Rounding Curve on single numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..kernels import FORMATS, ROUNDINGS, SCALINGS, Recipe
from ..kernels.engine.quantization import select
from ..kernels.figures import check_comparison_size, comparison_figure, rounding_curve
from ..kernels.numerics.error_statistics import evenly_spaced
from ..kernels.selection.presets import DIFFUSION
from ..kernels.studies.comparison import compare_roundings
from ..kernels.studies.rounding_curve import measure_rounding
from ..kernels.studies.table import to_markdown
from . import models
from .devices import compute_device, make_room
from .networks import Network, narrow
from .options import (
    calibration_input,
    device_input,
    layers_input,
    layers_problem,
    seed_input,
    size_inputs,
    with_choices,
)
from .pictures import draw_image, theme_input
from .progress import JobProgress
from .schema import CATEGORY, newer, rare

_SEED_TOOLTIP = "Another seed gives the stochastic roundings other random draws. Only details of the image change."


class StochasticFP8Compare(io.ComfyNode):
    """MODEL -> IMAGE and a Markdown table of every rounding in both formats."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8Compare",
            display_name="Compare FP8 Roundings",
            category=CATEGORY,
            search_aliases=["fp8 comparison", "which rounding", "e4m3 e5m2"],
            description=(
                "Tries every rounding in both formats on the same weights of a model. Shows the error and the bias of "
                "each, and recommends one from these numbers. With a calibration, it also tries calibrated rounding "
                "and shows the error of the layers' outputs. The model is not changed."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to try the roundings on, in 16 bits, with its LoRAs."),
                io.Combo.Input(
                    "scaling",
                    options=list(SCALINGS),
                    default="absmax",
                    tooltip=with_choices(
                        "How each layer is scaled to the FP8 range. Compare with the setting that you will quantize "
                        "with.",
                        SCALINGS,
                    ),
                ),
                layers_input(
                    "The roundings are tried on the layers that Stochastic FP8 would quantize with this setting.",
                    DIFFUSION,
                ),
                io.Int.Input(
                    "most_layers",
                    default=24,
                    min=1,
                    max=4096,
                    tooltip="At most this many layers are tried, evenly spaced over the model. More layers give more "
                    "accurate numbers and take longer.",
                ),
                rare(seed_input(_SEED_TOOLTIP, optional=True)),
                device_input(),
                *size_inputs(1024, 832),
                calibration_input(
                    "What FP8 Calibration recorded for this model. It adds calibrated rounding and the error of the "
                    "layers' outputs."
                ),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(
                    id="IMAGE",
                    display_name="image",
                    tooltip="The error and bias of every rounding. With a calibration, also the error of the layers' "
                    "outputs.",
                ),
                io.String.Output(
                    id="markdown",
                    display_name="markdown",
                    tooltip="The recommendation, and a table with one row per format and rounding.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, layers=None):
        return layers_problem(layers) or True

    @classmethod
    def execute(
        cls,
        model,
        scaling,
        layers,
        most_layers,
        seed=0,
        device="auto",
        width=1024,
        height=832,
        calibration=None,
        theme="dark",
    ):
        check_comparison_size(width, height, calibrated=calibration is not None)
        network = models.diffusion_network(model)
        recipe = Recipe(layers=layers)
        names = select(network, recipe).quantize
        network.check(names, recipe)
        chosen = [names[i] for i in evenly_spaced(len(names), most_layers)]
        where = _with_float64(compute_device(device, network.patcher.load_device))
        make_room(where, (network.tensors[name].nbytes for name in chosen))
        progress = JobProgress()
        result = compare_roundings(
            _weights(network, chosen, where),
            scaling=scaling,
            seed=seed,
            source=network.name,
            total=len(names),
            calibration=calibration,
            progress=lambda done, name: progress(done, len(chosen), name),
        )
        progress(len(chosen), len(chosen), "")
        image = draw_image(lambda: comparison_figure(result, width=width, height=height), theme)
        return io.NodeOutput(image, to_markdown(result), ui=ui.PreviewImage(image, cls=cls))


def _with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU in place of Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _weights(network: Network, names: list[str], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, patched weight on `device`), one at a time."""
    for name in names:
        yield name, narrow(network.value(name, device))


class StochasticFP8RoundingCurve(io.ComfyNode):
    """A format and a rounding -> IMAGE."""

    @classmethod
    def define_schema(cls):
        limits: dict[str, Any] = {"min": -57344.0, "max": 57344.0, "step": 0.25, "round": 0.0001}
        return newer(
            io.Schema,
            node_id="StochasticFP8RoundingCurve",
            display_name="Rounding Curve",
            category=CATEGORY,
            search_aliases=["fp8 rounding", "stochastic rounding explained"],
            description=(
                "Draws how a rounding treats each number in a range: the results, the chance of rounding up, the bias "
                "and the variance. All four are measured with the code that quantizes models, and drawn beside the "
                "theory."
            ),
            inputs=[
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="float8_e4m3fn",
                    tooltip="The FP8 grid to round to. float8_e5m2 has steps twice as wide as float8_e4m3fn, over a "
                    "wider range.",
                ),
                io.Combo.Input(
                    "rounding",
                    options=list(ROUNDINGS),
                    default="stochastic",
                    tooltip=with_choices(
                        "The rounding to draw. The stochastic ones look alike because they have the same "
                        "distribution. nearest looks different.",
                        ROUNDINGS,
                    ),
                ),
                io.Float.Input("low", default=0.5, tooltip="The first value of the range.", **limits),
                io.Float.Input("high", default=2.5, tooltip="The last value of the range.", **limits),
                io.Int.Input(
                    "draws",
                    default=1000,
                    min=1,
                    max=10000,
                    tooltip="How many times each value is rounded. With more draws, the points scatter less around "
                    "the lines of the theory.",
                ),
                rare(seed_input(_SEED_TOOLTIP, optional=True)),
                *size_inputs(1024, 768),
                theme_input(),
            ],
            outputs=[io.Image.Output(id="IMAGE", display_name="image", tooltip="The rounding in four panels.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, format, rounding, low, high, draws, seed=0, width=1024, height=768, theme="dark"):
        curve = measure_rounding(format, rounding, low, high, draws=draws, seed=seed)
        image = draw_image(lambda: rounding_curve(curve, width=width, height=height), theme)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
