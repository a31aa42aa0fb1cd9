"""Records a calibration: the running sums of what layers receive."""

from __future__ import annotations

import math

import torch

from ..errors import ActivationError
from ..numerics.scaling import tensor_to_amax
from .moments import Calibration, LayerCalibration, bands, block_count, moment_size

GOLDEN_SECTION = (5**0.5 - 1) / 2
"""Its multiples fall evenly into 0..1, however many there are."""


class ActivationRecorder:
    """Gathers a calibration from the inputs of layers, call by call. The sums are kept on `device`.

    most_rows: of a call with more rows only so many are taken, evenly spaced, and others in the next call.
    """

    def __init__(self, device: torch.device | str = "cpu", most_rows: int | None = None):
        self.device, self.most_rows = device, most_rows
        self._sums: dict[str, _Sums] = {}

    def observe(self, key: str, x: torch.Tensor) -> None:
        """Add one call's inputs: x (..., width), float of any width, on any device.

        Raises ActivationError for NaN or infinite values.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return
        amax = float(tensor_to_amax(rows))
        if not math.isfinite(amax):
            nan, inf = int(rows.isnan().sum()), int(rows.float().isinf().sum())
            raise ActivationError(
                f"the inputs of layer '{key.removesuffix('.weight')}' hold {nan} NaN and {inf} infinite values: the "
                f"model does not work with these settings or in this precision, so there is nothing to calibrate on"
            )
        if key not in self._sums:
            self._sums[key] = _Sums(rows.shape[1], self.device)
        self._sums[key].add(rows, amax, self.most_rows or len(rows))

    def result(self, source: str = "") -> Calibration:
        """What was seen. The observer may not be used after that."""
        return Calibration({key: sums.result() for key, sums in self._sums.items()}, source)


def _thin(rows: torch.Tensor, most: int, call: int) -> torch.Tensor:
    """At most so many of them, evenly spaced. With each call they begin elsewhere: the same places each time may be
    a few columns of a picture."""
    step = -(-len(rows) // most)
    return rows[int(step * (call * GOLDEN_SECTION % 1)) :: step]


class _Sums:
    """One layer's running sums."""

    def __init__(self, width: int, device: torch.device | str):
        self.width, self.rows, self.calls, self.amax = width, 0, 0, 0.0
        self.packed = torch.zeros(moment_size(width), device=device)

    def add(self, rows: torch.Tensor, amax: float, most_rows: int) -> None:
        x = _thin(rows, most_rows, self.calls).float()
        blocks = x.reshape(len(x), block_count(self.width), -1).transpose(0, 1)
        for start, band in bands(self.packed, self.width):
            left = blocks[:, :, start : start + band.shape[1]].mT
            band += (left @ blocks[:, :, start:]).to(band.device)
        self.rows += len(x)
        self.calls += 1
        self.amax = max(self.amax, amax)

    def result(self) -> LayerCalibration:
        return LayerCalibration(self.width, self.rows, self.amax, lambda: self.packed)
