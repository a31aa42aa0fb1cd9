"""Memory in temporary files, which the system writes to disk and takes back when it needs the room."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path

import torch

from .. import display

log = logging.getLogger("stochastic_fp8")

PREFIX = "fp8_calibration_"


def mapped_memory(folder: Path, count: int) -> torch.Tensor:
    """`count` fp32 numbers in a new temporary file of a folder. Ordinary memory if the disk has no room for them.

    The file goes when the tensor does: on POSIX it has no name from the start, so not even a killed process leaves it
    behind. Elsewhere it is removed later, and one that is left lies in the folder.
    """
    size = 4 * count
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        try:
            _reserve(handle, size, folder)
            numbers = torch.from_file(name, shared=True, size=count, dtype=torch.float32, device="cpu")
        finally:
            os.close(handle)
            if not _removed(name):
                weakref.finalize(numbers.untyped_storage(), partial(_removed, name))
    except (OSError, RuntimeError, ValueError) as error:
        log.warning("a calibration of %s stays in main memory, because %s: %s", display.bytes(size), folder, error)
        return torch.empty(count, dtype=torch.float32, device="cpu")
    return numbers


def _reserve(handle: int, size: int, folder: Path) -> None:
    """Make the file as long, and its room on the disk its own: writing to memory cannot report a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, max(size, 1))
    elif shutil.disk_usage(folder).free < 2 * size:
        raise OSError("the disk is full")
    else:
        os.truncate(handle, max(size, 1))


def _removed(name: str) -> bool:
    """Whether a file could be removed: on Windows, not while it is mapped."""
    try:
        os.unlink(name)
    except OSError:
        return False
    return True
