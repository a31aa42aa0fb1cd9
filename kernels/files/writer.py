"""Writes safetensors files atomically, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

import torch

from ..errors import file_error
from .atomic_file import replacing
from .header import TensorInfo, format_header
from .reader import Source, is_safetensors, open_written

EXISTS = "already exists; choose another name, or ask to overwrite it"

SYNC_BYTES = 1 << 27
"""Bytes written between two fsync calls. Unsynced bytes take memory, and time at the end."""


@contextmanager
def writing(
    target: str | os.PathLike[str],
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    source: Source | None = None,
) -> Iterator[Writer]:
    """Write a safetensors file whose tensors are known in advance. It appears when the block ends without an exception.

    The block writes each tensor once, in any order; that of `Writer.order` is the fastest. source: what the tensors are
    read from; it must not change meanwhile.
    Raises CheckpointError: the target exists (unless `overwrite`), does not end in .safetensors or .sft, cannot be
    written, the disk is full, or the source changed; ValueError: a tensor was not written, or is not as announced. What
    else the block raises goes through as it is; the target is then unchanged.
    """
    target = Path(target)
    check_target(target, overwrite)
    try:
        header, offsets = format_header(tensors, metadata)
    except ValueError as error:
        raise file_error(target, f"cannot be written: {error}") from error
    size = len(header) + sum(info.nbytes for info in tensors.values())
    with ExitStack() as stack:
        with _as_checkpoint_error(target):
            file = stack.enter_context(replacing(target, size, overwrite=overwrite))
        writer = Writer(target, file, tensors, offsets)
        writer.write_at(0, memoryview(header))
        del header, offsets, tensors, metadata  # of 200,000 tensors they take as much memory as their inspection
        yield writer
        writer.check_complete()
        if source:
            source.check_unchanged()
        check_target(target, overwrite)
        with _as_checkpoint_error(target):
            stack.close()  # replaces the target


class Writer:
    """Writes the tensors of an open safetensors file."""

    def __init__(self, target: Path, file: FileIO, tensors: Mapping[str, TensorInfo], offsets: dict[str, int]):
        """target: the file that `file` becomes, which errors name."""
        self._target, self._file = target, file
        self._tensors = tensors
        self._offsets = offsets
        self._missing = set(offsets)
        self._unsynced = 0

    @property
    def order(self) -> tuple[str, ...]:
        """The tensors in file order."""
        return tuple(self._offsets)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a CPU tensor. Raises ValueError unless it has the announced dtype and shape."""
        if TensorInfo.of(tensor) != TensorInfo(self._tensors[key].dtype, self._tensors[key].shape):
            raise ValueError(f"tensor {key!r} is {TensorInfo.of(tensor)}, but was announced as {self._tensors[key]}")
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self.write_at(self._offsets[key], data.numpy().data)
        self._missing.discard(key)

    def copy(self, key: str, source: Source, source_key: str, look: Callable[[memoryview], None] | None = None) -> None:
        """Copy a tensor's bytes from another file. look: called with each piece of them, whole elements each."""
        offset = self._offsets[key]
        for chunk in source.chunks(source_key):
            if look:
                look(chunk)
            self.write_at(offset, chunk)
            offset += len(chunk)
        self._missing.discard(key)

    def reopen(self) -> Source:
        """Open the complete file, to verify it before it replaces the target. Nothing is written after that."""
        self.check_complete()
        self._tensors, self._offsets, self._missing = {}, {}, set()
        return open_written(Path(self._file.name), self._target)

    def write_at(self, offset: int, data: memoryview) -> None:
        with _as_checkpoint_error(self._target):
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
    """Raises CheckpointError if no file may be written there."""
    if not is_safetensors(target.name):
        raise file_error(target, "must end in .safetensors or .sft, because ComfyUI lists no other files")
    with _as_checkpoint_error(target):
        if not target.parent.is_dir():
            raise file_error(target, f"cannot be written: there is no folder {target.parent}")
        if target.is_dir():
            raise file_error(target, "is a folder; give a file name")
        if target.is_symlink() and not target.exists():
            raise file_error(target, "is a link to a file that does not exist; delete the link, or choose another name")
        if target.exists() and not target.is_file():
            raise file_error(target, "is not a regular file; choose another name")
        if target.exists() and not overwrite:
            raise file_error(target, EXISTS)


def refuse_same_file(source: Source, target: Path) -> None:
    """Raises CheckpointError if the target is one of the source's files, or a link to one."""
    with _as_checkpoint_error(target):
        if any(target.exists() and os.path.samefile(file.path, target) for file in source.files):
            raise file_error(target, "is the source itself; choose another name for the target")


@contextmanager
def _as_checkpoint_error(target: Path) -> Iterator[None]:
    """For operations on the target alone: an OSError in this block is a fault of the target."""
    try:
        yield
    except FileExistsError as error:
        raise file_error(target, EXISTS) from error
    except OSError as error:
        raise file_error(target, f"cannot be written: {error.strerror or error}; nothing was changed") from error
