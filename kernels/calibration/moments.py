"""What the Linear layers of a model receive while it runs: the data that calibrated rounding works from.

Only the second moment XᵀX of a layer's inputs X (rows, width) is kept, with the number of rows and their largest
magnitude. All three are sums or maxima, so calibrations can be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from ..errors import CalibrationError

WIDEST_BLOCK = 3072
"""A wider layer's moment is kept as equal blocks on its diagonal, at most this wide: Flux then takes 11 GB, not 28."""

TILE = 256
"""The moment is symmetric: of each band of this many rows, what lies left of the diagonal band is not stored."""


def block_count(width: int) -> int:
    """How many equal blocks, none wider than WIDEST_BLOCK, stand for a layer of `width` inputs."""
    count = -(-width // WIDEST_BLOCK)
    while width % count:
        count += 1
    return count


def moment_size(width: int) -> int:
    """How many numbers are kept of the second moment of `width` inputs."""
    return sum(math.prod(shape) for shape in _band_shapes(width))


@dataclass(frozen=True)
class LayerCalibration:
    """What one layer saw. `read_moment()` gives the packed moment: fp32 (moment_size(width),), a sum over the rows."""

    width: int
    rows: int
    amax: float
    """Largest magnitude of the inputs."""
    read_moment: Callable[[], torch.Tensor] = field(repr=False)

    def moment(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mean of x xᵀ over the rows, fp32 (blocks, side, side) with blocks * side = width, on `device`."""
        blocks = block_count(self.width)
        side = self.width // blocks
        moment = torch.empty(blocks, side, side, device=device)
        for start, band in bands(self.read_moment().to(device), self.width):
            stop = start + band.shape[1]
            moment[:, start:stop, start:] = band
            moment[:, stop:, start:stop] = band[:, :, stop - start :].mT
        return moment.div_(max(self.rows, 1))

    def __add__(self, other: LayerCalibration) -> LayerCalibration:
        total = self.read_moment() + other.read_moment()
        return LayerCalibration(self.width, self.rows + other.rows, max(self.amax, other.amax), lambda: total)


@dataclass(frozen=True)
class Calibration:
    """What the layers of one model saw, by tensor key (bare ComfyUI layer name + `.weight`)."""

    layers: Mapping[str, LayerCalibration]
    source: str = ""
    """The model's or the file's name, for people."""

    def layer_of(self, key: str, weight: torch.Tensor) -> LayerCalibration | None:
        """What a weight (out, in) was seen to be multiplied with; None if that was never seen, or has another width."""
        layer = self.layers.get(key)
        return layer if layer and weight.ndim == 2 and weight.shape[1] == layer.width else None

    def __add__(self, other: Calibration) -> Calibration:
        """Both runs together. Raises CalibrationError where a layer's widths differ."""
        layers = dict(self.layers)
        for key, layer in other.layers.items():
            if key in layers and layers[key].width != layer.width:
                raise CalibrationError(
                    f"the calibrations are of different models: layer '{key}' has {layers[key].width} inputs in one "
                    f"and {layer.width} in the other; calibrate this model anew"
                )
            layers[key] = layers[key] + layer if key in layers else layer
        return Calibration(layers, " + ".join(filter(None, (self.source, other.source))))

    @property
    def nbytes(self) -> int:
        return sum(4 * moment_size(layer.width) for layer in self.layers.values())


@cache
def _band_shapes(width: int) -> tuple[tuple[int, int, int], ...]:
    """The shape of each band: (blocks, its rows, its columns, which begin at the diagonal)."""
    blocks = block_count(width)
    side = width // blocks
    return tuple((blocks, min(TILE, side - start), side - start) for start in range(0, side, TILE))


def bands(packed: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, band) of a packed moment, as views of it."""
    at = start = 0
    for shape in _band_shapes(width):
        size = math.prod(shape)
        yield start, packed[at : at + size].view(shape)
        at, start = at + size, start + shape[1]
