"""`python -m kernels` ended at random moments by SIGKILL, SIGTERM and SIGINT.

The target is the file of before or the complete new one. A signal that a program can handle leaves no other file; after
SIGKILL the next job in that folder removes what was left.
"""

import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import sd3
from hostile.amounts import amount
from hostile.processes import POLL_SECONDS, files_of, start_command, wait_for_new_file
from safetensors.torch import save_file
from stochastic_fp8_pack.kernels import quantize_file

OLD = b"the file of before"
TIMES = {"SIGKILL": amount(4, 50), "SIGTERM": amount(2, 5), "SIGINT": amount(2, 5)}
"""Kills of each test; `make hostile` has four tests per signal, so that two processes share them."""
NOTHING_CHANGED = ("no file was changed", "nothing was changed")


@dataclass
class Job:
    """A job that is killed again and again, and how long it takes when it is not."""

    source: Path
    small: Path
    """A source for the next job, which is short."""
    result: bytes
    startup: float
    """Seconds until it begins to write."""
    writing: float

    def start(self, folder):
        return start_command(self.source, folder / "out.safetensors", "--overwrite")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    source, small = folder / "in.safetensors", folder / "small.safetensors"
    save_file(sd3(), small)
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(1024, 1024, generator=generator).bfloat16() for name in sd3(blocks=4)}, source)
    job = Job(source, small, b"", 0, 0)
    folder = tmp_path_factory.mktemp("reference")
    began = time.monotonic()
    process = job.start(folder)
    assert wait_for_new_file(folder, set(), lambda: process.poll() is not None)
    job.startup = time.monotonic() - began
    while not (folder / "out.safetensors").exists() and process.poll() is None:
        time.sleep(POLL_SECONDS)
    job.writing = time.monotonic() - began - job.startup
    assert process.wait(120) == 0, process.stderr.read()
    job.result = (folder / "out.safetensors").read_bytes()
    return job


def kill(job, folder, number, rng):
    """Start the job and end it: while it writes, or at any moment of its life. Its error output."""
    known = files_of(folder)
    process = job.start(folder)
    if rng.random() < 0.8:
        wait_for_new_file(folder, known, lambda: process.poll() is not None)
        time.sleep(rng.uniform(0, job.writing))
    else:
        time.sleep(rng.uniform(0, job.startup + job.writing))
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


def faults_of_a_kill(job, folder, number, rng):
    """What is wrong after one kill, and whether it left a temporary file."""
    folder.mkdir()
    target, following = folder / "out.safetensors", folder / "next.safetensors"
    target.write_bytes(OLD)
    errors = kill(job, folder, number, rng)
    content, left = target.read_bytes(), files_of(folder) - {target.name}
    faults = []
    if content not in (OLD, job.result):
        faults.append(f"the target is damaged: {len(content):,} bytes")
    if content != OLD and any(text in errors for text in NOTHING_CHANGED):
        faults.append(f"the target was replaced, but: {errors}")
    if number != signal.SIGKILL and left:
        faults.append(f"left {left}: {errors}")
    quantize_file(job.small, following)
    if files_of(folder) != {target.name, following.name}:
        faults.append(f"after the next job, the folder holds {files_of(folder)}")
    shutil.rmtree(folder)
    return faults, bool(left)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(amount(1, 4)))
@pytest.mark.parametrize("name", TIMES)
def test_a_killed_command_damages_nothing_and_leaves_nothing(job, tmp_path, name, share):
    rng = random.Random(f"{name} {share}")
    faults, cut_off = [], 0
    for _ in range(TIMES[name]):
        found, left = faults_of_a_kill(job, tmp_path / "out", signal.Signals[name], rng)
        faults += found
        cut_off += left
    print(f"{name}: {TIMES[name]} times, {cut_off} of them left a temporary file at first")
    assert not faults, "\n".join(faults)
