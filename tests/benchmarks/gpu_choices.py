"""What each choice costs in speed and memory on an NVIDIA GPU: those columns of README's table of choices.

COMFYUI_DIR=... python tests/benchmarks/gpu_choices.py     # prints a Markdown section for RESULTS.md
python tests/benchmarks/gpu_choices.py --blocks 2          # a part of the model

A model of Flux.1-dev's size with random weights: time per step, GPU memory, and how far its latents are from those of
bf16. The quality of a trained model in half precision: `COMFYUI_DEVICE=gpu python tests/benchmarks --choices`.
"""

from functools import partial

import gpu_flux  # isort: skip  (it brings ComfyUI)

import comfy.model_management
import comfy.sd
import torch
from measure import Row
from stochastic_fp8_pack.nodes.calibration import StochasticFP8Calibrate
from stochastic_fp8_pack.nodes.quantize_model import StochasticFP8Quantize

RECIPE = {"format": "float8_e4m3fn", "scaling": "absmax", "seed": 0, "layers": "auto"}
BATCHES = (1, 4)
RECORDED_STEPS, RENDERED_STEPS = 16, 16


def main():
    options = gpu_flux.options_parser(__doc__).parse_args(gpu_flux.ARGUMENTS)
    gpu_flux.print_section("What each choice costs on an NVIDIA GPU", __file__, rows(options))


def rows(options):
    weights = gpu_flux.flux_weights(options.blocks, options.hidden)
    scene = gpu_flux.Scene(options.side)
    original = comfy.sd.load_diffusion_model_state_dict(dict(weights))
    reference = scene.sample(original, RENDERED_STEPS)
    yield from rows_of("16 bits (bf16)", scene, original, reference)
    cast = {"dtype": torch.float8_e4m3fn}
    by_comfyui = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=cast)
    yield from rows_of("ComfyUI's weight_dtype fp8_e4m3fn", scene, by_comfyui, reference)
    del by_comfyui
    recorded = {**gpu_flux.SAMPLER, "seed": 1, "steps": RECORDED_STEPS, "runs": 1}
    calibration = StochasticFP8Calibrate.execute(**scene.inputs(original), **recorded).args[0]
    for name, choices in {
        "nearest": {"rounding": "nearest"},
        "stochastic": {"rounding": "stochastic"},
        "calibrated": {"rounding": "calibrated", "calibration": calibration},
        "nearest, matmul fp8": {"rounding": "nearest", "matmul": "fp8"},
        "calibrated, matmul fp8, with input scales": {
            "rounding": "calibrated",
            "matmul": "fp8",
            "calibration": calibration,
        },
    }.items():
        free_all()
        quantized = StochasticFP8Quantize.execute(original, **RECIPE, **choices).args[0]
        yield from rows_of(name, scene, quantized, reference)
        del quantized


def rows_of(name, scene, model, reference):
    """Time per step by batch size, the memory of all of the GPU, and the relative RMS change of the latents."""
    free_all()
    before = gpu_flux.used_memory()
    for batch in BATCHES:
        scene.sample(model, 1, batch)
        step, _ = gpu_flux.per_step(partial(scene.sample, model, batch=batch))
        more = f"{(gpu_flux.used_memory() - before) / 1e9:.1f} GB of GPU memory"
        yield Row(f"{name}: a step, batch {batch}", f"{1e3 * step:.0f} ms", more)
    change = scene.sample(model, RENDERED_STEPS) - reference
    error = (change.square().mean() / reference.square().mean()).sqrt().item()
    yield Row(f"{name}: change of the latents", f"{error:.4f}", "of bf16's, RMS")


def free_all():
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


if __name__ == "__main__":
    main()
