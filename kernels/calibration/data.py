"""What a model's Linear layers see while it runs: the data that calibrated rounding works from, kept in a file.

Of each layer's inputs X (rows, width) only the second moment XᵀX is kept, with the number of rows and their largest
magnitude. Being sums, they merge.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import torch

from ..checkpoint.safetensors_header import TensorInfo
from ..checkpoint.safetensors_io import CheckpointError, fault, open_source, writing
from ..scaling import tensor_to_amax

WIDEST_BLOCK = 3072
"""A wider layer's moment is kept as equal blocks on its diagonal, at most this wide: Flux then takes 11 GB, not 28."""

TILE = 256
"""The moment is symmetric: of each band of this many rows, what lies left of the diagonal band is not stored."""

MOST_INPUTS = 1 << 20
"""No Linear layer is wider; a file that says so is damaged."""

GOLDEN_SECTION = (5**0.5 - 1) / 2
"""Its multiples fall evenly into 0..1, however many there are."""

METADATA_ENTRY = "stochastic_fp8_calibration"
VERSION = 1


class ActivationError(ValueError):
    """A layer's inputs hold NaN or infinite values, so nothing can be learnt from this run."""


class CalibrationError(ValueError):
    """Calibrations that do not belong together, or none where one is needed."""


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
        for start, band in _bands(self.read_moment().to(device), self.width):
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


class Observer:
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
        for start, band in _bands(self.packed, self.width):
            left = blocks[:, :, start : start + band.shape[1]].mT
            band += (left @ blocks[:, :, start:]).to(band.device)
        self.rows += len(x)
        self.calls += 1
        self.amax = max(self.amax, amax)

    def result(self) -> LayerCalibration:
        return LayerCalibration(self.width, self.rows, self.amax, lambda: self.packed)


@cache
def _band_shapes(width: int) -> tuple[tuple[int, int, int], ...]:
    """The shape of each band: (blocks, its rows, its columns, which begin at the diagonal)."""
    blocks = block_count(width)
    side = width // blocks
    return tuple((blocks, min(TILE, side - start), side - start) for start in range(0, side, TILE))


def _bands(packed: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, band) of a packed moment, as views of it."""
    at = start = 0
    for shape in _band_shapes(width):
        size = math.prod(shape)
        yield start, packed[at : at + size].view(shape)
        at, start = at + size, start + shape[1]


# The file: one packed moment a layer, named by its tensor key, and the rest as JSON in the metadata.


def save_calibration(calibration: Calibration, target: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a calibration to a .safetensors file, atomically. Raises CheckpointError: the file cannot be written."""
    layers = calibration.layers
    infos = {key: TensorInfo("float32", (moment_size(layer.width),)) for key, layer in layers.items()}
    entries = {key: {"width": layer.width, "rows": layer.rows, "amax": layer.amax} for key, layer in layers.items()}
    text = json.dumps({"version": VERSION, "source": calibration.source, "layers": entries})
    with writing(target, infos, {METADATA_ENTRY: text}, overwrite=overwrite) as writer:
        for key in writer.order:
            writer.write(key, layers[key].read_moment().cpu())


def load_calibration(path: str | os.PathLike) -> Calibration:
    """Open a calibration file. Moments are read when they are asked for, a layer at a time.

    Raises CheckpointError: no safetensors file, or one that holds no calibration or a damaged one.
    """
    with open_source(path) as source:
        if METADATA_ENTRY not in source.metadata:
            raise fault(path, "holds no FP8 calibration; give a file that Save FP8 Calibration wrote")
        try:
            stated = json.loads(source.metadata[METADATA_ENTRY])
            if stated["version"] != VERSION:
                raise fault(
                    path, f"is a calibration of version {stated['version']}, known is {VERSION}: update the pack"
                )
            if stated["layers"].keys() != source.tensors.keys():
                raise ValueError("its metadata and its tensors name different layers")
            layers = {
                key: _stored_layer(path, key, source.tensors[key], **stated["layers"][key]) for key in source.tensors
            }
            return Calibration(layers, str(stated["source"]))
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise fault(path, f"is a damaged calibration: {error}; calibrate again") from error


def _stored_layer(path, key: str, info: TensorInfo, width: int, rows: int, amax: float) -> LayerCalibration:
    natural = type(width) is int and type(rows) is int and 0 < width <= MOST_INPUTS and rows > 0
    if not natural or not isinstance(amax, float) or not 0 <= amax < math.inf:
        raise ValueError(f"layer {key!r} has width {width!r}, rows {rows!r} and amax {amax!r}")
    if TensorInfo(info.dtype, info.shape) != TensorInfo("float32", (moment_size(width),)):
        raise ValueError(f"layer {key!r} of width {width} has {info.dtype} {info.shape}")
    return LayerCalibration(width, rows, amax, partial(_read_moment, path, key))


def _read_moment(path, key: str) -> torch.Tensor:
    with open_source(path) as source:
        moment = source.read(key)
    if not math.isfinite(tensor_to_amax(moment)):
        raise fault(path, f"holds NaN or infinite values for layer {key!r}; calibrate again")
    return moment
