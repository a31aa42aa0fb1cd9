"""The Triton kernels in Triton's interpreter, on the CPU: bytes and statistics of the reference, IEEE divisions.

Triton reads TRITON_INTERPRET when it is first imported and again at each launch.
"""

import dataclasses
import math

import grids
import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels import FORMATS, ROUNDINGS, SCALINGS
from stochastic_fp8_pack.kernels.calibration import gptq, moments
from stochastic_fp8_pack.kernels.calibration.calibrate_tensor import calibrate_tensor
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.numerics.backends import BACKENDS, Task, nvidia, nvidia_panels, panels, reference
from stochastic_fp8_pack.kernels.numerics.random_bits import stream_key
from stochastic_fp8_pack.kernels.numerics.scaling import amax_to_scale

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    import triton
    import triton.language as tl
    from stochastic_fp8_pack.kernels.numerics.backends import triton_kernels, triton_panels  # noqa: F401

    @triton.jit
    def divide(x, divisor, quotient, WIDE: tl.constexpr, TILE: tl.constexpr):
        index = tl.program_id(0) * TILE + tl.arange(0, TILE)
        by = tl.load(divisor + index)
        result = triton_kernels._divide(tl.load(x + index), by, tl.div_rn(1.0, by), WIDE)
        tl.store(quotient + index, result)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

