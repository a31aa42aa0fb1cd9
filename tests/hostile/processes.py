"""Starts and ends processes at random moments."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import PACK_ROOT

POLL_SECONDS = 0.002


def start_command(*arguments, environment=None, **options):
    """A running `python -m kernels` whose Ctrl+C works even where the test itself runs in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "kernels", *map(str, arguments)],
        cwd=PACK_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def files_of(folder):
    """Every file under a folder, by its path in it."""
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if not path.is_dir()}


def wait_for_new_file(folder, known, has_ended, seconds=120):
    """Wait until a file appears in a folder. False: the process ended before."""
    deadline = time.monotonic() + seconds
    while not files_of(folder) - known:
        if has_ended() or time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
