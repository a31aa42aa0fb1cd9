"""The calibration file: one packed moment per layer, named by its tensor key; the rest is JSON metadata."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, file_error
from ..files.bounded_json import parse_json
from ..files.header import TensorInfo, without_duplicates
from ..files.reader import Source, open_source
from ..files.writer import check_target, writing
from ..progress import Meter, ProgressCallback
from .moments import LARGEST_INPUT, Calibration, LayerCalibration, check_moment, moment_size
from .sensitivity import Sensitivity
from .sensitivity import from_json as sensitivity_from_json
from .sensitivity import to_json as sensitivity_to_json

MOST_INPUTS = 1 << 20
"""Width of the widest layer. A file with a wider one is damaged."""
MOST_ROWS = 1 << 53
"""Rows of recorded inputs. A file with more is damaged: the recorder would need centuries."""
MOST_VALUES = 16
"""JSON values per layer. Metadata with more is damaged; it could take gigabytes of memory."""

METADATA_ENTRY = "stochastic_fp8_calibration"
FILE_VERSION = 2
"""Version 1 has no digests. A reader ignores entries of a layer that it does not know."""

SENSITIVITY_ENTRY = "stochastic_fp8_sensitivity"
"""The measured effects of the layers, with a version and a digest of their own. Optional."""

DIGEST_BYTES = 8
"""Length of a BLAKE2b digest. In the file it is hexadecimal."""


def save_calibration(
    calibration: Calibration,
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a calibration to a .safetensors file, atomically.

    Each moment is read twice: the header, which is written first, holds its digest. progress counts both.

    Raises CheckpointError: the file cannot be written, or would be refused when it is loaded.
    """
    check_target(Path(target), overwrite)
    layers = calibration.layers
    infos = {key: TensorInfo("float32", (moment_size(layer.width),)) for key, layer in layers.items()}
    meter = Meter(2 * sum(info.nbytes for info in infos.values()), progress)
    entries = {}
    for key, layer in layers.items():
        meter.start(key, infos[key].nbytes)
        entries[key] = _entry(target, key, layer)
    stated = {"version": FILE_VERSION, "source": calibration.source, "layers": entries}
    text = json.dumps(stated | {"digest": _digest(stated)})
    metadata = {METADATA_ENTRY: text, **_sensitivity_entry(calibration)}
    with writing(target, infos, metadata, overwrite=overwrite) as writer:
        for key in writer.order:
            meter.start(key, infos[key].nbytes)
            writer.write(key, layers[key].read_moment().cpu())
        meter.finish()


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Open a calibration file. The moment of a layer is read and checked when it is needed.

    Reading a moment raises CheckpointError if it is damaged, or if the file has been changed or replaced since then.

    Raises CheckpointError: not a safetensors file, no calibration in it, or a damaged one.
    """
    with open_source(path) as source:
        file = _OpenCalibration(path, _identity(source))
        if METADATA_ENTRY not in source.metadata:
            raise file_error(path, "does not hold an FP8 calibration; give a file written by Save Calibration")
        try:
            stated = _parse(source.metadata[METADATA_ENTRY], len(source.tensors))
            version = stated["version"]
            if type(version) is not int or version < 1:
                raise ValueError(f"its version is {reprlib.repr(version)}")
            if version > FILE_VERSION:
                known = f"known: 1 to {FILE_VERSION}. Update the pack"
                raise file_error(path, f"is a calibration of version {reprlib.repr(version)}; {known}")
            if version > 1 and stated.pop("digest") != _digest(stated):
                raise ValueError("its metadata differs from the digest")
            if stated["layers"].keys() != source.tensors.keys():
                raise ValueError("its metadata and its tensors name different layers")
            layers = {
                key: _stored_layer(file, key, source.tensors[key], stated["layers"][key], digests=version > 1)
                for key in source.tensors
            }
            return Calibration(layers, str(stated["source"]), _stored_sensitivity(source.metadata))
        except CheckpointError:
            raise
        except KeyError as error:
            raise file_error(path, f"is a damaged calibration: it lacks the entry {error}; calibrate again") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise file_error(path, f"is a damaged calibration: {error}; calibrate again") from error


@dataclass(frozen=True)
class _OpenCalibration:
    """A calibration file that was loaded, whose moments are read later."""

    path: str | os.PathLike[str]
    identity: object
    """_identity when it was loaded."""

    def read(self, key: str, numbers: tuple[int, int, float], digest: str | None) -> torch.Tensor:
        """The packed moment of a layer, checked. numbers: width, rows and amax. digest: None for version 1."""
        with open_source(self.path) as source:
            if _identity(source) != self.identity:
                raise self._changed()
            moment = source.read(key)
            if _identity(source) != self.identity:
                raise self._changed()
        try:
            if digest is not None and digest != _digest([key, *numbers], moment):
                raise ValueError("damaged bytes, which differ from the digest,")
            check_moment(moment, *numbers)
        except ValueError as error:
            raise file_error(self.path, f"holds {error} for layer {key!r}; calibrate again") from error
        return moment

    def _changed(self) -> CheckpointError:
        return file_error(self.path, "was changed or replaced after it was loaded; load it again")


def _identity(source: Source) -> object:
    """What changes if a file is written again: the size and time of each file at the path, and the metadata."""
    try:
        stats = [os.stat(file.path) for file in source.files]
    except OSError as error:
        raise file_error(source.path, f"cannot be read: {error.strerror or error}") from error
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats], _digest(source.metadata)


def _entry(target: str | os.PathLike[str], key: str, layer: LayerCalibration) -> dict[str, object]:
    """What the metadata says about a layer. Raises CheckpointError for what load_calibration would refuse."""
    width, rows, amax = layer.width, layer.rows, layer.amax
    moment = layer.read_moment().cpu()
    try:
        _check_numbers(key, width, rows, amax)
    except ValueError as error:
        raise file_error(target, f"cannot be written: {error}; calibrate again") from error
    try:
        check_moment(moment, width, rows, amax)
    except ValueError as error:
        raise file_error(
            target, f"cannot be written: the moment of layer {key!r} holds {error}; calibrate again"
        ) from error
    digest = _digest([key, width, rows, amax], moment)
    return {**layer.further, "width": width, "rows": rows, "amax": amax, "digest": digest}


def _sensitivity_entry(calibration: Calibration) -> dict[str, str]:
    if calibration.sensitivity is None:
        return {}
    stated = sensitivity_to_json(calibration.sensitivity)
    return {SENSITIVITY_ENTRY: json.dumps(stated | {"digest": _digest(stated)})}


def _stored_sensitivity(metadata: Mapping[str, str]) -> Sensitivity | None:
    """Raises ValueError for a damaged entry."""
    if SENSITIVITY_ENTRY not in metadata:
        return None
    stated = parse_json(metadata[SENSITIVITY_ENTRY], hook=without_duplicates)
    if not isinstance(stated, dict) or stated.pop("digest", None) != _digest(stated):
        raise ValueError("its sensitivities differ from their digest")
    return sensitivity_from_json(stated)


def _stored_layer(file: _OpenCalibration, key: str, info: TensorInfo, entry: object, digests: bool) -> LayerCalibration:
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of layer {key!r} is not an object")
    further = dict(entry)
    width, rows, amax = (further.pop(name) for name in ("width", "rows", "amax"))
    digest = further.pop("digest") if digests else None
    width, rows, amax = numbers = _check_numbers(key, width, rows, amax)
    if digests and not isinstance(digest, str):
        raise ValueError(f"layer {key!r} has the digest {reprlib.repr(digest)}")
    if TensorInfo(info.dtype, info.shape) != TensorInfo("float32", (moment_size(width),)):
        raise ValueError(f"layer {key!r} of width {width} has {info.dtype} {info.shape}")
    return LayerCalibration(width, rows, amax, lambda: file.read(key, numbers, digest), further)


def _check_numbers(key: str, width: object, rows: object, amax: object) -> tuple[int, int, float]:
    """Raises ValueError, which names the layer, if no calibration can have these numbers."""
    if (
        isinstance(width, int)
        and isinstance(rows, int)
        and isinstance(amax, float)
        and not {type(width), type(rows)} & {bool}
        and 0 < width <= MOST_INPUTS
        and 0 < rows <= MOST_ROWS
        and 0 <= amax <= LARGEST_INPUT
    ):
        return width, rows, amax
    texts = [reprlib.repr(number) for number in (width, rows, amax)]
    raise ValueError("layer {!r} has width {}, rows {} and amax {}".format(key, *texts))


def _parse(text: str, layers: int) -> dict[str, Any]:
    """The JSON of the metadata entry. Raises ValueError, also if it holds far more values than the layers need."""
    if sum(map(text.count, ",[{")) > MOST_VALUES * (layers + MOST_VALUES):
        raise ValueError(f"its metadata holds more than {MOST_VALUES} values per layer")
    stated = json.loads(text, object_pairs_hook=without_duplicates)
    if not isinstance(stated, dict):
        raise ValueError("its metadata is not an object")
    return stated


def _digest(stated: object, tensor: torch.Tensor | None = None) -> str:
    """BLAKE2b of JSON data, with sorted keys and without spaces, followed by the bytes of a tensor on the CPU."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    digest.update(json.dumps(stated, sort_keys=True, separators=(",", ":")).encode())
    if tensor is not None:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
