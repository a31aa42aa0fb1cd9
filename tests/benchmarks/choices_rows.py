"""What each choice costs in size and quality: the landscape model with all Linear layers in E4M3, and ComfyUI's cast.

On a CPU, ComfyUI computes in fp32 and has no FP8 matmul. With COMFYUI_DEVICE=gpu it computes in half precision.
"""

import shutil
import tempfile
from pathlib import Path

import conftest  # noqa: F401  (loads the pack)
import tiny_models
from comfyui.server import ComfyUIServer
from measure import Row
from quality_rows import BATCH, CALIBRATION_SEEDS, RUNS, Studio, level, psnr

CHOICES = {
    "nearest": {"rounding": "nearest"},
    "stochastic": {"rounding": "stochastic"},
    "calibrated": {"rounding": "calibrated"},
    "calibrated, matmul fp8": {"rounding": "calibrated", "matmul": "fp8"},
}


def rows(rounds):
    """`rounds` is not used: these rows are qualities."""
    with tempfile.TemporaryDirectory() as folder, ComfyUIServer(Path(folder)) as server:
        studio = Studio(server)
        studio.calibrate("calibration", CALIBRATION_SEEDS, BATCH, RUNS)
        original = studio.render()

        def quality(changed):
            return level([psnr(*pair) for pair in zip(studio.render(changed), original, strict=True)])

        yield Row("16 bits", "", megabytes(tiny_models.LANDSCAPES))
        yield Row("ComfyUI's weight_dtype fp8_e4m3fn", quality(cast_by_comfyui(studio)), "the 16-bit file")
        for name, choices in CHOICES.items():

            def changed(graph, model, choices=choices):
                return studio.quantize(graph, model, **choices)

            size = megabytes(studio.save("choice", changed))
            if server.on_cpu and "matmul" in choices:
                yield Row(name, "absent", f"{size}; ComfyUI has no FP8 matmul on a CPU")
            else:
                yield Row(name, quality(changed), size)


def cast_by_comfyui(studio):
    """A loader that casts every weight to E4M3, without scales, as it loads."""
    shutil.copy(tiny_models.LANDSCAPES, studio.server.models("diffusion_models") / "landscapes.safetensors")
    return lambda graph, model: studio.bench.load(graph, "landscapes.safetensors", "fp8_e4m3fn")


def megabytes(path):
    return f"{path.stat().st_size / 1e6:.1f} MB"
