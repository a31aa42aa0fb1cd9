"""Quantizing in ComfyUI's graph on an NVIDIA GPU: does the bus limit the speed for a model in CPU memory?

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

server.PromptServer(asyncio.new_event_loop())  # the nodes add their routes to it

from comfyui_version import __version__ as VERSION  # noqa: E402
from measure import Row, costs, duration, faster, interleaved, table  # noqa: E402
from stochastic_fp8_pack.kernels import Recipe, quantize_tensor  # noqa: E402
from stochastic_fp8_pack.kernels.engine.quantization import select  # noqa: E402
from stochastic_fp8_pack.kernels.numerics.transfers import to_device  # noqa: E402
from stochastic_fp8_pack.nodes import in_graph, models  # noqa: E402

WIDTH, FEED_FORWARD = 3072, 12288
CUDA = torch.device("cuda")
ROUNDS = 7


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80, help="blocks of 151 million weights; default: %(default)s")
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
    names = select(network, recipe).quantize
    size = sum(network.tensors[name].nbytes for name in names)
    what = f"{len(names)} weights, {size / 1e9:.1f} GB in CPU memory"
    first, _ = quantize(network, recipe)
    torch.cuda.reset_peak_memory_stats()
    _, state = quantize(network, recipe)
    peak = torch.cuda.max_memory_allocated()
    contestants = {
        "ours": lambda: quantize(network, recipe)[0],
        "plain": lambda: plain_seconds(network, names),
        "bus": lambda: bus_seconds(size),
        "moved": lambda: moved_seconds(network, names),
        "fresh": lambda: fresh_seconds(network, names),
    }
    seconds = interleaved(contestants, ROUNDS, statistics.median)
    ours = seconds["ours"]
    yield costs(
        f"{what}: quantized, with statistics", ours, "bus limit: sending them from pinned memory", seconds["bus"]
    )
    yield costs("the same", ours, "transfers only: sending them, fetching the codes", seconds["moved"])
    yield costs("the same", ours, "clearing new CPU memory for the result", seconds["fresh"])
    yield faster("the same", ours, "plain .to(cuda), scaled cast and .cpu()", seconds["plain"])
    yield Row("the same, the first time", duration(first), "with Triton compilation")
    largest = max(network.tensors[name].nbytes for name in names)
    yield Row("peak GPU memory", f"{peak / largest:.2f} x the largest tensor", "", "", "<= 3 x", peak <= 3 * largest)
    yield differing("bytes compared with the CPU's", network, state)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * largest / torch.cuda.get_device_properties(0).total_memory)
    yield differing("the same, with too little GPU memory for a tensor", network, quantize(network, recipe)[1])


def quantize(network, recipe):
    """Seconds, and the state dict."""
    start = time.perf_counter()
    state = in_graph.NetworkJob(network, recipe, CUDA).run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, state


def bus_seconds(size):
    """Seconds to send that many bytes from pinned memory."""
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
    """Seconds to send the weights from where they are, and to fetch as many codes into new memory."""
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
    """Seconds to get new memory for the result: the operating system clears every page when it is first used."""
    start = time.perf_counter()
    kept = [torch.empty(network.tensor(name).shape, dtype=torch.uint8).zero_() for name in names]
    seconds = time.perf_counter() - start
    del kept
    return seconds


def differing(what, network, state):
    """Compare every sixteenth weight with the CPU's codes."""
    compared = differ = 0
    for name in list(state.weights)[::16]:
        expected = quantize_tensor(network.tensor(name), key=name).codes.view(torch.uint8)
        compared += expected.numel()
        differ += int((state.weights[name].codes.read().view(torch.uint8) != expected).sum())
    return Row(what, f"{differ} differ", f"of {compared:,}", "", "0", differ == 0)


if __name__ == "__main__":
    main()
