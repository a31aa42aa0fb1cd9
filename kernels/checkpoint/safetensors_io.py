"""Reads safetensors files tensor by tensor and writes them atomically.

Nothing is memory-mapped: mapped pages count as resident memory, and a file that shrinks would crash the process.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .atomic_file import replacing
from .safetensors_header import MAX_HEADER, TensorInfo, format_header, parse_header, without_duplicates

COPY_CHUNK = 1 << 23
"""Bytes of a tensor in memory at once while it is copied from file to file."""

SYNC_BYTES = 1 << 27
"""Written bytes after which the disk is waited for: what is still on its way takes memory, and time at the end."""

_NOT_SAFETENSORS = {
    b"PK\x03\x04": "is a PyTorch pickle; pickles can run code and are never opened: convert it to safetensors first",
    b"\x80": "is a Python pickle; pickles can run code and are never opened: convert it to safetensors first",
    b"GGUF": "is a GGUF file: start from the 16-bit safetensors file of this model",
    b"version https://git-lfs": "is a Git LFS pointer and not the model: download the model itself",
    b"<": "is a web page, probably of a failed download: download the model again",
}


class CheckpointError(ValueError):
    """A file that cannot be read, written or used; the message names the file, the fault and the way out."""


def fault(path: str | os.PathLike, text: str) -> CheckpointError:
    """A CheckpointError in one line that begins with the file's name."""
    return CheckpointError(" ".join(f"{os.fspath(Path(path).name)}: {text}".splitlines()))


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorInfo):
    """A tensor and where its bytes lie: `offset` from the start of `file`."""

    offset: int
    file: _File


class _File:
    """One open file; reads are safe from several threads."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe could wait for ever
                raise fault(path, "is no file; give a .safetensors file, or the .safetensors.index.json of a set")
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise fault(path, f"cannot be opened: {error.strerror or error}") from error
        self.size = os.fstat(self._file.fileno()).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < len(buffer):
                    count = self._file.readinto(buffer[done:])
                    if not count:
                        raise fault(self.path, "became shorter while it was read; try again when it is complete")
                    done += count
        except OSError as error:
            raise fault(self.path, f"cannot be read: {error.strerror or error}") from error

    def read(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def close(self) -> None:
        self._file.close()


class Source:
    """An open checkpoint: one safetensors file, or several that an index joins. A context manager."""

    def __init__(self, path: Path, files: list[_File], tensors: dict[str, StoredTensor], metadata: dict[str, str]):
        self.path = path
        self.files = files
        self.tensors = tensors
        self.metadata = metadata

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    def read(self, key: str, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, in memory of its own, or in that of `scratch` (uint8, 1-D, at least as long).

        Reading into used memory is four times as fast as into fresh pages.
        Raises CheckpointError: I/O, or a dtype that this torch lacks.
        """
        tensor = self.tensors[key]
        dtype = getattr(torch, tensor.dtype, None)
        if dtype is None:
            raise fault(self.path, f"tensor {key!r} has dtype {tensor.dtype}, which torch {torch.__version__} lacks")
        data = torch.empty(tensor.nbytes, dtype=torch.uint8) if scratch is None else scratch[: tensor.nbytes]
        tensor.file.read_into(memoryview(data.numpy()), tensor.offset)
        return data.view(dtype).reshape(tensor.shape)

    def read_bytes(self, key: str) -> bytes:
        """The tensor's bytes as they lie in the file."""
        tensor = self.tensors[key]
        return tensor.file.read(tensor.offset, tensor.nbytes)

    def chunks(self, key: str) -> Iterator[memoryview]:
        """The tensor's bytes, at most COPY_CHUNK at a time, each in the same buffer."""
        tensor = self.tensors[key]
        buffer = memoryview(bytearray(min(tensor.nbytes, COPY_CHUNK)))
        for start in range(0, tensor.nbytes, COPY_CHUNK):
            chunk = buffer[: tensor.nbytes - start]
            tensor.file.read_into(chunk, tensor.offset + start)
            yield chunk

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def open_source(path: str | os.PathLike) -> Source:
    """Open a `.safetensors` file, or the `.safetensors.index.json` that joins several, and validate its header.

    Raises CheckpointError for anything that is not a whole and consistent safetensors file.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        names = sorted(set(_read_index(path).values()))
    elif path.suffix == ".safetensors":
        names = [path.name]
    else:
        raise fault(path, "is no .safetensors file, the only kind that is read")
    source = Source(path, [], {}, {})
    try:
        for name in names:
            _add_file(source, path.with_name(name))
        if path.suffix == ".json":
            _check_index(source)
    except BaseException:
        source.close()
        raise
    return source


@contextmanager
def writing(
    target: str | os.PathLike,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> Iterator[Writer]:
    """Write a safetensors file of which every size is known: it appears, whole, when the block ends well.

    The block writes each tensor once, fastest in the order of `Writer.order`. Raises CheckpointError: the target
    exists (unless `overwrite`), is no .safetensors name, cannot be written, or the disk is full.
    """
    target = Path(target)
    check_target(target, overwrite)
    try:
        header, offsets = format_header(tensors, metadata)
    except ValueError as error:
        raise fault(target, f"cannot be written: {error}") from error
    size = len(header) + sum(info.nbytes for info in tensors.values())
    with _as_checkpoint_error(target), replacing(target, size) as file:
        writer = Writer(file, tensors, offsets)
        writer.write_at(0, memoryview(header))
        yield writer
        writer.check_complete()
        check_target(target, overwrite)


class Writer:
    """The tensors' part of a safetensors file that is being written."""

    def __init__(self, file, tensors: Mapping[str, TensorInfo], offsets: dict[str, int]):
        self._file = file
        self._tensors = tensors
        self._offsets = offsets
        self._missing = set(offsets)
        self._unsynced = 0

    @property
    def order(self) -> tuple[str, ...]:
        """The tensors as they follow each other in the file."""
        return tuple(self._offsets)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a CPU tensor. Raises ValueError where it is not of the dtype and shape announced."""
        if TensorInfo.of(tensor) != TensorInfo(self._tensors[key].dtype, self._tensors[key].shape):
            raise ValueError(f"tensor {key!r} is {TensorInfo.of(tensor)}, announced was {self._tensors[key]}")
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self.write_at(self._offsets[key], memoryview(data.numpy()))
        self._missing.discard(key)

    def copy(self, key: str, source: Source, source_key: str) -> None:
        """Copy a tensor's bytes from another file."""
        offset = self._offsets[key]
        for chunk in source.chunks(source_key):
            self.write_at(offset, chunk)
            offset += len(chunk)
        self._missing.discard(key)

    def reopen(self, target: Path) -> Source:
        """What has been written so far, to be checked before it takes the target's place."""
        source = Source(target, [], {}, {})
        _add_file(source, Path(self._file.name))
        return source

    def write_at(self, offset: int, data: memoryview) -> None:
        self._file.seek(offset)
        self._unsynced += len(data)
        while len(data):
            data = data[self._file.write(data) :]
        if self._unsynced >= SYNC_BYTES:
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def check_complete(self) -> None:
        if self._missing:
            raise ValueError(f"tensors never written: {', '.join(sorted(self._missing))}")


