import math
from dataclasses import replace

import pytest
import torch
from reports import heavy_tailed
from stochastic_fp8_pack.kernels import ErrorStatistics
from stochastic_fp8_pack.kernels.reports.comparison import (
    compare_roundings,
    describe_sample,
    recommend,
    recommend_for_sums,
    thin,
    to_markdown,
)

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
def test_only_the_error_of_nearest_repeats(gaussian, format):
    nearest = trials(gaussian)[format, "nearest"]
    assert nearest.repeating == nearest.relative_rmse
    for rounding in STOCHASTIC:
        # the product of two independent errors has a mean of 0 and a spread of RMSE² / sqrt(n)
        trial = trials(gaussian)[format, rounding]
        assert trial.repeating[0] < trial.relative_rmse[0] * math.sqrt(4 / 512)


def test_saturation_repeats_in_every_draw():
    weight = torch.cat((torch.linspace(1, 400, 1000), torch.full((24,), 4000.0)))
    comparison = compare_roundings([("a.weight", weight)], scaling="none")
    trial = trials(comparison)["float8_e4m3fn", "stochastic"]
    assert trial.repeating[0] == pytest.approx(trial.relative_rmse[0], rel=0.01)
    assert trial.errors[0].saturated == 24


def test_bias_is_measured_against_chance(gaussian):
    error = ErrorStatistics(count=10000, sum_error=50.0, sum_squared_error=100.0, sum_squared=1.0)
    trial = replace(gaussian.trials[0], errors=(error, ErrorStatistics(count=4)))
    assert trial.bias_over_chance == pytest.approx((5.0, 0.0))


def test_thin_keeps_the_largest_value():
    x = torch.zeros(3 << 20)
    x[12345] = -7.0
    assert thin(x).numel() == (1 << 20) + 1
    assert thin(x).abs().max() == 7
    assert thin(x[:100].reshape(10, 10)).shape == (100,)


def test_recommendation_follows_the_numbers(gaussian):
    assert recommend(gaussian).startswith("Choose nearest in float8_e4m3fn for weights closest to the original: ")
    assert "choose a stochastic one for sums" in recommend_for_sums(gaussian)
    wide = compare_roundings([("a.weight", torch.logspace(0, 4.7, 4096))], scaling="none")
    assert recommend(wide).startswith("Choose nearest in float8_e5m2 ")


def test_recommendation_quotes_the_medians(gaussian):
    def fixed(trial):
        share = {"nearest": 0.02}.get(trial.rounding, 0.03) * (2 if trial.format == "float8_e5m2" else 1)
        error = ErrorStatistics(count=100, sum_squared_error=share**2, sum_squared=1.0)
        return replace(trial, errors=(error,), repeating=(share if trial.rounding == "nearest" else 0.001,))

    comparison = replace(gaussian, trials=tuple(map(fixed, gaussian.trials)))
    assert recommend(comparison) == (
        "Choose nearest in float8_e4m3fn for weights closest to the original: its error is 2 % of a typical weight, "
        "against 3 % with a stochastic rounding and 4 % in float8_e5m2."
    )
    assert recommend_for_sums(comparison) == (
        "Averaged over many draws, at most 0.1 % of error would remain with the stochastic roundings, and all 2 % with "
        "nearest: choose a stochastic one for sums and repeated quantization."
    )
    stubborn = replace(comparison, trials=tuple(replace(trial, repeating=(0.02,)) for trial in comparison.trials))
    assert "they do not help these layers" in recommend_for_sums(stubborn)


def test_nothing_lost():
    comparison = compare_roundings([("a.weight", torch.zeros(4, 4))])
    assert recommend(comparison) == "Every rounding in both formats keeps these layers exactly."
    assert recommend_for_sums(comparison) == "Nothing is lost that averaging could bring back."
    assert "| float8_e5m2 | nearest | 0 % | 0.00 | 0 % | lossless |" in to_markdown(comparison)


def test_no_layers():
    with pytest.raises(ValueError, match="no layers to compare"):
        compare_roundings([])


def test_progress_and_sample():
    seen = []
    weights = [(f"{i}.weight", heavy_tailed(i, 16, 16)) for i in range(3)]
    comparison = compare_roundings(weights, total=30, progress=lambda done, key: seen.append((done, key)))
    assert seen == [(0, "0.weight"), (1, "1.weight"), (2, "2.weight")]
    assert describe_sample(comparison) == "3 of 30 layers, evenly spaced"


def test_the_largest_seed_is_no_error():
    compare_roundings([("a.weight", heavy_tailed(0, 8, 8))], seed=2**64 - 1)
