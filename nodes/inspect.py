"""Inspect FP8 Checkpoint: what is wrong with a file, and what each ComfyUI version makes of it."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io, ui

from ..kernels.figures import inspection_sheet
from ..kernels.state_dict.findings import Inspection
from ..kernels.state_dict.inspection import inspect_file
from ..kernels.state_dict.repair import repair_file
from .files import (
    OUTPUT_FOLDERS,
    check_prefix,
    find_source,
    fingerprint,
    list_sources,
    loader_name,
    target_path,
)
from .pictures import draw_image, theme_input
from .schema import CATEGORY, newer

log = logging.getLogger("stochastic_fp8")


class StochasticFP8Inspect(io.ComfyNode):
    """A file -> its findings, and a repaired copy on request."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8Inspect",
            display_name="Inspect FP8 Checkpoint",
            category=CATEGORY,
            search_aliases=["check fp8", "verify fp8", "repair fp8", "broken checkpoint"],
            description=(
                "Checks an FP8 file. Lists what is wrong with it, what that does to the image, how to repair it, and "
                "how each ComfyUI version reads it. Unless deep is on, only headers and scales are read, so even a "
                "large file takes a moment."
            ),
            inputs=[
                io.Combo.Input("file", options=list_sources(), tooltip="The file to check."),
                io.Boolean.Input(
                    "deep",
                    default=False,
                    tooltip="Also reads every weight, to find NaN and infinite codes that would turn the image "
                    "black. Slow for a large file.",
                ),
                io.Boolean.Input(
                    "repair",
                    default=False,
                    tooltip="Writes a copy with all faults repaired that can be repaired without the 16-bit model.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="repaired",
                    tooltip="The name of the repaired copy. A number is added, so that no file is overwritten.",
                ),
                theme_input(),
            ],
            outputs=[
                io.String.Output(id="findings", display_name="findings", tooltip="The findings, one line per kind."),
                io.Image.Output(id="image", display_name="image", tooltip="The findings as an image."),
                io.Boolean.Output(id="ok", display_name="ok", tooltip="Whether the file is free of errors."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file, **choices):
        return fingerprint(file)

    @classmethod
    def execute(cls, file, deep, repair, filename_prefix, theme="dark"):
        kind, path = find_source(file)
        if repair:
            check_prefix(OUTPUT_FOLDERS[kind], filename_prefix)
        inspection = inspect_file(path, deep=deep)
        text = inspection.summary
        if repair:
            text += "\n\n" + _repair(kind, path, inspection, filename_prefix)
        log.info("%s", text)
        image = draw_image(lambda: inspection_sheet(inspection), theme)
        return io.NodeOutput(text, image, inspection.ok, ui=ui.PreviewText(text))


def _repair(kind: str, path: Path, inspection: Inspection, filename_prefix: str) -> str:
    """Write the repaired copy, if there is anything to repair. Returns the text for the findings."""
    if not inspection.repairable:
        return "There is nothing to repair." if inspection.ok else "None of these problems can be repaired."
    target = target_path(kind, filename_prefix)
    repaired = repair_file(path, target)
    return f"Repaired copy: {loader_name(kind, target)}\n{repaired.summary}"
