"""Inspect FP8 Checkpoint: is this file sound, and what will each ComfyUI version make of it?"""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ..kernels.figures.findings import inspection_sheet
from ..kernels.state_dict.inspection import inspect_file
from ..kernels.state_dict.repair import repair_file
from .files import find_source, fingerprint, list_sources, loader_name, target_path
from .pictures import draw_image
from .schema import CATEGORY, fit

log = logging.getLogger("stochastic_fp8")


class StochasticFP8Inspect(io.ComfyNode):
    """A file -> findings in plain words; a repaired copy if wished."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8Inspect",
            display_name="Inspect FP8 Checkpoint",
            category=CATEGORY,
            search_aliases=["fp8 check", "verify fp8", "repair fp8"],
            description=(
                "Looks into an FP8 file and says what is wrong with it, what that does to the image, how to repair it, "
                "and how each ComfyUI version reads it. Reads headers and scales only, so even a large file takes a "
                "moment."
            ),
            inputs=[
                fit(io.Combo.Input, "file", options=list_sources(), tooltip="The file to look into."),
                fit(io.Boolean.Input, "deep", default=False, tooltip=_DEEP_TOOLTIP),
                fit(io.Boolean.Input, "repair", default=False, tooltip=_REPAIR_TOOLTIP),
                fit(io.String.Input, "filename_prefix", default="repaired", tooltip="The name of the repaired copy."),
            ],
            outputs=[
                io.String.Output(id="findings", display_name="findings", tooltip="What was found, one finding a line."),
                io.Image.Output(id="image", display_name="image", tooltip="The same as a picture."),
                io.Boolean.Output(id="ok", display_name="ok", tooltip="Whether the file is free of errors."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file, **choices):
        return fingerprint(file)

    @classmethod
    def execute(cls, file, deep, repair, filename_prefix):
        kind, path = find_source(file)
        inspection = inspect_file(path, deep=deep)
        text = inspection.summary
        if repair:
            text += "\n\n" + _repair(kind, path, inspection, filename_prefix)
        log.info("%s", text)
        image = draw_image(lambda: inspection_sheet(inspection))
        return io.NodeOutput(text, image, inspection.ok, ui=ui.PreviewText(text))


_DEEP_TOOLTIP = "Also read every FP8 weight, to find codes that would turn the image black. Slow for a large file."
_REPAIR_TOOLTIP = "Write a copy with everything put right that can be, as far as that goes without the 16-bit model."


def _repair(kind: str, path, inspection, filename_prefix: str) -> str:
    if not inspection.repairable:
        return "There is nothing to repair."
    target = target_path(kind, filename_prefix)
    repaired = repair_file(path, target)
    return f"Repaired copy: {loader_name(kind, target)}\n{repaired.summary}"
