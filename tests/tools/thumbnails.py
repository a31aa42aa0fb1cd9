"""Makes the thumbnails of the example workflows from what they render. ``make pictures`` calls this.

Each is 768 x 432. The demo model and the tiny models replace those that cannot be shipped.
"""

from pathlib import Path

import tiny_models
from comfyui.graph import Graph
from comfyui.pack import metadata_of
from comfyui.server import PACK_ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

SIZE = (768, 432)
PAPER = "#ffffff"
EXAMPLES = PACK_ROOT / "example_workflows"
RECIPE = {"format": "float8_e4m3fn", "rounding": "stochastic", "scaling": "absmax", "seed": 0}


def make_thumbnails(server):
    """Run the examples and write ``example_workflows/<name>.jpg``."""
    before, after, histogram = render(server, *_landscape("dawn", layers="all_linear"))
    save(below(beside(before, after), histogram), "Try it now")
    (report,) = render(server, *_layer_report("nearest"))
    save(fit(report, SIZE), "Quantize and save")
    before, after = render(server, *_lora(server))
    save(beside(before, after, SIZE), "Quantize after LoRA")
    (histogram,) = render(server, *_histogram_of_a_file(server))
    save(fit(histogram, SIZE), "File to file")
    (report,) = render(server, *_text_encoder_report(server))
    save(fit(report, SIZE), "Text encoder")
    (findings,) = render(server, *_findings(server))
    save(fit(findings, SIZE), "Inspect and repair")
    nearest, calibrated = render(server, *_sheets())
    save(below(fit(nearest, (SIZE[0], 216)), fit(calibrated, (SIZE[0], 216))), "Calibrate, quantize, compare")
    (curve,) = render(server, *_size_and_quality())
    save(fit(curve, SIZE), "Fit my memory")


def render(server, graph, *images):
    """Run a graph and fetch the given images as PIL pictures."""
    savers = [
        graph.add("TestSaveTensor", name=f"thumbnail_{i}.safetensors", image=image) for i, image in enumerate(images)
    ]
    entry = server.queue(graph.prompt, timeout=300)
    tensors = [load_file(server.files(entry, saver.id, "tensors")[0])["samples"][0] for saver in savers]
    return [Image.fromarray((tensor * 255).round().byte().numpy()) for tensor in tensors]


def _landscape(scene, **recipe):
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene=scene)
    quantized = graph.add("StochasticFP8Quantize", model=demo, **RECIPE, **recipe)
    histogram = graph.add("StochasticFP8ErrorHistogram", report=quantized[1], layers="all", width=1536, height=648)
    return graph, _paint(graph, demo, demo), _paint(graph, demo, quantized), histogram


def demo_landscape(server, scene, seed):
    """A 256 x 256 picture of the demo model."""
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene=scene)
    (picture,) = render(server, graph, _paint(graph, demo, demo, seed))
    return picture


def _paint(graph, demo, model, seed=42):
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    sampled = graph.sample(model, demo[1], demo[2], latent, seed=seed, steps=20, cfg=2.5)
    return graph.add("VAEDecode", samples=sampled, vae=demo[3])


def calibrate(graph, demo):
    """Add a calibration on twelve images."""
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=4)
    return graph.add(
        "StochasticFP8Calibrate",
        model=demo,
        positive=demo[1],
        negative=demo[2],
        latent_image=latent,
        seed=1000,
        steps=20,
        cfg=2.5,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        runs=3,
    )


def sheets_of_two_roundings(graph, demo, calibration):
    """The original compared with two FP8 models: (sheet of nearest, sheet of calibrated, report of calibrated)."""
    original = _paint(graph, demo, demo)
    sheets = []
    for rounding in ("nearest", "calibrated"):
        choices = {**RECIPE, "rounding": rounding, "layers": "all_linear", "calibration": calibration}
        quantized = graph.add("StochasticFP8Quantize", model=demo, **choices)
        sheet = {"image_a": original, "image_b": _paint(graph, demo, quantized), "amplify": 8, "width": 1024}
        sheets.append(graph.add("StochasticFP8ImageCompare", **sheet, label_a="original", label_b=rounding))
    return *sheets, quantized[1]


def _sheets():
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene="dusk")
    nearest, calibrated, _ = sheets_of_two_roundings(graph, demo, calibrate(graph, demo))
    return graph, nearest, calibrated


