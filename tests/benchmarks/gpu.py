"""Speed on an NVIDIA GPU, and whether its bytes are the CPU's. Prints a Markdown section for RESULTS.md.

python tests/benchmarks/gpu.py             # checks, then times
python tests/benchmarks/gpu.py --times     # only these; also --checks

Peers: comfy-kitchen where it is installed or can be, ComfyUI's comfy.float where there is a ComfyUI (COMFYUI_DIR).
"""

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conftest  # noqa: E402, F401  (loads the pack)
import gpu_checks  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from measure import Absent, Row, table  # noqa: E402
from stochastic_fp8_pack.kernels import FORMATS, ROUNDINGS, quantize_tensor  # noqa: E402
from stochastic_fp8_pack.kernels.numerics.backends import Task, nvidia, reference  # noqa: E402
from stochastic_fp8_pack.kernels.numerics.random_bits import stream_key  # noqa: E402

SIDE = 8192
LARGEST = 448.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="whether the bytes, statistics and errors are the CPU's")
    parser.add_argument("--times", action="store_true", help=f"a {SIDE} x {SIDE} tensor beside peers and limits")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here")
    both = not (options.checks or options.times)
    print("## On an NVIDIA GPU\n")
    print(f"{machine()}\n\n    python {' '.join(['tests/benchmarks/gpu.py', *sys.argv[1:]])}\n", flush=True)
    if both or options.times:
        print(f"{SIDE} x {SIDE}, bfloat16 to E4M3 unless stated otherwise. Medians of many launches.\n")
        print(table(time_rows()), flush=True)
    if both or options.checks:
        print("\nCompared with the CPU, on new random tensors. The output memory is filled with other bytes first:\n")
        print(table(check_rows()), flush=True)


def machine():
    gpu = torch.cuda.get_device_properties(0)
    return (
        f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB; "
        f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}."
    )


def time_rows():
    x = (torch.randn(SIDE, SIDE, device="cuda") * 0.02).bfloat16()
    plain = launches(lambda: x.to(torch.float8_e4m3fn))
    limit = 0.75 * launches(x.clone)
    yield us("plain RNE cast, unscaled", plain, "limit: 3 bytes per element at copy speed", limit)
    yield from rounding_rows(x, plain)
    yield from peer_rows(x)
    yield from whole_tensor_rows(x)
    yield from transfer_rows(x)


def rounding_rows(x, plain):
    """The pass that scales, rounds and encodes."""
    for rounding in ROUNDINGS:
        yield us(f"rounding pass, {rounding}", launches(rounding_pass(x, rounding)), "plain RNE cast", plain, 1.25)
    e5m2 = launches(lambda: x.to(torch.float8_e5m2))
    yield us(
        "rounding pass, stochastic, E5M2", launches(rounding_pass(x, format="float8_e5m2")), "its plain RNE cast", e5m2
    )
    for dtype in (torch.float16, torch.float32):
        source = x.to(dtype)
        cast = launches(lambda source=source: source.to(torch.float8_e4m3fn))
        name = str(dtype).removeprefix("torch.")
        yield us(f"rounding pass, stochastic, {name}", launches(rounding_pass(source)), "its plain RNE cast", cast)


def peer_rows(x):
    """With a given scale, which every contestant applies. amax is the same pass for all of them."""
    ours = launches(rounding_pass(x))
    scale = x.abs().amax().float() / LARGEST
    contestants = {
        f"{kitchen_name()}, as ComfyUI calls it": (kitchen(x, scale), 7),
        "comfy.float": (comfy(x, scale), None),
        "scaled RNE cast in PyTorch": (lambda: (x.float() / scale).to(torch.float8_e4m3fn), None),
        "this pack's PyTorch fallback": (rounding_pass(x, backend=reference), None),
    }
    for peer, (run, bar) in contestants.items():
        yield faster("rounding pass, stochastic", ours, peer, run, bar)


def whole_tensor_rows(x):
    """The whole of quantize_tensor: GPU time and wall time."""
    amax = busy(lambda: nvidia.tensor_to_amax(x.view(-1)))
    norm = busy(lambda: torch.linalg.vector_norm(x, float("inf")))
    yield us("amax: GPU time", amax, "torch.linalg.vector_norm(x, inf)", norm)
    plain = busy(lambda: x.to(torch.float8_e4m3fn))
    for measured in (False, True):
        what = f"whole tensor{', statistics' if measured else ''}"
        ours = busy(lambda measured=measured: quantize_tensor(x, key="k", statistics=measured))
        yield us(f"{what}: GPU time", ours, "plain RNE cast", plain, 2.7 if measured else None)
        passing = wall(lambda measured=measured: quantize_tensor(x, key="k", statistics=measured))
        yield us(f"{what}: wall time", passing, "its GPU time", ours)