def write_tensors(
    target: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a state dict atomically, tensor by tensor; any device, any strides. Raises CheckpointError as `writing`."""
    infos = {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}
    with writing(target, infos, metadata or {}, overwrite=overwrite) as writer:
        for key in writer.order:
            writer.write(key, tensors[key].cpu())


def check_target(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError where no file may be written."""
    if target.suffix != ".safetensors":
        raise fault(target, "must end in .safetensors, or ComfyUI does not list it")
    with _as_checkpoint_error(target):
        if not target.parent.is_dir():
            raise fault(target, f"cannot be written: there is no folder {target.parent}")
        if target.is_dir():
            raise fault(target, "is a folder; give a file name")
        if target.exists() and not overwrite:
            raise fault(target, "already exists; choose another name, or ask to overwrite it")


def refuse_same_file(source: Source, target: Path) -> None:
    """Raises CheckpointError where the target is (a link to) one of the source's files."""
    with _as_checkpoint_error(target):
        if any(target.exists() and os.path.samefile(file.path, target) for file in source.files):
            raise fault(target, "is the source itself; choose another name for the result")


@contextmanager
def _as_checkpoint_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fault(target, f"cannot be written: {error.strerror or error}; nothing was changed") from error


def _add_file(source: Source, path: Path) -> None:
    file = _File(path)
    source.files.append(file)
    tensors, metadata = _read_header(file)
    twice = next(iter(tensors.keys() & source.tensors.keys()), None)
    if twice is not None:
        raise fault(source.path, f"joins two files that both hold tensor {twice!r}; download the model again")
    source.tensors.update(tensors)
    source.metadata = metadata | source.metadata


def _read_header(file: _File) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    start = file.read(0, min(file.size, 32))
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        for magic, text in _NOT_SAFETENSORS.items():
            if start.startswith(magic):
                raise fault(file.path, text)
    if len(start) < 8 or length <= MAX_HEADER and 8 + length > file.size:
        raise fault(file.path, "is truncated: it ends inside its header; download it again")
    if length > MAX_HEADER or start[8:9] != b"{":
        raise fault(file.path, "is not a safetensors file: it does not begin with a header; download it again")
    try:
        entries, metadata = parse_header(file.read(8, length))
    except (ValueError, RecursionError) as error:
        raise fault(file.path, f"has an invalid header: {error}; download it again") from error
    end = 8 + length + sum(info.nbytes for info, _ in entries.values())
    if end > file.size:
        raise fault(file.path, f"is truncated: {end - file.size:,} of {end:,} bytes are missing; download it again")
    if end < file.size:
        raise fault(file.path, f"has {file.size - end:,} bytes that belong to no tensor; download it again")
    tensors = {
        key: StoredTensor(info.dtype, info.shape, 8 + length + offset, file) for key, (info, offset) in entries.items()
    }
    return tensors, metadata


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor -> file name in the same folder."""
    file = _File(path)
    try:
        if file.size > MAX_HEADER:
            raise fault(path, f"has {file.size:,} bytes, too many for an index")
        index = json.loads(file.read(0, file.size), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise fault(path, f"is not a valid index: {error}; download it again") from error
    finally:
        file.close()
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(path, "has no weight_map from tensor names to file names; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise fault(path, f"names {name!r}, which is no .safetensors file in the same folder; download it again")
    return weight_map


def _check_index(source: Source) -> None:
    weight_map = _read_index(source.path)
    for key, name in weight_map.items():
        if key not in source.tensors or source.tensors[key].file.path.name != name:
            raise fault(source.path, f"promises tensor {key!r} in {name!r}, where it is not; download that file again")
