"""Hostile files of 100 MB are refused, or done, in 400 MB of memory."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hostile.amounts import WHOLE
from hostile.giants import GIANTS, many_empty_tensors, tensor, tiny_layers, write
from stochastic_fp8_pack.kernels import StochasticFP8Error
from stochastic_fp8_pack.kernels.files.reader import open_source

MOST_MEMORY = 400_000_000
TESTS = Path(__file__).resolve().parents[1]

SHORT = ("header entry of brackets", "inline entries within the limit", "names of many parts", "index of names")
"""The files of the short run."""


def measure(job, path):
    """The outcome, the seconds and the peak memory of a job in a process of its own."""
    command = [sys.executable, "-m", "hostile.peak", job, path]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(job, path):
    result = measure(job, path)
    print(f"{job}: {result['peak'] / 1e6:.0f} MB, {result['seconds']:.1f} s: {result['outcome']}")
    assert result["peak"] <= MOST_MEMORY, result


@pytest.fixture
def folder():
    """A folder that is deleted at once: pytest would keep gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", GIANTS if WHOLE else SHORT)
def test_memory_stays_bounded(folder, name):
    path = GIANTS[name](folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 130_000_000
    check("calibration" if name.startswith("calibration") else "read", path)


@pytest.mark.skipif(not WHOLE, reason="takes a minute: make hostile")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layers", [66_000, 200_000])
def test_memory_stays_bounded_while_tiny_layers_are_quantized(folder, layers):
    check("quantize", tiny_layers(layers)(folder))


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        ("n" * 1024, "n" * 1025),
        ("é" * 1024, "é" * 1025),
    ],
)
def test_names_within_the_limit_are_read(folder, within, beyond):
    for name in (within, beyond):
        write(folder / "a.safetensors", [tensor(name, "U8", [0], 0, 0)])
        if name == within:
            open_source(folder / "a.safetensors").close()
        else:
            with pytest.raises(StochasticFP8Error, match="name"):
                open_source(folder / "a.safetensors")


def test_200000_tensors_are_read_and_one_more_is_refused(folder):
    open_source(many_empty_tensors(200_000)(folder)).close()
    with pytest.raises(StochasticFP8Error, match="200,000"):
        open_source(many_empty_tensors(200_001)(folder))