formats = pytest.mark.parametrize("format", FORMATS)
roundings = pytest.mark.parametrize("rounding", ROUNDINGS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def weights(n, dtype="bfloat16", seed=0):
    """Weights with outliers, tiny values, powers of two, ties and both zeros."""
    rng = np.random.default_rng([seed, n])
    values = rng.standard_normal(n) * np.exp(2 * rng.standard_normal(n))
    special = [0.0, -0.0, 448.0, -448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 17.0, 18.0, -19.0, 1.0625, 2.0**-30]
    values[: len(special)] = special[:n]
    return torch.from_numpy(values).clamp(-6e4, 6e4).to(DTYPES[dtype])


def both(x, format, rounding, scaling="absmax", statistics=False, seed=1):
    """(codes, statistics) of the Triton kernels, then of the reference."""
    amax = reference.tensor_to_amax(x)
    scale = amax_to_scale(amax, FORMATS[format], SCALINGS[scaling])
    stream = stream_key(seed, rounding, "layer.weight")
    task = Task(scale, amax, FORMATS[format], ROUNDINGS[rounding], stream)
    results = []
    for backend in (nvidia, reference):
        codes = torch.full((x.numel(),), 0xFF, dtype=torch.uint8)
        results.append((codes, backend.quantize_slice(x, codes, task, statistics)))
    return results


@roundings
@formats
@dtypes
def test_bytes_equal_the_reference(dtype, format, rounding):
    for scaling in SCALINGS:
        (codes, _), (expected, _) = both(weights(1500, dtype), format, rounding, scaling)
        assert torch.equal(codes, expected), scaling


@pytest.mark.parametrize("factor", [2.0**90, 2.0**-90])
def test_statistics_of_weights_whose_squares_exceed_fp32(factor):
    x = weights(3000, "float32") * factor
    (codes, error), (expected, _) = both(x, "float8_e4m3fn", "stochastic", statistics=True)
    assert torch.equal(codes, expected)
    assert error.sum_squared == pytest.approx(float((x.double() ** 2).sum()), rel=1e-6)
    assert error.sum_squared_error > 0


@pytest.mark.parametrize("n", [0, 1, 2, 1023, 65537, 131072 + 3])
def test_bytes_equal_the_reference_at_any_size(n):
    (codes, _), (expected, _) = both(weights(n), "float8_e4m3fn", "stochastic", seed=2**64 - 1)
    assert torch.equal(codes, expected)


def test_words_of_an_offset_view_start_at_its_first_element():
    x = weights(3000)
    (codes, _), (expected, _) = both(x[1:], "float8_e4m3fn", "owlshift")
    assert torch.equal(codes, expected)


@roundings
@formats
@pytest.mark.parametrize("scaling", ["absmax", "none"])
def test_statistics_equal_the_reference(scaling, format, rounding):
    x = weights(1500, seed=3) * 10
    (codes, ours), (expected, theirs) = both(x, format, rounding, scaling, statistics=True)
    assert torch.equal(codes, expected)
    compare(ours, theirs)
    assert (ours.saturated > 0) == (scaling == "none" and format == "float8_e4m3fn")


@pytest.mark.parametrize("n", [0, 1, 131072 + 9])
def test_statistics_equal_the_reference_at_any_size(n):
    (codes, ours), (expected, theirs) = both(weights(n, "float32"), "float8_e5m2", "shift_perturb", statistics=True)
    assert torch.equal(codes, expected)
    compare(ours, theirs)


def compare(ours, theirs):
    for name in ("count", "saturated", "flushed", "exact", "amax", "step_histogram", "relative_histogram"):
        assert getattr(ours, name) == getattr(theirs, name), name
    magnitude = math.sqrt(theirs.count * theirs.sum_squared_error)
    assert ours.sum_error == pytest.approx(theirs.sum_error, abs=1e-6 * magnitude)
    for name in ("sum_squared_error", "sum_squared", "max_error"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6)


def test_statistics_of_a_known_tensor():
    """16.5 lies a quarter of a step above 16 and 2^-11 a quarter above 0."""
    x = torch.tensor([448.0, -448.0, 16.5, -(2.0**-11), 0.0, -0.0])
    (codes, error), _ = both(x, "float8_e4m3fn", "nearest", statistics=True)
    assert codes.tolist() == [0x7E, 0xFE, 0x58, 0x80, 0x00, 0x80]
    assert (error.count, error.exact, error.flushed, error.saturated) == (6, 4, 1, 0)
    assert error.sum_error == -0.5 + 2.0**-11
    assert error.max_error == 0.5
    assert error.sum_squared == 2 * 448.0**2 + 16.5**2
    # Bins of 1/32 step: -1/4 for 16.5 and +1/4 for the negative one, on edges, which belong to the bin nearer to 0.
    assert {i: count for i, count in enumerate(error.step_histogram) if count} == {32: 1, 40: 4, 48: 1}
    # Two bins per octave from 2^-32: 0.5/448 = 1.14 * 2^-10, and 2^-11/448 = 1.14 * 2^-20.
    assert {i: count for i, count in enumerate(error.relative_histogram) if count} == {24: 1, 44: 1}


@roundings
@formats
def test_errors_on_bin_edges(format, rounding):
    x = torch.from_numpy(grids.values_at_bin_edges(format)).repeat(20)
    (codes, error), _ = both(x, format, rounding, "none", statistics=True)
    errors = grids.steps(x.numpy(), codes.numpy(), format)
    assert len(set(32 * errors) & set(range(-16, 17))) == 33, "errors on all edges up to half a step"
    assert error.step_histogram == grids.step_histogram(errors)


@dtypes
def test_amax(dtype):
    for n in (0, 1, 7, 20_000):
        x = weights(n, dtype, seed=4)
        assert nvidia.tensor_to_amax(x) == (x.abs().max().float().item() if n else 0)


@pytest.mark.parametrize("where", [0, 16_383, 16_384, 19_999])
@dtypes
def test_amax_is_nan_or_infinite_if_any_value_is(dtype, where):
    x = weights(20_000, dtype)
    x[where] = -math.inf
    assert nvidia.tensor_to_amax(x) == math.inf
    x[10], x[where] = math.inf, math.nan
    assert math.isnan(nvidia.tensor_to_amax(x))


def test_amax_of_fp64_beyond_fp32_is_infinite():
    assert nvidia.tensor_to_amax(torch.tensor([-1e300, 1.0], dtype=torch.float64)) == math.inf


def test_divisions_are_correctly_rounded():
    rng = np.random.default_rng(5)
    hard = [0xFFFFFF, 0x800001, 0x800000, 0xFFFFFE, *rng.integers(1 << 23, 1 << 24, 60)]
    few_bits = np.repeat(np.arange(1024, 2048), len(hard)).astype(np.float32)
    many_bits = rng.integers(1 << 23, 1 << 24, len(few_bits)).astype(np.float32)
    divisors = np.tile(np.array(hard, np.float32) * np.float32(2.0**-30), 1024)
    for x, wide in ((few_bits, False), (many_bits, True), (many_bits * np.float32(1e-20), True)):
        quotients = torch.empty(len(x))
        divide[(len(x) // 8192,)](torch.from_numpy(x), torch.from_numpy(divisors), quotients, WIDE=wide, TILE=8192)
        np.testing.assert_array_equal(quotients.numpy(), x / divisors)


def panel_inputs(blocks, rows, outputs, seed=0):
    """The arguments of round_panel except the codes and the format: the second half of twice as many inputs."""
    generator = torch.Generator().manual_seed(seed)
    scaled, errors = (torch.randn(blocks, 2 * rows, outputs, generator=generator) * size for size in (60, 0.1))
    scaled[0, rows:, :3] = torch.tensor([0.0, 1e-4, 2000.0])[:outputs]  # zeros, underflow, saturation
    from_others = torch.randn(blocks, rows, outputs, generator=generator)
    within = 0.3 * torch.randn(blocks, rows, rows, generator=generator)  # what is not below the diagonal is not used
    return scaled[:, rows:], errors[:, rows:], from_others, within


@formats
@pytest.mark.parametrize("shape", [(1, 16, 40), (2, 11, 33), (3, 1, 1)])
def test_a_panel_is_rounded_as_in_the_reference(format, shape):
    blocks, rows, outputs = shape
    arguments, results = panel_inputs(*shape), []
    for module in (nvidia_panels, panels):
        codes = torch.full((blocks, 2 * rows, outputs), 0x7F, dtype=torch.uint8)
        changes = module.round_panel(*arguments, codes[:, rows:].view(FORMATS[format].dtype), FORMATS[format])
        assert (codes[:, :rows] == 0x7F).all()
        results.append((codes, changes))
    (codes, changes), (expected, expected_changes) = results
    assert torch.equal(codes, expected)
    torch.testing.assert_close(changes, expected_changes, rtol=0, atol=1e-4)


def test_weights_that_are_not_numbers_get_finite_codes():
    scaled, errors, from_others, within = panel_inputs(1, 4, 8)
    codes = torch.full((1, 4, 8), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    from_others[0, 1] = math.nan
    nvidia_panels.round_panel(scaled, errors, from_others, within, codes, FORMATS["float8_e4m3fn"])
    assert codes.float().isfinite().all()


def damped_moments(blocks, side):
    x = torch.randn(blocks, 4 * side, side, generator=torch.Generator().manual_seed(side))
    x = x @ torch.randn(side, side, generator=torch.Generator().manual_seed(1)) + x
    moments = x.mT @ x / (4 * side)
    damping = 0.01 * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    return moments + torch.diag_embed(damping.expand(-1, side)), damping


@pytest.mark.parametrize(("blocks", "side", "width"), [(1, 40, 16), (3, 70, 24), (2, 16, 16), (1, 1, 1)])
def test_pivots_are_chosen_as_in_the_reference(blocks, side, width):
    moments, damping = damped_moments(blocks, side)
    results = []
    for module in (nvidia_panels, panels):
        pivots = moments.diagonal(dim1=1, dim2=2).clone()
        results.append((*module.factor_panel(moments, pivots, damping, width), pivots))
    (columns, taken, pivots), (expected, expected_taken, expected_pivots) = results
    assert torch.equal(taken, expected_taken)
    torch.testing.assert_close(columns, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pivots, expected_pivots, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_pivots_of_damaged_moments_are_not_all_taken(value):
    """1e30 overflows when it is squared. The caller sees pivots that are left when all should be taken."""
    moments, damping = damped_moments(1, 12)
    moments[0, 3, 4] = moments[0, 4, 3] = value
    for module in (nvidia_panels, panels):
        pivots = moments.diagonal(dim1=1, dim2=2).clone()
        columns, taken = module.factor_panel(moments, pivots, damping, 12)
        assert 0 <= taken.min() <= taken.max() < 12
        assert not (pivots.isposinf().all() and columns.isfinite().all())


@formats
@pytest.mark.parametrize("blocks", [1, 2])
def test_calibrated_rounding_with_the_kernels_is_that_without(monkeypatch, format, blocks):
    """A whole layer: the panels of pivots are narrower here, so sums have another order."""
    monkeypatch.setattr(panels, "NVIDIA", dataclasses.replace(panels.NVIDIA, pivots=16))
    monkeypatch.setattr(gptq, "PANEL", 16)
    monkeypatch.setattr(moments, "WIDEST_BLOCK", 32 // blocks)
    moments._band_shapes.cache_clear()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    recorder = ActivationRecorder()
    recorder.observe("w", x + 0.3 * torch.randn(4000, 32, generator=generator))
    layer = recorder.result().layers["w"]
    weight = torch.randn(20, 32, generator=generator)
    results = []
    for kind in (panels.NVIDIA, panels.REFERENCE):
        monkeypatch.setattr(gptq, "choose_panels", lambda device, kind=kind: kind)
        scaling = "absmax" if blocks == 1 else "none"  # whose scale is not searched
        results.append(calibrate_tensor(weight, layer, format=format, scaling=scaling))
    moments._band_shapes.cache_clear()
    ours, reference_one = results
    same = ours.codes.view(torch.uint8) == reference_one.codes.view(torch.uint8)
    assert same.float().mean() > 0.99
    assert ours.scale == reference_one.scale
    assert ours.output_error.chosen == pytest.approx(reference_one.output_error.chosen, rel=0.01)
    assert ours.output_error.chosen < 0.8 * ours.output_error.nearest


def test_a_gpu_gets_the_kernels_and_a_cpu_the_reference(monkeypatch):
    assert panels.choose_panels(torch.device("cpu")) is panels.REFERENCE
    monkeypatch.setattr(panels, "choose_backend", lambda device: BACKENDS["nvidia"])
    assert panels.choose_panels(torch.device("cuda")) is panels.NVIDIA
