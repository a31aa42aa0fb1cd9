"""Compare FP8 Roundings: the measurements, the advice drawn from them, and the table."""

import math
from dataclasses import replace

import pytest
import torch
from reports import heavy_tailed
from stochastic_fp8_pack.kernels import ErrorStatistics, dequantize_tensor, quantize_tensor
from stochastic_fp8_pack.kernels.calibration.calibrate_tensor import calibrate_tensor
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.studies import comparison as module
from stochastic_fp8_pack.kernels.studies.advice import (
    advise_for_outputs,
    advise_for_sums,
    advise_for_weights,
    describe_sample,
    describe_unseen,
)
from stochastic_fp8_pack.kernels.studies.comparison import compare_roundings, thin, thin_rows
from stochastic_fp8_pack.kernels.studies.table import to_markdown

STOCHASTIC = ("stochastic", "owlshift", "complex_neighbor", "shift_perturb")


@pytest.fixture(scope="module")
def gaussian():
    generator = torch.Generator().manual_seed(0)
    return compare_roundings([("a.weight", torch.randn(512, 512, generator=generator))], source="gaussian")


def trials(comparison):
    return {(trial.format, trial.rounding): trial for trial in comparison.trials}


def test_every_rounding_in_both_formats(gaussian):
    assert set(trials(gaussian)) == {
        (format, rounding) for format in ("float8_e4m3fn", "float8_e5m2") for rounding in (*STOCHASTIC, "nearest")
    }


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_stochastic_rounding_has_twice_the_squared_error_of_nearest(gaussian, format):
    nearest = trials(gaussian)[format, "nearest"].relative_rmse[0]
    for rounding in STOCHASTIC:
        ratio = trials(gaussian)[format, rounding].relative_rmse[0] / nearest
        assert ratio**2 == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_only_the_error_of_nearest_is_systematic(gaussian, format):
    nearest = trials(gaussian)[format, "nearest"]
    assert nearest.systematic == nearest.relative_rmse
    for rounding in STOCHASTIC:
        # the product of two independent errors has a mean of 0 and a spread of RMSE² / sqrt(n)
        trial = trials(gaussian)[format, rounding]
        assert trial.systematic[0] < trial.relative_rmse[0] * math.sqrt(4 / 512)


def test_saturation_is_systematic():
    weight = torch.cat((torch.linspace(1, 400, 1000), torch.full((24,), 4000.0)))
    comparison = compare_roundings([("a.weight", weight)], scaling="none")
    trial = trials(comparison)["float8_e4m3fn", "stochastic"]
    assert trial.systematic[0] == pytest.approx(trial.relative_rmse[0], rel=0.01)
    assert trial.errors[0].saturated == 24


def test_bias_in_standard_errors(gaussian):
    error = ErrorStatistics(count=10000, sum_error=50.0, sum_squared_error=100.0, sum_squared=1.0)
    trial = replace(gaussian.trials[0], errors=(error, ErrorStatistics(count=4)))
    assert trial.bias_in_standard_errors == pytest.approx((5.0, 0.0))


def test_thin_keeps_the_largest_value():
    x = torch.zeros(3 << 20)
    x[12345] = -7.0
    assert thin(x).numel() == (1 << 20) + 1
    assert thin(x).abs().max() == 7
    assert thin(x[:100].reshape(10, 10)).shape == (100,)


def test_recommendation_follows_the_numbers(gaussian):
    assert advise_for_weights(gaussian).startswith(
        "Choose nearest in float8_e4m3fn for weights closest to the original: "
    )
    assert advise_for_sums(gaussian).startswith("Choose a stochastic rounding for sums")
    wide = compare_roundings([("a.weight", torch.logspace(0, 4.7, 4096))], scaling="none")
    assert advise_for_weights(wide).startswith("Choose nearest in float8_e5m2 ")


def test_recommendation_quotes_the_medians(gaussian):
    def fixed(trial):
        share = {"nearest": 0.02}.get(trial.rounding, 0.03) * (2 if trial.format == "float8_e5m2" else 1)
        error = ErrorStatistics(count=100, sum_squared_error=share**2, sum_squared=1.0)
        return replace(trial, errors=(error,), systematic=(share if trial.rounding == "nearest" else 0.001,))

    comparison = replace(gaussian, trials=tuple(map(fixed, gaussian.trials)))
    assert advise_for_weights(comparison) == (
        "Choose nearest in float8_e4m3fn for weights closest to the original: its error is 2 % of a typical weight "
        "(stochastic rounding: 3 %, float8_e5m2: 4 %)."
    )
    assert advise_for_sums(comparison) == (
        "Choose a stochastic rounding for sums and repeated quantization: averaged over seeds, at most 0.1 % of "
        "error remains (nearest: 2 %)."
    )
    stubborn = replace(comparison, trials=tuple(replace(trial, systematic=(0.02,)) for trial in comparison.trials))
    assert advise_for_sums(stubborn) == (
        "Stochastic rounding does not help these layers: even averaged over many seeds, 2 % of error remains "
        "(nearest: 2 %)."
    )


