"""A file that appears whole or not at all, whatever ends the job: an error, a cancel, a signal, a power cut."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: there an open file cannot be deleted, which is the lock
    fcntl = None


@contextmanager
def replacing(target: Path, size: int) -> Iterator[BinaryIO]:
    """A new unbuffered file for `size` bytes, which takes `target`'s place when the block ends well.

    It is written beside the target as `<name>.tmp-<random>`. When the block raises, it is deleted and the target is as
    it was. What killed jobs for the same target left behind is removed first; a living job's file is locked and stays.
    Raises OSError: no space, no permission, no such folder, target locked (Windows).
    """
    remove_stale(target)
    check_free_space(target, size)
    file, temporary = _create_locked(target)
    try:
        with file, _sigterm_raises():
            yield file
            os.fsync(file.fileno())
            if os.name == "nt":
                file.close()
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def remove_stale(target: Path) -> None:
    """Delete the temporary files of dead jobs for this target."""
    name = re.compile(re.escape(target.name) + r"\.tmp-[0-9a-f]{16}")
    for path in target.parent.iterdir():
        if name.fullmatch(path.name):
            with suppress(OSError), open(path, "rb") as file:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    file.close()
                path.unlink()


def check_free_space(target: Path, size: int) -> None:
    """Raises OSError if the target's disk has less than `size` bytes left."""
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise OSError(f"{size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free: free some space first")


def _create_locked(target: Path) -> tuple[BinaryIO, Path]:
    while True:
        temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(8)}")
        file = open(temporary, "x+b", buffering=0)
        if fcntl:
            with suppress(OSError):  # some network drives have no locks; then nobody takes this file for stale either
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.exists():  # another job's clean-up may have come between creating and locking
            return file, temporary
        file.close()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn a SIGTERM that would kill the process on the spot into SystemExit, so that clean-up runs."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:
        yield
        return

    def terminate(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
