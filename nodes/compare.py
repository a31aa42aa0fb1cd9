"""The nodes that show roundings: Compare FP8 Roundings on a model's weights, Rounding Curve on numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from comfy_api.latest import io, ui

from ..kernels import FORMATS, ROUNDINGS, SCALINGS, Recipe
from ..kernels.figures import check_comparison_size, comparison_figure, rounding_curve, to_image
from ..kernels.numerics.error_statistics import evenly_spaced
from ..kernels.selection.selection import LAYERS
from ..kernels.studies import comparison
from ..kernels.studies.rounding_curve import measure_rounding
from . import in_graph, models
from .devices import compute_device, make_room
from .networks import Network, narrow
from .options import LARGEST_SEED, calibration_input, combo, device_input
from .preview import size_inputs
from .progress import Progress
from .schema import CATEGORY, fit

_SCALING_TOOLTIP = "How each layer is stretched over the FP8 range: compare with the setting that you mean to use."
_LAYERS_TOOLTIP = "Which layers to try the roundings on: those that Stochastic FP8 Quantize would take."
_MOST_TOOLTIP = "Of a model with more layers, this many are tried, evenly spaced. More: truer numbers, and slower."
_SEED_TOOLTIP = "Another seed gives the stochastic roundings another draw; the picture changes in details only."
_CALIBRATION_TOOLTIP = (
    "What FP8 Calibration recorded of this model. With it calibrated rounding is tried too, and the picture shows what "
    "each rounding does to the layers' outputs."
)
_FORMAT_TOOLTIP = "The grid to round to. E5M2's steps are twice as wide as E4M3's, over a wider range."
_ROUNDING_TOOLTIP = "The rounding to draw. The stochastic ones look alike, since they have one law; nearest does not."
_DRAWS_TOOLTIP = "How often each value is rounded. More draws: less scatter around the lines of theory."


def seed_input() -> io.Int.Input:
    return fit(
        io.Int.Input,
        "seed",
        default=0,
        min=0,
        max=LARGEST_SEED,
        control_after_generate=False,
        optional=True,
        tooltip=_SEED_TOOLTIP,
    )


class StochasticFP8Compare(io.ComfyNode):
    """MODEL -> IMAGE and a Markdown table of every rounding in both formats."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8Compare",
            display_name="Compare FP8 Roundings",
            category=CATEGORY,
            search_aliases=["fp8 comparison", "which rounding", "e4m3 e5m2"],
            description=(
                "Tries every rounding in both formats on the same weights of a model and shows error beside bias, with "
                "a recommendation from the numbers; with a calibration, calibrated rounding and the error of the "
                "layers' outputs too. The model stays as it is."
            ),
            inputs=[
                fit(io.Model.Input, "model", tooltip="The model to try the roundings on, in 16 bits."),
                combo("scaling", SCALINGS, _SCALING_TOOLTIP, default="absmax"),
                combo("layers", LAYERS, _LAYERS_TOOLTIP, default="auto"),
                fit(io.Int.Input, "most_layers", default=24, min=1, max=4096, tooltip=_MOST_TOOLTIP),
                seed_input(),
                device_input(),
                *size_inputs(1024, 832),
                calibration_input(_CALIBRATION_TOOLTIP),
            ],
            outputs=[
                io.Image.Output(
                    id="IMAGE",
                    display_name="image",
                    tooltip="Error and bias of every rounding; with a calibration, errors of outputs.",
                ),
                io.String.Output(
                    id="markdown",
                    display_name="markdown",
                    tooltip="The recommendation, and a table with a row a rounding.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, scaling, layers, most_layers, seed=0, device="auto", width=1024, height=832, calibration=None
    ):
        check_comparison_size(width, height, calibrated=calibration is not None)
        network = models.diffusion_network(model)
        network.check_source()
        names = in_graph.select(network, Recipe(layers=layers)).quantize
        chosen = [names[i] for i in evenly_spaced(len(names), most_layers)]
        where = _with_float64(compute_device(device, network.patcher.load_device))
        make_room(where, (network.info(name).nbytes for name in chosen))
        progress = Progress()
        result = comparison.compare_roundings(
            weights(network, chosen, where),
            scaling=scaling,
            seed=seed,
            source=type(model.model).__name__,
            total=len(names),
            calibration=calibration,
            progress=lambda done, name: progress(done, len(chosen), name),
        )
        progress(len(chosen), len(chosen), "")
        image = to_image(comparison_figure(result, width=width, height=height))
        return io.NodeOutput(image, comparison.to_markdown(result), ui=ui.PreviewImage(image, cls=cls))


def _with_float64(device: torch.device) -> torch.device:
    """Where errors can be compared: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def weights(network: Network, names: list[str], device) -> Iterator[tuple]:
    """(name, patched weight on `device`), one by one."""
    for name in names:
        yield name, narrow(network.value(name, device))


class StochasticFP8RoundingCurve(io.ComfyNode):
    """A format and a rounding -> IMAGE."""

    @classmethod
    def define_schema(cls):
        limits = {"min": -57344.0, "max": 57344.0, "step": 0.25, "round": 0.0001}
        return fit(
            io.Schema,
            node_id="StochasticFP8RoundingCurve",
            display_name="Rounding Curve",
            category=CATEGORY,
            search_aliases=["fp8 rounding", "stochastic rounding explained"],
            description=(
                "Draws what a rounding does to each number of a range: the staircase, the chance of rounding up, the "
                "error of the mean, and the variance, measured with the real kernels beside the theory."
            ),
            inputs=[
                fit(io.Combo.Input, "format", options=list(FORMATS), default="float8_e4m3fn", tooltip=_FORMAT_TOOLTIP),
                combo("rounding", ROUNDINGS, _ROUNDING_TOOLTIP, default="stochastic"),
                fit(io.Float.Input, "low", default=0.5, tooltip="The first value of the range.", **limits),
                fit(io.Float.Input, "high", default=2.5, tooltip="The last value of the range.", **limits),
                fit(io.Int.Input, "draws", default=1000, min=1, max=10000, tooltip=_DRAWS_TOOLTIP),
                seed_input(),
                *size_inputs(1024, 768),
            ],
            outputs=[io.Image.Output(id="IMAGE", display_name="image", tooltip="The rounding in four panels.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, format, rounding, low, high, draws, seed=0, width=1024, height=768):
        curve = measure_rounding(format, rounding, low, high, draws=draws, seed=seed)
        image = to_image(rounding_curve(curve, width=width, height=height))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
