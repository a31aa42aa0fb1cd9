"""The calibration file: one packed moment per layer, named by its tensor key; the rest is JSON metadata."""

from __future__ import annotations

import json
import math
import os
from functools import partial

import torch

from ..errors import CheckpointError, file_error
from ..files.header import TensorInfo
from ..files.reader import open_source
from ..files.writer import writing
from ..numerics.scaling import tensor_to_amax
from .moments import Calibration, LayerCalibration, moment_size

MOST_INPUTS = 1 << 20
"""Width of the widest layer. A file with a wider one is damaged."""

METADATA_ENTRY = "stochastic_fp8_calibration"
FILE_VERSION = 1


def save_calibration(calibration: Calibration, target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a calibration to a .safetensors file, atomically. Raises CheckpointError: the file cannot be written."""
    layers = calibration.layers
    infos = {key: TensorInfo("float32", (moment_size(layer.width),)) for key, layer in layers.items()}
    entries = {key: {"width": layer.width, "rows": layer.rows, "amax": layer.amax} for key, layer in layers.items()}
    text = json.dumps({"version": FILE_VERSION, "source": calibration.source, "layers": entries})
    with writing(target, infos, {METADATA_ENTRY: text}, overwrite=overwrite) as writer:
        for key in writer.order:
            writer.write(key, layers[key].read_moment().cpu())


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Open a calibration file. The moment of a layer is read when it is needed.

    Raises CheckpointError: not a safetensors file, no calibration in it, or a damaged one.
    """
    with open_source(path) as source:
        if METADATA_ENTRY not in source.metadata:
            raise file_error(path, "does not hold an FP8 calibration; give a file written by Save FP8 Calibration")
        try:
            stated = json.loads(source.metadata[METADATA_ENTRY])
            if stated["version"] != FILE_VERSION:
                raise file_error(
                    path, f"is a calibration of version {stated['version']}; known: {FILE_VERSION}. Update the pack"
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
            raise file_error(path, f"is a damaged calibration: {error}; calibrate again") from error


def _stored_layer(
    path: str | os.PathLike[str], key: str, info: TensorInfo, width: int, rows: int, amax: float
) -> LayerCalibration:
    positive = type(width) is int and type(rows) is int and 0 < width <= MOST_INPUTS and rows > 0
    if not positive or not isinstance(amax, float) or not 0 <= amax < math.inf:
        raise ValueError(f"layer {key!r} has width {width!r}, rows {rows!r} and amax {amax!r}")
    if TensorInfo(info.dtype, info.shape) != TensorInfo("float32", (moment_size(width),)):
        raise ValueError(f"layer {key!r} of width {width} has {info.dtype} {info.shape}")
    return LayerCalibration(width, rows, amax, partial(_read_moment, path, key))


def _read_moment(path: str | os.PathLike[str], key: str) -> torch.Tensor:
    with open_source(path) as source:
        moment = source.read(key)
    if not math.isfinite(tensor_to_amax(moment)):
        raise file_error(path, f"holds NaN or infinite values for layer {key!r}; calibrate again")
    return moment
