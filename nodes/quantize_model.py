"""The nodes that quantize in the graph: MODEL -> MODEL and CLIP -> CLIP."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..kernels import display
from ..kernels.engine.quantization import recipe_entry
from ..kernels.numerics.rounding import METHODS
from ..kernels.report.report import join_reports
from ..kernels.selection.presets import DIFFUSION, TEXT_ENCODER
from ..kernels.selection.selection import LAYERS
from . import models
from .calibrate_text_encoder import check_encoders, encoder_calibration
from .devices import compute_device
from .files import workflow_metadata
from .in_graph import NetworkJob
from .live import summary_output
from .options import (
    calibration_input,
    device_input,
    layer_inputs,
    layers_problem,
    limit_inputs,
    matmul_input,
    nonfinite_input,
    recipe,
    report_output,
    rounding_inputs,
)
from .running import source_name
from .schema import CATEGORY, newer

log = logging.getLogger("stochastic_fp8")


class StochasticFP8Quantize(io.ComfyNode):
    """MODEL -> a new MODEL with scaled FP8 weights."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8Quantize",
            display_name="Stochastic FP8",
            category=CATEGORY,
            search_aliases=[
                "fp8",
                "stochastic fp8 quantize",
                "float8",
                "quantize model",
                "quantise",
                "stochastic rounding",
                "compress",
                "smaller model",
                "vram",
                "less memory",
            ],
            description=(
                "Quantizes a model to scaled FP8: half the memory for the quantized layers, almost the same image. "
                "LoRAs before this node are merged in full precision, then rounded once. What you sample is exactly "
                "what Save Scaled FP8 Model writes. For the image closest to the original, choose rounding calibrated "
                "if you have a calibration, and nearest otherwise."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize, in 16 bits. It is not changed."),
                *rounding_inputs(METHODS),
                *layer_inputs(DIFFUSION, LAYERS),
                matmul_input(),
                nonfinite_input(),
                device_input(),
                calibration_input(),
                *limit_inputs(),
            ],
            outputs=[
                io.Model.Output(id="MODEL", display_name="model", tooltip="The quantized model."),
                report_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, layers=None):
        return layers_problem(layers, LAYERS) or True

    @classmethod
    def execute(cls, model, device="auto", nonfinite="error", calibration=None, **choices):
        chosen = recipe(nonfinite=nonfinite, calibration=calibration, **choices)
        models.check_runs(chosen.format)
        network = models.diffusion_network(model)
        where = compute_device(device, network.patcher.load_device)
        job = NetworkJob(network, chosen, where, calibration, workflow_metadata(cls.hidden))
        models.check_recognised(model, network)
        state = job.run()
        job.quantization.check_anything_left()
        quantized = models.load_quantized_model(model, state, recipe_entry(job.quantization.report()))
        report = job.quantization.report()  # complete, now that the loader has read the kept tensors
        _log(report)
        return io.NodeOutput(quantized, report, ui=summary_output(report))


class StochasticFP8QuantizeTextEncoder(io.ComfyNode):
    """CLIP -> a new CLIP whose large encoders are scaled FP8."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8QuantizeTextEncoder",
            display_name="Stochastic FP8 Text Encoder",
            category=CATEGORY,
            search_aliases=["t5 fp8", "fp8 t5", "quantize clip", "quantize t5", "umt5", "smaller text encoder"],
            description=(
                "Quantizes large text encoders (T5-XXL, language models) to scaled FP8. CLIP-L and CLIP-G pass "
                "through unchanged because ComfyUI cannot read them in FP8. The report lists what was left unchanged, "
                "and why."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder to quantize, in 16 bits. It is not changed."),
                *rounding_inputs(METHODS),
                *layer_inputs(TEXT_ENCODER),
                nonfinite_input(),
                device_input(),
                calibration_input(
                    "What Text Encoder Calibration recorded for this text encoder. Rounding calibrated needs it."
                ),
            ],
            outputs=[
                io.Clip.Output(id="CLIP", display_name="clip", tooltip="The quantized text encoder."),
                report_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, layers=None):
        return layers_problem(layers) or True

    @classmethod
    def execute(cls, clip, device="auto", nonfinite="error", calibration=None, **choices):
        chosen = recipe(nonfinite=nonfinite, calibration=calibration, **choices)
        models.check_runs(chosen.format)
        where = compute_device(device, clip.patcher.load_device)
        jobs = [
            NetworkJob(network, chosen, where, encoder_calibration(network, calibration))
            for network in models.text_networks(clip).values()
        ]
        check_encoders(jobs, calibration)
        states = {job.network: job.run() for job in jobs}
        name = source_name("clip", "CLIP") or type(clip.cond_stage_model).__name__.rstrip("_")
        report = join_reports([job.quantization.report() for job in jobs], name)
        if report.layers:
            scaled = {network: state for network, state in states.items() if state.weights}
            clip = models.load_quantized_clip(clip, scaled, recipe_entry(report))
            # Complete, now that the loader has read the kept tensors.
            report = join_reports([job.quantization.report() for job in jobs], name)
        _log(report)
        return io.NodeOutput(clip, report, ui=summary_output(report))


def _log(report) -> None:
    log.info(
        "%s: %d layers quantized to %s with %s rounding, %d tensors kept, %s",
        report.source,
        len(report.layers),
        report.recipe.format,
        report.recipe.rounding,
        len(report.kept),
        display.sizes(report.bytes_before, report.bytes_after),
    )
    for note in report.notes:
        log.info("%s", note)
