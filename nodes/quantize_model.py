"""The nodes that quantize in the graph: MODEL -> MODEL and CLIP -> CLIP."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..kernels.numerics.rounding import METHODS
from . import in_graph, models
from .devices import compute_device
from .live import summary_output
from .options import (
    calibration_input,
    device_input,
    layer_inputs,
    matmul_input,
    nonfinite_input,
    recipe,
    rounding_inputs,
)
from .schema import CATEGORY, FP8Report, fit

log = logging.getLogger("stochastic_fp8")

_REPORT_TOOLTIP = "What was quantized and what it cost: connect it to FP8 Error Histogram or FP8 Layer Report."


class StochasticFP8Quantize(io.ComfyNode):
    """MODEL -> a new MODEL with scaled FP8 weights."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8Quantize",
            display_name="Stochastic FP8 Quantize",
            category=CATEGORY,
            search_aliases=["fp8", "quantize", "quantise", "float8"],
            description=(
                "Quantizes a model to scaled FP8: half the memory of a 16-bit model, almost the same image. LoRAs "
                "before this node are baked in at full precision. What you sample is exactly what Save Scaled FP8 "
                "Model writes. For the image closest to the original choose rounding calibrated, with a calibration, "
                "or else nearest; the stochastic methods have twice its squared error, but no bias."
            ),
            inputs=[
                fit(io.Model.Input, "model", tooltip="The model to quantize, in 16 bits. It stays as it is."),
                *rounding_inputs(METHODS),
                *layer_inputs(),
                matmul_input(),
                nonfinite_input(),
                device_input(),
                calibration_input(),
            ],
            outputs=[
                io.Model.Output(id="MODEL", display_name="model", tooltip="The quantized model."),
                FP8Report.Output(id="FP8_REPORT", display_name="report", tooltip=_REPORT_TOOLTIP),
            ],
        )

    @classmethod
    def execute(cls, model, device="auto", nonfinite="error", calibration=None, **choices):
        chosen = recipe(nonfinite=nonfinite, calibration=calibration, **choices)
        models.check_runs(chosen.format)
        network = models.diffusion_network(model)
        selection = in_graph.select(network, chosen)
        part, report = in_graph.quantize_network(
            network,
            selection,
            chosen,
            compute_device(device, network.patcher.load_device),
            type(model.model).__name__,
            calibration,
        )
        if not report.layers:
            raise in_graph.nothing_to_quantize(report)
        _log(report)
        quantized = models.load_quantized_model(model, part, in_graph.attachment(report))
        return io.NodeOutput(quantized, report, ui=summary_output(report))


class StochasticFP8QuantizeTextEncoder(io.ComfyNode):
    """CLIP -> a new CLIP whose large encoders are scaled FP8."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8QuantizeTextEncoder",
            display_name="Stochastic FP8 Quantize Text Encoder",
            category=CATEGORY,
            search_aliases=["fp8", "quantize clip", "t5", "float8"],
            description=(
                "Quantizes the large text encoders (T5-XXL, LLMs) to scaled FP8. CLIP-L and CLIP-G pass through as "
                "they are, since ComfyUI cannot read them in FP8; the report says so."
            ),
            inputs=[
                fit(io.Clip.Input, "clip", tooltip="The text encoder to quantize, in 16 bits. It stays as it is."),
                *rounding_inputs(),
                *layer_inputs(),
                nonfinite_input(),
                device_input(),
            ],
            outputs=[
                io.Clip.Output(id="CLIP", display_name="clip", tooltip="The quantized text encoder."),
                FP8Report.Output(id="FP8_REPORT", display_name="report", tooltip=_REPORT_TOOLTIP),
            ],
        )

    @classmethod
    def execute(cls, clip, device="auto", nonfinite="error", **choices):
        chosen = recipe(nonfinite=nonfinite, **choices)
        models.check_runs(chosen.format)
        parts, reports = {}, []
        for name, network in models.text_networks(clip).items():
            selection = in_graph.select(network, chosen)
            reason = in_graph.untouchable(selection)
            if reason:
                reports.append(in_graph.keep_network(network, chosen, reason, name))
                continue
            where = compute_device(device, network.patcher.load_device)
            parts[name], report = in_graph.quantize_network(network, selection, chosen, where, name)
            reports.append(report)
        report = in_graph.join_reports(reports, type(clip.cond_stage_model).__name__.rstrip("_"))
        _log(report)
        if not report.layers:
            return io.NodeOutput(clip, report, ui=summary_output(report))
        quantized = models.load_quantized_clip(clip, parts, in_graph.attachment(report))
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
