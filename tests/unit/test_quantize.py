"""quantize_tensor and dequantize_tensor: backend, strides, chunk size and thread count do not change the result."""

import hashlib

import grids
import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels import (
    FORMATS,
    ROUNDINGS,
    SCALINGS,
    NonFiniteError,
    dequantize_tensor,
    quantize_tensor,
)
from stochastic_fp8_pack.kernels.numerics.backends import Task, cpu, reference
from stochastic_fp8_pack.kernels.numerics.random_bits import stream_key
from stochastic_fp8_pack.kernels.numerics.scaling import amax_to_scale, tensor_to_amax

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
SIZES = [0, 1, 2, 3, 1000, 65535, 65536, 65537, 131072, 200001, 4 * 131072 + 77]

formats = pytest.mark.parametrize("format", FORMATS)
roundings = pytest.mark.parametrize("rounding", ROUNDINGS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def heavy_tailed(n, dtype="float32", seed=0):
    """Weights with outliers, tiny values and zeros."""
    rng = np.random.default_rng([seed, n])
    values = rng.standard_normal(n) * np.exp(2 * rng.standard_normal(n))
    values[rng.random(n) < 0.02] = 0
    return torch.from_numpy(np.clip(values, -6e4, 6e4)).to(DTYPES[dtype])


def codes_of(x, **options):
    return quantize_tensor(x, key="layer.weight", **options).codes.view(torch.uint8)


@pytest.mark.parametrize("scaling", SCALINGS)
@roundings
@formats
@dtypes
def test_the_cpu_backend_gives_the_bytes_of_the_reference(dtype, format, rounding, scaling):
    stream = stream_key(5, rounding, "k")
    for n in SIZES:
        x = heavy_tailed(n, dtype)
        amax = tensor_to_amax(x).item()
        scale = amax_to_scale(amax, FORMATS[format], SCALINGS[scaling])
        task = Task(scale, amax, FORMATS[format], ROUNDINGS[rounding], stream)
        fast, slow = torch.full((2, n), 0xFF, dtype=torch.uint8)
        cpu.quantize_slice(x, fast, task, False)
        reference.quantize_slice(x, slow, task, False)
        assert torch.equal(fast, slow), n


@dtypes
@formats
def test_nearest_equals_ml_dtypes(format, dtype):
    x = heavy_tailed(100_000, dtype)
    q = quantize_tensor(x, format=format, rounding="nearest")
    scaled = x.float().numpy() / q.scale.numpy()
    np.testing.assert_array_equal(q.codes.view(torch.uint8).numpy(), grids.nearest_codes(scaled, format))


GOLDEN = {
    ("float8_e4m3fn", "stochastic"): "8f3ad06a06d865d4",
    ("float8_e4m3fn", "owlshift"): "f48ce4bd75674606",
    ("float8_e4m3fn", "complex_neighbor"): "23f92a1e4b7cc357",
    ("float8_e4m3fn", "shift_perturb"): "ce30ff3cc779a98b",
    ("float8_e4m3fn", "nearest"): "bd498387d2e5d12a",
    ("float8_e5m2", "stochastic"): "6c334f03c3db6c94",
    ("float8_e5m2", "owlshift"): "edbddb49a9b2d02d",
    ("float8_e5m2", "complex_neighbor"): "5af60554063fa881",
    ("float8_e5m2", "shift_perturb"): "ad6094154e412874",
    ("float8_e5m2", "nearest"): "6877ebf4787eb23d",
}


@roundings
@formats
def test_golden_bytes(format, rounding):
    """Changing these breaks the promise that a recipe always gives the same file."""
    x = torch.arange(-70_000, 70_000, dtype=torch.float32) / 7_000
    digest = hashlib.sha256(codes_of(x, format=format, rounding=rounding, seed=42).numpy().tobytes()).hexdigest()
    assert digest[:16] == GOLDEN[format, rounding]


@roundings
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunk_size_does_not_change_the_bytes(monkeypatch, dtype, rounding):
    x = heavy_tailed(9 * 131072 + 5, dtype)
    expected = codes_of(x, rounding=rounding)
    for blocks in (1, 3, 16):
        monkeypatch.setattr(cpu, "CHUNK_BLOCKS", blocks)
        assert torch.equal(codes_of(x, rounding=rounding), expected)


@roundings
def test_thread_count_does_not_change_the_bytes(rounding):
    x = heavy_tailed(1_700_000, "bfloat16")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            q = quantize_tensor(x, rounding=rounding, statistics=True)
            results.append((q.codes.view(torch.uint8), q.error.step_histogram, q.error.flushed))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for codes, *counts in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert counts == list(results[0][1:])


@roundings
@dtypes
def test_strides_do_not_change_the_bytes(dtype, rounding):
    x = heavy_tailed(120 * 90, dtype).reshape(120, 90)
    expected = codes_of(x, rounding=rounding)
    wide = torch.zeros((120, 180), dtype=x.dtype)
    wide[:, ::2] = x
    assert torch.equal(codes_of(wide[:, ::2], rounding=rounding), expected)
    assert torch.equal(codes_of(x.t().contiguous().t(), rounding=rounding), expected)
    assert torch.equal(
        codes_of(torch.cat([x.new_zeros(7), x.reshape(-1)])[7:].reshape(120, 90), rounding=rounding), expected
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4, 5, 6)])
@roundings
def test_shapes(shape, rounding):
    q = quantize_tensor(torch.ones(shape), rounding=rounding, statistics=True)
    assert q.codes.shape == shape
    assert q.codes.dtype == torch.float8_e4m3fn
    assert q.codes.is_contiguous()
    assert (q.scale.dtype, q.scale.shape) == (torch.float32, ())
    assert torch.equal(dequantize_tensor(q.codes, q.scale), torch.ones(shape))
    assert q.error.count == q.codes.numel()


