"""Derived constants against the published ones, and every code against torch and ml_dtypes."""

import grids
import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels.numerics.formats import E4M3FN, E5M2, FORMATS


@pytest.mark.parametrize("code", range(256))
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_decodes_as_in_torch_and_ml_dtypes(name, code):
    ours = FORMATS[name].decode(code)
    theirs = torch.tensor([code], dtype=torch.uint8).view(FORMATS[name].dtype).float().item()
    np.testing.assert_array_equal([ours, ours], [theirs, grids.decode([code], name)[0]])
    assert np.isnan(ours) or np.signbit(ours) == np.signbit(theirs)


@pytest.mark.parametrize(
    ("float8", "largest", "quantum", "smallest_normal", "finite", "distinct"),
    [(E4M3FN, 448.0, 2**-9, 2**-6, 254, 253), (E5M2, 57344.0, 2**-16, 2**-14, 248, 247)],
)
def test_constants(float8, largest, quantum, smallest_normal, finite, distinct):
    assert (float8.max, float8.quantum, float8.smallest_normal) == (largest, quantum, smallest_normal)
    values = np.array(float8.values)
    assert np.isfinite(values).sum() == finite
    assert len(set(values[np.isfinite(values)])) == distinct


def test_largest_codes():
    assert E4M3FN.decode(0x7E) == 448
    assert np.isnan(E4M3FN.decode(0x7F))
    assert E5M2.decode(0x7B) == 57344
    assert E5M2.decode(0xFC) == -np.inf


@pytest.mark.parametrize("code", [-1, 256])
def test_a_code_out_of_range_is_an_error(code):
    with pytest.raises(ValueError, match=f"{code} is not a code of float8_e5m2"):
        E5M2.decode(code)
