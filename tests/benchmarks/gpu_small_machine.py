"""Calibrating a model of Flux.1-dev's size with little memory: 32 GB of main memory, a 24 GB GPU, nothing pinned.

COMFYUI_DIR=... COMFYUI_PYTHON=... python tests/benchmarks/gpu_small_machine.py     # a Markdown section for RESULTS.md
python tests/benchmarks/gpu_small_machine.py --memory 24 --vram 16                  # GB
python tests/benchmarks/gpu_small_machine.py --blocks 2                             # a part of the model

Other processes hold the rest of the main memory. This needs a machine without swap, without a lower container limit,
and without memory ballooning. What is left includes the system's copies of files. If it is too small, the
out-of-memory killer ends ComfyUI. ComfyUI is told to keep the rest of the GPU's memory free. The model's file and the
result need 50 GB of disk.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import gpu_flux  # isort: skip  (it brings ComfyUI)

import torch
from comfyui.graph import Graph
from comfyui.pack import quantize, save
from comfyui.server import ComfyUIServer, ExecutionError, ServerError
from measure import Peak, Row, anonymous_peak
from safetensors.torch import save_file

TIMEOUT = 900
HOLDERS = 8
HOLD = "import sys; held = b'x' * int(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def main():
    parser = gpu_flux.options_parser(__doc__)
    parser.add_argument("--memory", type=float, default=32, help="GB of main memory that are left")
    parser.add_argument("--vram", type=float, default=24, help="GB of the GPU's memory that ComfyUI may use")
    parser.add_argument("--steps", type=int, default=16, help="recorded steps")
    options = parser.parse_args(gpu_flux.ARGUMENTS)
    with tempfile.TemporaryDirectory() as folder:
        gpu_flux.print_section("Calibrating with little memory", __file__, rows(options, Path(folder)))


def rows(options, folder):
    model = folder / "models" / "diffusion_models" / "flux.safetensors"
    model.parent.mkdir(parents=True)
    weights = gpu_flux.flux_weights(options.blocks, options.hidden)
    save_file(weights, model)
    del weights
    arguments = ["--disable-pinned-memory"]
    if gpu_flux.GPU.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        arguments += ["--reserve-vram", str((total - options.vram * 1e9) / 2**30)]
    yield Row("the model's file", f"{model.stat().st_size / 1e9:.1f} GB", "")
    with main_memory(options.memory * 1e9):
        yield Row("main memory left before ComfyUI's start", f"{options.memory:g} GB", "")
        for rounding in ("calibrated", "nearest"):
            with ComfyUIServer(folder, arguments=arguments) as server:
                Path(f"/proc/{server.pid}/oom_score_adj").write_text("1000")
                yield graph_row(server, rounding, options)


def graph_row(server, rounding, options):
    """A graph that loads, calibrates, quantizes and saves. The bar is that ComfyUI finishes it."""
    graph, choices = Graph(), {}
    model = graph.add("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
    if rounding == "calibrated":
        prompt = graph.add("TestRandomConditioning", seed=1, tokens=512, width=4096, pooled_width=768)
        latent = graph.add("EmptySD3LatentImage", width=options.side, height=options.side, batch_size=1)
        inputs = {"model": model, "positive": prompt, "negative": prompt, "latent_image": latent}
        sampler = {**gpu_flux.SAMPLER, "seed": 0, "steps": options.steps, "runs": 1}
        choices = {"calibration": graph.add("StochasticFP8Calibrate", **inputs, **sampler)}
    save(graph, rounding, model=quantize(graph, model, rounding=rounding, layers="all_linear", **choices))
    start = time.perf_counter()
    what = f"load, calibrate {options.steps} steps, quantize, save" if choices else "load, quantize, save"
    before = gpu_flux.used_memory()
    with anonymous_peak(server.pid) as main, Peak(gpu_flux.used_memory) as gpu:
        try:
            server.queue(graph.prompt, timeout=TIMEOUT)
        except (ExecutionError, ServerError, OSError, HTTPException) as error:
            reason = (str(error).splitlines() or [repr(error)])[-1][:200]
            return Row(f"{rounding}: {what}", "failed", reason, "", "finishes", False)
        finally:
            for path in server.output.rglob("*.safetensors"):
                path.unlink()
    seconds = f"{time.perf_counter() - start:.0f} s"
    peaks = f"anonymous memory {main.bytes / 1e9:.1f} GB, GPU {max(0, gpu.bytes - before) / 1e9:.1f} GB"
    return Row(f"{rounding}: {what}", seconds, peaks, "", "finishes", True)


@contextmanager
def main_memory(left):
    """While the block runs, `left` bytes of main memory are available."""
    total = memory("MemTotal")
    held = max(0, memory("MemAvailable") - int(left))
    command = [sys.executable, "-c", HOLD, str(held // HOLDERS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holders = [subprocess.Popen(command, **pipes) for _ in range(HOLDERS if held else 0)]
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"held\n"
        yield
        assert all(holder.poll() is None for holder in holders), "the system took back memory that was held"
        assert memory("MemTotal") == total, "this machine's memory grew meanwhile"
    finally:
        for holder in holders:
            holder.communicate(b"")


def memory(name):
    """An entry of /proc/meminfo, in bytes."""
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(known[name].split()[0])


if __name__ == "__main__":
    os.environ["COMFYUI_DEVICE"] = "gpu" if gpu_flux.GPU.type == "cuda" else "cpu"
    main()
