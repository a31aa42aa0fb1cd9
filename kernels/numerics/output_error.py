"""The error that rounding a weight causes in its layer's output, predicted from a calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


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


def relative_output_error(original: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """√(tr E H Eᵀ / tr W H Wᵀ) of a rounded weight (out, in); 0 if the output is all zero.

    moment: LayerCalibration.moment(), on the weight's device.
    """
    energy = output_energy(original, moment)
    return math.sqrt(output_energy(rounded.float() - original.float(), moment) / energy) if energy > 0 else 0.0


def output_energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """tr W H Wᵀ: the mean square of the outputs of a weight (out, in), summed over the outputs."""
    parts = weight.float().reshape(len(weight), *moment.shape[:2]).transpose(0, 1)
    return max(float((parts @ moment * parts).sum(dtype=torch.float64)), 0.0)
