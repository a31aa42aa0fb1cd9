"""Calibrated rounding against textbook GPTQ, against exhaustive search, and against what the layer really puts out."""

import itertools

import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels import FORMATS, ROUNDINGS, dequantize_tensor, quantize_tensor
from stochastic_fp8_pack.kernels.calibration import gptq, moments
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.errors import CalibrationError
from stochastic_fp8_pack.kernels.numerics.rounding import round_to_codes

formats = pytest.mark.parametrize("format", FORMATS)


def correlated(rows, width, seed=0):
    """Inputs that share a few directions and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, max(1, width // 4), generator=generator)
    mixing = torch.randn(shared.shape[1], width, generator=generator)
    sizes = torch.exp(0.7 * torch.randn(width, generator=generator))
    return (shared @ mixing + torch.randn(rows, width, generator=generator)) * sizes


def weights(outputs, width, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(outputs, width, generator=generator) / width**0.5


def seen(x):
    observer = ActivationRecorder()
    observer.observe("layer.weight", x)
    return observer.result().layers["layer.weight"]


def scale_of(weight, format="float8_e4m3fn"):
    return quantize_tensor(weight, format=format, rounding="nearest").scale


def calibrated(weight, layer, format="float8_e4m3fn", **options):
    return gptq.calibrate(weight, scale_of(weight, format), layer, FORMATS[format], **options)


def output_error(weight, codes, scale, x):
    """The relative change of the layer's output, by running it."""
    original, changed = x.double() @ weight.double().T, x.double() @ dequantize_tensor(codes, scale).double().T
    return float((changed - original).norm() / original.norm())


def textbook_gptq(weight, moment, damping, format):
    """Frantar et al., algorithm 1, column by column in float64, on a weight already scaled."""
    hessian = moment + damping * np.diag(moment).mean() * np.eye(len(moment))
    order = least_loss_last(hessian)
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


def least_loss_last(hessian):
    """From the last place to the first, the input whose variance given those already placed is the least."""
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
def test_without_descent_it_is_gptq(format, outputs, width):
    weight, layer = weights(outputs, width), seen(correlated(5000, width))
    codes, scale, _ = calibrated(weight, layer, format, search_scale=False, descents=0)
    scaled = (weight / scale).double().numpy()
    expected = textbook_gptq(scaled, layer.moment()[0].double().numpy(), gptq.damping_share(5000), format)
    agreeing = (codes.view(torch.uint8).numpy() == expected).mean()
    assert agreeing > 0.998  # a tie that fp32 sees otherwise changes what comes after it in its row


@formats
def test_close_to_the_best_of_all_roundings(format):
    """Six inputs: two codes below or two above each weight are 4096 choices an output, and all are tried."""
    found, best, nearest = np.zeros((3, 30))
    for seed in range(30):
        weight, layer = weights(4, 6, seed), seen(correlated(40_000, 6, seed))
        codes, scale, _ = calibrated(weight, layer, format, search_scale=False)
        moment = layer.moment()[0].double().numpy()
        error = (dequantize_tensor(codes, scale) - weight).double().numpy()
        found[seed] = np.einsum("oi,ij,oj->", error, moment, error)
        best[seed], nearest[seed] = exhaustive(weight, scale, moment, format)
    assert (found / best).mean() < 1.05  # now and then a code further away is better still
    assert (nearest / best).mean() > 1.25


def exhaustive(weight, scale, moment, format):
    """The least error that any choice among four codes makes, and that of the nearest ones; summed over outputs."""
    values = np.array(sorted({v for v in FORMATS[format].values if np.isfinite(v)}))
    scaled = (weight / scale).double().numpy()
    around = np.searchsorted(values, scaled)[None] + np.array([-2, -1, 0, 1])[:, None, None]
    candidates = values[around.clip(0, len(values) - 1)]
    choices = np.array(list(itertools.product(range(4), repeat=6)))
    errors = (candidates[choices[:, None], np.arange(4)[:, None], np.arange(6)] - scaled) * float(scale)
    cost = np.einsum("coi,ij,coj->co", errors, moment, errors)
    plain = (np.take_along_axis(candidates, np.abs(candidates - scaled).argmin(0)[None], 0)[0] - scaled) * float(scale)
    return cost.min(0).sum(), np.einsum("oi,ij,oj->", plain, moment, plain)


def test_after_descent_no_single_step_helps():
    """With passes to spare, moving any one code up or down makes the damped error larger."""
    weight, layer = weights(6, 24), seen(correlated(40_000, 24))
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
    weight, layer = weights(64, 96), seen(correlated(5000, 96))
    without, once, thrice = (calibrated(weight, layer, format, descents=n)[2].chosen for n in (0, 1, 3))
    assert thrice < once < without


@formats
def test_the_prediction_is_what_the_layer_does(format):
    x = correlated(4000, 96)
    weight, layer = weights(64, 96), seen(x)
    codes, scale, error = calibrated(weight, layer, format)
    plain = quantize_tensor(weight, format=format, rounding="nearest")
    assert error.rows == 4000
    assert error.chosen == pytest.approx(output_error(weight, codes, scale, x), rel=1e-3)
    assert error.nearest == pytest.approx(output_error(weight, plain.codes, plain.scale, x), rel=1e-3)
    assert error.chosen < 0.5 * error.nearest


