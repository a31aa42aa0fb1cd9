"""(scaled value, random word) -> FP8 code: the readable reference, in integer arithmetic on any device.

A magnitude has a *position* in code space. The integer part is the FP8 code below the magnitude; the fraction is how
far the magnitude lies towards the next code. A carry out of the mantissa increments the exponent, which is the step
into the next binade, so stochastic rounding to FP8 is integer stochastic rounding of the position. Positions are int32
fixed point. The contract is in kernels/ROUNDING.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .formats import Float8Format

FRACTION_BITS = 16
"""Fraction bits of a position in stochastic rounding, the same as the bits of a random word."""
ONE = 1 << FRACTION_BITS

FP32_MANTISSA = 23
FP32_BIAS = 127

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(position, word) -> magnitude code, all int32. Up means away from zero."""


@dataclass(frozen=True)
class Rounding:
    """A rounding method. draw: None for a method without randomness."""

    name: str
    description: str
    draw: Draw | None
    complements_words: bool = False
    """Every method rounds up exactly when fraction + w carries, with w the random word or its complement 65535 - word.
    True: the complement."""

    @property
    def stochastic(self) -> bool:
        return self.draw is not None


def code_positions(scaled: torch.Tensor, float8: Float8Format, fraction_bits: int) -> torch.Tensor:
    """The position of |scaled| in code space: int32 with `fraction_bits` fraction bits (0 or 16).

    Rounded once, to nearest with ties to even, so 0 fraction bits is rounding to nearest itself. Beyond the largest
    finite value, positions continue as if the format had more exponents; the caller saturates.

    scaled: fp32, finite, any shape.
    """
    bits = scaled.abs().view(torch.int32)
    exponent = bits >> FP32_MANTISSA
    smallest_normal = FP32_BIAS + 1 - float8.exponent_bias
    significand = (bits & ((1 << FP32_MANTISSA) - 1)) | (1 << FP32_MANTISSA)
    binades_above = (exponent - smallest_normal).clamp(min=0)
    binades_below = (smallest_normal - exponent).clamp(min=0)
    position = significand + (binades_above << FP32_MANTISSA)
    surplus_bits = FP32_MANTISSA - float8.mantissa_bits - fraction_bits + binades_below
    return _shift_right_to_nearest_even(position, surplus_bits)


def _shift_right_to_nearest_even(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """x / 2^bits, rounded to nearest, ties to even. int32, x >= 0, bits >= 1; x < 2^24 where bits > 25."""
    bits = bits.clamp(max=26)
    odd = (x >> bits) & 1
    return (x + (1 << (bits - 1)) - 1 + odd) >> bits


def _draw_stochastic(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Up with a probability equal to the fraction."""
    below = position >> FRACTION_BITS
    fraction = position & (ONE - 1)
    return below + (word < fraction).int()


def _draw_complex_neighbor(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """The bracket is the nearest code and its neighbour on the value's side (the upper one for an exact value)."""
    nearest = (position + ONE // 2 - 1 + ((position >> FRACTION_BITS) & 1)) >> FRACTION_BITS
    neighbor = torch.where(position >= nearest << FRACTION_BITS, nearest + 1, nearest - 1)
    below, above = torch.minimum(nearest, neighbor), torch.maximum(nearest, neighbor)
    return torch.where(word < position - (below << FRACTION_BITS), above, below)


def _draw_shift_perturb(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Add noise of (word + 1/2) / 2^16 - 1/2 steps, then round to nearest. The code changes by at most one.

    The sum has one more fraction bit, which is always set, so there are no ties. Steps have the same length on both
    sides of a power of two in code space, so the result stays in the bracket.
    """
    perturbed = 2 * position + (2 * word + 1 - ONE)
    return (perturbed + ONE) >> (FRACTION_BITS + 1)


def _draw_owlshift(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Add a uniform offset of less than one step, then take the floor."""
    return (position + word) >> FRACTION_BITS


ROUNDINGS = {
    rounding.name: rounding
    for rounding in (
        Rounding("stochastic", "up or down at random, without bias", _draw_stochastic, complements_words=True),
        Rounding("nearest", "smallest error per weight", None),
        Rounding("owlshift", "stochastic; adds part of a step, then truncates", _draw_owlshift),
        Rounding(
            "complex_neighbor",
            "stochastic; draws between two neighbours",
            _draw_complex_neighbor,
            complements_words=True,
        ),
        Rounding("shift_perturb", "stochastic; adds noise, then rounds to nearest", _draw_shift_perturb),
    )
}
"""The roundings that treat each number alone: the two to choose from, then other mechanisms of stochastic rounding."""


CALIBRATED = Rounding("calibrated", "smallest error of each layer's output; needs a calibration", None)

METHODS = {
    rounding.name: rounding
    for rounding in (ROUNDINGS["stochastic"], ROUNDINGS["nearest"], CALIBRATED, *ROUNDINGS.values())
}
"""Every choice of rounding: those of ROUNDINGS, and `calibrated`, which treats a whole weight (calibration/gptq.py)."""


def round_magnitudes(
    scaled: torch.Tensor, words: torch.Tensor | None, float8: Float8Format, rounding: Rounding
) -> torch.Tensor:
    """The magnitude codes of scaled values: int32 of the same shape, saturated at the largest finite code.

    scaled: fp32, finite. words: int32 in 0..65535, same shape; unused, and may be None, for `nearest`.
    """
    if rounding.draw is None:
        magnitudes = code_positions(scaled, float8, 0)
    elif words is None:
        raise ValueError(f"rounding {rounding.name!r} needs random words")
    else:
        magnitudes = rounding.draw(code_positions(scaled, float8, FRACTION_BITS), words)
    return magnitudes.clamp(max=float8.max_code)


def encode(magnitudes: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """FP8 codes, uint8: seven bits of magnitude and the sign of `scaled`; -0.0 keeps its sign."""
    negative = scaled.view(torch.int32) < 0
    return (magnitudes | (negative.int() << 7)).to(torch.uint8)


def round_to_codes(
    scaled: torch.Tensor, words: torch.Tensor | None, float8: Float8Format, rounding: Rounding
) -> torch.Tensor:
    """round_magnitudes, then encode."""
    return encode(round_magnitudes(scaled, words, float8, rounding), scaled)
