"""Calibrating in ComfyUI on an NVIDIA GPU: FP8 Calibration and Quantize on a model of Flux.1-dev's size.

COMFYUI_DIR=... python tests/benchmarks/gpu_flux.py     # prints a Markdown section for RESULTS.md
python tests/benchmarks/gpu_flux.py --blocks 2          # a part of the model

The weights are random, which changes neither the sizes nor the times.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or HERE.parent.parent / ".build" / "comfyui").resolve()
sys.path[:0] = [str(HERE.parent)]

import conftest  # noqa: E402, F401  (loads the pack)
import tiny_models  # noqa: E402
import torch  # noqa: E402

sys.path[:] = [str(COMFYUI), *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE), str(HERE)]
sys.argv, ARGUMENTS = sys.argv[:1], sys.argv[1:]

import comfy.options  # noqa: E402
import utils.extra_config  # noqa: E402, F401  (first, as main.py does: comfy/utils.py would hide it later)

comfy.options.enable_args_parsing(False)
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = not torch.cuda.is_available()  # a small model shows there whether this program works

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import latent_preview  # noqa: E402
import server  # noqa: E402

import nodes as comfy_nodes  # noqa: E402

server.PromptServer(asyncio.new_event_loop())  # the nodes add their routes to it

from comfyui_version import __version__ as VERSION  # noqa: E402
from measure import Row, anonymous_peak, say, table  # noqa: E402
from stochastic_fp8_pack.kernels.errors import ActivationError  # noqa: E402
from stochastic_fp8_pack.nodes import calibration as calibration_nodes  # noqa: E402
from stochastic_fp8_pack.nodes.quantize_model import StochasticFP8Quantize  # noqa: E402

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW, MANY = 3, 13
"""Steps until a run is warm, and in all."""
PLACES = {"room on the GPU": (calibration_nodes.SHARE_OF_ROOM, 2), "sums in main memory": (0, 4)}
"""The share of the free memory that is used, and the bar: a recorded step over a plain one."""
SAMPLER = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
ROUND_SECONDS = 60
MEMORY_BAR, BARRED = 3e9, {"room on the GPU"}
"""What calibrating may take beyond nearest, in bytes. Pinned sums cannot be given back."""


def main():
    options = options_parser(__doc__).parse_args(ARGUMENTS)
    print_section("Calibrating in ComfyUI on an NVIDIA GPU", __file__, rows(options))


def options_parser(doc, side=1024):
    """The options of a benchmark with a model of Flux's kind."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=38, help="single blocks; half as many double ones")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--side", type=int, default=side, help="of the image, in pixels")
    return parser


def is_whole(options):
    """Whether the model is as large as Flux.1-dev: bars hold for that."""
    return options.blocks == 38 and options.hidden == 3072


def print_section(title, program, rows):
    """A Markdown section for RESULTS.md. The rows are made with ComfyUI's temporary folder in one that is removed."""
    print(f"## {title}\n")
    print(f"{device_name()}, torch {torch.__version__}, ComfyUI {VERSION}, {os.cpu_count()} CPU cores.\n")
    print(f"    {' '.join([f'python tests/benchmarks/{Path(program).name}', *ARGUMENTS])}\n", flush=True)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.set_temp_directory(folder)
        print(table(map(say, rows)), flush=True)


