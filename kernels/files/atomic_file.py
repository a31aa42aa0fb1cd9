"""Atomic file writing: the file appears complete or not at all, whatever ends the job (error, signal, power cut)."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import string
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import FrameType

if sys.platform != "win32":  # on Windows an open file cannot be deleted, which serves as its lock
    import fcntl

RANDOM_BYTES = 8


@contextmanager
def replacing(target: Path, size: int) -> Iterator[FileIO]:
    """A new unbuffered file for `size` bytes that replaces `target` when the block ends without an exception.

    The file is written beside the target as `<name>.tmp-<random>`. If the block raises, the file is deleted and the
    target stays as it was. Temporary files left by killed jobs for this target are removed first; those of running jobs
    are locked and stay.
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
    """Delete temporary files that killed jobs for this target left behind."""
    for path in target.parent.iterdir():
        if _is_temporary(path.name, target.name):
            with suppress(OSError), open(path, "rb") as file:
                if sys.platform == "win32":
                    file.close()
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _is_temporary(name: str, target: str) -> bool:
    random = name.removeprefix(f"{target}.tmp-")
    return random != name and len(random) == 2 * RANDOM_BYTES and set(random) <= set(string.hexdigits.lower())


def check_free_space(target: Path, size: int) -> None:
    """Raises OSError if the target's disk has fewer than `size` bytes free."""
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise OSError(f"{size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free: free some space first")


def _create_locked(target: Path) -> tuple[FileIO, Path]:
    while True:
        temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(RANDOM_BYTES)}")
        file = open(temporary, "x+b", buffering=0)
        if sys.platform != "win32":
            with suppress(OSError):  # some network drives have no locks; remove_stale then fails to lock it, too
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.exists():  # another job's remove_stale can delete it before it is locked
            return file, temporary
        file.close()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn a SIGTERM that would kill the process at once into SystemExit, so that clean-up runs."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
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
