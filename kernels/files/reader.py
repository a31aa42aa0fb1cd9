"""Reads safetensors files, one tensor at a time.

Files are not memory-mapped: mapped pages count as resident memory, and a file that shrinks would crash the process.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import CheckpointError, file_error, limit_error
from .bounded_json import MAX_JSON, TooLargeError, parse_json
from .header import MAX_HEADER, MAX_TENSORS, TensorInfo, parse_header, without_duplicates

LIBRARY_MAX_HEADER = 100_000_000
"""Bytes. The safetensors library refuses a longer header."""

COPY_CHUNK = 1 << 23
"""Bytes in memory while a tensor is copied from file to file."""

_ENDINGS = (".safetensors", ".sft")
_INDEX = re.compile(r"\.index(?:\.\w+)?\.json$", re.IGNORECASE)
_SHARD = re.compile(
    r"(?P<stem>.+?)(?P<inner>\.\w+)?-(?P<number>[0-9]{1,6})-of-(?P<of>[0-9]{1,6})(?P<outer>\.\w+)?"
    r"\.(?:safetensors|sft)$",
    re.IGNORECASE,
)
"""A file of a set: `model-00001-of-00003.safetensors`; a variant is `model.fp16-…` or `…-of-00003.fp16.safetensors`."""
_NOT_IN_A_NAME = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that no name in an index has: a separator, control characters, and what has no bytes in UTF-8."""

_AGAIN = "download it again"
_PICKLE = "pickles can run code and are never opened", "convert it to safetensors first"

_NOT_SAFETENSORS = {
    b"PK\x03\x04": (f"is a PyTorch pickle; {_PICKLE[0]}", _PICKLE[1]),
    b"\x80": (f"is a Python pickle; {_PICKLE[0]}", _PICKLE[1]),
    b"GGUF": ("is a GGUF file", "start from the 16-bit safetensors file of this model"),
    b"version https://git-lfs": ("is a Git LFS pointer, not the model", "download the model itself"),
    b"<": ("is a web page, probably from a failed download", "download the model again"),
}
"""First bytes of a file that is not safetensors -> what it is, and the way out."""


class Extent(NamedTuple):
    """Consecutive bytes of a file."""

    file: _File
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorInfo):
    """A tensor in a file. Its bytes begin at `offset` from the start of `file`."""

    offset: int
    file: _File

    @property
    def extents(self) -> Sequence[Extent]:
        """Where its bytes are, in their order."""
        return (Extent(self.file, self.offset, self.nbytes),)


