"""Times contestants side by side, and formats rows that say whether a bar is met."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WORKSPACE = ROOT / ".build" / "bench"
CHILD = Path(__file__).with_name("child.py")


class Absent(Exception):
    """A peer or a measurement that is not available here; the message says why."""


@dataclass(frozen=True)
class Row:
    """One measurement of this pack, compared with another or with a limit."""

    what: str
    ours: str
    other: str
    ratio: str = ""
    bar: str = ""
    met: bool | None = None

    def cells(self):
        verdict = {True: "met", False: "NOT met", None: ""}[self.met]
        return self.what, self.ours, self.other, self.ratio, self.bar, verdict


HEADS = ("what", "ours", "against", "ratio", "bar", "")


def table(rows):
    """The rows as a Markdown table with aligned columns."""
    lines = [HEADS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def say(row):
    """The row, which is also logged at once: a table appears when all of its rows are there."""
    print(*filter(None, row.cells()), sep=" | ", file=sys.stderr, flush=True)
    return row


def faster(what, ours, peer, peer_seconds, at_least=None):
    """A row whose ratio is the peer's time divided by ours. `ours`: seconds."""
    if isinstance(peer_seconds, Absent):
        return Row(what, duration(ours), f"{peer}: absent, {peer_seconds}")
    ratio = peer_seconds / ours
    bar, met = (f">= {at_least:g} x", ratio >= at_least) if at_least else ("", None)
    return Row(what, duration(ours), f"{peer} {duration(peer_seconds)}", f"{ratio:.2f} x", bar, met)


def costs(what, ours, other, other_seconds, at_most=None):
    """A row whose ratio is our time divided by the other's."""
    ratio = ours / other_seconds
    bar, met = (f"<= {at_most:g} x", ratio <= at_most) if at_most else ("", None)
    return Row(what, duration(ours), f"{other} {duration(other_seconds)}", f"{ratio:.2f} x", bar, met)


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def interleaved(contestants, rounds, of=min):
    """Time functions by name. Returns seconds by name: the best of all rounds, or `of` all rounds.

    Each round runs every function once. A function may return its own seconds. The entry of a function that raises
    Absent is the exception.
    """
    seconds, absent = {name: [] for name in contestants}, {}
    for _ in range(rounds):
        for name, run in contestants.items():
            if name in absent:
                continue
            try:
                start = time.perf_counter()
                own = run()
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
            except Absent as reason:
                absent[name] = reason
    return {name: absent[name] if name in absent else of(seconds[name]) for name in contestants}


def environment(**variables):
    """The environment of a timed program. Its bytecode is kept for the next run, as on a user's machine."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(WORKSPACE / "bytecode"), **variables}


def in_child(job, *arguments):
    """Run a job of child.py in its own process. Returns what it measured, and `peak` (resident bytes)."""
    command = [sys.executable, CHILD, job, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Absent(f"it failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    """The largest of the numbers that `read` gives while the block runs, in bytes."""

    SECONDS_BETWEEN_SAMPLES = 0.02

    def __init__(self, read):
        self.bytes = 0
        self._read, self._end = read, threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._end.set()
        self._thread.join()

    def _sample(self):
        while not self._end.wait(self.SECONDS_BETWEEN_SAMPLES):
            self.bytes = max(self.bytes, self._read())


def anonymous_peak(pid):
    """The peak of a process's anonymous memory: what no file backs."""
    return Peak(partial(_anonymous_memory, pid))


def _anonymous_memory(pid):
    """In bytes; 0 once the process has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0


def machine():
    """The machine and the conditions of the measurement, in words."""
    import torch

    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    return (
        f"{cores} CPU cores, {memory:.0f} GB of memory, torch {torch.__version__}, Python {sys.version.split()[0]}; "
        f"load average {load:.1f} before the run. Times drift on shared machines: compare within a run only."
    )
