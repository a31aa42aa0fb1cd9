"""Error statistics against numpy in float64, and counting (lookup table) against measuring (arithmetic)."""

import math

import grids
import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels import FORMATS, ROUNDINGS, ErrorStatistics, dequantize_tensor, quantize_tensor
from stochastic_fp8_pack.kernels.numerics import quantized_tensor
from stochastic_fp8_pack.kernels.numerics.backends import BACKENDS, cpu
from stochastic_fp8_pack.kernels.numerics.error_statistics import (
    RELATIVE_BINS,
    STEP_BINS,
    merge,
    relative_bin_edges,
    step_bin_edges,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
COUNTS = ("count", "saturated", "flushed", "exact", "step_histogram", "relative_histogram", "max_error", "amax")
SUMS = ("sum_error", "sum_squared_error", "sum_squared")


def weights(n=200_000, dtype="float32"):
    rng = np.random.default_rng(n)
    values = rng.standard_normal(n) * np.exp(rng.standard_normal(n))
    values[:50] = 0
    return torch.from_numpy(values).to(DTYPES[dtype])


@pytest.mark.parametrize("scaling", ["absmax", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", FORMATS)
def test_statistics_against_numpy(format, rounding, dtype, scaling):
    x = weights(dtype=dtype) * (60 if scaling == "none" else 1)
    q = quantize_tensor(x, format=format, rounding=rounding, scaling=scaling, statistics=True, key="w")
    original, result = x.double().numpy(), dequantize_tensor(q.codes, q.scale).double().numpy()
    error = result - original
    assert q.error.count == len(original)
    assert q.error.bias == pytest.approx(error.mean(), abs=1e-6 * np.abs(error).mean())
    assert q.error.rmse == pytest.approx(math.sqrt((error**2).mean()), rel=1e-5)
    assert q.error.relative_rmse == pytest.approx(math.sqrt((error**2).sum() / (original**2).sum()), rel=1e-5)
    assert q.error.sqnr == pytest.approx(10 * np.log10((original**2).sum() / (error**2).sum()), abs=1e-4)
    assert q.error.max_error == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert q.error.amax == pytest.approx(np.abs(original).max(), rel=1e-7)
    assert q.error.saturated == ((x.float() / q.scale).abs() > grids.LARGEST[format]).sum()
    assert q.error.flushed == ((result == 0) & (original != 0)).sum()
    if dtype != "float64":
        assert q.error.exact == (error.astype(np.float32) == 0).sum()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", FORMATS)
def test_step_histogram_against_numpy(format, rounding):
    x = weights()
    q = quantize_tensor(x, format=format, rounding=rounding, statistics=True, key="w")
    errors = grids.steps((x / q.scale).numpy(), q.codes.view(torch.uint8).numpy(), format)
    assert q.error.step_histogram == grids.step_histogram(errors)
    assert sum(q.error.step_histogram) == len(x)


@pytest.mark.parametrize(("backend", "threshold"), [("reference", 0), ("cpu", 0), ("cpu", 1 << 40)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", FORMATS)
def test_errors_on_bin_edges(monkeypatch, format, rounding, dtype, backend, threshold):
    monkeypatch.setattr(quantized_tensor, "choose_backend", lambda device: BACKENDS[backend])
    monkeypatch.setattr(cpu, "LOOKUP_THRESHOLD", threshold)
    x = torch.from_numpy(grids.values_at_bin_edges(format)).to(DTYPES[dtype]).repeat(20)
    x = x[x.isfinite()]
    q = quantize_tensor(x, format=format, rounding=rounding, scaling="none", statistics=True, key="w")
    errors = grids.steps(x.float().numpy(), q.codes.view(torch.uint8).numpy(), format)
    edges = set(range(-16, 17)) if rounding == "nearest" else set(range(-31, 32))
    assert edges - {0} <= set(32 * errors), "errors on every edge"
    assert q.error.step_histogram == grids.step_histogram(errors)


def test_an_error_on_an_edge_is_counted_nearer_to_0():
    """In E4M3, 17 and 19 are half a step from 16 and 20; 480 saturates by one step, 488 and 2000 by more."""
    x = torch.tensor([17.0, -17.0, 19.0, -19.0, 16.0625, 480.0, -480.0, 488.0, 2000.0, 16.0, 0.0])
    q = quantize_tensor(x, rounding="nearest", scaling="none", statistics=True)
    counted = {i - 40: count for i, count in enumerate(q.error.step_histogram) if count}
    assert counted == {-16: 2, 16: 2, -1: 1, -32: 1, 32: 1, -40: 2, 0: 2}


def test_relative_histogram_against_numpy():
    x = weights()
    q = quantize_tensor(x, statistics=True, key="w")
    error = (dequantize_tensor(q.codes, q.scale) - x).double().abs().numpy() / q.amax
    expected, _ = np.histogram(error[error > 0], bins=relative_bin_edges())
    assert len(q.error.relative_histogram) == RELATIVE_BINS
    assert sum(q.error.relative_histogram) == (error > 0).sum()
    assert np.abs(np.array(q.error.relative_histogram) - expected).sum() <= 1e-4 * len(x)


def test_bin_edges():
    edges = step_bin_edges()
    assert (len(edges), edges[0], edges[-1]) == (STEP_BINS + 1, -1.25, 1.25)
    assert edges[40] == edges[41] == 0
    assert [edges.index(edge) for edge in (-1, -0.5, 1 / 32, 0.5, 1)] == [8, 24, 42, 57, 73]
    assert relative_bin_edges()[:3] == [2**-32, 1.5 * 2**-32, 2**-31]
    assert relative_bin_edges()[-1] == 1


def test_shapes_of_the_step_histograms():
    """Nearest is a box on [-1/2, 1/2]; stochastic a triangle on [-1, 1], with twice the squared error."""
    x = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, 1_000_000)).float()
    nearest, stochastic = (quantize_tensor(x, rounding=r, statistics=True).error for r in ("nearest", "stochastic"))
    box, triangle = (np.array(error.step_histogram) / 1e6 * 32 for error in (nearest, stochastic))
    edges = np.array(step_bin_edges())
    centres = (edges[1:] + edges[:-1]) / 2
    sides = centres != 0
    assert np.abs(box[sides & (np.abs(centres) < 0.5)] - 1).max() < 0.1
    assert box[np.abs(centres) > 0.5].sum() == 0
    assert np.abs(triangle - np.maximum(0, 1 - np.abs(centres)))[sides].max() < 0.1
    assert triangle[np.abs(centres) > 1].sum() == 0
    assert stochastic.sum_squared_error / nearest.sum_squared_error == pytest.approx(2, rel=0.02)
    assert abs(stochastic.bias) < 5 * stochastic.rmse / 1000


@pytest.mark.parametrize("scaling", ["absmax", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_counting_and_measuring_agree(monkeypatch, rounding, dtype, scaling):
    x = weights(700_000, dtype) * (100 if scaling == "none" else 1)
    options = {"rounding": rounding, "scaling": scaling, "statistics": True, "key": "w"}
    counted = quantize_tensor(x, **options).error
    monkeypatch.setattr(cpu, "LOOKUP_THRESHOLD", 1 << 40)
    measured = quantize_tensor(x, **options).error
    for name in ("count", "saturated", "flushed", "exact", "step_histogram", "samples"):
        assert getattr(counted, name) == getattr(measured, name), name
    for name in SUMS:
        magnitude = abs(measured.sum_squared_error * measured.count) ** 0.5 if name == "sum_error" else 0
        assert getattr(counted, name) == pytest.approx(getattr(measured, name), rel=1e-5, abs=1e-6 * magnitude)
    difference = np.abs(np.array(counted.relative_histogram) - np.array(measured.relative_histogram)).sum()
    assert difference <= 1e-4 * counted.count


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_statistics_of_huge_weights(dtype):
    """Their squares overflow fp32, which ends at 2^128."""
    x = weights(20_000, dtype)
    usual, extreme = (quantize_tensor(x * by, key="w", statistics=True).error for by in (1, 2.0**100))
    assert extreme.rmse == pytest.approx(2.0**100 * usual.rmse, rel=1e-5)
    assert extreme.sqnr == pytest.approx(usual.sqnr, abs=1e-4)
    assert extreme.relative_rmse == pytest.approx(usual.relative_rmse, rel=1e-5)
    assert extreme.step_histogram == usual.step_histogram


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_statistics_of_tiny_weights(dtype):
    """All are flushed to zero, because of the smallest scale. Their squares underflow fp32, which starts at 2^-149."""
    x = weights(20_000, dtype) * 2.0**-90
    error = quantize_tensor(x, key="w", statistics=True).error
    assert error.rmse == error.rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-5)
    assert error.sqnr == 0
    assert error.flushed == x.count_nonzero()


def test_merging_the_halves_gives_the_whole():
    x, half = weights(), 100_000
    q = quantize_tensor(x, statistics=True, rounding="nearest")
    parts = []
    for part in (x[:half], x[half:]):
        padded = torch.cat([part, x.abs().max()[None]])
        parts.append(quantize_tensor(padded, statistics=True, rounding="nearest").error)
    both = merge(parts)
    assert both.count == q.error.count + 2
    assert both.amax == q.error.amax
    assert sum(both.step_histogram) == both.count
    assert set(both.samples) & set(parts[0].samples)
    assert merge([parts[0], parts[1], q.error]).count == both.count + q.error.count
    assert both.sum_squared_error == pytest.approx(q.error.sum_squared_error, rel=1e-5)
    assert len(both.samples) == 128


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("rounding", [name for name, rounding in ROUNDINGS.items() if rounding.draw])
def test_gain_of_nearest_against_a_second_run(rounding, spread):
    """spread: the part of a step above FP8 values in which the originals lie."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(1 + (rng.integers(0, 8, 100_000) + spread * rng.random(100_000)) / 8)
    errors = [
        quantize_tensor(x, rounding=name, scaling="none", statistics=True, key="w").error
        for name in (rounding, "nearest")
    ]
    gain = errors[1].sqnr - errors[0].sqnr
    assert gain == pytest.approx(6.0 if spread < 1 else 3.0, abs=0.2)
    assert errors[0].nearest_gain == pytest.approx(gain, abs=0.1)


@pytest.mark.parametrize("value", [1.0, 1000.0])
def test_no_gain_of_nearest_without_errors_or_with_saturation(value):
    x = torch.tensor([value, 1.03])
    q = quantize_tensor(x[: 1 if value == 1 else 2], scaling="none", statistics=True, key="w")
    assert q.error.nearest_gain is None


def test_samples_are_pairs_of_original_and_dequantized():
    x = weights(10_000)
    q = quantize_tensor(x, statistics=True, key="w")
    dequantized = dequantize_tensor(q.codes, q.scale)
    assert len(q.error.samples) == 128
    pairs = set(zip(x.tolist(), dequantized.tolist(), strict=True))
    assert set(q.error.samples) <= pairs
    assert q.error.samples[0] == (x[0].item(), dequantized[0].item())


def test_without_statistics_there_is_no_error():
    assert quantize_tensor(torch.ones(3)).error is None


def test_statistics_of_nothing():
    empty = ErrorStatistics()
    assert (empty.bias, empty.rmse, empty.rms, empty.relative_rmse, empty.sqnr) == (0, 0, 0, 0, math.inf)
    assert merge([]) == empty
    assert quantize_tensor(torch.ones(0), statistics=True).error.count == 0


def test_sqnr_without_a_signal_is_minus_infinity():
    assert ErrorStatistics(count=1, sum_squared_error=1.0).sqnr == -math.inf
