"""What rounding a layer's weight does to the layer's output, as far as a calibration can tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputError:
    """Error of the output relative to the output, both RMS, on the inputs of a calibration: √(tr E H Eᵀ / tr W H Wᵀ).

    W is the weight, E what rounding adds to it, H the second moment of the inputs. Predicted on a sample of the
    outputs where there are thousands.
    """

    rows: int
    """Rows of inputs that the prediction rests on."""
    nearest: float
    """What rounding to nearest would do, at its own scale."""
    chosen: float
    """What the chosen codes do: never above `nearest`."""


def relative_output_error(original: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """√(tr E H Eᵀ / tr W H Wᵀ) of a weight (out, in) that was rounded; 0 where the output is all zero.

    moment: LayerCalibration.moment(), on the weight's device.
    """
    energy = output_energy(original, moment)
    return math.sqrt(output_energy(rounded.float() - original.float(), moment) / energy) if energy > 0 else 0.0


def output_energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """tr W H Wᵀ: the mean square of what a weight (out, in) puts out, summed over the outputs."""
    parts = weight.float().reshape(len(weight), *moment.shape[:2]).transpose(0, 1)
    return max(float((parts @ moment * parts).sum(dtype=torch.float64)), 0.0)