class _File:
    """One open file. Several threads can read it at the same time."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe could wait forever
                raise file_error(
                    path, "is not a regular file", "give a .safetensors file, or the .safetensors.index.json of a set"
                )
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise file_error(path, f"cannot be opened: {error.strerror or error}") from error
        self.size, self._modified = self._state()

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file was written to since it was opened."""
        if self._state() != (self.size, self._modified):
            raise file_error(self.path, "changed while it was read", "try again when it is complete")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < len(buffer):
                    count = self._file.readinto(buffer[done:])
                    if not count:
                        raise file_error(self.path, "shrank while it was read", "try again when it is complete")
                    done += count
        except OSError as error:
            raise file_error(self.path, f"cannot be read: {error.strerror or error}") from error

    def read(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return buffer

    def close(self) -> None:
        self._file.close()

    def _state(self) -> tuple[int, int]:
        """Size, and time of the last change in ns."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


class Source:
    """An open checkpoint: one safetensors file, or the files of an index. A context manager."""

    def __init__(self, path: Path, files: list[_File], tensors: dict[str, StoredTensor], metadata: dict[str, str]):
        self.path = path
        self.files = files
        self.tensors = tensors
        self.metadata = metadata
        """The entries of all files; where two files differ, those of the first."""
        self.metadata_by_file: list[dict[str, str]] = []
        self.notes: Sequence[str] = ()
        """What else the user should know about this source."""

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    def read(self, key: str, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, in new memory or in `scratch` (uint8, 1-D, at least `nbytes` long).

        Reading into memory in use is four times as fast as into new pages.
        Raises CheckpointError: the file cannot be read, or this version of torch lacks the dtype.
        """
        tensor = self.tensors[key]
        dtype = getattr(torch, tensor.dtype, None)
        if dtype is None:
            raise file_error(
                self.path, f"tensor {key!r} has dtype {tensor.dtype}, which torch {torch.__version__} lacks"
            )
        data = (
            torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu") if scratch is None else scratch[: tensor.nbytes]
        )
        self._read_into(data.numpy().data, tensor)
        return data.view(dtype).reshape(tensor.shape)

    def read_bytes(self, key: str) -> bytes:
        """The tensor's bytes, as in the file."""
        tensor = self.tensors[key]
        buffer = bytearray(tensor.nbytes)
        self._read_into(memoryview(buffer), tensor)
        return bytes(buffer)

    def chunks(self, key: str) -> Iterator[memoryview]:
        """The tensor's bytes, at most COPY_CHUNK at a time. The next chunk overwrites the last one's memory."""
        tensor = self.tensors[key]
        buffer = memoryview(bytearray(min(tensor.nbytes, COPY_CHUNK)))
        for file, offset, nbytes in tensor.extents:
            for start in range(0, nbytes, COPY_CHUNK):
                chunk = buffer[: nbytes - start]
                file.read_into(chunk, offset + start)
                yield chunk

    @staticmethod
    def _read_into(buffer: memoryview, tensor: StoredTensor) -> None:
        done = 0
        for file, offset, nbytes in tensor.extents:
            file.read_into(buffer[done : done + nbytes], offset)
            done += nbytes

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file was written to since it was opened: what was read may be a mixture."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_safetensors(name: str) -> bool:
    """Whether ComfyUI reads a file of this name as safetensors: `.safetensors` or `.sft`, in upper or lower case."""
    return name.lower().endswith(_ENDINGS)


def is_index(name: str) -> bool:
    """Whether a file of this name lists the files of a set: `model.safetensors.index.json` or `….index.fp16.json`."""
    return bool(_INDEX.search(name))


class Shard(NamedTuple):
    """One file of a set, by its name."""

    number: int
    """From 1."""
    of: int
    """How many files the set has."""
    indices: tuple[str, str]
    """The names that the index of the set can have."""


def shard(name: str) -> Shard | None:
    """What the name of a file of a set says, in the one form that indexes use; None for any other name.

    name: with or without folders before it; `indices` have the same.
    """
    match = _SHARD.match(name)
    if match is None:
        return None
    stem, inner, outer = match["stem"], match["inner"] or "", match["outer"] or ""
    indices = f"{stem}{inner}.safetensors.index.json", f"{stem}.safetensors.index{inner or outer}.json"
    return Shard(int(match["number"]), int(match["of"]), indices)


def source_files(path: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that hold the tensors of a source: the file itself, or those that an index lists.

    Raises CheckpointError: another kind of file, or an invalid index.
    """
    path = Path(path)
    if is_index(path.name):
        return [path.with_name(name) for name in sorted(set(_read_index(path).values()))]
    if not is_safetensors(path.name):
        raise file_error(path, "is not a .safetensors file; other formats cannot be read")
    return [path]


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a `.safetensors` (or `.sft`) file, or all files of a `.safetensors.index.json`, and validate the headers.

    Raises CheckpointError for anything that is not a complete and consistent safetensors file.
    """
    path = Path(path)
    files = source_files(path)
    source = Source(path, [], {}, {})
    try:
        for file in files:
            _add_file(source, file)
        if is_index(path.name):
            _check_index(source)
    except BaseException:
        source.close()
        raise
    return source


def open_written(path: Path, target: Path) -> Source:
    """Open a file that is still being written at `path`. Errors name `target`, the file that it will become."""
    source = Source(target, [], {}, {})
    _add_file(source, path)
    return source


def _add_file(source: Source, path: Path) -> None:
    file = _File(path)
    source.files.append(file)
    tensors, metadata = _read_header(file)
    twice = next(iter(tensors.keys() & source.tensors.keys()), None)
    if twice is not None:
        raise file_error(source.path, f"lists two files that both hold tensor {twice!r}", "download the model again")
    if len(tensors) + len(source.tensors) > MAX_TENSORS:
        raise limit_error(
            source.path, f"lists files of more than {MAX_TENSORS:,} tensors together", "download the model again"
        )
    source.tensors.update(tensors)
    source.metadata = metadata | source.metadata
    source.metadata_by_file.append(metadata)
    if sum(map(len, source.metadata.values())) > MAX_HEADER:
        raise limit_error(
            source.path, f"lists files with more than {MAX_HEADER:,} characters of metadata together", _AGAIN
        )


def _read_header(file: _File) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    start = file.read(0, min(file.size, 32))
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        for magic, (fault, way_out) in _NOT_SAFETENSORS.items():
            if start.startswith(magic):
                raise file_error(file.path, fault, way_out)
    if len(start) < 8 or length <= MAX_HEADER and 8 + length > file.size:
        raise file_error(file.path, "is truncated: it ends inside its header", _AGAIN)
    if MAX_HEADER < length < file.size and start[8:9] == b"{":
        error = limit_error if length <= LIBRARY_MAX_HEADER else file_error
        raise error(
            file.path,
            f"has a header of {length:,} bytes; at most {MAX_HEADER:,} are read, and headers of published models have "
            "less than 2 MB",
            _AGAIN,
        )
    if length > MAX_HEADER or start[8:9] != b"{":
        raise file_error(file.path, "is not a safetensors file: it does not begin with a header", _AGAIN)
    try:
        entries, metadata = parse_header(file.read(8, length))
    except TooLargeError as error:
        raise limit_error(file.path, f"has a header beyond the limits: {error}", _AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise file_error(file.path, f"has an invalid header: {error}", _AGAIN) from error
    end = 8 + length + sum(info.nbytes for info, _ in entries.values())
    if end > file.size:
        raise file_error(file.path, f"is truncated: {end - file.size:,} of {end:,} bytes are missing", _AGAIN)
    if end < file.size:
        raise file_error(file.path, f"has {file.size - end:,} bytes after the last tensor", _AGAIN)
    tensors = {
        key: StoredTensor(info.dtype, info.shape, 8 + length + offset, file) for key, (info, offset) in entries.items()
    }
    return tensors, metadata


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor -> name of a file in the same folder."""
    file = _File(path)
    try:
        if file.size > MAX_JSON:
            raise limit_error(
                path,
                f"has {file.size:,} bytes, too many for an index: at most {MAX_JSON:,} are read",
                _AGAIN,
            )
        index = parse_json(file.read(0, file.size), hook=without_duplicates)
    except CheckpointError:
        raise
    except TooLargeError as error:
        raise limit_error(path, f"is an index beyond the limits: {error}", _AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise file_error(path, f"is not a valid index: {error}", _AGAIN) from error
    finally:
        file.close()
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise file_error(path, "has no weight_map from tensor names to file names", _AGAIN)
    if len(weight_map) > MAX_TENSORS:
        raise limit_error(path, f"lists more than {MAX_TENSORS:,} tensors", _AGAIN)
    for name in weight_map.values():
        if not isinstance(name, str) or not _is_in_folder(name):
            raise file_error(path, f"names {name!r}, which is not a .safetensors file in the same folder", _AGAIN)
    return weight_map


def _is_in_folder(name: str) -> bool:
    """Whether this is the name of a safetensors file, without a folder."""
    return Path(name).name == name and not _NOT_IN_A_NAME.search(name) and is_safetensors(name)


def _check_index(source: Source) -> None:
    weight_map = _read_index(source.path)
    for key, name in weight_map.items():
        if key not in source.tensors or source.tensors[key].file.path.name != name:
            raise file_error(
                source.path, f"lists tensor {key!r} in {name!r}, which does not hold it", "download that file again"
            )
