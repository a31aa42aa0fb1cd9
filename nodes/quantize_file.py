"""Stochastic FP8 Quantize File: a streamed file-to-file job that never loads the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
from comfy_api.latest import io, ui
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels.engine.file_job import quantize_file
from ..kernels.files.reader import open_source
from ..kernels.numerics.rounding import METHODS
from .devices import compute_device, make_room
from .files import (
    OUTPUT_FOLDERS,
    check_entries,
    find_source,
    fingerprint,
    list_sources,
    loader_name,
    prefix_problem,
    target_path,
    workflow_metadata,
)
from .live import summary_output
from .options import (
    another_comfyui_input,
    calibration_input,
    device_input,
    filename_output,
    layer_inputs,
    layout_input,
    matmul_input,
    nonfinite_input,
    recipe,
    report_output,
    rounding_inputs,
)
from .progress import JobProgress
from .schema import CATEGORY, newer

log = logging.getLogger("stochastic_fp8")


class StochasticFP8QuantizeFile(io.ComfyNode):
    """A model file -> a scaled FP8 file under output/."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8QuantizeFile",
            display_name="Stochastic FP8 Quantize File",
            category=CATEGORY,
            search_aliases=["convert to fp8", "quantize checkpoint", "float8"],
            description=(
                "Quantizes a file of any size to a scaled FP8 file. The model is not loaded: only a few tensors are in "
                "memory at a time. In an all-in-one checkpoint, the diffusion model and large text encoders are "
                "quantized. VAE and CLIP are copied unchanged."
            ),
            inputs=[
                io.Combo.Input("file", options=list_sources(), tooltip="The 16-bit model file to quantize."),
                *rounding_inputs(METHODS),
                *layer_inputs()[:1],
                io.String.Input(
                    "filename_prefix",
                    default="stochastic_fp8",
                    tooltip="The name of the new file. A number is added, unless overwrite is on.",
                ),
                layout_input(),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replaces an earlier file of this name, once the new one is complete and verified.",
                ),
                io.Boolean.Input(
                    "requantize",
                    default=False,
                    tooltip="Accepts a file whose layers are already in this format. Rounding them again costs more "
                    "quality.",
                ),
                *layer_inputs()[1:],
                matmul_input(),
                nonfinite_input(),
                device_input(),
                calibration_input(),
                another_comfyui_input(),
            ],
            outputs=[filename_output(), report_output()],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return prefix_problem(filename_prefix, OUTPUT_FOLDERS.values()) or True

    @classmethod
    def fingerprint_inputs(cls, file, **choices):
        return fingerprint(file)

    @classmethod
    def execute(
        cls,
        file,
        filename_prefix,
        overwrite,
        requantize,
        device="auto",
        calibration=None,
        for_another_comfyui=False,
        **choices,
    ):
        kind, source = find_source(file)
        chosen = recipe(**choices)
        if not for_another_comfyui:
            check_entries(chosen.layout, [chosen.format])
        target = target_path(kind, filename_prefix, overwrite)
        where = compute_device(device, comfy.model_management.get_torch_device())
        make_room(where, _tensor_sizes(source))
        progress = JobProgress()
        report = quantize_file(
            source,
            target,
            chosen,
            calibration=calibration,
            requantize=requantize,
            overwrite=overwrite,
            device=where,
            metadata=workflow_metadata(cls.hidden),
            for_comfyui=None if for_another_comfyui else COMFYUI_VERSION,
            progress=progress,
            observe=progress.layer,
        )
        for note in report.notes:
            log.info("%s", note)
        name = loader_name(kind, target)
        return io.NodeOutput(name, report, ui={**ui.PreviewText(name).as_dict(), **summary_output(report)})


def _tensor_sizes(source: Path) -> Iterator[int]:
    """In bytes; the file is opened when the first is asked for."""
    with open_source(source) as opened:
        yield from (info.nbytes for info in opened.tensors.values())
