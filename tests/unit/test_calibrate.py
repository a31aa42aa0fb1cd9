"""Calibrated rounding against textbook GPTQ, exhaustive search and the layer's real outputs."""

import itertools
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels import FORMATS, ROUNDINGS, dequantize_tensor, quantize_tensor
from stochastic_fp8_pack.kernels.calibration import calibrate_tensor as calibrate_module
from stochastic_fp8_pack.kernels.calibration import gptq, moments
from stochastic_fp8_pack.kernels.calibration.calibrate_tensor import calibrate_tensor
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.errors import CalibrationError
from stochastic_fp8_pack.kernels.numerics.backends.panels import to_nearest
from stochastic_fp8_pack.kernels.numerics.output_error import CONTRADICTORY, WEIGHT_ERROR, relative_output_error
from stochastic_fp8_pack.kernels.numerics.rounding import round_to_codes

formats = pytest.mark.parametrize("format", FORMATS)


def correlated(rows, width, seed=0):
    """Correlated inputs of different magnitudes, like activations."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, max(1, width // 4), generator=generator)
    mixing = torch.randn(shared.shape[1], width, generator=generator)
    sizes = torch.exp(0.7 * torch.randn(width, generator=generator))
    return (shared @ mixing + torch.randn(rows, width, generator=generator)) * sizes


def weights(outputs, width, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(outputs, width, generator=generator) / width**0.5


def recorded(x):
    recorder = ActivationRecorder()
    recorder.observe("layer.weight", x)
    return recorder.result().layers["layer.weight"]


def scale_of(weight, format="float8_e4m3fn"):
    return quantize_tensor(weight, format=format, rounding="nearest").scale


def calibrated(weight, layer, format="float8_e4m3fn", **options):
    return gptq.gptq_round(weight, scale_of(weight, format), layer, FORMATS[format], **options)


def output_error(weight, codes, scale, x):
    """The relative change of the layer's output, computed by running it."""
    original, changed = x.double() @ weight.double().T, x.double() @ dequantize_tensor(codes, scale).double().T
    return float((changed - original).norm() / original.norm())


