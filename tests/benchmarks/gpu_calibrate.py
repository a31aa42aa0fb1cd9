"""Calibrated rounding on an NVIDIA GPU: its error compared with the CPU's, and its time for 12 billion parameters.

python tests/benchmarks/gpu_calibrate.py     # prints a Markdown section for RESULTS.md
"""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conftest  # noqa: E402, F401  (loads the pack)
import torch  # noqa: E402
from measure import Row, table  # noqa: E402
from stochastic_fp8_pack.kernels import FORMATS, dequantize_tensor, quantize_tensor  # noqa: E402
from stochastic_fp8_pack.kernels.calibration.calibrate_tensor import calibrate_tensor  # noqa: E402
from stochastic_fp8_pack.kernels.calibration.moments import Calibration, LayerCalibration  # noqa: E402
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder  # noqa: E402
from stochastic_fp8_pack.kernels.engine.quantize_weight import input_scale  # noqa: E402
from stochastic_fp8_pack.kernels.numerics.backends import BACKEND_VARIABLE, choose_backend  # noqa: E402
from stochastic_fp8_pack.kernels.numerics.transfers import begin_transfer  # noqa: E402
from stochastic_fp8_pack.kernels.recipe import Recipe  # noqa: E402

SHAPES = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360))
"""(outputs, inputs) of the layers of a model like Flux."""
DOUBLE = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072))
SINGLE = ((21504, 3072), (3072, 15360), (9216, 3072))
FLUX = (*19 * 2 * DOUBLE, *38 * SINGLE)
"""The Linear layers in the blocks of Flux.1-dev: 19 double ones of two streams, and 38 single ones."""
LAYER_SECONDS, MODEL_SECONDS = 0.15, 60
CHUNK_ROWS = 4096


def main():
    print("## Calibrated rounding on an NVIDIA GPU\n")
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, torch {torch.__version__}.\n\n    python tests/benchmarks/gpu_calibrate.py\n", flush=True)
    print(table([*agreement_rows(), *matmul_rows(), *time_rows(), *model_rows()]), flush=True)


