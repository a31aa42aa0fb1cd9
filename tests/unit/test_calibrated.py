"""Weights by recipe: which layers are calibrated, what happens to the others, and the notes about them."""

from dataclasses import replace

import grids
import pytest
import torch
from stochastic_fp8_pack.kernels import LayerReport, Recipe, dequantize_tensor, quantize_tensor
from stochastic_fp8_pack.kernels.calibration.calibrate_tensor import calibrate_tensor
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.engine.notes import calibration_notes, matmul_notes
from stochastic_fp8_pack.kernels.engine.quantize_weight import input_scale, quantize_weight
from stochastic_fp8_pack.kernels.errors import CalibrationError, NonFiniteError
from stochastic_fp8_pack.kernels.numerics.output_error import CONTRADICTORY, WEIGHT_ERROR, OutputError

KEY = "blocks.0.attn.qkv.weight"
RECIPE = Recipe(rounding="calibrated", calibration="prompts")


def correlated(rows, width):
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn(rows, width // 4, generator=generator)
    mixing = torch.randn(width // 4, width, generator=generator)
    return shared @ mixing + 0.5 * torch.randn(rows, width, generator=generator)


X = correlated(4000, 64)
WEIGHT = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)).bfloat16()


def calibration(key=KEY, x=X):
    recorder = ActivationRecorder()
    recorder.observe(key, x)
    return recorder.result("prompts")


def same_bytes(first, second):
    return torch.equal(first.codes.view(torch.uint8), second.codes.view(torch.uint8)) and first.scale == second.scale


def test_a_recorded_layer_is_calibrated():
    q = quantize_weight(WEIGHT, KEY, RECIPE, calibration())
    assert same_bytes(q, calibrate_tensor(WEIGHT, calibration().layers[KEY]))
    assert q.output_error.rows == 4000
    assert q.output_error.chosen < 0.5 * q.output_error.nearest
    assert (q.codes.shape, q.codes.dtype, q.scale.dtype) == (WEIGHT.shape, torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize(("key", "x"), [("another.weight", X), (KEY, X[:, :32])], ids=["not recorded", "another width"])
def test_other_layers_are_rounded_to_nearest(key, x):
    q = quantize_weight(WEIGHT, KEY, RECIPE, calibration(key, x))
    assert same_bytes(q, quantize_tensor(WEIGHT, rounding="nearest"))
    assert q.output_error is None


def test_a_calibration_changes_no_other_rounding():
    recipe = replace(RECIPE, rounding="stochastic", seed=5)
    q = quantize_weight(WEIGHT, KEY, recipe, calibration())
    assert same_bytes(q, quantize_tensor(WEIGHT, rounding="stochastic", seed=5, key=KEY))


def test_without_a_calibration_the_error_names_the_nodes():
    with pytest.raises(CalibrationError, match="connect FP8 Calibration or Load Calibration .* --calibration FILE"):
        quantize_weight(WEIGHT, KEY, RECIPE, None)


def test_the_statistics_describe_the_codes():
    q = calibrate_tensor(WEIGHT, calibration().layers[KEY], statistics=True)
    error = (dequantize_tensor(q.codes, q.scale) - WEIGHT.float()).double()
    assert q.error.count == 48 * 64
    assert q.error.rmse == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)
    assert q.error.bias == pytest.approx(error.mean().item(), abs=1e-8)
    codes = q.codes.view(torch.uint8).reshape(-1).numpy()
    errors = grids.steps((WEIGHT.float() / q.scale).reshape(-1).numpy(), codes, "float8_e4m3fn")
    assert q.error.step_histogram == grids.step_histogram(errors)
    assert q.error.samples[0][0] == WEIGHT[0, 0]


def test_without_scaling_the_scale_stays_one():
    q = calibrate_tensor(WEIGHT, calibration().layers[KEY], scaling="none")
    assert float(q.scale) == 1.0
    assert q.output_error.chosen < q.output_error.nearest


