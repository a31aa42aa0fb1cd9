"""python -m hostile.peak JOB FILE: one job on one file, and the memory that it took above the baseline, as JSON."""

import json
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401 - loads the pack
from checkpoints import sd3
from safetensors.torch import save_file
from stochastic_fp8_pack import kernels

MOST_MEMORY = 3 << 30
"""Bytes. A fault must not take the machine down: beyond this, memory is refused."""


def read(path):
    """Inspect and plan."""
    results = []
    for job in (lambda: kernels.inspect_file(path, deep=True).summary, lambda: str(kernels.plan_file(path).notes)):
        try:
            results.append(job())
        except kernels.StochasticFP8Error as error:
            results.append(f"refused: {error}")
    return " | ".join(result[:200] for result in results)


def quantize(path):
    return f"{len(kernels.quantize_file(path, path.with_name('result.safetensors')).layers)} layers"


def calibration(path):
    return f"{len(kernels.load_calibration(path).layers)} layers"


JOBS = {"read": read, "quantize": quantize, "calibration": calibration}


def memory(field):
    """Bytes of resident memory, now (VmRSS) or at most so far (VmHWM).

    resource.getrusage would count the process that started this one as well.
    """
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main():
    job, path = JOBS[sys.argv[1]], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:  # what is imported at first use counts as baseline
        save_file(sd3(), Path(folder) / "small.safetensors")
        quantize(Path(folder) / "small.safetensors")
        read(Path(folder) / "small.safetensors")
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    baseline, began = memory("VmRSS"), time.perf_counter()
    try:
        outcome = job(path)
    except kernels.StochasticFP8Error as error:
        outcome = f"refused: {error}"
    seconds, peak = time.perf_counter() - began, memory("VmHWM") - baseline
    print(json.dumps({"outcome": outcome[:500], "peak": peak, "seconds": seconds}))


if __name__ == "__main__":
    main()