def inputs(rows, width, device, seed=0):
    """Correlated rows of different magnitude, like activations."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    shared = torch.randn(rows, width // 4, **options) @ torch.randn(width // 4, width, **options)
    return (shared + torch.randn(rows, width, **options)) * torch.exp(0.5 * torch.randn(width, **options))


def seen(width, rows, device="cuda"):
    """The calibration of a layer, gathered and kept on `device`."""
    observer = ActivationRecorder(device)
    for chunk in range(rows // CHUNK_ROWS):
        observer.observe("weight", inputs(CHUNK_ROWS, width, device, chunk))
    return observer.result().layers["weight"]


def weight(outputs, width, device="cuda"):
    generator = torch.Generator(device).manual_seed(1)
    return (torch.randn(outputs, width, generator=generator, device=device) / width**0.5).bfloat16()


def agreement_rows():
    """The predicted error on both devices, for the same data."""
    layer = seen(1536, 2 * CHUNK_ROWS)
    packed = layer.read_moment()
    on_cpu = LayerCalibration(layer.width, layer.rows, layer.amax, packed.cpu)
    for format in FORMATS:
        w = weight(768, 1536)
        ours = calibrate_tensor(w, layer, format=format)
        again = calibrate_tensor(w, layer, format=format)
        other = calibrate_tensor(w.cpu(), on_cpu, format=format).output_error
        ratio = ours.output_error.chosen / other.chosen
        errors = [f"{100 * error.chosen:.3g} %" for error in (ours.output_error, other)]
        name = f"768 x 1536, {format}: predicted error"
        yield Row(name, errors[0], f"CPU {errors[1]}", f"{ratio:.4f} x", "within 1 %", abs(ratio - 1) <= 0.01)
        same = torch.equal(ours.codes.view(torch.uint8), again.codes.view(torch.uint8))
        yield Row(f"768 x 1536, {format}: run twice", "", "", "same bytes" if same else "other bytes", "same", same)


def matmul_rows():
    """An FP8 matrix multiplication with and without the input scale that a calibration gives."""
    layer, w = seen(3072, 2 * CHUNK_ROWS), weight(3072, 3072)
    x = inputs(CHUNK_ROWS, 3072, "cuda", seed=99) * 20
    scaled = LayerCalibration(layer.width, layer.rows, 20 * layer.amax, layer.read_moment)
    scale = input_scale(Calibration({"weight": scaled}), "weight", Recipe(matmul="fp8")).cuda()
    q = quantize_tensor(w, rounding="nearest")
    full = x @ dequantize_tensor(q.codes, q.scale).T
    for name, factor in (("with input_scale", scale), ("at scale 1, clamped at 448", torch.ones((), device="cuda"))):
        codes = (x / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(codes, q.codes.T, scale_a=factor, scale_b=q.scale, out_dtype=torch.bfloat16)
        error = float((out.float() - full).norm() / full.norm())
        verdict = ("<= 5 %", error <= 0.05) if factor is scale else ("", None)
        yield Row(f"FP8 matmul {name}: error of the output", f"{100 * error:.2f} %", "full precision", "", *verdict)


def time_rows():
    """One layer of each shape, beside the path that every GPU has."""
    for outputs, width in SHAPES:
        w, layer = weight(outputs, width), seen(width, 4 * CHUNK_ROWS)
        seconds, q = timed(w, layer)
        memory = torch.cuda.max_memory_allocated() / 2**30
        with backend("reference"):
            torch_seconds, plain = timed(w, layer, rounds=1)
        ratio = q.output_error.chosen / plain.output_error.chosen
        name, met = f"{outputs} x {width}", (f"<= {LAYER_SECONDS} s", seconds <= LAYER_SECONDS)
        against = f"PyTorch's operations {torch_seconds:.2f} s"
        verdict = met if (outputs, width) == SHAPES[0] else ("", None)
        yield Row(name, f"{1e3 * seconds:.0f} ms", against, f"{torch_seconds / seconds:.0f} x faster", *verdict)
        gain = f"{q.output_error.chosen / q.output_error.nearest:.2f} x nearest; peak {memory:.1f} GiB"
        same = "within 1 %", abs(ratio - 1) <= 0.01
        yield Row(f"{name}: error", gain, "PyTorch's operations", f"{ratio:.4f} x", *same)


def timed(w, layer, rounds=3):
    """(seconds, result): the fastest of some rounds, after one that compiles."""
    calibrate_tensor(w, layer, statistics=True)
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        q = calibrate_tensor(w, layer, statistics=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), q


@contextmanager
def backend(name):
    """Quantize with a backend of this name."""
    os.environ[BACKEND_VARIABLE] = name
    choose_backend.cache_clear()
    try:
        yield
    finally:
        del os.environ[BACKEND_VARIABLE]
        choose_backend.cache_clear()


def model_rows():
    """All layers of Flux, one after the other: weights and moments come from main memory, codes return to it."""
    weights = {shape: weight(*shape).cpu() for shape in set(FLUX)}
    layers = {}
    for width in {width for _, width in FLUX}:
        layer = seen(width, 2 * CHUNK_ROWS)
        packed = layer.read_moment().cpu()
        layers[width] = LayerCalibration(width, layer.rows, layer.amax, lambda packed=packed: packed)
    parameters = sum(outputs * width for outputs, width in FLUX)
    torch.cuda.synchronize()
    start, arriving = time.perf_counter(), None
    for outputs, width in FLUX:
        options = {"device": "cuda", "statistics": True, "leave_on_device": True}
        q = calibrate_tensor(weights[outputs, width], layers[width], **options)
        if arriving:
            arriving()
        arriving = begin_transfer(q.codes, torch.device("cpu"))
    arriving()
    seconds = time.perf_counter() - start
    name = f"all {len(FLUX)} layers of Flux.1-dev, {parameters / 1e9:.1f} billion parameters"
    yield Row(name, f"{seconds:.1f} s", "", "", f"<= {MODEL_SECONDS} s", seconds <= MODEL_SECONDS)


if __name__ == "__main__":
    main()
