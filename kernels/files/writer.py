"""Writes safetensors files atomically, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import file_error
from .atomic_file import replacing
from .header import TensorInfo, format_header
from .reader import Source, open_written

SYNC_BYTES = 1 << 27
"""Written bytes after which the disk is waited for: what is still on its way takes memory, and time at the end."""


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
        raise file_error(target, f"cannot be written: {error}") from error
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
        return open_written(Path(self._file.name), target)

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


def check_target(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError where no file may be written."""
    if target.suffix != ".safetensors":
        raise file_error(target, "must end in .safetensors, or ComfyUI does not list it")
    with _as_checkpoint_error(target):
        if not target.parent.is_dir():
            raise file_error(target, f"cannot be written: there is no folder {target.parent}")
        if target.is_dir():
            raise file_error(target, "is a folder; give a file name")
        if target.exists() and not overwrite:
            raise file_error(target, "already exists; choose another name, or ask to overwrite it")


def refuse_same_file(source: Source, target: Path) -> None:
    """Raises CheckpointError where the target is (a link to) one of the source's files."""
    with _as_checkpoint_error(target):
        if any(target.exists() and os.path.samefile(file.path, target) for file in source.files):
            raise file_error(target, "is the source itself; choose another name for the result")


@contextmanager
def _as_checkpoint_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise file_error(target, f"cannot be written: {error.strerror or error}; nothing was changed") from error
