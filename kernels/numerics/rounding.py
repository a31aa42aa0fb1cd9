"""(scaled value, random word) -> FP8 code: the readable reference, in integer arithmetic on any device.

A magnitude becomes its *position* in code space: the integer part is the code below it, the fraction is how far
it lies towards the next code. The carry out of the mantissa into the exponent is the step into the next binade, so
stochastic rounding to FP8 is integer stochastic rounding of the position. Positions are int32 fixed point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .formats import Float8Format

FRACTION_BITS = 16
"""Fraction bits of a position in stochastic rounding: as many as a random word has."""
ONE = 1 << FRACTION_BITS

FP32_MANTISSA = 23
FP32_BIAS = 127


@dataclass(frozen=True)
class Rounding:
    """A rounding method: `draw(position, word)` -> code, on int32 tensors; None for a method without randomness."""

    name: str
    description: str
    draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    complements_words: bool = False
    """Every method rounds up where fraction + word carries: the word as it is, or its complement 65535 - word."""

    @property
    def stochastic(self) -> bool:
        return self.draw is not None


def code_positions(scaled: torch.Tensor, format: Float8Format, fraction_bits: int) -> torch.Tensor:
    """The position of |scaled| in code space, int32 with `fraction_bits` fraction bits (0 or 16).

    Rounded once, to nearest with ties to even; with 0 fraction bits this is rounding to nearest itself. Beyond the
    largest finite value positions go on counting as if the format had more exponents: callers saturate the code.

    scaled: fp32, finite, any shape.
    """
    bits = scaled.abs().view(torch.int32)
    exponent = bits >> FP32_MANTISSA
    smallest_normal = FP32_BIAS + 1 - format.exponent_bias
    significand = (bits & ((1 << FP32_MANTISSA) - 1)) | (1 << FP32_MANTISSA)
    binades_above = (exponent - smallest_normal).clamp(min=0)
    binades_below = (smallest_normal - exponent).clamp(min=0)
    position = significand + (binades_above << FP32_MANTISSA)
    surplus_bits = FP32_MANTISSA - format.mantissa_bits - fraction_bits + binades_below
    return _shift_right_to_nearest_even(position, surplus_bits)


def _shift_right_to_nearest_even(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """x / 2^bits for int32 x >= 0 and bits >= 1, rounded to nearest, ties to even. Wants x < 2^24 where bits > 25."""
    bits = bits.clamp(max=26)
    odd = (x >> bits) & 1
    return (x + (1 << (bits - 1)) - 1 + odd) >> bits


def _draw_stochastic(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Between the code below and the one above: up with probability equal to the fraction."""
    below = position >> FRACTION_BITS
    fraction = position & (ONE - 1)
    return below + (word < fraction).int()


def _draw_complex_neighbor(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """The bracket is the nearest code and its neighbour on the value's side (the upper one if they are equal)."""
    nearest = (position + ONE // 2 - 1 + ((position >> FRACTION_BITS) & 1)) >> FRACTION_BITS
    neighbor = torch.where(position >= nearest << FRACTION_BITS, nearest + 1, nearest - 1)
    below, above = torch.minimum(nearest, neighbor), torch.maximum(nearest, neighbor)
    return torch.where(word < position - (below << FRACTION_BITS), above, below)


def _draw_shift_perturb(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Noise (word + 1/2) / 2^16 - 1/2 is added, then rounded to nearest; half a step moves no code by more than one.

    The sum has one more fraction bit and is odd in it, so there are no ties. Adding it in code space, where a step
    is a step on both sides of a power of two, confines the result to the bracket.
    """
    perturbed = 2 * position + (2 * word + 1 - ONE)
    return (perturbed + ONE) >> (FRACTION_BITS + 1)


def _draw_owlshift(position: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """A uniform offset is added to the position and the floor taken."""
    return (position + word) >> FRACTION_BITS


ROUNDINGS = {
    rounding.name: rounding
    for rounding in (
        Rounding(
            "stochastic",
            "up or down at random, in proportion to the distance: unbiased",
            _draw_stochastic,
            complements_words=True,
        ),
        Rounding("owlshift", "adds a random fraction of a step, then cuts: same law as stochastic", _draw_owlshift),
        Rounding(
            "complex_neighbor",
            "draws between the nearest value and its neighbour: same law as stochastic",
            _draw_complex_neighbor,
            complements_words=True,
        ),
        Rounding(
            "shift_perturb",
            "adds half a step of noise, then rounds to nearest: same law as stochastic",
            _draw_shift_perturb,
        ),
        Rounding("nearest", "to the nearest value, ties to even: least error for each weight, but biased", None),
    )
}


CALIBRATED = Rounding("calibrated", "for the layer's output, on inputs it was seen to get: needs a calibration", None)

METHODS = {**ROUNDINGS, CALIBRATED.name: CALIBRATED}
"""Every choice of rounding: ROUNDINGS look at one number at a time, `calibrated` at a whole weight (calibrate.py)."""


def round_to_codes(
    scaled: torch.Tensor, words: torch.Tensor | None, format: Float8Format, rounding: Rounding
) -> torch.Tensor:
    """The FP8 codes of scaled values, uint8 of the same shape. Values beyond the format's range saturate; -0 stays -0.

    scaled: fp32, finite. words: int32 in 0..65535 of the same shape; unused, and may be None, for `nearest`.
    """
    if rounding.stochastic:
        magnitude = rounding.draw(code_positions(scaled, format, FRACTION_BITS), words)
    else:
        magnitude = code_positions(scaled, format, 0)
    negative = scaled.view(torch.int32) < 0
    return (magnitude.clamp(max=format.max_code) | (negative.int() << 7)).to(torch.uint8)