def test_the_error_names_a_non_finite_weight():
    broken = WEIGHT.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="tensor 'blocks.0.attn.qkv.weight' holds 1 NaN and 0 infinite values"):
        quantize_weight(broken, KEY, RECIPE, calibration())


def test_input_scales_have_a_margin():
    recorded = calibration(x=torch.tensor([[-358.4, 2.0] * 8]))
    fp8 = replace(RECIPE, matmul="fp8")
    scale = input_scale(recorded, KEY, fp8)
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert float(scale) == pytest.approx(1.0)
    assert input_scale(recorded, KEY, RECIPE) is None
    assert input_scale(recorded, "another.weight", fp8) is None
    assert input_scale(None, KEY, fp8) is None
    assert float(input_scale(calibration(x=torch.zeros(1, 16)), KEY, fp8)) == 2**-14


def calibrated_layers(errors):
    return [LayerReport(key, (48, 64), "bfloat16", 6144, 1.0, 0.5, output_error=error) for key, error in errors.items()]


def test_notes_list_what_a_user_should_know():
    errors = {
        "a": OutputError(5000, 0.02, 0.01),
        "b": OutputError(200, 0.02, 0.01),
        "c": OutputError(9000, 0.02, 0.02),
        "d": None,
        "e": None,
        "f": OutputError(9000, 0.02, 0.02, WEIGHT_ERROR),
        "g": OutputError(9000, 0.02, 0.02, CONTRADICTORY),
    }
    unknown, no_better, too_far, impossible, few = calibration_notes(RECIPE, calibrated_layers(errors))
    assert unknown.startswith("2 of 7 layers were rounded to nearest, because the calibration has no inputs")
    assert unknown.endswith(": d, e")
    assert no_better.startswith("1 of 7 layers were rounded to nearest, because calibrated rounding would not")
    assert no_better.endswith(": c")
    assert too_far.startswith("1 of 7 layers were rounded to nearest, because calibrated rounding would lower the SQNR")
    assert too_far.endswith(" by more than 10 dB: f")
    assert impossible.startswith("1 of 7 layers were rounded to nearest, because their recorded inputs contradict each")
    assert impossible.endswith(": calibrate again: g")
    assert few.startswith("1 of 7 layers were calibrated with more damping, on fewer than 3,000 rows")
    assert few.endswith(": b")
    assert list(calibration_notes(RECIPE, calibrated_layers({"a": errors["a"]}))) == []
    assert list(calibration_notes(Recipe(), calibrated_layers(errors))) == []


def test_layers_that_see_one_row_per_step_are_not_told_to_run_more():
    """Modulation layers: 80 rows where the others have 80 × 4,096."""
    rows = {"image": 327_680, "modulation": 80, "text": 2_900}
    errors = {key: OutputError(count, 0.02, 0.01) for key, count in rows.items()}
    both = {key: errors[key] for key in ("image", "modulation")}
    assert list(calibration_notes(RECIPE, calibrated_layers(both))) == []
    (note,) = calibration_notes(RECIPE, calibrated_layers({"text": errors["text"], "modulation": errors["modulation"]}))
    assert note.startswith("2 of 2 layers were calibrated with more damping")


def test_calibrated_rounding_with_fp8_matmul_is_noted():
    both = replace(RECIPE, matmul="fp8")
    (note,) = list(matmul_notes(both, [ScaledWeightWithScale]))
    assert note.startswith("matmul fp8 loses what calibrated rounding gains")
    assert list(matmul_notes(RECIPE, [])) == []
    assert len(list(matmul_notes(replace(both, rounding="nearest"), []))) == 1


class ScaledWeightWithScale:
    input_scale = torch.tensor(1.0)


def test_a_note_names_twenty_layers_and_counts_the_rest():
    (note,) = calibration_notes(RECIPE, calibrated_layers({f"layer{i}": None for i in range(25)}))
    assert note.startswith("25 of 25 layers")
    assert note.endswith(": " + ", ".join(f"layer{i}" for i in range(20)) + " and 5 more")
