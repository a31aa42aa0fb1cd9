"""What rounding a layer's weight does to the layer's output, as far as a calibration can tell."""

from __future__ import annotations

from dataclasses import dataclass


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
