"""Stochastic FP8 Quantize File: a streamed file-to-file job that never loads the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
from comfy_api.latest import io, ui

from ..kernels.engine.file_job import quantize_file
from ..kernels.files.reader import open_source
from ..kernels.numerics.rounding import METHODS
from .devices import compute_device, make_room
from .files import find_source, fingerprint, list_sources, loader_name, target_path, workflow_metadata
from .live import summary_output
from .options import (
    calibration_input,
    device_input,
    keywords,
    layer_inputs,
    layout_input,
    matmul_input,
    nonfinite_input,
    recipe,
    rounding_inputs,
)
from .progress import Progress
from .schema import CATEGORY, FP8Report, fit

log = logging.getLogger("stochastic_fp8")


class StochasticFP8QuantizeFile(io.ComfyNode):
    """A model file -> a scaled FP8 file under output/."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8QuantizeFile",
            display_name="Stochastic FP8 Quantize File",
            category=CATEGORY,
            search_aliases=["convert to fp8", "quantize checkpoint", "float8"],
            description=(
                "Quantizes a file of any size to a scaled FP8 file, a few tensors in memory at a time, without loading "
                "the model. In an all-in-one checkpoint the diffusion model and large text encoders are quantized; "
                "VAE and CLIP stay as they are."
            ),
            inputs=[
                fit(io.Combo.Input, "file", options=list_sources(), tooltip="The 16-bit model to quantize."),
                *rounding_inputs(METHODS),
                *layer_inputs()[:1],
                fit(io.String.Input, "filename_prefix", default="stochastic_fp8", tooltip=_PREFIX_TOOLTIP),
                layout_input(),
                fit(io.Boolean.Input, "overwrite", default=False, tooltip=_OVERWRITE_TOOLTIP),
                fit(io.Boolean.Input, "requantize", default=False, tooltip=_REQUANTIZE_TOOLTIP),
                *layer_inputs()[1:],
                matmul_input(),
                nonfinite_input(),
                device_input(),
                calibration_input(),
            ],
            outputs=[
                io.String.Output(
                    id="filename", display_name="filename", tooltip="The file's name as ComfyUI's loader lists it."
                ),
                FP8Report.Output(id="FP8_REPORT", display_name="report", tooltip=_REPORT_TOOLTIP),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file, **choices):
        return fingerprint(file)

    @classmethod
    def execute(cls, file, filename_prefix, overwrite, requantize, device="auto", calibration=None, **choices):
        kind, source = find_source(file)
        target = target_path(kind, filename_prefix, overwrite)
        where = compute_device(device, comfy.model_management.get_torch_device())
        make_room(where, _tensor_sizes(source))
        progress = Progress()
        report = quantize_file(
            source,
            target,
            **keywords(recipe(**choices)),
            calibration=calibration,
            requantize=requantize,
            overwrite=overwrite,
            device=where,
            metadata=workflow_metadata(cls.hidden),
            progress=progress,
            observe=progress.observe,
        )
        for note in report.notes:
            log.info("%s", note)
        name = loader_name(kind, target)
        return io.NodeOutput(name, report, ui={**ui.PreviewText(name).as_dict(), **summary_output(report)})


def _tensor_sizes(source: Path) -> Iterator[int]:
    """In bytes; the file is opened when the first is asked for."""
    with open_source(source) as opened:
        yield from (info.nbytes for info in opened.tensors.values())


_PREFIX_TOOLTIP = "The new file's name; a number is counted up unless overwrite is on."
_OVERWRITE_TOOLTIP = "Replace an earlier file of this name, once the new one is complete and verified."
_REQUANTIZE_TOOLTIP = "Allow a file whose layers are in this format already. It loses quality a second time."
_REPORT_TOOLTIP = "What was quantized and what it cost: connect it to FP8 Error Histogram or FP8 Layer Report."
