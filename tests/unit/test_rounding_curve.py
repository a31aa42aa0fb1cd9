"""The measurements behind the Rounding Curve."""

import numpy as np
import pytest
from stochastic_fp8_pack.kernels.studies.rounding_curve import measure_rounding

STOCHASTIC = ("stochastic", "owlshift", "complex_neighbor", "shift_perturb")


def test_neighbours_of_known_values():
    curve = measure_rounding("float8_e4m3fn", "nearest", 0.5, 2.5, draws=1)
    at = {value: np.flatnonzero(curve.values == value)[0] for value in (0.5, 1.0625, 2.125, 2.25)}
    neighbours = {value: (curve.below[i], curve.above[i]) for value, i in at.items()}
    assert neighbours == {0.5: (0.5, 0.5), 1.0625: (1.0, 1.125), 2.125: (2.0, 2.25), 2.25: (2.25, 2.25)}
    assert curve.theory_variance[at[2.125]] == 0.125**2
    assert np.isnan(curve.step[at[0.5]])


def test_values_outside_the_range_saturate():
    curve = measure_rounding("float8_e4m3fn", "stochastic", 448, 500, draws=5)
    assert (curve.mean == 448).all()
    assert (curve.below == 448).all()
    assert (curve.theory_variance == 0).all()


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("rounding", STOCHASTIC)
def test_draws_are_unbiased_between_two_neighbours(format, rounding):
    curve = measure_rounding(format, rounding, -1.5, 2.5, draws=400)
    assert ((curve.one_draw == curve.below) | (curve.one_draw == curve.above)).all()
    inside = ~np.isnan(curve.step)
    scores = (curve.mean - curve.values)[inside] / np.sqrt(curve.theory_variance[inside] / 400)
    assert np.mean(scores**2) == pytest.approx(1, abs=0.25)
    assert abs(np.mean(scores)) < 0.2
    assert curve.up[inside] == pytest.approx(curve.fraction[inside], abs=0.13)


def test_nearest_never_varies():
    curve = measure_rounding("float8_e5m2", "nearest", draws=3)
    assert (curve.variance == 0).all()
    assert set(curve.up[~np.isnan(curve.up)]) == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 2.0, "high": 1.0}, "the range from 2.0 to 1.0 is not valid"),
        ({"low": 0.0, "high": float("inf")}, "the range from 0.0 to inf is not valid"),
        ({"draws": 0}, "draws is 0; choose 1 or more"),
        ({"format": "float7"}, "unknown format 'float7'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_rounding(**{"format": "float8_e4m3fn", "rounding": "nearest"} | arguments)
