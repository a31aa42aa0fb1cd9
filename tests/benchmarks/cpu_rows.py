"""Tensors on the CPU, the pack's start, and the figures."""

import statistics

import measure
import peers
import torch
from measure import Absent, Row, costs, faster, interleaved
from reports import repeated, small_report
from stochastic_fp8_pack.kernels import ROUNDINGS, quantize_tensor

SIDE = 4096
FORMAT, LARGEST = torch.float8_e4m3fn, 448.0
BARS = {
    torch.bfloat16: {"comfy": 15, "cast": 1.0, "comfy+": 8, "cast+": 0.5},
    torch.float16: {"comfy": 15, "cast": 1.0, "comfy+": 8, "cast+": 0.5},
    torch.float32: {"comfy": 6, "cast": 0.35, "comfy+": None, "cast+": None},
}
"""Smallest ratio of the peer's time to ours. "+": with error statistics."""


def rows(rounds):
    for dtype in BARS:
        yield from tensor_rows(dtype, rounds)
    yield from start_rows(rounds)
    yield from figure_rows(rounds)


def tensor_rows(dtype, rounds):
    """Every rounding, with and without statistics, compared with the peers on the same tensor."""
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    contestants = {"comfy": comfy(x), "kitchen": kitchen(x), "cast": lambda: cast(x), "copy": x.clone}
    for rounding in ROUNDINGS:
        for statistics_on in (False, True):
            contestants[rounding, statistics_on] = ours(x, rounding, statistics_on)
    best = interleaved(contestants, rounds)
    name, bars = str(dtype).removeprefix("torch."), BARS[dtype]
    for rounding in ROUNDINGS:
        for statistics_on in (False, True):
            what = f"{name}, {rounding}{', statistics' if statistics_on else ''}"
            seconds, plus = best[rounding, statistics_on], "+" * statistics_on
            yield faster(what, seconds, "comfy.float", best["comfy"], bars["comfy" + plus])
            yield faster(what, seconds, "scaled RNE cast", best["cast"], bars["cast" + plus])
    stochastic = best["stochastic", False]
    yield faster(f"{name}, stochastic", stochastic, "comfy-kitchen eager", best["kitchen"])
    yield costs(f"{name}, stochastic", stochastic, "limit: copying the tensor", best["copy"])


def ours(x, rounding, statistics_on):
    def run():
        quantize_tensor(x, rounding=rounding, statistics=statistics_on, key="blocks.0.weight")

    return run


def cast(x):
    """amax, scale, and PyTorch's own conversion, which rounds to nearest even."""
    scale = x.abs().amax().float() / LARGEST
    return (x.float() / scale).to(FORMAT)


def comfy(x):
    """As comfy.quant_ops calls it."""

    def run():
        rounding = peers.comfy_float()
        scale = torch.amax(x.abs()) / LARGEST
        rounding(x * (1.0 / scale).to(x.dtype), FORMAT, seed=1)

    return run


def kitchen(x):
    """As newer versions of ComfyUI call it."""

    def run():
        rounding = peers.kitchen_eager()
        scale = torch.amax(x.abs()) / LARGEST
        random = torch.randint(0, 256, x.shape, dtype=torch.uint8)
        rounding(x * (1.0 / scale).to(x.dtype), random, FORMAT)

    return run


def start_rows(rounds):
    what = "importing the pack and its nodes in ComfyUI"
    try:
        results = [measure.in_child("start", peers.comfyui()) for _ in range(rounds + 1)][1:]
    except Absent as reason:
        yield Row(what, "absent", str(reason))
        return
    best = min(result["seconds"] for result in results)
    heavy = ", ".join(results[0]["heavy"])
    yield Row(what, measure.duration(best), f"imported: {heavy}" if heavy else "", "", "<= 50 ms", best <= 0.05)


def figure_rows(rounds):
    from stochastic_fp8_pack.kernels.figures import error_histogram, layer_report, to_image

    report = repeated(small_report(rounding="stochastic"), 1000)
    for figure in (error_histogram, layer_report):
        seconds = [_time(lambda draw=figure: to_image(draw(report))) for _ in range(rounds + 1)][1:]
        best, middle = min(seconds), statistics.median(seconds)
        what = f"{figure.__name__} of 1,000 layers"
        yield Row(what, measure.duration(best), f"median {measure.duration(middle)}", "", "<= 1.5 s", best <= 1.5)


def _time(run):
    return interleaved({"it": run}, 1)["it"]