def measure(graph, demo, calibration):
    """Add a measurement of the demo model's layers."""
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    inputs = {"model": demo, "positive": demo[1], "negative": demo[2], "latent_image": latent}
    sampler = {"steps": 4, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return graph.add("StochasticFP8Sensitivity", **inputs, **sampler, seed=2000, seeds=2, calibration=calibration)


def _size_and_quality():
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene="dusk")
    measured = measure(graph, demo, calibrate(graph, demo))
    return graph, graph.add("StochasticFP8SizeQuality", model=demo, calibration=measured, width=1536, height=1000)


def _layer_report(rounding):
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene="day")
    quantized = graph.add("StochasticFP8Quantize", model=demo, **{**RECIPE, "rounding": rounding}, layers="auto")
    return graph, graph.add("StochasticFP8LayerReport", report=quantized[1])


def _lora(server):
    path = server.models("loras") / "thumbnail.safetensors"
    tiny_models.write_sd3_lora(path, depth=3, rank=2, strength=0.12)
    graph = Graph()
    demo = graph.add("StochasticFP8DemoModel", scene="dusk")
    patched = graph.add("LoraLoaderModelOnly", model=demo, lora_name=path.name, strength_model=1.0)
    quantized = graph.add("StochasticFP8Quantize", model=patched, **RECIPE, layers="auto")
    return graph, _paint(graph, demo, patched, seed=43), _paint(graph, demo, quantized, seed=43)


def _histogram_of_a_file(server):
    path = tiny_models.save(
        load_file(tiny_models.LANDSCAPES), server.models("diffusion_models") / "thumbnail.safetensors"
    )
    graph = Graph()
    options = {"filename_prefix": "thumbnail", "layout": "native", "overwrite": True, "requantize": False}
    file = f"diffusion_models/{path.name}"
    job = graph.add("StochasticFP8QuantizeFile", file=file, layers="auto", **options, **RECIPE)
    return graph, graph.add("StochasticFP8ErrorHistogram", report=job[1], layers="all", width=1024, height=576)


def _text_encoder_report(server):
    path = tiny_models.write_t5xxl(server.models("text_encoders") / "thumbnail_t5.safetensors")
    graph = Graph()
    clip = graph.add("CLIPLoader", clip_name=path.name, type="sd3", device="default")
    quantized = graph.add("StochasticFP8QuantizeTextEncoder", clip=clip, layers="auto", **RECIPE)
    return graph, graph.add("StochasticFP8LayerReport", report=quantized[1])


def _findings(server):
    """A file with the faults that converters most often leave."""
    from stochastic_fp8_pack.kernels import quantize_file

    path = Path(server.models("diffusion_models")) / "my_fp8_model.safetensors"
    quantize_file(tiny_models.LANDSCAPES, path, overwrite=True)
    tensors, metadata = load_file(path), metadata_of(path)
    first, second, third = sorted(name for name in tensors if name.endswith("x_block.attn.proj.weight_scale"))
    tensors[first] = tensors[first].bfloat16()
    tensors[second] = tensors[second] * 0
    del tensors[third]
    save_file(tensors, path, metadata)
    graph = Graph()
    options = {"deep": False, "repair": False, "filename_prefix": "repaired"}
    return graph, graph.add("StochasticFP8Inspect", file=f"diffusion_models/{path.name}", **options)[1]


def fit(picture, size):
    """The whole picture at the top of a white sheet of that size."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    small = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(small, ((size[0] - small.width) // 2, 0))
    return sheet


def fill(picture, size):
    """The middle of the picture, scaled and cropped to that size."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    large = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    left, top = (large.width - size[0]) // 2, (large.height - size[1]) // 2
    return large.crop((left, top, left + size[0], top + size[1]))


def beside(left, right, size=(SIZE[0], 216)):
    half = (size[0] - 6) // 2
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(fill(left, (half, size[1])), (0, 0))
    sheet.paste(fill(right, (half, size[1])), (size[0] - half, 0))
    return sheet


def below(top, bottom):
    sheet = Image.new("RGB", SIZE, PAPER)
    sheet.paste(top, (0, 0))
    sheet.paste(fit(bottom, (SIZE[0], SIZE[1] - top.height)), (0, top.height))
    return sheet


def save(picture, name):
    picture.save(EXAMPLES / f"{name}.jpg", quality=88, optimize=True)
