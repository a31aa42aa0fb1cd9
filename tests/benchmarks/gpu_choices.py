"""What each choice costs in speed and memory on an NVIDIA GPU: those columns of README's table of choices.

COMFYUI_DIR=... python tests/benchmarks/gpu_choices.py     # prints a Markdown section for RESULTS.md
python tests/benchmarks/gpu_choices.py --blocks 2          # a part of the model

A model of Flux.1-dev's size with random weights: time per step, GPU memory, and how far its latents are from those of
bf16. The quality of a trained model in half precision: `COMFYUI_DEVICE=gpu python tests/benchmarks --choices`.
"""

import argparse
import tempfile

import gpu_flux  # isort: skip  (it brings ComfyUI)

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from measure import Row, say, table
from stochastic_fp8_pack.nodes.calibration import StochasticFP8Calibrate
from stochastic_fp8_pack.nodes.quantize_model import StochasticFP8Quantize

import nodes as comfy_nodes

RECIPE = {"format": "float8_e4m3fn", "scaling": "absmax", "seed": 0, "layers": "auto"}
BATCHES = (1, 4)
RECORDED_STEPS, RENDERED_STEPS = 16, 16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=38, help="single blocks; half as many double ones")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels")
    options = parser.parse_args(gpu_flux.ARGUMENTS)
    print("## What each choice costs on an NVIDIA GPU\n")
    print(f"{gpu_flux.device_name()}, torch {torch.__version__}, ComfyUI {gpu_flux.VERSION}.\n")
    print(f"    {' '.join(['python tests/benchmarks/gpu_choices.py', *gpu_flux.ARGUMENTS])}\n", flush=True)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.set_temp_directory(folder)
        print(table(rows(options)), flush=True)


def rows(options):
    weights = gpu_flux.flux_weights(options.blocks, options.hidden)
    scene = Scene(options.side)
    original = comfy.sd.load_diffusion_model_state_dict(dict(weights))
    reference = scene.render(original)
    yield from scene.rows("16 bits (bf16)", original, reference)
    cast = {"dtype": torch.float8_e4m3fn}
    by_comfyui = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=cast)
    yield from scene.rows("ComfyUI's weight_dtype fp8_e4m3fn", by_comfyui, reference)
    del by_comfyui
    calibration = scene.record(original)
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
        yield from scene.rows(name, quantized, reference)
        del quantized


class Scene:
    """One random prompt, and the latents of one seed."""

    def __init__(self, side):
        prompt = {"pooled_output": torch.randn(1, 768), "guidance": 3.5}
        self._prompt, self._side = [[torch.randn(1, 512, 4096), prompt]], side

    def _latent(self, batch):
        return {"samples": torch.zeros(batch, 16, self._side // 8, self._side // 8)}

    def _sample(self, model, steps, batch=1):
        settings = [gpu_flux.SAMPLER[name] for name in ("cfg", "sampler_name", "scheduler")]
        prompts = self._prompt, self._prompt
        return comfy_nodes.common_ksampler(model, 0, steps, *settings, *prompts, self._latent(batch))[0]["samples"]

    def render(self, model):
        return self._sample(model, RENDERED_STEPS)

    def record(self, model):
        inputs = {"model": model, "positive": self._prompt, "negative": self._prompt, "latent_image": self._latent(1)}
        choices = {**gpu_flux.SAMPLER, "seed": 1, "steps": RECORDED_STEPS, "runs": 1}
        return StochasticFP8Calibrate.execute(**inputs, **choices).args[0]

    def rows(self, name, model, reference):
        """Time per step by batch size, the memory of all of the GPU, and the relative RMS change of the latents."""
        free_all()
        before = used()
        for batch in BATCHES:
            self._sample(model, 1, batch)
            step, _ = gpu_flux.per_step(lambda steps, batch=batch: self._sample(model, steps, batch))
            more = f"{(used() - before) / 1e9:.1f} GB of GPU memory"
            yield say(Row(f"{name}: a step, batch {batch}", f"{1e3 * step:.0f} ms", more))
        change = self.render(model) - reference
        error = (change.square().mean() / reference.square().mean()).sqrt().item()
        yield say(Row(f"{name}: change of the latents", f"{error:.4f}", "of bf16's, RMS"))


def used():
    """Bytes of the GPU that are in use, by whatever allocator."""
    if gpu_flux.GPU.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def free_all():
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


if __name__ == "__main__":
    main()
