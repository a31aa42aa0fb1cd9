"""Layers `measured`: the quality of the landscape model at several sizes, and the prediction beside real renders.

None of the held-out seeds is used to calibrate or to measure.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import RECIPE, quantize
from comfyui.server import ComfyUIServer
from measure import Row
from quality_rows import BATCH, CALIBRATION_SEEDS, HELD_OUT_SEEDS, RENDER, RUNS, TIMEOUT, WORDS, Studio, level, psnr
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels import Recipe
from stochastic_fp8_pack.kernels.engine.file_weights import FileWeights
from stochastic_fp8_pack.kernels.engine.quantization import Quantization
from stochastic_fp8_pack.kernels.files.reader import open_source

MEASURE = {"seeds": 1, "steps": 4, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
MEASURE_SEED = 9000
SHARES = (0.0, 0.05, 0.10, 0.15, 0.20, 0.30, 0.38, 0.50, 0.65, 0.80)
"""Shares of the parameters of all Linear layers that may stay in 16 bits."""
BARS = {("calibrated", 0.38): 51, ("calibrated", 0.20): 46, ("calibrated", 0.10): 43, ("nearest", 0.38): 41}
"""Smallest PSNR in dB."""
LARGEST_DEVIATION = 3  # dB
LONGEST = 60  # seconds


def rows(rounds):
    """`rounds` is not used: these rows are qualities, and the time of one long job."""
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    with tempfile.TemporaryDirectory() as folder, ComfyUIServer(Path(folder), environment=threads) as server:
        yield from measured_rows(FittingStudio(server))


def measured_rows(studio):
    studio.calibrate("calibration", CALIBRATION_SEEDS, BATCH, RUNS)
    seconds = studio.measure()
    yield Row(
        "measuring 34 layers",
        f"{seconds:.0f} s",
        "4 prompts, 1 seed and 4 steps each",
        "",
        f"<= {LONGEST} s",
        seconds <= LONGEST,
    )
    calibration = studio.load_calibration("measured")
    original = studio.held_out(None)
    deviations = {}
    for rounding in ("calibrated", "nearest"):
        images, _ = studio.held_out({"rounding": rounding, "layers": "sd3"})
        preset = [psnr(*pair) for pair in zip(images, original[0], strict=True)]
        yield Row(f"{rounding}, the SD3 preset (38 % kept)", level(preset), "", "")
        for share in SHARES:
            limit = limit_of(calibration, rounding, share)
            images, latents = studio.held_out({"rounding": rounding, "layers": "measured", "size_limit": limit})
            found = [psnr(*pair) for pair in zip(images, original[0], strict=True)]
            real, predicted = latent_quality(latents, original[1]), predicted_quality(calibration, rounding, limit)
            deviations[rounding, share] = abs(real - predicted)
            bar = BARS.get((rounding, share))
            verdict = (f">= {bar} dB", statistics.mean(found) >= bar) if bar else ("", None)
            texts = f"latent {real:.1f} dB, predicted {predicted:.1f} dB"
            yield Row(f"{rounding}, {100 * share:.0f} % kept", level(found), texts, "", *verdict)
        largest = max(deviations[rounding, share] for share in SHARES)
        yield Row(
            f"{rounding}: predicted against real latents, {len(SHARES)} sizes",
            f"{largest:.1f} dB apart at most",
            "",
            "",
            f"<= {LARGEST_DEVIATION} dB",
            largest <= LARGEST_DEVIATION,
        )


class FittingStudio(Studio):
    """A Studio that measures, and renders latents beside images."""

    def measure(self):
        """Measure the landscape model. Returns the seconds it took, with loading the model."""
        graph = Graph()
        model, scenes = self.inputs(graph)
        latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)
        calibration = graph.add("StochasticFP8LoadCalibration", calibration_name="calibration_00001_.safetensors")
        for number, (positive, negative) in enumerate(scenes.values()):
            inputs = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
            seed = MEASURE_SEED + number
            calibration = graph.add("StochasticFP8Sensitivity", **inputs, seed=seed, **MEASURE, calibration=calibration)
        graph.add("StochasticFP8SaveCalibration", filename_prefix="measured", calibration=calibration)
        start = time.perf_counter()
        self.server.queue(graph.prompt, timeout=TIMEOUT)
        return time.perf_counter() - start

    def held_out(self, choices):
        """(images, latents) of the held-out seeds. choices: of the recipe; None: the unquantized model."""
        graph = Graph()
        model, scenes = self.inputs(graph)
        vae = graph.add("StochasticFP8DemoModel", scene=WORDS[0])[3]
        if choices:
            calibration = graph.add("StochasticFP8LoadCalibration", calibration_name="measured_00001_.safetensors")
            model = quantize(graph, model, **{**RECIPE, **choices}, calibration=calibration)
        latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=2)
        kept = []
        for number, seed in enumerate(HELD_OUT_SEEDS):
            sampled = graph.sample(model, *scenes[WORDS[number % len(WORDS)]], latent, seed=seed, **RENDER)
            image = graph.add("VAEDecode", samples=sampled, vae=vae)
            kept.append((self.bench.keep(graph, image, as_="image"), self.bench.keep(graph, sampled)))
        entry = self.server.queue(graph.prompt, timeout=TIMEOUT)
        return tuple(
            torch.cat([load_file(self.server.files(entry, pair[i].id, "tensors")[0])["samples"] for pair in kept])
            for i in range(2)
        )


def latent_quality(latents, originals):
    """Latent dB, the mean over the images."""
    changes = (latents - originals).square().mean((1, 2, 3))
    return (10 * torch.log10(originals.square().mean((1, 2, 3)) / changes)).mean().item()


def limit_of(calibration, rounding, share):
    """The size limit in GB at which this share of the parameters of all Linear layers can stay in 16 bits."""
    linear = [w for key, w in load_file(tiny_models.LANDSCAPES).items() if w.ndim == 2 and key.endswith(".weight")]
    smallest = planned(calibration, rounding, 1).choices.smallest
    return (smallest + share * sum(w.numel() for w in linear)) / 1e9


def predicted_quality(calibration, rounding, limit):
    return planned(calibration, rounding, limit).choice.decibels


def planned(calibration, rounding, limit):
    """The MeasuredChoice of a plan."""
    recipe = Recipe(rounding=rounding, layers="measured", size_limit=limit)
    with open_source(tiny_models.LANDSCAPES) as source:
        return Quantization(FileWeights(source), recipe, calibration).measured
