"""Main memory that calibrating takes on a CPU, beside the same graph with rounding to nearest.

Counted is anonymous memory, which the system cannot take back: no file backs it.
"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import tiny_models
from comfyui.graph import Graph
from comfyui.pack import Bench, quantize
from comfyui.server import ComfyUIServer
from measure import Row, anonymous_peak, in_child
from quality_rows import TIMEOUT, calibrate
from stochastic_fp8_pack.kernels.calibration.moments import moment_size

DIM = 1024
LAYERS = (2, 6)
"""Blocks of two Wan models, so that growth shows."""
SIZE = {"width": 256, "height": 256, "length": 5}
SAMPLER = {"steps": 2, "cfg": 1.0}
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
"""Lets glibc return freed blocks above 1 MB to the system, in place of those above 32 MB: only memory in use counts."""
LARGEST_LAYER = (3072, 15360)
BAR = 3e9
"""More than nearest takes, in bytes."""


def rows(rounds):
    """`rounds` is not used: a peak is the largest of many samples."""
    yield layer_row()
    for layers in LAYERS:
        yield from model_rows(layers)
    yield from model_rows(LAYERS[-1], RETURNED_AT_ONCE, ", large blocks returned at once")


def model_rows(layers, environment=None, how=""):
    shapes = tiny_models.wan_shapes(layers, DIM, 4 * DIM)
    millions = sum(map(math.prod, shapes.values())) / 1e6
    stages = {rounding: stage_peaks(shapes, rounding, environment) for rounding in ("nearest", "calibrated")}
    sums = recorded_bytes(layers)
    yield Row(f"{millions:.0f} million parameters{how}: sums of recorded inputs", megabytes(sums), "")
    for stage, title in STAGES.items():
        yield memory_row(f"the same: {title}", *(stages[rounding][stage] for rounding in ("calibrated", "nearest")))
    yield memory_row("the same: peak of all", *(max(stages[each].values()) for each in ("calibrated", "nearest")))


STAGES = {
    "record": "loading, and recording or sampling 2 steps",
    "quantize": "quantizing, and sampling 2 steps",
}


def stage_peaks(shapes, rounding, environment):
    """Stage -> peak of ComfyUI's anonymous memory in bytes, in a server of its own. Each stage is a prompt."""
    with tempfile.TemporaryDirectory() as folder, ComfyUIServer(Path(folder), environment=environment) as server:
        tiny_models.save(tiny_models.state_dict(shapes), server.models("diffusion_models") / "wan.safetensors")
        graph, bench, peaks = Graph(), Bench(server), {}
        model = bench.load(graph, "wan.safetensors")
        text = graph.add("TestRandomConditioning", seed=1, tokens=8, width=4096, pooled_width=0)
        latent = graph.add("EmptyHunyuanLatentVideo", batch_size=1, **SIZE)
        choices = {"rounding": rounding, "layers": "all_linear"}
        if rounding == "calibrated":
            choices["calibration"] = first = calibrate(graph, model, text, text, latent, **SAMPLER)
            rendered = first[1]
        else:
            rendered = graph.sample(model, text, text, latent, **SAMPLER)
        bench.keep(graph, rendered)
        with anonymous_peak(server.pid) as peaks["record"]:
            server.queue(graph.prompt, timeout=TIMEOUT)
        bench.keep(graph, graph.sample(quantize(graph, model, **choices), text, text, rendered, **SAMPLER))
        with anonymous_peak(server.pid) as peaks["quantize"]:  # ComfyUI does not record again
            server.queue(graph.prompt, timeout=TIMEOUT)
        return {stage: peak.bytes for stage, peak in peaks.items()}


def memory_row(what, ours, nearest):
    return Row(what, megabytes(ours), f"nearest {megabytes(nearest)}", f"{(ours - nearest) / 1e6:+,.0f} MB")


def layer_row():
    """The working memory of the widest layer of Flux.1-dev, which is what calibrated rounding adds at full size."""
    out, width = LARGEST_LAYER
    peaks = [in_child("layer_memory", rounding, out, width)["anonymous"] for rounding in ("calibrated", "nearest")]
    more = peaks[0] - peaks[1]
    met = (f"<= {BAR / 1e9:g} GB more", more <= BAR)
    return replace(memory_row(f"a layer of {out} x {width} on the CPU", *peaks), bar=met[0], met=met[1])


def recorded_bytes(layers):
    """Bytes of the sums: of the layers that see every position, all but the keys and values of the text."""
    return layers * 4 * (6 * moment_size(DIM) + moment_size(4 * DIM))


def megabytes(count):
    return f"{count / 1e6:,.0f} MB"