def transfer_rows(x):
    """A weight in pageable CPU memory, quantized on the GPU, with its codes back in CPU memory."""
    source, pinned = x.cpu(), x.cpu().pin_memory()
    codes, landing = x.to(torch.float8_e4m3fn), torch.empty(x.shape, dtype=torch.float8_e4m3fn, pin_memory=True)

    def bus():
        x.copy_(pinned, non_blocking=True)
        landing.copy_(codes, non_blocking=True)

    ours = wall(lambda: quantize_tensor(source, key="k", device="cuda"))
    yield us("from and to CPU memory, wall time", ours, "bus limit: pinned copies in both directions", wall(bus))
    naive = wall(lambda: source.to("cuda").to(torch.float8_e4m3fn).cpu())
    yield us("from and to CPU memory, wall time", ours, "plain .to(cuda), cast and .cpu()", naive)


def check_rows():
    found = gpu_checks.grid()
    cases = f"{found['tensors']:,} tensors, {found['elements']:,} elements"
    yield verdict(
        f"bytes: formats x roundings x dtypes x scalings x sizes ({cases})", found["bytes"], found["bytes_differ"]
    )
    yield verdict("amax", found["tensors"], found["amax_differs"])
    for name in (*gpu_checks.COUNTED, "sums"):
        yield verdict(f"statistics: {name.replace('_', ' ')}", found["statistics"], found[f"{name}_differs"])
    gpus = torch.cuda.device_count()
    yield verdict(f"bytes: strides, offsets, dimensions, a stream, GPUs ({gpus})", "all", gpu_checks.layouts())
    compared, differ = gpu_checks.beyond_int32()
    yield verdict("bytes: more than 2^31 elements", compared, differ)
    yield verdict("NaN and infinite values: found and counted", "all", 0 if gpu_checks.nonfinite() else "some")
    for bits, pairs, wrong in gpu_checks.divisions():
        yield verdict(f"divisions of {bits}-bit significands against IEEE division", pairs, wrong)
    yield verdict("transfers: to the GPU and back", "all", gpu_checks.transfers())
    peak, warnings, differ = gpu_checks.memory()
    yield Row("peak GPU memory, source in CPU memory", f"{peak:.2f} x the tensor", "", "", "<= 3 x", peak <= 3)
    yield verdict(f"bytes, with too little GPU memory ({len(warnings)} warnings)", "all", differ)


def verdict(what, compared, differ):
    count = f"{compared:,}" if isinstance(compared, int) else compared
    return Row(what, f"{differ} differ", f"of {count}", "", "0", differ == 0)


def us(what, ours, other, other_us, at_most=None):
    """A row in which the ratio says how many times the other's time we take. Times in microseconds."""
    ratio = ours / other_us
    bar, met = (f"<= {at_most:g} x", ratio <= at_most) if at_most else ("", None)
    return Row(what, f"{ours:.1f} µs", f"{other} {other_us:.1f} µs", f"{ratio:.2f} x", bar, met)


def faster(what, ours, peer, run, at_least):
    """A row in which the ratio says how many times as fast as the peer we are."""
    try:
        theirs = launches(run)
    except Absent as reason:
        return Row(what, f"{ours:.1f} µs", f"{peer}: absent, {reason}")
    ratio = theirs / ours
    bar, met = (f">= {at_least:g} x", ratio >= at_least) if at_least else ("", None)
    return Row(what, f"{ours:.1f} µs", f"{peer} {theirs:.1f} µs", f"{ratio:.1f} x faster", bar, met)


def launches(run):
    """The median of many launches, between device events, in microseconds."""
    return 1e3 * triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median")


def busy(run, times=30):
    """GPU time of a call in microseconds: kernels, copies and fills."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / times


def wall(run, times=15):
    """Median wall time of a call, in microseconds, until its result is complete."""
    run()
    seconds = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def rounding_pass(x, rounding="stochastic", format="float8_e4m3fn", backend=nvidia):
    flat, amax = x.view(-1), float(x.abs().max())
    scale = torch.tensor(amax) / FORMATS[format].max
    task = Task(scale, amax, FORMATS[format], ROUNDINGS[rounding], stream_key(1, rounding, "k"))
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    return lambda: backend.quantize_slice(flat, codes, task, False)


def kitchen(x, scale):
    """comfy-kitchen as comfy.float.stochastic_rounding calls it, with the scaling before it."""
    generator = torch.Generator(device="cuda")

    def run():
        rounding = kitchen_module().stochastic_rounding_fp8
        generator.manual_seed(1)
        scaled = x * (1.0 / scale).to(x.dtype)
        words = torch.randint(0, 256, x.shape, dtype=torch.uint8, device="cuda", generator=generator)
        return rounding(scaled, words, torch.float8_e4m3fn)

    return run


def kitchen_module():
    """comfy_kitchen, installed if it is missing. Raises Absent."""
    if not importlib.util.find_spec("comfy_kitchen"):
        sys.path.append(str(peers.install(peers.KITCHEN)))
    module = importlib.import_module("comfy_kitchen")
    if not module.list_backends()["cuda"]["available"]:
        raise Absent("its CUDA kernels do not load here")
    return module


def kitchen_name():
    try:
        return f"comfy-kitchen=={importlib.metadata.version('comfy-kitchen')}"
    except importlib.metadata.PackageNotFoundError:
        return peers.KITCHEN


def comfy(x, scale):
    def run():
        return peers.comfy_float()(x * (1.0 / scale).to(x.dtype), torch.float8_e4m3fn, seed=1)

    return run


if __name__ == "__main__":
    main()
