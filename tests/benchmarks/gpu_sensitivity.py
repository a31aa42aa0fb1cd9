"""Layer Sensitivity in ComfyUI on an NVIDIA GPU: how long it takes for a model of Flux.1-dev's size.

COMFYUI_DIR=... python tests/benchmarks/gpu_sensitivity.py     # prints a Markdown section for RESULTS.md
python tests/benchmarks/gpu_sensitivity.py --blocks 2          # a part of the model

The weights are random: which layers matter says nothing, but sizes and times are those of a trained model.
"""

import argparse
import tempfile
import time

import gpu_flux  # isort: skip  (it brings ComfyUI)

import folder_paths
import torch
from measure import Row, say, table
from stochastic_fp8_pack.nodes.calibration import StochasticFP8Calibrate
from stochastic_fp8_pack.nodes.sensitivity import StochasticFP8Sensitivity

import nodes as comfy_nodes

STEPS = 4
LONGEST = 180  # seconds
SEEDS = (1, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=38, help="single blocks; half as many double ones")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--side", type=int, default=512, help="of the image, in pixels")
    options = parser.parse_args(gpu_flux.ARGUMENTS)
    print("## Measuring layers in ComfyUI on an NVIDIA GPU\n")
    print(f"{gpu_flux.device_name()}, torch {torch.__version__}, ComfyUI {gpu_flux.VERSION}.\n")
    print(f"    {' '.join(['python tests/benchmarks/gpu_sensitivity.py', *gpu_flux.ARGUMENTS])}\n", flush=True)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.set_temp_directory(folder)
        print(table(rows(options)), flush=True)


def rows(options):
    model = gpu_flux.flux(options.blocks, options.hidden)
    positive = [[torch.randn(1, 512, 4096), {"pooled_output": torch.randn(1, 768), "guidance": 3.5}]]
    latent = {"samples": torch.zeros(1, 16, options.side // 8, options.side // 8)}
    inputs = {"model": model, "positive": positive, "negative": positive, "latent_image": latent}
    sampler = [gpu_flux.SAMPLER[name] for name in ("cfg", "sampler_name", "scheduler")]

    def plain(steps):
        comfy_nodes.common_ksampler(model, 0, steps, *sampler, positive, positive, latent)

    plain(1)
    step, _ = gpu_flux.per_step(plain)
    yield say(Row(f"a plain step at {options.side} x {options.side}", f"{1e3 * step:.0f} ms", ""))
    choices = {**gpu_flux.SAMPLER, "seed": 0}
    recorded = StochasticFP8Calibrate.execute(**inputs, **choices, steps=STEPS, runs=1).args[0]
    for calibration in (None, recorded):
        for seeds in SEEDS:
            start = time.perf_counter()
            output = StochasticFP8Sensitivity.execute(
                **inputs, **choices, steps=STEPS, seeds=seeds, calibration=calibration
            )
            seconds = time.perf_counter() - start
            layers = output.args[0].sensitivity.layers.values()
            alone = f"{sum(layer.alone for layer in layers)} of {len(layers)} layers measured alone"
            what = f"{seeds} x {STEPS} steps{', with a calibration' if calibration else ''}"
            whole = options.blocks == 38 and options.hidden == 3072
            met = (f"<= {LONGEST} s", seconds <= LONGEST) if whole and seeds == 1 else ("", None)
            yield say(Row(what, f"{seconds:.0f} s", alone, f"{seconds / step:.0f} steps", *met))


if __name__ == "__main__":
    main()
