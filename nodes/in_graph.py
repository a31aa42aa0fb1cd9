"""Quantizes the networks of a MODEL or CLIP tensor by tensor, and reports what it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import torch

from ..kernels import KeptTensor, LayerReport, NonFiniteError, QuantizedTensor, Recipe, Report
from ..kernels.calibration.moments import Calibration
from ..kernels.engine.quantize_weight import calibration_notes, check_calibration, input_scale, quantize_weight
from ..kernels.numerics.rounding import CALIBRATED
from ..kernels.numerics.transfers import Ahead, Arrival, begin_transfer
from ..kernels.selection.presets import TEXT_ENCODER
from ..kernels.selection.reasons import NON_FINITE, NOT_LINEAR, UNTOUCHED_NETWORK, Reason
from ..kernels.selection.selection import Selection, select_layers
from ..kernels.version import VERSION
from .devices import make_room
from .models import Part
from .networks import ModelError, Network, ScaledWeight, narrow
from .progress import Progress


def select(network: Network, recipe: Recipe) -> Selection:
    return select_layers(
        {name: network.info(name) for name in network.names},
        layers=recipe.layers,
        keep=recipe.keep,
        only=recipe.only,
        suffixes=recipe.suffixes,
        linear_names=network.linear_names,
    )


def quantize_network(
    network: Network,
    selection: Selection,
    recipe: Recipe,
    device: torch.device,
    source: str,
    calibration: Calibration | None = None,
) -> tuple[Part, Report]:
    """Round each selected weight once, its patches included; what was scaled FP8 and is kept stays so.

    Raises ModelError naming every tensor with NaN or infinite values (unless nonfinite is "keep"), and for weights
    that are GGUF or unscaled FP8; CalibrationError where the recipe needs a calibration and there is none.
    """
    check_calibration(recipe, calibration)
    network.check_source()
    progress = Progress()
    weights = {name: scaled for name, scaled in network.scaled.items() if name not in selection.quantize}
    layers, nonfinite = [], []
    sizes = {name: network.info(name).nbytes for name in selection.quantize}
    done, total = 0, sum(sizes.values())
    has_room = make_room(device, sizes.values())
    home = network.patcher.offload_device
    coming: list[tuple[str, torch.Tensor, Arrival]] = []  # name, scale, codes: of one weight at most

    def bring_home() -> None:
        for name, scale, codes in coming:
            weights[name] = _scaled_weight(network, name, codes(), scale.to(home), recipe, calibration)
        coming.clear()

    with Ahead(device, has_room) as ahead:
        for i, name in enumerate(selection.quantize):
            progress(done, total, name)
            done += sizes[name]
            _send(ahead, network, selection.quantize[i : i + 2], recipe)
            bring_home()
            try:
                q = _quantize(network, name, recipe, device, calibration, ahead)
            except NonFiniteError as error:
                nonfinite.append(error.with_traceback(None))  # the traceback would keep the tensor
                continue
            layers.append(_layer_report(network, name, q))
            progress.observe(len(layers), len(selection.quantize), q.error)
            coming.append((name, q.scale, begin_transfer(q.codes, home)))
            del q  # and with it codes that leave the GPU
        bring_home()
    progress(total, total, "")
    if nonfinite and recipe.nonfinite == "error":
        raise ModelError(_nonfinite_text(nonfinite))
    kept = (
        *selection.kept,
        *(
            (error.key, Reason(NON_FINITE, detail=f"{error.nan} NaN and {error.inf} infinite values"))
            for error in nonfinite
        ),
    )
    report = Report(
        source,
        selection.family,
        recipe,
        tuple(layers),
        tuple(_kept(network, name, reason) for name, reason in kept),
        selection.pattern_hits,
        (*selection.notes, *_notes(network, selection), *_calibration_notes(recipe, layers)),
    )
    return Part(network, weights), report


def keep_network(network: Network, recipe: Recipe, reason: str, source: str) -> Report:
    """The report of a network that stays as it is."""
    kept = tuple(_kept(network, name, Reason(UNTOUCHED_NETWORK, detail=reason)) for name in network.names)
    return Report(source, "unknown", recipe, kept=kept, notes=(f"{source} stays as it is: {reason}",))


def untouchable(selection: Selection) -> str:
    """Why a text encoder must stay as it is; "" if it need not."""
    preset = selection.components.main.preset
    return "" if preset.kind == TEXT_ENCODER else preset.reason or "ComfyUI has no FP8 detection for this text encoder"


def join_reports(reports: Iterable[Report], source: str) -> Report:
    """One report of several networks; the family is that of the one that was quantized."""
    reports = sorted(reports, key=lambda report: not report.layers)
    return replace(
        reports[0],
        source=source,
        layers=sum((report.layers for report in reports), ()),
        kept=sum((report.kept for report in reports), ()),
        pattern_hits=sum((report.pattern_hits for report in reports), ()),
        notes=sum((report.notes for report in reports), ()),
    )


def attachment(report: Report) -> dict:
    """What a saved file says under `stochastic_fp8`, as quantize_file writes it."""
    return asdict(report.recipe) | {
        "version": VERSION,
        "source": report.source,
        "family": report.family,
        "quantized": [layer.key for layer in report.layers],
        "kept_layers": [tensor.key for tensor in report.kept if tensor.reason.kind != NOT_LINEAR],
    }


def nothing_to_quantize(report: Report) -> ModelError:
    reasons = dict.fromkeys(tensor.reason.text for tensor in report.kept if tensor.reason.kind != NOT_LINEAR)
    text = "; ".join(reasons) or "it has no Linear layers that ComfyUI could run in FP8"
    return ModelError(f"nothing to quantize in {report.source}: {text}")


def _send(ahead: Ahead, network: Network, names: Iterable[str], recipe: Recipe) -> None:
    """Send weights ahead, up to one that is not rounded as it is: patching or widening it needs the room."""
    for name in names:
        tensor = network.tensor(name)
        if recipe.rounding == CALIBRATED.name or not network.is_plain(name) or tensor.itemsize != 2:
            return
        ahead.begin(tensor)


def _quantize(
    network: Network, name: str, recipe: Recipe, device: torch.device, calibration: Calibration | None, ahead: Ahead
) -> QuantizedTensor:
    """The codes lie on the CUDA device that made them, if it had the memory for the whole weight."""
    start = network.tensor(name).device if network.is_plain(name) else device
    weight = narrow(network.value(name, start))
    return quantize_weight(weight, name, recipe, calibration, device=device, bring_back=False, send=ahead)


def _scaled_weight(
    network: Network,
    name: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    recipe: Recipe,
    calibration: Calibration | None,
) -> ScaledWeight:
    full_precision = recipe.matmul == "full" and not network.is_text_encoder
    known = network.scaled[name].input_scale if name in network.scaled else None
    measured = input_scale(calibration, name, recipe)
    return ScaledWeight(codes, scale, full_precision, known if measured is None else measured)


def _layer_report(network: Network, name: str, q: QuantizedTensor) -> LayerReport:
    info = network.info(name)
    return LayerReport(
        name, info.shape, info.dtype, info.nbytes, q.amax, q.scale.item(), q.error, output_error=q.output_error
    )


def _calibration_notes(recipe: Recipe, layers: Iterable[LayerReport]) -> Iterable[str]:
    if recipe.rounding == CALIBRATED.name:
        yield from calibration_notes({layer.key: layer.output_error for layer in layers})


def _kept(network: Network, name: str, reason: Reason) -> KeptTensor:
    info = network.info(name)
    return KeptTensor(name, info.shape, info.dtype, info.nbytes, reason)


def _notes(network: Network, selection: Selection) -> Iterable[str]:
    again = sum(name in network.scaled for name in selection.quantize)
    if again:
        yield f"{again} layers were already scaled FP8: dequantized first, so their first error stays"
    if len(network.scaled) > again:
        yield f"{len(network.scaled) - again} layers were already scaled FP8 and stay so, bit for bit"
    patched = len(network.patched_names)
    if patched:
        yield f"{patched} weights carry patches (LoRA): applied in full precision, then rounded once"


def _nonfinite_text(errors: list[NonFiniteError]) -> str:
    tensors = "; ".join(f"{error.key} ({error.nan} NaN, {error.inf} infinite)" for error in errors)
    return f"values that are not finite: {tensors}; nonfinite 'keep' leaves these tensors as they are"