def test_nothing_lost():
    comparison = compare_roundings([("a.weight", torch.zeros(4, 4))])
    assert advise_for_weights(comparison) == "Every rounding in both formats keeps these layers exactly."
    assert advise_for_sums(comparison) == "There is no error that averaging over many seeds could reduce."
    assert "| float8_e5m2 | nearest | 0 % | 0 | 0 % | ∞ dB |" in to_markdown(comparison)


def test_no_layers():
    with pytest.raises(ValueError, match="no layers to compare"):
        compare_roundings([])


def test_progress_and_sample():
    seen = []
    weights = [(f"{i}.weight", heavy_tailed(i, 16, 16)) for i in range(3)]
    comparison = compare_roundings(weights, total=30, progress=lambda done, key: seen.append((done, key)))
    assert seen == [(0, "0.weight"), (1, "1.weight"), (2, "2.weight")]
    assert describe_sample(comparison) == "3 of 30 layers, evenly spaced"


def test_largest_seed():
    compare_roundings([("a.weight", heavy_tailed(0, 8, 8))], seed=2**64 - 1)


# --- with a calibration

FORMATS = ("float8_e4m3fn", "float8_e5m2")
KEYS = ("a.weight", "b.weight", "c.weight")
WEIGHTS = {key: heavy_tailed(i, 96, 64) for i, key in enumerate(KEYS)}


