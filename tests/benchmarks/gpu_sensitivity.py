"""Layer Sensitivity in ComfyUI on an NVIDIA GPU: how long it takes for a model of Flux.1-dev's size.

COMFYUI_DIR=... python tests/benchmarks/gpu_sensitivity.py     # prints a Markdown section for RESULTS.md
python tests/benchmarks/gpu_sensitivity.py --blocks 2          # a part of the model

The weights are random: which of its layers matter says nothing, but sizes and times are those of a trained model.
"""

import time
from functools import partial

import gpu_flux  # isort: skip  (it brings ComfyUI)

from measure import Row
from stochastic_fp8_pack.nodes.calibration import StochasticFP8Calibrate
from stochastic_fp8_pack.nodes.sensitivity import StochasticFP8Sensitivity

STEPS = 4
LONGEST = 180  # seconds
SEEDS = (1, 2)


def main():
    options = gpu_flux.options_parser(__doc__, side=512).parse_args(gpu_flux.ARGUMENTS)
    gpu_flux.print_section("Measuring layers in ComfyUI on an NVIDIA GPU", __file__, rows(options))


def rows(options):
    model, scene = gpu_flux.flux(options.blocks, options.hidden), gpu_flux.Scene(options.side)
    inputs, plain = scene.inputs(model), partial(scene.sample, model)
    plain(1)
    step, _ = gpu_flux.per_step(plain)
    yield Row(f"a plain step at {options.side} x {options.side}", f"{1e3 * step:.0f} ms", "")
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
            barred = gpu_flux.is_whole(options) and seeds == 1
            met = (f"<= {LONGEST} s", seconds <= LONGEST) if barred else ("", None)
            yield Row(what, f"{seconds:.0f} s", alone, f"{seconds / step:.0f} steps", *met)


if __name__ == "__main__":
    main()