def textbook_gptq(weight, moment, damping, format):
    """Frantar et al., algorithm 1, column by column in float64, on a scaled weight."""
    hessian = moment + damping * np.diag(moment).mean() * np.eye(len(moment))
    order = min_pivot_order(hessian)
    hessian = hessian[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w = weight[:, order].copy()
    codes = np.empty(w.shape, np.uint8)
    for j in range(w.shape[1]):
        column = torch.from_numpy(w[:, j].astype(np.float32))
        code = round_to_codes(column, None, FORMATS[format], ROUNDINGS["nearest"])
        error = (w[:, j] - np.array(FORMATS[format].values)[code.numpy()]) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
        codes[:, j] = code.numpy()
    return codes[:, np.argsort(order)]


def min_pivot_order(hessian):
    """From the last place to the first: the input with the smallest variance given those already placed."""
    placed = []
    for _ in range(len(hessian)):
        inverse = np.linalg.inv(hessian[np.ix_(placed, placed)])
        loss = {
            j: hessian[j, j] - hessian[j, placed] @ inverse @ hessian[placed, j]
            for j in range(len(hessian))
            if j not in placed
        }
        placed.append(min(loss, key=loss.get))
    return np.array(placed[::-1])


@formats
@pytest.mark.parametrize(("outputs", "width"), [(8, 16), (48, 200), (16, 300)])
def test_without_descent_it_equals_gptq(format, outputs, width):
    weight, layer = weights(outputs, width), recorded(correlated(5000, width))
    codes, scale, _ = calibrated(weight, layer, format, search_scale=False, descents=0)
    scaled = (weight / scale).double().numpy()
    expected = textbook_gptq(scaled, layer.moment()[0].double().numpy(), gptq.damping_share(5000), format)
    agreeing = (codes.view(torch.uint8).numpy() == expected).mean()
    assert agreeing > 0.998  # a tie that fp32 breaks differently changes the rest of its row


@formats
def test_it_is_close_to_the_best_of_all_roundings(format):
    """Six inputs, and four codes around each weight: all 4096 choices per output are tried."""
    found, best, nearest = np.zeros((3, 30))
    for seed in range(30):
        weight, layer = weights(4, 6, seed), recorded(correlated(40_000, 6, seed))
        codes, scale, _ = calibrated(weight, layer, format, search_scale=False)
        moment = layer.moment()[0].double().numpy()
        error = (dequantize_tensor(codes, scale) - weight).double().numpy()
        found[seed] = np.einsum("oi,ij,oj->", error, moment, error)
        best[seed], nearest[seed] = exhaustive(weight, scale, moment, format)
    assert (found / best).mean() < 1.05  # sometimes a code further away is better
    assert (nearest / best).mean() > 1.25


def exhaustive(weight, scale, moment, format):
    """The smallest error of all choices among four codes, and the error of the nearest codes; sums over outputs."""
    values = np.array(sorted({v for v in FORMATS[format].values if np.isfinite(v)}))
    scaled = (weight / scale).double().numpy()
    around = np.searchsorted(values, scaled)[None] + np.array([-2, -1, 0, 1])[:, None, None]
    candidates = values[around.clip(0, len(values) - 1)]
    choices = np.array(list(itertools.product(range(4), repeat=6)))
    errors = (candidates[choices[:, None], np.arange(4)[:, None], np.arange(6)] - scaled) * float(scale)
    cost = np.einsum("coi,ij,coj->co", errors, moment, errors)
    plain = (np.take_along_axis(candidates, np.abs(candidates - scaled).argmin(0)[None], 0)[0] - scaled) * float(scale)
    return cost.min(0).sum(), np.einsum("oi,ij,oj->", plain, moment, plain)


def test_after_descent_no_single_change_helps():
    """After enough passes, moving any one code up or down makes the damped error larger."""
    weight, layer = weights(6, 24), recorded(correlated(40_000, 24))
    codes, scale, _ = calibrated(weight, layer, search_scale=False, descents=30)
    moment = layer.moment()[0].double()
    moment += gptq.damping_share(40_000) * moment.diagonal().mean() * torch.eye(24)
    error = (dequantize_tensor(codes, scale) - weight).double()
    bits = codes.view(torch.uint8)
    for step in (1, -1):
        moved = (bits.int() + step).to(torch.uint8).view(codes.dtype)
        inner = (bits & 0x7F > 0) & (bits & 0x7F < 0x7E)
        change = (dequantize_tensor(moved, scale) - dequantize_tensor(codes, scale)).double()
        gain = 2 * change * (error @ moment) + change.square() * moment.diagonal()
        assert (gain[inner] > -1e-9 * gain[inner].abs().max()).all()


@formats
def test_descent_helps(format):
    weight, layer = weights(64, 96), recorded(correlated(5000, 96))
    without, once, thrice = (calibrated(weight, layer, format, descents=n)[2].chosen for n in (0, 1, 3))
    assert thrice < once < without


@formats
def test_the_predicted_error_is_that_of_the_layer(format):
    x = correlated(4000, 96)
    weight, layer = weights(64, 96), recorded(x)
    codes, scale, error = calibrated(weight, layer, format)
    plain = quantize_tensor(weight, format=format, rounding="nearest")
    assert error.rows == 4000
    assert error.chosen == pytest.approx(output_error(weight, codes, scale, x), rel=1e-3)
    assert error.nearest == pytest.approx(output_error(weight, plain.codes, plain.scale, x), rel=1e-3)
    assert error.chosen < 0.5 * error.nearest


@formats
def test_it_helps_on_held_out_inputs(format):
    x = correlated(8000, 96)
    weight = weights(64, 96)
    codes, scale, _ = calibrated(weight, recorded(x[:4000]), format)
    plain = quantize_tensor(weight, format=format, rounding="nearest")
    held_out = x[4000:]
    assert output_error(weight, codes, scale, held_out) < 0.5 * output_error(weight, plain.codes, plain.scale, held_out)


@formats
def test_uncorrelated_inputs_are_rounded_to_nearest(format):
    """Without correlation no input can compensate the error of another, so the bytes are those of nearest."""
    weight = weights(20, 32)
    layer = recorded(torch.diag(torch.linspace(1, 5, 32)))
    codes, scale, error = calibrated(weight, layer, format, search_scale=False)
    plain = quantize_tensor(weight, format=format, rounding="nearest")
    assert torch.equal(codes.view(torch.uint8), plain.codes.view(torch.uint8))
    assert torch.equal(scale, plain.scale)
    assert error.chosen == error.nearest


def test_a_gpu_without_enough_memory_falls_back_to_the_cpu(monkeypatch, caplog):
    """The GPU is a name here: what is sent to it stays in main memory."""
    layer, weight = recorded(correlated(200, 48)), weights(24, 48)
    devices, round_on = [], calibrate_module.gptq_round

    def send(tensor, device):
        devices.append(device.type)
        return tensor

    def out_of_memory_on_the_gpu(*arguments, **options):
        if devices[-1] == "cuda":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return round_on(*arguments, **options)

    monkeypatch.setattr(calibrate_module, "gptq_round", out_of_memory_on_the_gpu)
    q = calibrate_tensor(weight, layer, key="a.weight", device="cuda", send=send)
    assert devices == ["cuda", "cpu"]
    assert "tensor 'a.weight': cuda is out of memory; falling back to the CPU" in caplog.text
    assert torch.equal(q.codes.view(torch.uint8), calibrate_tensor(weight, layer).codes.view(torch.uint8))


def outlier():
    """A weight, and inputs of which that of the largest weight is always zero."""
    weight = weights(32, 48) * 1e-4
    weight[3, 7] = 10.0
    x = correlated(4000, 48)
    x[:, 7] = 0
    return weight, x


def test_an_outlier_whose_input_is_zero_would_saturate(monkeypatch):
    """A smaller scale saturates the largest weight and helps the others."""
    monkeypatch.setattr(gptq, "LARGEST_WEIGHT_ERROR", float("inf"))
    weight, x = outlier()
    codes, chosen, error = calibrated(weight, recorded(x))
    assert float(chosen) == pytest.approx(0.5 * float(scale_of(weight)))
    assert codes[3, 7].float() == 448
    assert error.chosen < error.nearest


def is_nearest(codes, scale, weight, format="float8_e4m3fn"):
    plain = quantize_tensor(weight, format=format, rounding="nearest")
    return torch.equal(codes.view(torch.uint8), plain.codes.view(torch.uint8)) and torch.equal(scale, plain.scale)


def test_a_weight_that_would_lose_10_db_is_rounded_to_nearest():
    weight, x = outlier()
    codes, scale, error = calibrated(weight, recorded(x))
    assert is_nearest(codes, scale, weight)
    assert (error.fallback, error.chosen) == (WEIGHT_ERROR, error.nearest)


def test_the_limit_is_on_the_squared_error_of_the_weight(monkeypatch):
    weight, layer = weights(64, 96), recorded(correlated(4000, 96))
    codes, scale, _ = calibrated(weight, layer)
    plain = quantize_tensor(weight, rounding="nearest")
    found, nearest = (
        (dequantize_tensor(*pair) - weight).double().square().sum()
        for pair in ((codes, scale), (plain.codes, plain.scale))
    )
    assert 1.5 < found / nearest < 4  # far from the limit
    for factor, fallback in ((1.001, ""), (0.999, WEIGHT_ERROR)):
        monkeypatch.setattr(gptq, "LARGEST_WEIGHT_ERROR", factor * float(found / nearest))
        assert calibrated(weight, layer)[2].fallback == fallback


def with_moment(moment, rows=4000):
    return moments.LayerCalibration(len(moment), rows, 10.0, lambda: (moment * rows).float().reshape(-1))


def contradictory(width=32):
    """Each pair of inputs is allowed, but three of them are not: a and b agree, b and c agree, a and c do not."""
    moment = torch.eye(width)
    moment[:3, :3] = torch.tensor([[1, 0.95, -0.95], [0.95, 1, 0.95], [-0.95, 0.95, 1]])
    return moment


@formats
@pytest.mark.parametrize(
    "moment",
    [
        contradictory(),
        1e30 * contradictory(),
        torch.eye(32).index_fill(0, torch.tensor([3]), float("nan")),
        torch.eye(32).index_fill(1, torch.tensor([3]), float("inf")),
        torch.full((32, 32), -1.0),
        1 - 2 * torch.rand(256, 256, generator=torch.Generator().manual_seed(0)).round() * (1 - torch.eye(256)),
        torch.full((200, 200), 3e38),
    ],
    ids=["three inputs", "three large inputs", "NaN", "Inf", "negative", "random signs", "overflow"],
)
def test_a_moment_of_no_inputs_gives_nearest(format, moment):
    weight = weights(20, len(moment))
    codes, scale, error = calibrated(weight, with_moment(moment), format)
    assert is_nearest(codes, scale, weight, format)
    assert error.fallback == CONTRADICTORY
    assert math.isfinite(error.chosen)
    assert error.chosen == error.nearest


@formats
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e15, 1e30, 3e38])
def test_weights_of_any_size_give_finite_codes_and_errors(format, size):
    weight, layer = weights(20, 32), recorded(correlated(4000, 32))
    weight = weight / weight.abs().max() * size
    codes, scale, error = calibrated(weight, layer, format)
    assert torch.isfinite(codes.float()).all()
    assert 0 < float(scale) < math.inf
    assert 0 <= error.chosen <= error.nearest < math.inf
    if size > 1:
        assert error.chosen < 0.6 * error.nearest


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_never_gives_bad_codes(seed):
    """Flipped bits of a moment that has no digest: refused when it is read, or codes near those of nearest."""
    generator = np.random.default_rng(seed)
    weight, layer = weights(16, 16), recorded(correlated(4000, 16))
    original = layer.read_moment().clone()
    plain = quantize_tensor(weight, rounding="nearest")
    limit = 10.001 * (dequantize_tensor(plain.codes, plain.scale) - weight).square().sum()
    accepted = 0
    for _ in range(60):
        damaged = original.clone()
        at = generator.integers(len(damaged))
        damaged.view(torch.int32)[at] ^= int(np.int32(np.uint32(1 << generator.integers(32)).view(np.int32)))
        try:
            moments.check_moment(damaged, 16, layer.rows, layer.amax)
        except ValueError:
            continue
        accepted += 1
        codes, scale, _ = calibrated(weight, moments.LayerCalibration(16, layer.rows, layer.amax, lambda: damaged))  # noqa: B023
        assert (dequantize_tensor(codes, scale) - weight).square().sum() <= limit
    assert accepted


