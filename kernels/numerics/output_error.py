"""The error that rounding a weight causes in its layer's output, predicted from a calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .matrix_precision import full_precision_products
from .scaling import tensor_to_amax

WEIGHT_ERROR = "weight error"
"""Reason for nearest: calibrated codes would be more than 10 dB further from the weight than those of nearest."""
CONTRADICTORY = "contradictory inputs"
"""Reason for nearest: no inputs have the recorded second moment."""


@dataclass(frozen=True)
class OutputError:
    """RMS error of a layer's output over the RMS of the output, on recorded inputs: √(tr E H Eᵀ / tr W H Wᵀ).

    W is the weight, E its rounding error, H the second moment of the inputs. Layers with thousands of outputs are
    predicted from a sample of them.
    """

    rows: int
    """Rows of recorded inputs."""
    nearest: float
    """Error of rounding to nearest, at its own scale."""
    chosen: float
    """Error of the chosen codes; never above `nearest`."""
    fallback: str = ""
    """WEIGHT_ERROR or CONTRADICTORY: why calibrated codes were not used. "": they were used, or would not be better."""


def relative_output_error(original: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """√(tr E H Eᵀ / tr W H Wᵀ) of a rounded weight (out, in); 0 if the output is all zero.

    moment: LayerCalibration.moment(), on the weight's device. The result does not depend on torch.autocast.
    """
    unit = unit_of(original)
    energy = output_energy(original.float() * unit, moment)
    if not energy > 0:
        return 0.0
    return math.sqrt(output_energy((rounded.float() - original.float()) * unit, moment) / energy)


def output_energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """tr W H Wᵀ: the mean square of the outputs of a weight (out, in), summed over the outputs."""
    parts = weight.float().reshape(len(weight), *moment.shape[:2]).transpose(0, 1)
    with full_precision_products(weight.device):
        return max(float((parts @ moment * parts).sum(dtype=torch.float64)), 0.0)


def unit_of(weight: torch.Tensor) -> float:
    """The power of two that brings a finite weight's amax to 0.5..1, so that its energy fits into fp32; 1 for zeros.

    Multiplying by it changes no mantissa. An error over an output is the same in any unit.
    """
    exponent = math.frexp(float(tensor_to_amax(weight)))[1]
    return 2.0 ** min(max(-exponent, -126), 126)
