"""Convert File to FP8: a streamed file-to-file job that never loads the model."""

from __future__ import annotations

import logging

import comfy.model_management
from comfy_api.latest import io, ui
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels.engine.file_job import quantize_file
from ..kernels.numerics.rounding import METHODS
from ..kernels.selection.components import Components
from ..kernels.selection.selection import LAYERS
from .devices import compute_device, make_room
from .diffusers_names import open_native
from .files import (
    OUTPUT_FOLDERS,
    TOKENS,
    check_detected,
    check_entries,
    check_folder,
    fill_tokens,
    find_source,
    fingerprint,
    list_sources,
    loader_name,
    prefix_problem,
    target_path,
    workflow_metadata,
)
from .live import files_output, summary_output
from .options import (
    another_comfyui_input,
    calibration_input,
    device_input,
    filename_output,
    layer_inputs,
    layout_input,
    limit_inputs,
    matmul_input,
    nonfinite_input,
    recipe,
    report_output,
    rounding_inputs,
)
from .progress import JobProgress
from .schema import CATEGORY, newer, rare

log = logging.getLogger("stochastic_fp8")


class StochasticFP8QuantizeFile(io.ComfyNode):
    """A model file -> a scaled FP8 file under output/."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8QuantizeFile",
            display_name="Convert File to FP8",
            category=CATEGORY,
            search_aliases=[
                "convert",
                "convert checkpoint",
                "convert safetensors",
                "quantize file",
                "quantize checkpoint",
            ],
            description=(
                "Quantizes a file of any size to a scaled FP8 file. The model is not loaded: only a few tensors are in "
                "memory at a time. In an all-in-one checkpoint, the diffusion model and large text encoders are "
                "quantized. VAE and CLIP are copied unchanged."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_sources(),
                    tooltip="The 16-bit model to quantize. A model in several files is listed as its "
                    ".safetensors.index.json.",
                ),
                *rounding_inputs(METHODS),
                *layer_inputs(layers=LAYERS)[:1],
                io.String.Input(
                    "filename_prefix",
                    default=TOKENS,
                    tooltip="The name of the new file. %model% stands for the name of the old one, %format% for the "
                    "format. A number is added, unless overwrite is on.",
                ),
                layout_input(),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replaces an earlier file of this name, once the new one is complete and verified.",
                ),
                rare(
                    io.Boolean.Input(
                        "requantize",
                        default=False,
                        tooltip="Accepts a file whose layers are already in this format. Rounding them again costs "
                        "more quality.",
                    )
                ),
                *layer_inputs()[1:],
                matmul_input(),
                nonfinite_input(),
                device_input(),
                calibration_input(),
                another_comfyui_input(),
                *limit_inputs(),
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
        target = target_path(kind, fill_tokens(filename_prefix, source.name, [chosen.format]), overwrite)
        where = compute_device(device, comfy.model_management.get_torch_device())
        progress = JobProgress()
        with open_native(source) as opened:
            if not for_another_comfyui:
                components = Components(opened.tensors)
                check_folder(kind, opened, components)
                check_detected(opened, components)
            make_room(where, (info.nbytes for info in opened.tensors.values()))
            report = quantize_file(
                opened,
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
        files = files_output(OUTPUT_FOLDERS[kind], {name: target})
        return io.NodeOutput(name, report, ui={**ui.PreviewText(name).as_dict(), **summary_output(report), **files})