class Scene:
    """A random prompt, and an empty image of `side` pixels."""

    def __init__(self, side):
        conditions = {"pooled_output": torch.randn(1, 768), "guidance": 3.5}
        self._prompt, self._side = [[torch.randn(1, 512, 4096), conditions]], side

    def inputs(self, model):
        """The inputs of a node that renders."""
        return {"model": model, "positive": self._prompt, "negative": self._prompt, "latent_image": self._latent(1)}

    def sample(self, model, steps, batch=1):
        settings = [SAMPLER[name] for name in ("cfg", "sampler_name", "scheduler")]
        prompts = self._prompt, self._prompt
        return comfy_nodes.common_ksampler(model, 0, steps, *settings, *prompts, self._latent(batch))[0]["samples"]

    def _latent(self, batch):
        return {"samples": torch.zeros(batch, 16, self._side // 8, self._side // 8)}


def device_name():
    return torch.cuda.get_device_properties(0).name if GPU.type == "cuda" else "CPU"


def flux(blocks, hidden):
    """A Flux with random weights, in CPU memory."""
    return comfy.sd.load_diffusion_model_state_dict(flux_weights(blocks, hidden))


def flux_weights(blocks, hidden):
    shapes = tiny_models.flux_shapes(blocks, hidden, context=4096, pooled=768)
    kept = {key: shape for key, shape in shapes.items() if _double_block(key) < blocks // 2}
    return {key: (torch.randn(shape, device=GPU) * 0.02).bfloat16().cpu() for key, shape in kept.items()}


def _double_block(key):
    found = re.match(r"double_blocks\.(\d+)", key)
    return int(found[1]) if found else 0


def rows(options):
    model = flux(options.blocks, options.hidden)
    scene = Scene(options.side)
    inputs, plain = scene.inputs(model), partial(scene.sample, model)

    whole, memory = is_whole(options), {}
    plain(1)
    step, _ = per_step(plain)
    yield Row(f"a plain step at {options.side} x {options.side}", f"{1e3 * step:.0f} ms", "")
    for place, (share, bar) in PLACES.items():
        calibration_nodes.SHARE_OF_ROOM = share

        def record(steps):
            return calibration_nodes.StochasticFP8Calibrate.execute(**inputs, seed=0, steps=steps, runs=1, **SAMPLER)

        reset_peak()
        with anonymous_peak(os.getpid()) as memory[place]:
            seconds, output = per_step(record)
        met = (f"<= {bar} x", seconds / step <= bar) if whole else ("", None)
        yield Row(f"recorded, {place}", f"{1e3 * seconds:.0f} ms", "a plain step", f"{seconds / step:.2f} x", *met)
        calibration = output.args[0]
        start = time.perf_counter()
        record(1)
        yield Row("the same: the whole node, one step", f"{time.perf_counter() - start:.1f} s", peak())
    size = f"{calibration.nbytes / 1e9:.1f} GB"
    yield Row(f"the calibration of {len(calibration.layers)} layers", size, "")
    yield bad_input_row(inputs)
    bars = {"calibrated": ROUND_SECONDS} if whole else {}
    for rounding in ("nearest", "calibrated"):
        start = time.perf_counter()
        choices = {"format": "float8_e4m3fn", "scaling": "absmax", "seed": 0, "layers": "all_linear"}
        with anonymous_peak(os.getpid()) as memory[rounding]:
            StochasticFP8Quantize.execute(model, rounding=rounding, calibration=calibration, **choices)
        seconds = time.perf_counter() - start
        bar = bars.get(rounding)
        met = (f"<= {bar} s", seconds <= bar) if bar else ("", None)
        yield Row(f"the node Quantize, {rounding}", f"{seconds:.1f} s", "", "", *met)
    for place in PLACES:
        peak_bytes = max(memory[place].bytes, memory["calibrated"].bytes)
        more = peak_bytes - memory["nearest"].bytes
        met = (f"<= {MEMORY_BAR / 1e9:g} GB more", more <= MEMORY_BAR) if whole and place in BARRED else ("", None)
        texts = f"{peak_bytes / 1e9:.1f} GB", f"nearest {memory['nearest'].bytes / 1e9:.1f} GB", f"{more / 1e9:+.1f} GB"
        yield Row(f"anonymous main memory at the peak, {place}", *texts, *met)


def bad_input_row(inputs):
    """NaN in the prompt must stop the node and name the first layer, though a GPU is not waited for."""
    bad = [[torch.full((1, 512, 4096), float("nan")), inputs["positive"][0][1]]]
    try:
        calibration_nodes.StochasticFP8Calibrate.execute(
            **{**inputs, "positive": bad}, seed=0, steps=2, runs=1, **SAMPLER
        )
    except ActivationError as error:
        named = "'txt_in'" in str(error)
        return Row("NaN in the prompt", "named the layer" if named else str(error), "", "", "", named)
    return Row("NaN in the prompt", "not seen", "", "", "", False)


def per_step(run):
    """(seconds per step once FEW steps are done, which make and pin the sums; what a run of MANY steps returned)."""
    prepare, ends = latent_preview.prepare_callback, []

    def timed(*arguments):
        callback = prepare(*arguments)

        def end(*step):
            synchronize()
            ends.append(time.perf_counter())
            return callback(*step)

        return end

    latent_preview.prepare_callback = timed
    try:
        result = run(MANY)
    finally:
        latent_preview.prepare_callback = prepare
    return (ends[-1] - ends[FEW - 1]) / (MANY - FEW), result


def used_memory():
    """Bytes of the GPU that are in use, by whatever program and allocator."""
    if GPU.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def synchronize():
    if GPU.type == "cuda":
        torch.cuda.synchronize()


def reset_peak():
    if GPU.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak():
    return f"peak {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if GPU.type == "cuda" else ""


if __name__ == "__main__":
    main()
