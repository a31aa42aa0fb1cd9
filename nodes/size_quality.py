"""Size and Quality: what layers measured would make of a MODEL, before it is quantized."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kernels.figures import size_quality_figure
from ..kernels.studies.size_quality import study_sizes, to_json, to_markdown
from .models import diffusion_network
from .options import size_inputs
from .pictures import draw_image, theme_input
from .schema import CATEGORY, FP8Calibration, newer


class StochasticFP8SizeQuality(io.ComfyNode):
    """MODEL and FP8_CALIBRATION -> IMAGE, and the same as Markdown and as JSON."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8SizeQuality",
            display_name="Size and Quality",
            category=CATEGORY,
            search_aliases=["fp8 size", "fit my memory", "file size", "pareto", "mixed precision"],
            description=(
                "Shows the predicted quality of your model for every file size, from all FP8 to 16 bits, and which "
                "layers stay in 16 bits. Choose a point, and type its size into size_limit of a quantize node."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that was measured, in 16 bits, with its LoRAs."),
                FP8Calibration.Input(
                    "calibration", tooltip="What Layer Sensitivity measured for this model, or a file of it."
                ),
                *size_inputs(1024, 832),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(
                    id="IMAGE", display_name="image", tooltip="Predicted quality and kept layers over the file size."
                ),
                io.String.Output(
                    id="markdown",
                    display_name="markdown",
                    tooltip="Tables of sizes with their predicted quality, and of the kinds of layers.",
                ),
                io.String.Output(
                    id="json", display_name="json", tooltip="All points and the order of the layers as JSON."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, calibration, width=1024, height=832, theme="dark"):
        study = study_sizes(diffusion_network(model), calibration)
        image = draw_image(lambda: size_quality_figure(study, width=width, height=height), theme)
        return io.NodeOutput(image, to_markdown(study), to_json(study), ui=ui.PreviewImage(image, cls=cls))
