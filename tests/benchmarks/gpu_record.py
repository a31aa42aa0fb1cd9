"""Recording a calibration on an NVIDIA GPU: its time per step beside the layers themselves, and whether sums agree.

python tests/benchmarks/gpu_record.py                # prints a Markdown section for RESULTS.md
python tests/benchmarks/gpu_record.py --blocks 2     # a part of the model
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conftest  # noqa: E402, F401  (loads the pack)
import torch  # noqa: E402
from gpu_calibrate import DOUBLE, SINGLE, inputs  # noqa: E402
from measure import Row, table  # noqa: E402
from stochastic_fp8_pack.kernels.calibration.mapped import mapped_memory  # noqa: E402
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder  # noqa: E402

IMAGE, TEXT = 4096, 512
"""Rows of a step at 1024 x 1024, and of its prompt."""
STEPS = 6
STEP_SECONDS = 0.184
"""A step of Flux.1-dev in ComfyUI 0.33.0 on an H100. The Linear layers alone take half of it."""
BARS = {"room on the GPU": 2, "sums in main memory, pinned": 4}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=38, help="single blocks; half as many double ones")
    options = parser.parse_args()
    print("## Recording on an NVIDIA GPU\n")
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, torch {torch.__version__}.\n\n    python tests/benchmarks/gpu_record.py\n", flush=True)
    with torch.inference_mode():
        print(table([*agreement_rows(), *time_rows(options.blocks)]), flush=True)


def on_gpu(store=None):
    return ActivationRecorder(most_rows=IMAGE, room=lambda device: 1 << 40, store=store)


def pinned(store=None):
    return ActivationRecorder(most_rows=IMAGE, pin=pin, store=store)


def pageable(store=None):
    return ActivationRecorder(most_rows=IMAGE, store=store)


PLACES = {"room on the GPU": on_gpu, "sums in main memory, pinned": pinned, "sums in main memory, pageable": pageable}


def pin(tensor):
    """Register a tensor's memory with CUDA, as ComfyUI does."""
    runtime = torch.cuda.cudart()
    if runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1) == 0:
        return partial(runtime.cudaHostUnregister, tensor.data_ptr())
    return None


def agreement_rows():
    """The moments of a few layers over five calls of bf16 rows, against fp64."""
    widths = (3072, 12288, 15360, 256)
    for place, make in PLACES.items():
        recorder = make()
        calls = {width: [inputs(4096, width, "cuda", call).bfloat16() for call in range(5)] for width in widths}
        for call in range(5):
            for width in widths:
                recorder.observe(f"{width}.weight", calls[width][call])
        worst = 0.0
        for key, layer in recorder.result().layers.items():
            moment, rows = layer.moment("cuda"), torch.cat(calls[layer.width])
            for block, found in enumerate(moment):
                x = rows[:, block * len(found) : (block + 1) * len(found)].double()
                exact = x.mT @ x / len(x)
                size = exact.diagonal().sqrt()
                worst = max(worst, float(((found.double() - exact).abs() / (size[:, None] * size)).max()))
            assert layer.rows == len(rows), key
        what = f"{place}: largest error of a moment, over the sizes of its inputs"
        yield Row(what, f"{worst:.1e}", "fp64", "", "<= 1e-4", worst <= 1e-4)


def network(blocks):
    """(key, rows, outputs, inputs) of each layer, in the order of a step."""
    for block in range(blocks // 2):
        for stream, rows in (("img", IMAGE), ("txt", TEXT)):
            for i, (outputs, width) in enumerate(DOUBLE):
                yield f"double.{block}.{stream}.{i}.weight", 1 if outputs == 18432 else rows, outputs, width
    for block in range(blocks):
        for i, (outputs, width) in enumerate(SINGLE):
            yield f"single.{block}.{i}.weight", 1 if outputs == 9216 else IMAGE + TEXT, outputs, width


def time_rows(blocks):
    layers = list(network(blocks))
    weights = {key: torch.randn(out, width, device="cuda").bfloat16() for key, _, out, width in layers}
    rows = {(n, width): inputs(n, width, "cuda").bfloat16() for _, n, _, width in layers}

    def step(recorder=None):
        for key, n, _, width in layers:
            if recorder:
                recorder.observe(key, rows[n, width])
            torch.nn.functional.linear(rows[n, width], weights[key])

    step()
    plain = seconds_per_step(step)
    yield Row(f"a step of {len(layers)} Linear layers alone, without attention", f"{1e3 * plain:.0f} ms", "")
    for place, make in PLACES.items():
        with tempfile.TemporaryDirectory() as folder:
            recorder = make(partial(mapped_memory, Path(folder)))
            first = time.perf_counter()
            for _ in range(2):  # makes and pins the sums
                step(recorder)
            torch.cuda.synchronize()
            first = time.perf_counter() - first
            each = seconds_per_step(partial(step, recorder))
            more, bar = each - plain, BARS.get(place)
            ratio = (STEP_SECONDS + more) / STEP_SECONDS
            verdict = (f"<= {bar} x", ratio <= bar) if bar and blocks == 38 else ("", None)
            against = f"a whole step {1e3 * STEP_SECONDS:.0f} ms"
            yield Row(f"recording adds: {place}", f"{1e3 * more:.0f} ms", against, f"{ratio:.2f} x", *verdict)
            peak = torch.cuda.max_memory_allocated() / 2**30
            start = time.perf_counter()
            calibration = recorder.result()
            stored = time.perf_counter() - start
        size = f"{calibration.nbytes / 1e9:.1f} GB"
        yield Row(
            "its first two steps; storing the sums", f"{first:.1f} s; {stored:.1f} s", size, f"peak {peak:.0f} GiB"
        )
        del calibration, recorder
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_per_step(step):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    main()
