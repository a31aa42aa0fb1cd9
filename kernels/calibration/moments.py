"""A calibration: statistics of what the Linear layers of a model receive while it runs.

For a layer's inputs X (rows, width) they are the second moment XᵀX, the number of rows and the largest magnitude. All
three are sums or maxima, so calibrations can be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..errors import CalibrationError
from ..numerics.matrix_precision import exact_products
from ..numerics.scaling import tensor_to_amax
from ..numerics.transfers import to_device

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

WIDEST_BLOCK = 3072
"""Inputs. The moment of a wider layer is kept as equal blocks on its diagonal: 11 GB for Flux in place of 28 GB."""

TILE = 256
"""Rows of a band. The moment is symmetric: each band is stored from its first column on the diagonal to the right."""

LARGEST_INPUT = 1e15
"""Magnitude of the largest input. The moment of 10^8 rows of such inputs still fits into fp32."""

MOMENT_TOLERANCE = 0.01
"""Relative rounding error that a recorded moment may have: fp32 sums over many calls, on some GPUs of TF32 products."""

Store = Callable[[int], torch.Tensor]
"""Number of elements -> an fp32 tensor of that many, contiguous, in main memory; its values do not matter."""

SMALLEST_PRODUCT = 2.0**-126
"""The smallest normal fp32 number. Smaller products of two inputs may be recorded as 0."""


def block_count(width: int) -> int:
    """The number of equal blocks, none wider than WIDEST_BLOCK, for a layer of `width` inputs."""
    count = -(-width // WIDEST_BLOCK)
    while width % count:
        count += 1
    return count


def moment_size(width: int) -> int:
    """Numbers that are stored for the second moment of `width` inputs."""
    return sum(math.prod(shape) for shape in _band_shapes(width))


@dataclass(frozen=True)
class LayerCalibration:
    """The recorded inputs of one layer."""

    width: int
    """Number of inputs."""
    rows: int
    amax: float
    """Largest magnitude of the inputs."""
    read_moment: Callable[[], torch.Tensor] = field(repr=False)
    """Returns the packed moment: fp32 (moment_size(width),), a sum over the rows."""
    further: Mapping[str, object] = field(default_factory=dict)
    """Entries of a calibration file that this version does not know, as JSON data. A sum of calibrations has none."""
    kept: torch.Tensor | None = field(default=None, repr=False)
    """The rows themselves, float (rows, width), where they take less memory than their moment."""

    @property
    def nbytes(self) -> int:
        """Bytes of the rows or the moment."""
        return 4 * moment_size(self.width) if self.kept is None else self.kept.nbytes

    def moment(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mean of x xᵀ over the rows, fp32 (blocks, side, side) with blocks * side = width, on `device`."""
        blocks = block_count(self.width)
        side = self.width // blocks
        moment = torch.empty(blocks, side, side, dtype=torch.float32, device=device)
        for start, band in bands(self._packed_on(torch.device(device)), self.width):
            stop = start + band.shape[1]
            moment[:, start:stop, start:] = band
            moment[:, stop:, start:stop] = band[:, :, stop - start :].mT
        return moment.div_(max(self.rows, 1))

    def _packed_on(self, device: torch.device) -> torch.Tensor:
        """The packed moment on a device. Kept rows are multiplied there: in main memory, their moment is larger."""
        return to_device(self.read_moment(), device) if self.kept is None else products(to_device(self.kept, device))

    def __add__(self, other: LayerCalibration) -> LayerCalibration:
        return self.plus(other)

    def plus(self, other: LayerCalibration, store: Store | None = None) -> LayerCalibration:
        """Both together. store: memory for the sum; None: new memory."""
        amax = max(self.amax, other.amax)
        if self.kept is not None and other.kept is not None:
            both = torch.cat([self.kept, other.kept])
            if both.nbytes <= 4 * moment_size(self.width):
                return few_rows(both, amax)
        target = store(moment_size(self.width)) if store else None
        total = torch.add(self.read_moment().cpu(), other.read_moment().cpu(), out=target)
        return LayerCalibration(self.width, self.rows + other.rows, amax, lambda: total)


