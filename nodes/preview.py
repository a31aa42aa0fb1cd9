"""The nodes that show a report: FP8 Error Histogram and FP8 Layer Report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from comfy_api.latest import io, ui

from ..kernels import LayerReport, Report
from ..kernels.figures import error_histogram, layer_report, to_image
from ..kernels.report import table as report_table
from ..kernels.selection.patterns import compile_pattern
from .options import combo, patterns
from .progress import Progress
from .schema import CATEGORY, FP8Report, fit

MOST_IMAGES = 32

_LAYERS_TOOLTIP = "Which layers to show."
_PATTERN_TOOLTIP = (
    "With layers set to pattern: the names to show, e.g. blocks.0.attn or *mlp*. One pattern a line; * stands for any "
    "characters between two dots."
)
_COUNT_TOOLTIP = "With worst or pattern: at most this many images, one a layer."
_REPORT_TOOLTIP = "The report of a quantize node."


def pick_all(report: Report, pattern: str) -> list[tuple[LayerReport, ...]]:
    return [report.layers]


def pick_worst(report: Report, pattern: str) -> list[tuple[LayerReport, ...]]:
    return [(layer,) for layer in report.worst(len(report.layers))]


def pick_by_pattern(report: Report, pattern: str) -> list[tuple[LayerReport, ...]]:
    """Each layer that one of the patterns matches, in the report's order. Raises ValueError if there is none."""
    names = [layer.key for layer in report.layers]
    expressions = [compile_pattern(part, names) for part in patterns(pattern)]
    picked = [(layer,) for layer in report.layers if any(each.search(layer.key) for each in expressions)]
    if not picked:
        examples = ", ".join(names[:3]) or "none"
        raise ValueError(f"pattern '{pattern.strip()}' matches no layer that was quantized; there are e.g. {examples}")
    return picked


PICKS: dict[str, Callable[[Report, str], Sequence[Sequence[LayerReport]]]] = {
    "all": pick_all,
    "worst": pick_worst,
    "pattern": pick_by_pattern,
}
_PICK_WORDS = {
    "all": "one image of all layers together",
    "worst": "the layers that lost most, one image each, worst first",
    "pattern": "the layers whose names match the pattern below, one image each",
}


def size_inputs(width: int, height: int) -> list:
    """width and height of a figure in pixels."""
    sides = {"min": 256, "max": 4096, "step": 8, "optional": True}
    return [
        fit(
            io.Int.Input, "width", default=width, tooltip="Pixels; a wider image is sharper, with larger text.", **sides
        ),
        fit(io.Int.Input, "height", default=height, tooltip="Pixels; a higher image gives the panels room.", **sides),
    ]


class StochasticFP8ErrorHistogram(io.ComfyNode):
    """FP8_REPORT -> a batch of IMAGEs."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8ErrorHistogram",
            display_name="FP8 Error Histogram",
            category=CATEGORY,
            search_aliases=["fp8 error", "quantization error", "sqnr"],
            description=(
                "Shows how far quantizing moved the weights: in steps of the FP8 grid, against the largest weight, and "
                "each value before and after. Thin lines are the theory; a departure from them is worth a look."
            ),
            inputs=[
                FP8Report.Input("report", tooltip=_REPORT_TOOLTIP),
                combo("layers", _PICK_WORDS, _LAYERS_TOOLTIP, default="all"),
                fit(io.String.Input, "pattern", default="", multiline=True, optional=True, tooltip=_PATTERN_TOOLTIP),
                fit(
                    io.Int.Input,
                    "count",
                    default=5,
                    min=1,
                    max=MOST_IMAGES,
                    optional=True,
                    tooltip=_COUNT_TOOLTIP,
                ),
                *size_inputs(1024, 480),
            ],
            outputs=[io.Image.Output(id="IMAGE", display_name="image", tooltip="One image for each layer shown.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report, layers, pattern="", count=5, width=1024, height=480):
        picked = PICKS[layers](report, pattern)[:count]
        if not picked:
            raise ValueError(f"no layer of {report.source} was quantized, so there is nothing to show")
        progress = Progress()
        images = []
        for done, group in enumerate(picked):
            progress(done, len(picked), group[0].key)
            images.append(to_image(error_histogram(report, group, width=width, height=height)))
        progress(len(picked), len(picked), "")
        image = torch.cat(images)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class StochasticFP8LayerReport(io.ComfyNode):
    """FP8_REPORT -> IMAGE, the table as Markdown and as JSON."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8LayerReport",
            display_name="FP8 Layer Report",
            category=CATEGORY,
            search_aliases=["fp8 report", "layer error", "sqnr table"],
            description=(
                "Shows where in the network quantization cost how much, names the layers that lost most, and adds up "
                "what it saved. Keep those layers if the image suffers."
            ),
            inputs=[
                FP8Report.Input("report", tooltip=_REPORT_TOOLTIP),
                *size_inputs(1024, 768),
            ],
            outputs=[
                io.Image.Output(id="IMAGE", display_name="image", tooltip="Loss by layer, and sizes before and after."),
                io.String.Output(
                    id="markdown", display_name="markdown", tooltip="A table with a row a layer, worst first."
                ),
                io.String.Output(
                    id="json",
                    display_name="json",
                    tooltip="The same table for programs, with the recipe and the sizes.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report, width=1024, height=768):
        image = to_image(layer_report(report, width=width, height=height))
        markdown, json = report_table.to_markdown(report), report_table.to_json(report)
        return io.NodeOutput(image, markdown, json, ui=ui.PreviewImage(image, cls=cls))
