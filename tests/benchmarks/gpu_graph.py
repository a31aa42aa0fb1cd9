"""Quantizing in ComfyUI's graph on an NVIDIA GPU: is a model that lies in CPU memory bound by the bus?

COMFYUI_DIR=... python tests/benchmarks/gpu_graph.py     # prints a Markdown section for RESULTS.md
python tests/benchmarks/gpu_graph.py --layers 24         # a model of 7 GB instead of 24
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
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

import comfy.sd  # noqa: E402
import server  # noqa: E402

server.PromptServer(asyncio.new_event_loop())  # to which the nodes add their routes

from comfyui_version import __version__ as VERSION  # noqa: E402
from measure import Row, costs, duration, faster, interleaved, table  # noqa: E402
from stochastic_fp8_pack.kernels import Recipe, quantize_tensor  # noqa: E402
from stochastic_fp8_pack.kernels.numerics.transfers import to_device  # noqa: E402
from stochastic_fp8_pack.nodes import in_graph, models  # noqa: E402

WIDTH, FEED_FORWARD = 3072, 12288
CUDA = torch.device("cuda")
ROUNDS = 7


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80, help="of 151 million weights each")
    options = parser.parse_args(ARGUMENTS)
    gpu = torch.cuda.get_device_properties(0)
    print("## In ComfyUI's graph on an NVIDIA GPU\n")
    print(f"{gpu.name}, torch {torch.__version__}, ComfyUI {VERSION}, {os.cpu_count()} CPU cores.\n")
    print(f"    {' '.join(['python tests/benchmarks/gpu_graph.py', *ARGUMENTS])}\n", flush=True)
    with torch.inference_mode():
        print(table(rows(models.diffusion_network(wan(options.layers)))), flush=True)


def wan(layers):
    """A Wan 2.1 model of Flux's widths, with random weights, in CPU memory."""
    shapes = tiny_models.wan_shapes(layers, WIDTH, FEED_FORWARD)
    weights = {key: (torch.randn(shape, device=CUDA) * 0.02).bfloat16().cpu() for key, shape in shapes.items()}
    return comfy.sd.load_diffusion_model_state_dict(weights)


def rows(network):
    recipe = Recipe(layers="auto")
    selection = in_graph.select(network, recipe)
    names = selection.quantize
    size = sum(network.info(name).nbytes for name in names)
    what = f"{len(names)} weights, {size / 1e9:.1f} GB in CPU memory"
    first, _ = quantize(network, selection, recipe)
    torch.cuda.reset_peak_memory_stats()
    _, part = quantize(network, selection, recipe)
    peak = torch.cuda.max_memory_allocated()
    contestants = {
        "ours": lambda: quantize(network, selection, recipe)[0],
        "plain": lambda: plain_seconds(network, names),
        "bus": lambda: bus_seconds(size),
        "moved": lambda: moved_seconds(network, names),
        "fresh": lambda: fresh_seconds(network, names),
    }
    seconds = interleaved(contestants, ROUNDS, statistics.median)
    ours = seconds["ours"]
    yield costs(f"{what}: quantized, with statistics", ours, "the bus: sending them, pinned", seconds["bus"])
    yield costs("the same", ours, "moving alone: sending them, fetching as many codes", seconds["moved"])
    yield costs("the same", ours, "fresh CPU memory for the result, cleared", seconds["fresh"])
    yield faster("the same", ours, "plain .to(cuda), scaled cast and .cpu()", seconds["plain"])
    yield Row("the same, the first time", duration(first), "with Triton's compiling")
    largest = max(network.info(name).nbytes for name in names)
    yield Row("peak GPU memory", f"{peak / largest:.2f} x the largest tensor", "", "", "<= 3 x", peak <= 3 * largest)
    yield differing("bytes against the CPU's", network, part)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * largest / torch.cuda.get_device_properties(0).total_memory)
    yield differing(
        "the same with too little GPU memory for a tensor", network, quantize(network, selection, recipe)[1]
    )


def quantize(network, selection, recipe):
    """Seconds, and the quantized weights."""
    start = time.perf_counter()
    part, _ = in_graph.quantize_network(network, selection, recipe, CUDA, "wan")
    torch.cuda.synchronize()
    return time.perf_counter() - start, part


def bus_seconds(size):
    """To send so many bytes from pinned memory."""
    pinned, there = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True), torch.empty(1 << 28, device=CUDA).byte()
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        there.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * size / len(pinned)


def moved_seconds(network, names):
    """To send the weights from where they lie, and to fetch as many codes into memory of their own."""
    codes = torch.zeros(max(network.tensor(name).numel() for name in names), dtype=torch.uint8, device=CUDA)
    start, kept = time.perf_counter(), []
    for name in names:
        sent = to_device(network.tensor(name), CUDA)
        kept.append(to_device(codes[: sent.numel()], torch.device("cpu")))
    return time.perf_counter() - start


def plain_seconds(network, names):
    start, kept = time.perf_counter(), []
    for name in names:
        x = network.tensor(name).to(CUDA)
        scale = x.abs().amax().float() / 448
        kept.append((x / scale).to(torch.float8_e4m3fn).cpu())
    return time.perf_counter() - start


def fresh_seconds(network, names):
    """For the operating system to hand out the result's memory: every page is cleared when first touched."""
    start = time.perf_counter()
    kept = [torch.empty(network.tensor(name).shape, dtype=torch.uint8).zero_() for name in names]
    seconds = time.perf_counter() - start
    del kept
    return seconds


def differing(what, network, part):
    """Every sixteenth weight, quantized on the CPU."""
    compared = differ = 0
    for name in list(part.weights)[::16]:
        expected = quantize_tensor(network.tensor(name), key=name).codes.view(torch.uint8)
        compared += expected.numel()
        differ += int((part.weights[name].codes.view(torch.uint8) != expected).sum())
    return Row(what, f"{differ} differ", f"of {compared:,}", "", "0", differ == 0)


if __name__ == "__main__":
    main()