def test_blocks_are_rounded_independently(monkeypatch):
    monkeypatch.setattr(moments, "WIDEST_BLOCK", 64)
    moments._band_shapes.cache_clear()
    weight, x = weights(24, 128), correlated(4000, 128)
    scale = scale_of(weight)
    together, _, error = calibrated(weight, recorded(x), search_scale=False)
    for columns in (slice(0, 64), slice(64, 128)):
        alone, _, _ = gptq.gptq_round(
            weight[:, columns], scale, recorded(x[:, columns]), FORMATS["float8_e4m3fn"], search_scale=False
        )
        assert torch.equal(together[:, columns].view(torch.uint8), alone.view(torch.uint8))
    moments._band_shapes.cache_clear()
    assert error.chosen < error.nearest


def test_chunks_change_nothing(monkeypatch):
    weight, layer = weights(50, 32), recorded(correlated(4000, 32))
    whole = calibrated(weight, layer)
    monkeypatch.setattr(gptq, "CHUNK_ELEMENTS", 7 * 32)
    parts = calibrated(weight, layer)
    assert torch.equal(whole[0].view(torch.uint8), parts[0].view(torch.uint8))
    assert whole[2].chosen == pytest.approx(parts[2].chosen, rel=1e-6)


def test_the_bytes_are_reproducible():
    weight, layer = weights(50, 160), recorded(correlated(4000, 160))
    first, second = calibrated(weight, layer), calibrated(weight.clone(), layer)
    assert torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8))
    assert torch.equal(first[1], second[1])


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@formats
@pytest.mark.parametrize("width", [96, 300])
@pytest.mark.parametrize(
    "context",
    [
        pytest.param(lambda: default_dtype(torch.float64), id="default dtype float64"),
        pytest.param(lambda: default_dtype(torch.bfloat16), id="default dtype bfloat16"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast to bfloat16"),
        pytest.param(lambda: torch.autocast("cpu", torch.float16), id="autocast to float16"),
    ],
)
def test_default_dtype_and_autocast_change_nothing(format, width, context):
    weight, x = weights(40, width), correlated(200, width)
    nearest = scale_of(weight, format)

    def results():
        layer = recorded(x)
        codes, scale, error = gptq.gptq_round(weight, nearest, layer, FORMATS[format], descents=2)
        q = calibrate_tensor(weight, layer, format=format, statistics=True)
        measured = relative_output_error(weight, dequantize_tensor(codes, scale), layer.moment())
        tensors = [layer.read_moment(), layer.moment(), codes.view(torch.uint8), scale]
        return [*tensors, q.codes.view(torch.uint8), q.scale], (error, q.error, q.output_error, measured)

    expected, expected_errors = results()
    with context():
        tensors, errors = results()
    assert [t.dtype for t in tensors] == [t.dtype for t in expected]
    assert all(map(torch.equal, tensors, expected))
    assert errors == expected_errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision(dtype):
    weight, layer = weights(20, 32).half().bfloat16().to(dtype), recorded(correlated(4000, 32))
    assert torch.equal(
        calibrated(weight, layer)[0].view(torch.uint8), calibrated(weight.float(), layer)[0].view(torch.uint8)
    )


@pytest.mark.parametrize("x", [torch.zeros(5, 32), correlated(5, 32)], ids=["inputs all zero", "few rows"])
def test_with_little_data_it_is_no_worse_than_nearest(x):
    weight = weights(20, 32)
    codes, _, error = calibrated(weight, recorded(x))
    assert error.chosen <= error.nearest
    assert torch.isfinite(codes.float()).all()


def test_a_zero_weight_stays_zero():
    codes, scale, error = calibrated(torch.zeros(16, 32), recorded(correlated(50, 32)))
    assert (codes.float() == 0).all()
    assert (float(scale), error.nearest, error.chosen) == (1.0, 0.0, 0.0)


def test_fewer_rows_get_more_damping():
    assert gptq.damping_share(10**6) == 0.01
    assert gptq.damping_share(3000) == 0.01
    assert gptq.damping_share(300) == pytest.approx(0.1)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(CalibrationError, match=r"\(20, 48\) does not fit a calibration of 32 inputs"):
        calibrated(weights(20, 48), recorded(correlated(50, 32)))


@formats
def test_the_grid_is_that_of_nearest(format):
    """The cast used here against the reference: every finite bf16 value, ties, values beyond the range."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.isfinite()]
    values = torch.tensor([v for v in FORMATS[format].values if np.isfinite(v)])
    ties = (values.sort().values[1:] + values.sort().values[:-1]) / 2
    x = torch.cat([every, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    expected = round_to_codes(x, None, FORMATS[format], ROUNDINGS["nearest"])
    assert torch.equal(to_nearest(x, FORMATS[format]).view(torch.uint8), expected)
