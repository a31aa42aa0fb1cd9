"""Calibrated rounding of this version and of an earlier one, from the same calibration: 16 images, pair by pair.

python tests/benchmarks/paired.py 2ff9b63      # the last one that rounds column by column
"""

import argparse
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conftest  # noqa: E402, F401  (loads the pack)
import tiny_models  # noqa: E402
import torch  # noqa: E402
from comfyui.server import ComfyUIServer  # noqa: E402
from measure import ROOT, Row, environment, machine, table  # noqa: E402
from quality_rows import BATCH, CALIBRATION_SEEDS, RUNS, Studio, level, psnr  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

FORMAT = "e4m3"
BAR = -0.3  # dB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REVISION", help="what to compare with, as git names it")
    options = parser.parse_args()
    print(f"{machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(table(rows(Path(folder), options.revision)), flush=True)


def rows(folder, revision):
    versions = {"this version": ROOT, revision: extracted(revision, folder / "earlier")}
    with ComfyUIServer(folder / "comfyui") as server:
        studio = Studio(server)
        studio.calibrate("calibration", CALIBRATION_SEEDS, BATCH, RUNS)
        calibration = server.output / "fp8_calibrations" / "calibration_00001_.safetensors"
        models = server.models("diffusion_models")
        files = [quantized(root, calibration, models / f"{n}.safetensors") for n, root in enumerate(versions.values())]
        original = studio.render()
        ours, theirs = (
            [psnr(*pair) for pair in zip(studio.render(loader(studio, file)), original, strict=True)] for file in files
        )
    gains = [one - other for one, other in zip(ours, theirs, strict=True)]
    bar = f">= {BAR} dB", statistics.mean(gains) >= BAR
    yield Row("landscapes, calibrated E4M3: PSNR", level(ours), f"{revision} {level(theirs)}")
    yield Row(f"{len(gains)} pairs: difference", level(gains), revision, "", *bar)
    yield Row("weights that differ", "{:,} of {:,}".format(*differing(*files)), revision)


def extracted(revision, folder):
    """The files of a revision."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def quantized(root, calibration, target):
    """The landscape model as this checkout quantizes it, file to file."""
    choices = ["--calibrated", "--calibration", calibration, "--fp8_type", FORMAT, "--preset", "all_linear"]
    command = [sys.executable, "-m", "kernels", tiny_models.LANDSCAPES, target, *choices]
    subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True)
    return target


def loader(studio, file):
    return lambda graph, model: studio.bench.load(graph, file.name)


def differing(one, other):
    """(dequantized weights that differ, all of them)."""
    weights = [load_file(file) for file in (one, other)]
    names = [name for name, tensor in weights[0].items() if tensor.dtype == torch.float8_e4m3fn]
    values = [
        torch.cat([(tensors[name].float() * tensors[f"{name}_scale"]).flatten() for name in names])
        for tensors in weights
    ]
    return int((values[0] != values[1]).sum()), len(values[0])


if __name__ == "__main__":
    main()
