"""amax and scale: ComfyUI's convention, no false saturation, the smallest scale, and edge cases."""

import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels.numerics.formats import E4M3FN, E5M2, FORMATS
from stochastic_fp8_pack.kernels.numerics.scaling import SCALINGS, amax_to_scale, tensor_to_amax


def scale_of(amax, float8=E4M3FN, scaling="absmax"):
    return amax_to_scale(amax, float8, SCALINGS[scaling])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "amax"),
    [([1.0, -3.5, 2.0], 3.5), ([0.0, -0.0], 0.0), ([], 0.0), ([-7.0], 7.0), ([float("nan"), 1.0], float("nan"))],
)
def test_amax(values, amax, dtype):
    result = tensor_to_amax(torch.tensor(values, dtype=dtype))
    assert result.dtype == torch.float32
    assert result.shape == ()
    np.testing.assert_equal(result.item(), amax)


def test_amax_of_infinite_values_and_of_fp64_beyond_fp32():
    assert tensor_to_amax(torch.tensor([1.0, -float("inf")])).item() == float("inf")
    assert tensor_to_amax(torch.tensor([1e300], dtype=torch.float64)).item() == float("inf")


@pytest.mark.parametrize(
    ("amax", "float8", "scaling", "scale"),
    [
        (448.0, E4M3FN, "absmax", 1.0),
        (224.0, E4M3FN, "absmax", 0.5),
        (57344.0, E5M2, "absmax", 1.0),
        (57344.0, E5M2, "owlscale", 1.0),
        (448.0 - 2**-9, E4M3FN, "owlscale", 1.0),
        (0.0, E4M3FN, "absmax", 1.0),
        (0.0, E5M2, "owlscale", 1.0),
        (1e-3, E4M3FN, "absmax", 2**-14),
        (3.4, E5M2, "absmax", 2**-14),
        (1e9, E4M3FN, "none", 1.0),
    ],
)
def test_scales(amax, float8, scaling, scale):
    assert scale_of(amax, float8, scaling).item() == scale


@pytest.mark.parametrize("scaling", ["absmax", "owlscale"])
@pytest.mark.parametrize("float8", FORMATS.values(), ids=FORMATS)
def test_amax_never_saturates(float8, scaling):
    """With plain division, amax / scale is above the largest value for 8-9 % of tensors."""
    amax = torch.from_numpy(np.exp2(np.random.default_rng(3).uniform(4, 20, 20000)).astype(np.float32))
    scale = torch.stack([scale_of(each, float8, scaling) for each in amax.tolist()])
    assert (amax / scale <= float8.max).all()
    if scaling == "absmax":
        plain = amax.double() / float8.max
        assert ((scale.double() - plain).abs() <= 2**-23 * plain).all()
        assert 0.02 < (amax / (amax / float8.max) > float8.max).double().mean() < 0.2


def test_owlscale_leaves_one_quantum_of_headroom():
    assert 1000.0 / scale_of(1000.0, scaling="owlscale").item() == pytest.approx(448 - 2**-9, rel=1e-7)


def test_scale_is_fp32_and_0_dim():
    assert (scale_of(3.0).dtype, scale_of(3.0).shape) == (torch.float32, ())
