"""Atomic file writing: the file appears complete or not at all, whatever ends the job (error, signal, power cut)."""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import FrameType

from .. import display

if sys.platform != "win32":  # on Windows an open file cannot be deleted, which serves as its lock
    import fcntl

log = logging.getLogger("stochastic_fp8")

_TEMPORARY = re.compile(r"\.stochastic_fp8-[0-9a-f]{16}\.tmp|.+\.safetensors\.tmp-[0-9a-f]{16}", re.DOTALL)
"""Names of temporary files, and those that earlier versions gave them."""

_ours: dict[Path, int] = {}
"""Temporary files of this process -> its id, which a forked process does not share."""


@contextmanager
def replacing(target: Path, size: int, *, overwrite: bool = True) -> Iterator[FileIO]:
    """A new unbuffered file for `size` bytes that becomes `target` when the block ends without an exception.

    The file is written beside the target under a hidden name that does not begin with the target's: ComfyUI counts
    files by how their names begin. If the block raises, the file is deleted and the target stays as it was. Temporary
    files of killed jobs in this folder are removed first; those of running jobs are locked and stay. A target that is
    replaced keeps its mode. Of a link, the file that it points to is replaced.
    Raises FileExistsError: there is a target, and not `overwrite`; OSError: no space, no permission, no such folder,
    target locked (Windows). The target is then unchanged. Only a KeyboardInterrupt or SystemExit can come later.
    """
    target = (target.resolve() if target.is_symlink() else target).absolute()
    remove_stale(target.parent)
    check_free_space(target, size)
    with _termination_raises(), _temporary(target.parent) as (file, path):
        yield file
        if overwrite:
            _copy_mode(target, file)
        os.fsync(file.fileno())
        if sys.platform == "win32":
            file.close()
        if overwrite:
            os.replace(path, target)
        else:
            _name_new(path, target)
        _sync_folder(target.parent)


def remove_stale(folder: Path) -> None:
    """Delete temporary files that killed jobs left in a folder."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                _remove_unlocked(path)


def check_free_space(target: Path, size: int) -> None:
    """Raises OSError if the target's disk has fewer than `size` bytes free."""
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise OSError(
            f"{display.bytes(size)} are needed, {display.bytes(free)} are free: free "
            f"{display.bytes(size - free)} on this disk first"
        )


def _remove_unlocked(path: Path) -> None:
    """Delete a regular file that no process has locked. Raises OSError if it is locked."""
    if not stat.S_ISREG(path.lstat().st_mode):  # opening a pipe could wait forever
        return
    if sys.platform == "win32":
        path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(folder: Path, identity: str | None = None) -> Iterator[tuple[FileIO, Path]]:
    """A new locked file, deleted at the end if it still has this name.

    identity: 16 hexadecimal digits of its name; None: random ones. Raises FileExistsError for one that exists.
    """
    path = folder / f".stochastic_fp8-{identity or secrets.token_hex(8)}.tmp"
    file = _create_locked(path)
    try:
        yield file, path
    finally:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            path.unlink()
        _ours.pop(path, None)


def _create_locked(path: Path) -> FileIO:
    while True:
        _ours[path] = os.getpid()  # before it exists: an interrupt between the two must not leave it behind
        try:
            file = open(path, "x+b", buffering=0)
        except OSError:
            _ours.pop(path, None)
            raise
        if _lock(file, path):
            return file
        file.close()


def _lock(file: FileIO, path: Path) -> bool:
    """Lock a new file. False if another job's remove_stale was faster, which deletes it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(OSError):
                path.unlink()
            return False
        except OSError:
            pass  # some network drives have no locks; remove_stale then fails to lock it, too
    return path.exists()


def _copy_mode(target: Path, file: FileIO) -> None:
    if sys.platform != "win32":
        with suppress(OSError):  # there is no target yet, or the disk does not store modes
            os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))


def _name_new(path: Path, target: Path) -> None:
    """Give a file a name that no file has. Raises FileExistsError."""
    if sys.platform == "win32":
        os.rename(path, target)
        return
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:  # FAT and some network drives have no hard links
        _rename_new(path, target)


def _rename_new(path: Path, target: Path) -> None:
    """Rename a file to a name that no file has. A lock keeps other jobs from the same name meanwhile."""
    claim = hashlib.sha256(os.fsencode(target.name.casefold())).hexdigest()[:16]
    with _temporary(target.parent, claim):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(path, target)


@atexit.register
def _remove_ours() -> None:
    """Delete the files of jobs whose threads end with the process, such as those of ComfyUI's server."""
    for path, process in list(_ours.items()):
        if process == os.getpid():
            with suppress(OSError):
                path.unlink()


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn a SIGTERM or SIGHUP that would kill the process at once into SystemExit, so that clean-up runs."""
    ours = []
    if threading.current_thread() is threading.main_thread():
        numbers = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]
        ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        for number in ours:
            signal.signal(number, terminate)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _sync_folder(folder: Path) -> None:
    """Some network drives cannot sync a folder. The file is complete without that, so it is not an error."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.debug("%s: the folder cannot be synced: %s", folder, error)