@roundings
@formats
def test_all_zero_gives_zeros_and_scale_1(format, rounding):
    q = quantize_tensor(torch.tensor([0.0, -0.0, 0.0]), format=format, rounding=rounding, statistics=True)
    assert q.codes.view(torch.uint8).tolist() == [0, 0x80, 0]
    assert q.scale.item() == 1
    assert (q.error.sqnr, q.error.exact, q.error.flushed) == (float("inf"), 3, 0)


def test_the_source_dtype_does_not_change_the_bytes():
    x = heavy_tailed(300_000, "bfloat16")
    assert torch.equal(codes_of(x), codes_of(x.float()))
    assert torch.equal(codes_of(x), codes_of(x.double()))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1_000, 600_000])
def test_torchs_default_dtype_does_not_change_the_result(default, n):
    x = heavy_tailed(n, "bfloat16")
    expected = quantize_tensor(x, statistics=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        q = quantize_tensor(x, statistics=True)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(q.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert (q.scale.dtype, q.error) == (torch.float32, expected.error)


def test_seed_key_and_method_change_the_sample():
    x = heavy_tailed(100_000)
    results = [
        quantize_tensor(x, seed=seed, key=key, rounding=rounding).codes.view(torch.uint8)
        for seed, key, rounding in [
            (0, "a", "stochastic"), (1, "a", "stochastic"), (0, "b", "stochastic"), (0, "a", "owlshift"),
            (0, "a", "complex_neighbor"), (0, "a", "shift_perturb"),
        ]
    ]  # fmt: skip
    shares = [(a != b).float().mean().item() for i, a in enumerate(results) for b in results[:i]]
    assert all(0.2 < share < 0.5 for share in shares)
    assert torch.equal(results[0], quantize_tensor(x, seed=0, key="a").codes.view(torch.uint8))


def test_the_sample_mean_of_many_seeds_approaches_the_value():
    """1,000 seeds for 2,000 values. z is the mean error over its standard deviation: mean 0 and variance 1."""
    x = heavy_tailed(2_000)
    draws = [quantize_tensor(x, seed=seed, key="k") for seed in range(1_000)]
    total = sum(dequantize_tensor(q.codes, q.scale).double() for q in draws)
    scaled = (x / draws[0].scale).double().numpy()
    _, low, high = grids.bracket(scaled, "float8_e4m3fn")
    spread = np.sqrt((high - np.abs(scaled)) * (np.abs(scaled) - low)) * draws[0].scale.item()
    random = spread > 1e-6 * np.abs(x.numpy())
    z = ((total / 1_000 - x.double()).numpy()[random]) / (spread[random] / np.sqrt(1_000))
    assert abs(z.mean()) < 5 / np.sqrt(len(z))
    assert 0.85 < (z**2).mean() < 1.15


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@dtypes
def test_non_finite_values_are_an_error_that_counts_them(dtype, bad):
    x = heavy_tailed(1_000, dtype)
    x[[3, 500]] = bad
    with pytest.raises(NonFiniteError, match="'layer.weight' holds") as error:
        codes_of(x)
    assert (error.value.nan, error.value.inf) == ((2, 0) if np.isnan(bad) else (0, 2))
    assert error.value.key == "layer.weight"


def test_fp64_beyond_fp32_counts_as_non_finite():
    with pytest.raises(NonFiniteError, match="0 NaN and 1 infinite"):
        quantize_tensor(torch.tensor([1.0, 1e200], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_a_type_error_that_names_the_tensor(dtype):
    with pytest.raises(TypeError, match="tensor 'layer.weight' is"):
        codes_of(torch.ones(4).to(dtype))


def test_fp8_input_is_an_error_that_says_to_dequantize_first():
    with pytest.raises(TypeError, match="dequantize it first"):
        codes_of(torch.ones(4).to(torch.float8_e5m2))


@pytest.mark.parametrize("option", ["format", "rounding", "scaling"])
def test_an_unknown_choice_is_an_error_that_lists_the_valid_ones(option):
    with pytest.raises(ValueError, match=f"unknown {option} 'best': choose one of .*(absmax|nearest|float8_e5m2)"):
        quantize_tensor(torch.ones(2), **{option: "best"})


def test_scaling_none_saturates_and_counts_the_saturated():
    q = quantize_tensor(torch.tensor([1.0, 449.0, -1e6]), scaling="none", rounding="nearest", statistics=True)
    assert dequantize_tensor(q.codes, q.scale).tolist() == [1, 448, -448]
    assert q.error.saturated == 2


@formats
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_error_bounds_relative_to_a_normal_value(format, rounding):
    mantissa_bits = {"float8_e4m3fn": 3, "float8_e5m2": 2}[format]
    x = torch.from_numpy(np.random.default_rng(1).uniform(0.5, 1.5, 100_000)).float()
    q = quantize_tensor(x, format=format, rounding=rounding)
    relative = ((dequantize_tensor(q.codes, q.scale) - x) / x).abs().max().item()
    bound = 2.0 ** -(mantissa_bits + (rounding == "nearest"))
    assert 0.85 * bound < relative < bound * (1 + 1e-6)


def test_tiny_tensors_have_a_scale_that_fp16_can_represent():
    q = quantize_tensor(torch.tensor([1e-6, -2e-6]), format="float8_e5m2", rounding="nearest")
    assert q.scale.item() == 2**-14
    assert dequantize_tensor(q.codes, q.scale).tolist() == pytest.approx([1e-6, -2e-6], rel=0.13)


def test_dequantizing_returns_the_requested_dtype():
    q = quantize_tensor(torch.ones(3))
    assert dequantize_tensor(q.codes, q.scale, torch.bfloat16).dtype == torch.bfloat16


def test_the_result_needs_no_gradient():
    assert not quantize_tensor(torch.nn.Parameter(torch.ones(3))).codes.requires_grad
