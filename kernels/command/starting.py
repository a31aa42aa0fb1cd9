"""Ctrl+C while the command starts: importing torch takes seconds, in which Python would answer with a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CANCELLED = 130
"""The exit code that shells give a program ended by Ctrl+C."""
NOTHING_CHANGED = "cancelled; no file was changed"


def is_command() -> bool:
    """Whether `python -m` is importing the package that it runs: Python then puts "-m" in the place of the program."""
    return sys.argv[:1] == ["-m"]


@contextmanager
def quiet_start(command: bool = True) -> Iterator[None]:
    """Ctrl+C in this block ends the process with one line and exit code 130. Does nothing if not `command`."""
    ours = threading.current_thread() is threading.main_thread()
    if not command or not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    """At once: modules that are half imported could turn an exception into something else."""
    with suppress(OSError):
        os.write(2, f"error: {NOTHING_CHANGED}\n".encode())
    os._exit(CANCELLED)
