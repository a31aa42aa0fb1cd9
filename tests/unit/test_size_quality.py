"""The study of sizes: its points beside real plans, its tables, its figure."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels import CalibrationError, plan_file
from stochastic_fp8_pack.kernels.calibration.moments import Calibration
from stochastic_fp8_pack.kernels.calibration.sensitivity import LayerEffect, RoundingErrors, Sensitivity
from stochastic_fp8_pack.kernels.engine.file_weights import FileWeights
from stochastic_fp8_pack.kernels.figures import size_quality_figure, to_image
from stochastic_fp8_pack.kernels.files.reader import open_source
from stochastic_fp8_pack.kernels.studies.size_quality import study_sizes, to_json, to_markdown
from tiny_models import LANDSCAPES

NEAREST, STOCHASTIC = {"float8_e4m3fn": 0.02, "float8_e5m2": 0.04}, {"float8_e4m3fn": 0.03, "float8_e5m2": 0.06}


def layers():
    return {key: w for key, w in load_file(LANDSCAPES).items() if w.ndim == 2 and key.endswith(".weight")}


def calibration(output=(0.03, 0.01), gain=2.0, without=(), calibrated_gain=None):
    """Effects that differ from layer to layer; attention has by far the largest."""
    errors = RoundingErrors(NEAREST, STOCHASTIC, output)
    effects = {
        key: LayerEffect((1e-3 if "attn" in key else 1e-5) * (1 + 5 * i % 7), errors)
        for i, key in enumerate(sorted(layers()))
        if key not in without
    }
    return Calibration({}, "made up", Sensitivity(effects, 1.0, 2, "2 seeds", gain, calibrated_gain))


def study(*arguments, **options):
    with open_source(LANDSCAPES) as source:
        return study_sizes(FileWeights(source), *arguments or [calibration()], **options)


@pytest.fixture(scope="module")
def measured():
    return study()


def note_of(report):
    return next(note for note in report.notes if "stay as they are" in note)


@pytest.mark.parametrize("index", [0, 5, 20, 33])
@pytest.mark.parametrize("rounding", ["nearest", "calibrated"])
def test_a_point_is_what_a_plan_says(measured, rounding, index):
    """With the size of a point as its limit, a plan chooses it: the same layers, size and quality."""
    curve = next(curve for curve in measured.curves if curve.rounding == rounding)
    point = curve.points[index]
    report = plan_file(
        LANDSCAPES,
        layers="measured",
        rounding="nearest" if rounding == "nearest" else "calibrated",
        size_limit=point.nbytes / 1e9,
        calibration=calibration(),
    )
    kept = {tensor.key for tensor in report.kept if tensor.reason.kind == "effect"}
    assert set(curve.order[: point.kept]) <= kept
    assert note_of(report).startswith(f"{len(kept)} of 34 layers stay as they are")
    if len(kept) == point.kept:
        assert f"quality {point.decibels:.1f} dB" in note_of(report)
    shares = sum(w.numel() for key, w in layers().items() if key in curve.order[: point.kept])
    assert point.share == pytest.approx(shares / sum(w.numel() for w in layers().values()))


def test_quality_grows_with_size_up_to_16_bits(measured):
    for curve in measured.curves:
        sizes, levels = [p.nbytes for p in curve.points], [p.decibels for p in curve.points]
        assert sizes == sorted(sizes) and levels == sorted(levels)
        assert (curve.points[0].kept, curve.points[-1].kept, levels[-1]) == (0, 34, math.inf)
        assert set(curve.points[-1].shares.values()) == {1.0}


def test_the_gain_lowers_the_quality(measured):
    plain = study(calibration(gain=1.0)).curves[0].points[0].decibels
    assert measured.curves[0].points[0].decibels == pytest.approx(plain - 10 * math.log10(2))


def test_each_rounding_has_its_gain(measured):
    levels = [[curve.points[0].decibels for curve in study(calibration(calibrated_gain=g)).curves] for g in (2.0, 20.0)]
    assert levels[0] == [curve.points[0].decibels for curve in measured.curves]
    assert levels[1] == pytest.approx([levels[0][0], levels[0][1] - 10])


def test_calibrated_is_left_out_without_recorded_inputs(measured):
    assert [curve.rounding for curve in measured.curves] == ["nearest", "calibrated"]
    assert [curve.rounding for curve in study(calibration(output=None)).curves] == ["nearest"]
    difference = measured.curves[1].points[0].decibels - measured.curves[0].points[0].decibels
    assert difference == pytest.approx(20 * math.log10(3))


def test_the_preset_is_the_file_of_auto(measured):
    kept = {t.key for t in plan_file(LANDSCAPES, layers="auto").kept} & layers().keys()
    assert measured.best.preset.kept == len(kept) == 13
    assert measured.best.preset.decibels < max(
        p.decibels for p in measured.best.points if p.nbytes <= measured.best.preset.nbytes
    )


def test_kinds_are_in_the_order_of_their_effect_per_parameter(measured):
    assert measured.kinds[0].name == "attention"
    assert sum(kind.layers for kind in measured.kinds) == 34
    assert sum(kind.parameters for kind in measured.kinds) == pytest.approx(1)
    assert sum(kind.effect for kind in measured.kinds) == pytest.approx(1)


def test_layers_without_a_known_effect_are_counted():
    assert study(calibration(without=["context_embedder.weight"])).unknown == 1


def test_tables(measured):
    text = to_markdown(measured)
    rows = [line for line in text.splitlines() if " MB | " in line]
    assert len(rows) == 12 and rows[0].count("|") == 6
    assert rows[-1].endswith("| 34 | 100 % | ∞ dB | ∞ dB |")
    assert f"Kept first (calibrated): {measured.best.order[0]}" in text
    data = json.loads(to_json(measured))
    assert data["curves"][0]["points"][-1]["decibels"] is None
    assert data["curves"][1]["order"] == list(measured.best.order)


def test_effects_are_needed():
    with pytest.raises(CalibrationError, match="measure them with Layer Sensitivity"):
        study(Calibration({}))
    with pytest.raises(CalibrationError, match="made with another model"):
        study(
            Calibration(
                {}, "", Sensitivity({"x.weight": calibration().sensitivity.layers["context_embedder.weight"]}, 1.0, 1)
            )
        )


@pytest.mark.parametrize("size", [(1024, 832), (256, 256), (4096, 4096)])
def test_the_figure_has_the_size_asked_for(measured, size):
    image = to_image(size_quality_figure(measured, width=size[0], height=size[1]))
    assert image.shape == (1, size[1], size[0], 3)
    assert len(np.unique(image.numpy())) > 20


def test_the_figure_marks_the_sizes_of_gpus(measured):
    """The same model, two thousand times as large."""

    def grown(point):
        return replace(point, nbytes=2000 * point.nbytes)

    curves = tuple(
        replace(curve, points=tuple(map(grown, curve.points)), preset=grown(curve.preset)) for curve in measured.curves
    )
    figure = size_quality_figure(replace(measured, curves=curves))
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert texts == {"12 GB file", "16 GB file"}
    assert figure.axes[1].get_xlabel() == "size of the file (GB)"


def test_the_figure_stands_equal_qualities(measured):
    """A model whose rounding changes nothing."""
    curves = tuple(
        replace(
            curve,
            points=tuple(replace(p, decibels=math.inf) for p in curve.points),
            preset=replace(curve.preset, decibels=math.inf),
        )
        for curve in measured.curves
    )
    assert to_image(size_quality_figure(replace(measured, curves=curves))).isfinite().all()
