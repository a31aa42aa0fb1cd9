"""The rounding contract, proven in two exhaustive halves: value -> position for all 16-bit values, and
(fraction, word) -> up for all 2^32 pairs. Together they bound the bias of every stochastic method without sampling.
"""

import re
from pathlib import Path

import grids
import numpy as np
import pytest
import torch
from stochastic_fp8_pack.kernels.numerics.formats import FORMATS
from stochastic_fp8_pack.kernels.numerics.rounding import (
    ONE,
    ROUNDINGS,
    code_positions,
    encode,
    round_magnitudes,
    round_to_codes,
)

STOCHASTIC = [name for name, rounding in ROUNDINGS.items() if rounding.stochastic]

formats = pytest.mark.parametrize("format", FORMATS)
dtypes_16 = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
stochastic_methods = pytest.mark.parametrize("method", STOCHASTIC)


def fp32_sweep(format, n=1 << 20):
    """fp32 values: all grid values and ties with their fp32 neighbours, random values of every binade, tiny ones."""
    rng = np.random.default_rng(7)
    grid = grids.magnitudes(format).astype(np.float32)
    middles = (grid[:-1] + grid[1:]) / 2
    edges = np.concatenate([grid, middles])
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))])
    spread = np.exp2(rng.uniform(-40, np.log2(grids.LARGEST[format]), n)).astype(np.float32)
    tiny = rng.integers(0, 1 << 23, 1000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([edges, spread, tiny])
    return np.concatenate([values, -values])


def in_range(values, format):
    return values[np.abs(values) <= grids.LARGEST[format]]


def positions(values, format, bits=16):
    return code_positions(torch.from_numpy(values), FORMATS[format], bits).numpy()


def check_positions(values, format):
    expected = np.rint(grids.position(values.astype(np.float64), format) * 65536)
    np.testing.assert_array_equal(positions(values, format), expected)


@dtypes_16
@formats
def test_position_of_every_16_bit_value(format, dtype):
    check_positions(in_range(grids.all_finite(dtype), format), format)


@formats
def test_position_of_fp32_values(format):
    check_positions(in_range(fp32_sweep(format), format), format)


def outcomes(method, fractions, code):
    """For each fraction and each of the 65,536 words, the drawn code minus the code below: (len(fractions), 65536)."""
    words = torch.arange(65536, dtype=torch.int32)
    draws = ROUNDINGS[method].draw((code << 16) + fractions[:, None], words[None])
    return draws.sub_(code)


@pytest.mark.slow
@stochastic_methods
def test_a_fraction_f_rounds_up_for_exactly_f_words(method):
    """All 2^32 pairs: P(up) = f / 2^16 for a random word."""
    for first in range(0, 65536, 16):
        fractions = torch.arange(first, first + 16, dtype=torch.int32)
        ups = outcomes(method, fractions, code=first // 16 % 127)
        low, high = torch.aminmax(ups)
        assert 0 <= low <= high <= 1
        assert ups.sum(1).tolist() == fractions.tolist()


@stochastic_methods
def test_the_result_is_monotone_in_the_word(method):
    fractions = torch.tensor([0, 1, 2, 255, 32767, 32768, 32769, 65534, 65535], dtype=torch.int32)
    steps = outcomes(method, fractions, code=17).diff(dim=1)
    assert (steps.abs().sum(1) <= 1).all()
    assert len(steps.unique()) == 2


@dtypes_16
@formats
def test_mean_and_variance_over_all_words(format, dtype):
    """With P(up) = fraction / 2^16, as proven above, both are exact to 2^-16 of the local step (or its square)."""
    values = in_range(grids.all_finite(dtype), format)
    _, low, high = grids.bracket(values, format)
    step, magnitude = high - low, np.abs(values.astype(np.float64))
    position = positions(values, format)
    grid = np.append(grids.magnitudes(format), np.nan)
    down, up, chance = grid[position >> 16], grid[(position >> 16) + 1], (position & 65535) / 65536
    mean = np.where(chance > 0, down + chance * (up - down), down)
    variance = np.where(chance > 0, chance * (1 - chance) * (up - down) ** 2, 0)
    assert np.abs((mean - magnitude) / step).max() <= 2**-16
    assert np.abs(variance - (high - magnitude) * (magnitude - low)).max() <= (2**-16 * step**2).max()
    assert (np.abs(variance - (high - magnitude) * (magnitude - low)) <= 2**-16 * step**2).all()


@dtypes_16
@formats
def test_nearest_equals_ml_dtypes_on_every_16_bit_value(format, dtype):
    values = grids.all_finite(dtype)
    codes = round_to_codes(torch.from_numpy(values), None, FORMATS[format], ROUNDINGS["nearest"])
    np.testing.assert_array_equal(codes.numpy(), grids.nearest_codes(values, format))


@formats
def test_nearest_equals_ml_dtypes_on_fp32_values(format):
    values = fp32_sweep(format)
    codes = round_to_codes(torch.from_numpy(values), None, FORMATS[format], ROUNDINGS["nearest"])
    np.testing.assert_array_equal(codes.numpy(), grids.nearest_codes(values, format))


@stochastic_methods
@formats
def test_results_are_in_the_bracket_and_exact_values_do_not_change(format, method):
    values = in_range(fp32_sweep(format, 1 << 16), format)
    below, low, high = grids.bracket(values, format)
    for word in (0, 1, 30000, 65534, 65535):
        words = torch.full((len(values),), word, dtype=torch.int32)
        codes = round_to_codes(torch.from_numpy(values), words, FORMATS[format], ROUNDINGS[method])
        result = np.abs(grids.decode(codes.numpy(), format))
        assert ((result == low) | (result == high)).all()
        exact = np.abs(values) == low
        assert (result[exact] == low[exact]).all()
        np.testing.assert_array_equal(codes.numpy() >> 7, np.signbit(values))


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize(("format", "code"), [("float8_e4m3fn", 0x7E), ("float8_e5m2", 0x7B)])
def test_values_beyond_the_range_saturate(format, code, method):
    largest = grids.LARGEST[format]
    beyond = [largest, np.nextafter(np.float32(largest), np.float32(np.inf)), largest * 1.07, 1e9, 3.4028235e38]
    values = torch.tensor([*beyond, *(-x for x in beyond)], dtype=torch.float32)
    for word in (0, 65535):
        words = torch.full(values.shape, word, dtype=torch.int32)
        magnitudes = round_magnitudes(values, words, FORMATS[format], ROUNDINGS[method])
        assert magnitudes.tolist() == [code] * 10
        assert encode(magnitudes, values).tolist() == [code] * 5 + [code | 0x80] * 5


@pytest.mark.parametrize("method", ROUNDINGS)
@formats
def test_zero_keeps_its_sign(format, method):
    words = torch.tensor([65535, 65535], dtype=torch.int32)
    codes = round_to_codes(torch.tensor([0.0, -0.0]), words, FORMATS[format], ROUNDINGS[method])
    assert codes.tolist() == [0x00, 0x80]


def test_stochastic_rounding_without_words_is_an_error():
    with pytest.raises(ValueError, match="rounding 'owlshift' needs random words"):
        round_to_codes(torch.ones(1), None, FORMATS["float8_e5m2"], ROUNDINGS["owlshift"])


def test_which_words_round_up():
    """A fraction of a quarter rounds up for words in the first or the last quarter, depending on the method."""
    position = torch.full((4,), (40 << 16) + ONE // 4, dtype=torch.int32)
    words = torch.tensor([0, 16383, 16384, 65535], dtype=torch.int32)
    ups = {method: (ROUNDINGS[method].draw(position, words) - 40).tolist() for method in STOCHASTIC}
    assert ups == {
        "stochastic": [1, 1, 0, 0],
        "complex_neighbor": [1, 1, 0, 0],
        "owlshift": [0, 0, 0, 1],
        "shift_perturb": [0, 0, 0, 1],
    }


def test_the_contract_names_existing_tests():
    folder = Path(__file__).parent
    contract = (folder.parents[1] / "kernels" / "ROUNDING.md").read_text(encoding="utf-8")
    tests = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("test_*.py")}
    for file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", contract):
        assert f"\ndef {name}(" in (tests[file] if file else "".join(tests.values())), f"{file}::{name}"