@dataclass(frozen=True)
class Calibration:
    """The recorded inputs of a model's layers."""

    layers: Mapping[str, LayerCalibration]
    """By tensor key: bare ComfyUI layer name + `.weight`."""
    source: str = ""
    """Name of the model or file, for people."""
    sensitivity: Sensitivity | None = None
    """The measured effects of the layers on the picture; None: not measured."""

    def layer_of(self, key: str, weight: torch.Tensor) -> LayerCalibration | None:
        """The recorded inputs of a weight (out, in). None: not recorded, or with another width."""
        layer = self.layers.get(key)
        return layer if layer and weight.ndim == 2 and weight.shape[1] == layer.width else None

    def of_encoder(self, prefix: str) -> Calibration:
        """The layers whose tensor keys begin with `prefix`, such as `t5xxl.`, named without it."""
        layers = {key.removeprefix(prefix): layer for key, layer in self.layers.items() if key.startswith(prefix)}
        return Calibration(layers, self.source)

    def __add__(self, other: Calibration) -> Calibration:
        return self.plus(other)

    def plus(self, other: Calibration, store: Store | None = None) -> Calibration:
        """Both runs together. store: memory for the sums; None: new memory.

        Raises CalibrationError if the widths of a layer differ.
        """
        layers = dict(self.layers)
        for key, layer in other.layers.items():
            if key in layers and layers[key].width != layer.width:
                raise CalibrationError(
                    f"the calibrations are of different models: layer '{key}' has {layers[key].width} inputs in one "
                    f"and {layer.width} in the other; calibrate this model again"
                )
            layers[key] = layers[key].plus(layer, store) if key in layers else layer
        measured = [each.sensitivity for each in (self, other) if each.sensitivity]
        sensitivity = measured[0] + measured[1] if len(measured) == 2 else next(iter(measured), None)
        return Calibration(layers, " + ".join(filter(None, (self.source, other.source))), sensitivity)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers.values())


def few_rows(rows: torch.Tensor, amax: float) -> LayerCalibration:
    """The recorded inputs of a layer that saw only these: float (rows, width), in main memory."""
    return LayerCalibration(rows.shape[1], len(rows), amax, lambda: products(rows), kept=rows)


def products(rows: torch.Tensor) -> torch.Tensor:
    """The packed moment of some rows, float (rows, width), on their device."""
    width = rows.shape[1]
    packed = torch.zeros(moment_size(width), dtype=torch.float32, device=rows.device)
    add_products(packed, width, rows)
    return packed


def add_products(packed: torch.Tensor, width: int, rows: torch.Tensor) -> None:
    """Add xᵀx of some rows x to a packed moment. rows: float (rows, width), on the moment's device."""
    blocks = rows.float().reshape(len(rows), block_count(width), -1).transpose(0, 1)
    with exact_products(rows):
        for start, band in bands(packed, width):
            band.baddbmm_(blocks[:, :, start : start + band.shape[1]].mT, blocks[:, :, start:])


@cache
def _band_shapes(width: int) -> tuple[tuple[int, int, int], ...]:
    """The shape of each band: (blocks, rows, columns from the diagonal on)."""
    blocks = block_count(width)
    side = width // blocks
    return tuple((blocks, min(TILE, side - start), side - start) for start in range(0, side, TILE))


def bands(packed: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, band) for each band of a packed moment; the bands are views of it."""
    at = start = 0
    for shape in _band_shapes(width):
        size = math.prod(shape)
        yield start, packed[at : at + size].view(shape)
        at, start = at + size, start + shape[1]


def check_moment(packed: torch.Tensor, width: int, rows: int, amax: float) -> None:
    """Check that inputs with this second moment can exist: `rows` rows of `width` inputs, none larger than `amax`.

    packed: fp32 (moment_size(width),), on any device. The entries must be finite, those on the diagonal between 0 and
    rows * amax², and all others at most the geometric mean of their two diagonal entries, each within
    MOMENT_TOLERANCE. Raises ValueError, which says what the moment holds.
    """
    if not math.isfinite(tensor_to_amax(packed)):
        raise ValueError("NaN or infinite values")
    diagonals = [band[:, :, : band.shape[1]].diagonal(dim1=1, dim2=2) for _, band in bands(packed, width)]
    squares = torch.cat(diagonals, dim=1).double()
    if bool((squares < 0).any()):
        raise ValueError("a negative sum of squares")
    underflow = rows * SMALLEST_PRODUCT
    if bool((squares > (1 + MOMENT_TOLERANCE) * rows * amax**2 + underflow).any()):
        raise ValueError("a sum of squares that is too large for its amax")
    largest = ((1 + MOMENT_TOLERANCE) * squares + underflow).sqrt().float()
    for start, band in bands(packed, width):
        rows_here = largest[:, start : start + band.shape[1], None]
        if bool((band.abs() > rows_here * largest[:, None, start:]).any()):
            raise ValueError("a sum of products that is too large for its sums of squares")
