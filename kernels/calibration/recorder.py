"""Records a calibration: running sums over the inputs of layers."""

from __future__ import annotations

import math

import torch

from ..errors import ActivationError
from ..numerics.matrix_precision import full_precision_products
from ..numerics.scaling import tensor_to_amax
from .moments import LARGEST_INPUT, Calibration, LayerCalibration, bands, block_count, moment_size

GOLDEN_SECTION = (5**0.5 - 1) / 2
"""The fractional parts of its multiples are evenly spread over 0..1, for any number of them."""


class ActivationRecorder:
    """Records a calibration from the inputs of layers, call by call. The sums are kept on `device`.

    most_rows: rows recorded per call, evenly spaced; None: all. The next call records other positions.
    """

    def __init__(self, device: torch.device | str = "cpu", most_rows: int | None = None):
        self.device, self.most_rows = device, most_rows
        self._sums: dict[str, _RunningSums] = {}

    def observe(self, key: str, x: torch.Tensor) -> None:
        """Add one call's inputs: x (..., width), float of any width, on any device.

        Raises ActivationError for NaN or infinite values, and for values above LARGEST_INPUT.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return
        amax = float(tensor_to_amax(rows))
        if not math.isfinite(amax):
            nan, inf = int(rows.isnan().sum()), int(rows.float().isinf().sum())
            raise ActivationError(
                f"the inputs of layer '{key.removesuffix('.weight')}' hold {nan} NaN and {inf} infinite values: the "
                f"model does not work with these settings or in this precision; change them, then calibrate again"
            )
        if amax > LARGEST_INPUT:
            raise ActivationError(
                f"the inputs of layer '{key.removesuffix('.weight')}' reach {amax:.3g}, more than {LARGEST_INPUT:.0e}: "
                f"the model does not work with these settings or in this precision; change them, then calibrate again"
            )
        if key not in self._sums:
            self._sums[key] = _RunningSums(rows.shape[1], self.device)
        self._sums[key].add(rows, amax, self.most_rows or len(rows))

    def result(self, source: str = "") -> Calibration:
        """The recorded calibration. The recorder must not be used afterwards: both share the sums."""
        return Calibration({key: sums.result() for key, sums in self._sums.items()}, source)


def _thin(rows: torch.Tensor, most: int, call: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spaced. The first one moves from call to call: fixed positions could be the
    same few columns of an image each time."""
    step = -(-len(rows) // most)
    return rows[int(step * (call * GOLDEN_SECTION % 1)) :: step]


class _RunningSums:
    """Those of one layer."""

    def __init__(self, width: int, device: torch.device | str):
        self.width, self.rows, self.calls, self.amax = width, 0, 0, 0.0
        self.packed = torch.zeros(moment_size(width), dtype=torch.float32, device=device)

    def add(self, rows: torch.Tensor, amax: float, most_rows: int) -> None:
        x = _thin(rows, most_rows, self.calls).float()
        blocks = x.reshape(len(x), block_count(self.width), -1).transpose(0, 1)
        with full_precision_products(x.device):
            for start, band in bands(self.packed, self.width):
                left = blocks[:, :, start : start + band.shape[1]].mT
                band += (left @ blocks[:, :, start:]).to(band.device)
        self.rows += len(x)
        self.calls += 1
        self.amax = max(self.amax, amax)

    def result(self) -> LayerCalibration:
        return LayerCalibration(self.width, self.rows, self.amax, lambda: self.packed)