@formats
def test_it_helps_on_inputs_never_seen(format):
    x = correlated(8000, 96)
    weight = weights(64, 96)
    codes, scale, _ = calibrated(weight, seen(x[:4000]), format)
    plain = quantize_tensor(weight, format=format, rounding="nearest")
    held_out = x[4000:]
    assert output_error(weight, codes, scale, held_out) < 0.5 * output_error(weight, plain.codes, plain.scale, held_out)


@formats
def test_unrelated_inputs_are_rounded_to_nearest(format):
    """With nothing shared between inputs no error can make up for another: the bytes are nearest's."""
    weight = weights(20, 32)
    layer = seen(torch.diag(torch.linspace(1, 5, 32)))
    codes, scale, error = calibrated(weight, layer, format, search_scale=False)
    plain = quantize_tensor(weight, format=format, rounding="nearest")
    assert torch.equal(codes.view(torch.uint8), plain.codes.view(torch.uint8))
    assert torch.equal(scale, plain.scale)
    assert error.chosen == error.nearest


def test_a_dead_outlier_gives_way_to_the_rest():
    """Where the largest weight meets an input that is always zero, a smaller scale cuts it off and spares the rest."""
    weight = weights(32, 48) * 1e-4
    weight[3, 7] = 10.0
    x = correlated(4000, 48)
    x[:, 7] = 0
    scale = scale_of(weight)
    codes, chosen, error = calibrated(weight, seen(x))
    assert float(chosen) == pytest.approx(0.5 * float(scale))
    assert codes[3, 7].float() == 448
    assert error.chosen < error.nearest


def test_blocks_are_rounded_each_for_itself(monkeypatch):
    monkeypatch.setattr(moments, "WIDEST_BLOCK", 64)
    moments._band_shapes.cache_clear()
    weight, x = weights(24, 128), correlated(4000, 128)
    scale = scale_of(weight)
    together, _, error = calibrated(weight, seen(x), search_scale=False)
    for columns in (slice(0, 64), slice(64, 128)):
        alone, _, _ = gptq.calibrate(
            weight[:, columns], scale, seen(x[:, columns]), FORMATS["float8_e4m3fn"], search_scale=False
        )
        assert torch.equal(together[:, columns].view(torch.uint8), alone.view(torch.uint8))
    moments._band_shapes.cache_clear()
    assert error.chosen < error.nearest


def test_bounding_the_memory_changes_nothing(monkeypatch):
    weight, layer = weights(50, 32), seen(correlated(4000, 32))
    whole = calibrated(weight, layer)
    monkeypatch.setattr(gptq, "CHUNK_ELEMENTS", 7 * 32)
    parts = calibrated(weight, layer)
    assert torch.equal(whole[0].view(torch.uint8), parts[0].view(torch.uint8))
    assert whole[2].chosen == pytest.approx(parts[2].chosen, rel=1e-6)


def test_the_same_bytes_every_time():
    weight, layer = weights(50, 160), seen(correlated(4000, 160))
    first, second = calibrated(weight, layer), calibrated(weight.clone(), layer)
    assert torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8))
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision(dtype):
    weight, layer = weights(20, 32).half().bfloat16().to(dtype), seen(correlated(4000, 32))
    assert torch.equal(
        calibrated(weight, layer)[0].view(torch.uint8), calibrated(weight.float(), layer)[0].view(torch.uint8)
    )


@pytest.mark.parametrize("x", [torch.zeros(5, 32), correlated(5, 32)], ids=["inputs all zero", "few rows"])
def test_little_to_go_by_is_no_worse_than_nearest(x):
    weight = weights(20, 32)
    codes, _, error = calibrated(weight, seen(x))
    assert error.chosen <= error.nearest
    assert torch.isfinite(codes.float()).all()


def test_a_zero_weight_stays_zero():
    codes, scale, error = calibrated(torch.zeros(16, 32), seen(correlated(50, 32)))
    assert (codes.float() == 0).all()
    assert (float(scale), error.nearest, error.chosen) == (1.0, 0.0, 0.0)


def test_few_rows_are_trusted_less():
    assert gptq.damping_share(10**6) == 0.01
    assert gptq.damping_share(3000) == 0.01
    assert gptq.damping_share(300) == pytest.approx(0.1)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(CalibrationError, match=r"\(20, 48\) cannot take 32 inputs"):
        calibrated(weights(20, 48), seen(correlated(50, 32)))


@formats
def test_the_grid_is_that_of_nearest(format):
    """The cast in use here against the reference: every finite bf16 value, ties, values beyond the range."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.isfinite()]
    values = torch.tensor([v for v in FORMATS[format].values if np.isfinite(v)])
    ties = (values.sort().values[1:] + values.sort().values[:-1]) / 2
    x = torch.cat([every, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    expected = round_to_codes(x, None, FORMATS[format], ROUNDINGS["nearest"])
    assert torch.equal(gptq._to_grid(x, FORMATS[format]).view(torch.uint8), expected)
