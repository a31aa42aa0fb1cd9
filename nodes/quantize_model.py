"""The nodes that quantize in the graph: MODEL -> MODEL and CLIP -> CLIP."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..kernels.engine.quantization import recipe_entry
from ..kernels.numerics.rounding import METHODS
from ..kernels.report.report import join_reports
from . import models
from .devices import compute_device
from .in_graph import quantize_network
from .live import summary_output
from .options import (
    calibration_input,
    device_input,
    layer_inputs,
    matmul_input,
    nonfinite_input,
    recipe,
    report_output,
    rounding_inputs,
)
from .schema import CATEGORY, newer

log = logging.getLogger("stochastic_fp8")


class StochasticFP8Quantize(io.ComfyNode):
    """MODEL -> a new MODEL with scaled FP8 weights."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8Quantize",
            display_name="Stochastic FP8 Quantize",
            category=CATEGORY,
            search_aliases=["fp8", "quantize", "quantise", "float8"],
            description=(
                "Quantizes a model to scaled FP8: half the memory for the quantized layers, almost the same image. "
                "LoRAs before this node are merged in full precision, then rounded once. What you sample is exactly "
                "what Save Scaled FP8 Model writes. For the image closest to the original, choose rounding calibrated "
                "if you have a calibration, and nearest otherwise. The stochastic methods have twice the squared "
                "error of nearest, but no bias."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize, in 16 bits. It is not changed."),
                *rounding_inputs(METHODS),
                *layer_inputs(),
                matmul_input(),
                nonfinite_input(),
                device_input(),
                calibration_input(),
            ],
            outputs=[
                io.Model.Output(id="MODEL", display_name="model", tooltip="The quantized model."),
                report_output(),
            ],
        )

    @classmethod
    def execute(cls, model, device="auto", nonfinite="error", calibration=None, **choices):
        chosen = recipe(nonfinite=nonfinite, calibration=calibration, **choices)
        models.check_runs(chosen.format)
        network = models.diffusion_network(model)
        where = compute_device(device, network.patcher.load_device)
        quantization, state = quantize_network(network, chosen, where, calibration)
        quantization.check_anything_left()
        report = quantization.report()
        _log(report)
        quantized = models.load_quantized_model(model, state, recipe_entry(report))
        return io.NodeOutput(quantized, report, ui=summary_output(report))


class StochasticFP8QuantizeTextEncoder(io.ComfyNode):
    """CLIP -> a new CLIP whose large encoders are scaled FP8."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8QuantizeTextEncoder",
            display_name="Stochastic FP8 Quantize Text Encoder",
            category=CATEGORY,
            search_aliases=["fp8", "quantize clip", "t5", "float8"],
            description=(
                "Quantizes large text encoders (T5-XXL, language models) to scaled FP8. CLIP-L and CLIP-G pass "
                "through unchanged because ComfyUI cannot read them in FP8. The report lists what was left unchanged, "
                "and why."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder to quantize, in 16 bits. It is not changed."),
                *rounding_inputs(),
                *layer_inputs(),
                nonfinite_input(),
                device_input(),
            ],
            outputs=[
                io.Clip.Output(id="CLIP", display_name="clip", tooltip="The quantized text encoder."),
                report_output(),
            ],
        )

    @classmethod
    def execute(cls, clip, device="auto", nonfinite="error", **choices):
        chosen = recipe(nonfinite=nonfinite, **choices)
        models.check_runs(chosen.format)
        states, reports = {}, []
        for network in models.text_networks(clip).values():
            where = compute_device(device, network.patcher.load_device)
            quantization, state = quantize_network(network, chosen, where)
            reports.append(quantization.report())
            if state.weights:
                states[network.prefix] = state
        report = join_reports(reports, type(clip.cond_stage_model).__name__.rstrip("_"))
        _log(report)
        if not report.layers:
            return io.NodeOutput(clip, report, ui=summary_output(report))
        quantized = models.load_quantized_clip(clip, states, recipe_entry(report))
        return io.NodeOutput(quantized, report, ui=summary_output(report))


def _log(report) -> None:
    before, after = report.bytes_before / 1e9, report.bytes_after / 1e9
    log.info(
        "%s: %d layers quantized to %s with %s rounding, %d tensors kept, %.3f GB -> %.3f GB",
        report.source,
        len(report.layers),
        report.recipe.format,
        report.recipe.rounding,
        len(report.kept),
        before,
        after,
    )
    for note in report.notes:
        log.info("%s", note)