def inputs(seed, width=64, rows=4000):
    """Inputs that share a few directions, like activations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 4, width, generator=generator)
    shared = torch.randn(rows, width // 4, generator=generator) @ mixing
    return shared + 0.5 * torch.randn(rows, width, generator=generator)


INPUTS = {key: inputs(seed) for seed, key in enumerate(KEYS)}


def calibration(**widths):
    """Layers a and b are recorded, c is not."""
    recorder = ActivationRecorder()
    for key in KEYS[:2]:
        recorder.observe(key, INPUTS[key][:, : widths.get(key[0], 64)])
    return recorder.result("prompts")


def compare(weights=WEIGHTS, known=None, **choices):
    return compare_roundings(weights.items(), calibration=known or calibration(), source="made_up", **choices)


@pytest.fixture(scope="module")
def calibrated():
    return compare()


def error_of_the_output(key, quantized):
    """Measured by running the layer on the recorded inputs."""
    weight, rounded = WEIGHTS[key].double(), dequantize_tensor(quantized.codes, quantized.scale).double()
    x = INPUTS[key].double()
    return float((x @ (rounded - weight).T).norm() / (x @ weight.T).norm())


def test_calibrated_is_one_of_the_roundings(calibrated):
    first, *others = STOCHASTIC
    assert calibrated.roundings == (first, "nearest", "calibrated", *others)
    assert len(calibrated.trials) == 12
    assert compare_roundings(WEIGHTS.items()).roundings == (first, "nearest", *others)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounding", [*STOCHASTIC, "nearest"])
def test_output_errors_match_the_layer_run_on_its_inputs(calibrated, format, rounding):
    choices = {"format": format, "rounding": rounding}
    expected = [error_of_the_output(key, quantize_tensor(WEIGHTS[key], key=key, **choices)) for key in KEYS[:2]]
    assert trials(calibrated)[format, rounding].output_errors == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_output_errors_of_calibrated_rounding_match_too(calibrated, format):
    layers = calibration().layers
    quantized = [calibrate_tensor(WEIGHTS[key], layers[key], format=format) for key in KEYS[:2]]
    expected = [error_of_the_output(key, each) for key, each in zip(KEYS, quantized, strict=False)]
    trial = trials(calibrated)[format, "calibrated"]
    assert trial.output_errors == pytest.approx(expected, rel=1e-3)
    for mine, nearest in zip(trial.output_errors, trials(calibrated)[format, "nearest"].output_errors, strict=True):
        assert mine < 0.6 * nearest


def test_unseen_layers_are_left_out_of_the_output_errors_and_counted(calibrated):
    assert calibrated.unseen == ("c.weight",)
    assert {len(trial.output_errors) for trial in calibrated.trials} == {2}
    assert describe_unseen(calibrated) == (
        "1 of these 3 layers is not in the calibration. Its output is left out, and calibrated rounds it to nearest."
    )
    nearest, mine = (trials(calibrated)["float8_e4m3fn", rounding] for rounding in ("nearest", "calibrated"))
    assert mine.errors[2] == nearest.errors[2]
    assert mine.errors[0] != nearest.errors[0]


def test_advice_for_outputs_ignores_unseen_layers():
    """Two of the three layers are not in the calibration. Their errors would decide the medians of the weights."""
    comparison = compare(known=calibration(b=32))
    assert comparison.unseen == ("b.weight", "c.weight")
    ruined = ErrorStatistics(count=1, sum_squared_error=1.0, sum_squared=1.0)
    worse = [replace(trial, errors=(trial.errors[0], ruined, ruined)) for trial in comparison.trials]
    assert advise_for_outputs(replace(comparison, trials=tuple(worse))) == advise_for_outputs(comparison)
    assert "Its weights are further from the original" in advise_for_outputs(comparison)


def test_layer_of_another_width_is_unseen():
    assert compare(known=calibration(a=32)).unseen == ("a.weight", "c.weight")


def test_calibration_does_not_change_the_other_roundings(calibrated):
    plain = trials(compare_roundings(WEIGHTS.items()))
    for choice, trial in plain.items():
        mine = trials(calibrated)[choice]
        assert (mine.errors, mine.systematic) == (trial.errors, trial.systematic)
        assert trial.output_errors == ()


def test_thin_rows_keeps_whole_rows_and_the_largest_value():
    weight = torch.arange(3000.0).reshape(3000, 1).expand(3000, 1024).clone()
    weight[1234, 5] = -1e5
    rows = thin_rows(weight)
    assert len(rows) == 1025
    assert rows.abs().max() == 1e5
    kept = rows[:, 0].tolist()
    assert kept == sorted(kept) and 1234 in kept
    steps = {after - before for before, after in zip(kept, kept[1:], strict=False)}
    assert max(steps) == 3, "evenly spaced"
    assert len(thin_rows(weight[:1024])) == 1024
    assert len(thin_rows(torch.ones(3, 1 << 21))) == 1


def test_large_layer_is_compared_by_some_of_its_outputs(calibrated, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_SAMPLE", 48 * 64)
    some = compare()
    assert trials(some)["float8_e4m3fn", "nearest"].errors[0].count in (48 * 64, 49 * 64)
    assert trials(some)["float8_e4m3fn", "nearest"].errors[2].count in (48 * 64, 48 * 64 + 1)
    for choice, trial in trials(some).items():
        assert trial.output_errors == pytest.approx(trials(calibrated)[choice].output_errors, rel=0.2)


def with_errors(comparison, outputs, weights):
    """The comparison with given errors by rounding, for one layer; twice as large for E5M2."""

    def fixed(trial):
        times = 2 if trial.format == "float8_e5m2" else 1
        share = times * weights.get(trial.rounding, 0.03)
        error = ErrorStatistics(count=100, sum_squared_error=share**2, sum_squared=1.0)
        output_errors = (times * outputs.get(trial.rounding, 0.02),)
        return replace(trial, errors=(error,), systematic=(0.01,), output_errors=output_errors)

    return replace(comparison, trials=tuple(map(fixed, comparison.trials)))


def test_advice_explains_weights_further_from_the_original(calibrated):
    made_up = with_errors(calibrated, {"nearest": 0.014, "calibrated": 0.004}, {"nearest": 0.02, "calibrated": 0.025})
    assert advise_for_outputs(made_up) == (
        "Choose calibrated in float8_e4m3fn for images closest to the original: the output error of a layer is 0.4 % "
        "(nearest: 1.4 %). Its weights are further from the original (2.5 %, nearest: 2 %), but their errors cancel "
        "out in the output."
    )
    assert advise_for_weights(made_up).startswith(
        "Without a calibration, choose nearest in float8_e4m3fn for weights closest"
    )
    assert advise_for_outputs(
        with_errors(calibrated, {"nearest": 0.014, "calibrated": 0.004}, {"nearest": 0.02, "calibrated": 0.02})
    ).endswith("0.4 % (nearest: 1.4 %).")


def test_advice_when_calibrated_rounding_does_not_help(calibrated):
    made_up = with_errors(calibrated, {"nearest": 0.014, "calibrated": 0.014}, {})
    assert advise_for_outputs(made_up) == (
        "Calibrated rounding does not help here: the output error of a layer is 1.4 % (nearest: 1.4 %)."
    )


def test_calibration_of_another_model(calibrated):
    other = compare({"z.weight": heavy_tailed(9, 96, 64)})
    assert other.unseen == ("z.weight",)
    assert advise_for_outputs(other).startswith("None of these layers is in the calibration.")
    assert describe_unseen(other) == ""
    assert "| float8_e4m3fn | calibrated | " in to_markdown(other)
    assert advise_for_outputs(compare_roundings(WEIGHTS.items())) == ""


def test_calibration_adds_a_column_to_the_table(calibrated):
    text = to_markdown(calibrated)
    assert "made_up: 3 layers, scaling absmax, calibration prompts; medians over layers" in text
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.endswith("| SQNR | output error |")
    assert {line.count("|") for line in (head, rule, *rows)} == {8}
    first, second = trials(calibrated)["float8_e5m2", "calibrated"].output_errors
    (row,) = (row for row in rows if row.startswith("| float8_e5m2 | calibrated |"))
    assert row.endswith(f"| {50 * (first + second):.3g} % |")
    assert "output error" not in to_markdown(compare_roundings(WEIGHTS.items()))
