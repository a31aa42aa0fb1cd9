"""The nodes that show a report: Error Histogram and Layer Report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from comfy_api.latest import io, ui

from ..kernels import LayerReport, Report
from ..kernels.choices import choose
from ..kernels.figures import error_histogram, layer_report
from ..kernels.report import table as report_table
from ..kernels.selection.patterns import Pattern, PatternSet, check_length
from .options import patterns, report_input, size_inputs, with_choices
from .pictures import draw_image, theme_input
from .progress import JobProgress
from .schema import CATEGORY, newer

MOST_IMAGES = 32

Groups = Sequence[Sequence[LayerReport]]
"""The layers of each image."""


def pick_all(report: Report, pattern: str) -> Groups:
    return [report.layers]


def pick_worst(report: Report, pattern: str) -> Groups:
    return [(layer,) for layer in report.worst(len(report.layers))]


def pick_by_pattern(report: Report, pattern: str) -> Groups:
    """Each layer that one of the patterns matches, in the report's order. Raises ValueError if there is none."""
    names = [layer.key for layer in report.layers]
    texts = patterns(pattern)
    check_length(texts)
    parsed = PatternSet(Pattern.parse(text).resolve(names) for text in texts)
    picked = [(layer,) for layer in report.layers if parsed.matching(layer.key)]
    if not picked:
        raise ValueError(
            f"pattern '{pattern.strip()}' matches no quantized layer: use names such as {', '.join(names[:3])}"
        )
    return picked


PICKS: dict[str, Callable[[Report, str], Groups]] = {
    "all": pick_all,
    "worst": pick_worst,
    "pattern": pick_by_pattern,
}

PICK_DESCRIPTIONS = {
    "all": "one image of all layers together",
    "worst": "the layers with the lowest SQNR, one image each, worst first",
    "pattern": "the layers whose names match the pattern, one image each",
}


class StochasticFP8ErrorHistogram(io.ComfyNode):
    """FP8_REPORT -> a batch of IMAGEs."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8ErrorHistogram",
            display_name="Error Histogram",
            category=CATEGORY,
            search_aliases=["fp8 histogram", "quantization error", "sqnr"],
            description=(
                "Shows how far quantization moved the weights: in steps of the FP8 grid, relative to the largest "
                "weight, and as values before and after. Thin lines show the theory. Look closer where the bars "
                "depart from it."
            ),
            inputs=[
                report_input(),
                io.Combo.Input(
                    "layers",
                    options=list(PICKS),
                    default="all",
                    tooltip=with_choices("Which layers to show.", PICK_DESCRIPTIONS),
                ),
                io.String.Input(
                    "pattern",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The layers to show when 'layers' is set to 'pattern', e.g. blocks.0.attn or *mlp*. One "
                    "pattern per line. * stands for any characters between two dots.",
                ),
                io.Int.Input(
                    "count",
                    default=5,
                    min=1,
                    max=MOST_IMAGES,
                    optional=True,
                    tooltip="The largest number of images when 'layers' is set to 'worst' or 'pattern'.",
                ),
                *size_inputs(1024, 480),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(
                    id="IMAGE", display_name="image", tooltip="One image per layer shown, or one image of all layers."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report, layers, pattern="", count=5, width=1024, height=480, theme="dark"):
        picked = choose(PICKS, layers, "layers")(report, pattern)[:count] if report.layers else []
        if not picked:
            raise ValueError(f"no layer of {report.source} was quantized: there is nothing to show")
        progress = JobProgress()
        images = []
        for done, group in enumerate(picked):
            progress(done, len(picked), group[0].key)
            images.append(_histogram(report, group, width, height, theme))
        progress(len(picked), len(picked), "")
        image = torch.cat(images)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def _histogram(report: Report, layers: Sequence[LayerReport], width: int, height: int, theme: str) -> torch.Tensor:
    return draw_image(lambda: error_histogram(report, layers, width=width, height=height), theme)


class StochasticFP8LayerReport(io.ComfyNode):
    """FP8_REPORT -> IMAGE, and the table as Markdown and as JSON."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8LayerReport",
            display_name="Layer Report",
            category=CATEGORY,
            search_aliases=["fp8 report", "fp8 layers", "layer error", "sqnr table"],
            description=(
                "Shows the error of each layer along the network, says whether layers stand out, and adds up the sizes "
                "before and after. If the image suffers, put the names of layers that stand out into 'keep' of the "
                "quantize node."
            ),
            inputs=[report_input(), *size_inputs(1024, 768), theme_input()],
            outputs=[
                io.Image.Output(
                    id="IMAGE", display_name="image", tooltip="The error of each layer, and the sizes before and after."
                ),
                io.String.Output(
                    id="markdown",
                    display_name="markdown",
                    tooltip="A table with one row per layer, the lowest SQNR first.",
                ),
                io.String.Output(
                    id="json",
                    display_name="json",
                    tooltip="The same table as JSON, with the recipe and the sizes.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report, width=1024, height=768, theme="dark"):
        image = draw_image(lambda: layer_report(report, width=width, height=height), theme)
        markdown, json = report_table.to_markdown(report), report_table.to_json(report)
        return io.NodeOutput(image, markdown, json, ui=ui.PreviewImage(image, cls=cls))
