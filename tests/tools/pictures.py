"""Makes the images of the documentation, from real nodes in a real ComfyUI on the landscape model that ships.

    make pictures

writes the images of the help pages, the thumbnails of the example workflows, and the icon and banner in .github/.
Look at what changed before you commit it.
"""

import tempfile
from pathlib import Path

import conftest  # noqa: F401 - loads the pack
from comfyui.graph import Graph
from comfyui.server import PACK_ROOT, ComfyUIServer
from PIL import Image
from safetensors.torch import load_file
from tools.emblem import draw_banner, draw_icon
from tools.thumbnails import calibrate, demo_landscape, make_thumbnails, measure, sheets_of_two_roundings

HELP = PACK_ROOT / "js" / "docs" / "pictures"
GITHUB = PACK_ROOT / ".github"
RECIPE = {"format": "float8_e4m3fn", "rounding": "stochastic", "scaling": "absmax", "seed": 0, "layers": "all_linear"}
COMPARED = {"scaling": "absmax", "layers": "all_linear", "most_layers": 34}


class Pictures:
    """A graph, and the images to write from it."""

    def __init__(self):
        self.graph = Graph()
        self._wanted = {}

    def want(self, path, image):
        saver = self.graph.add("TestSaveTensor", name=f"{path.stem}.safetensors", image=image)
        self._wanted[path] = saver

    def make(self, server):
        entry = server.queue(self.graph.prompt, timeout=600)
        for path, saver in self._wanted.items():
            (tensor,) = server.files(entry, saver.id, "tensors")
            write_picture(path, load_file(tensor)["samples"][0])


def write_picture(path, image):
    """Write charts as PNG with a palette and photographs as JPEG, to keep help pages small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((image * 255).round().byte().numpy())
    if path.suffix == ".png":
        picture.quantize(dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        picture.save(path, quality=88, optimize=True)


def landscape(graph, scene, **recipe):
    """The demo model and its pictures, before and after quantizing: (model, report, before, after)."""
    model = graph.add("StochasticFP8DemoModel", scene=scene)
    quantized = graph.add("StochasticFP8Quantize", model=model, **{**RECIPE, **recipe})
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    images = []
    for each in (model, quantized):
        sampled = graph.sample(each, model[1], model[2], latent, steps=20, cfg=2.5)
        images.append(graph.add("VAEDecode", samples=sampled, vae=model[3]))
    return model, quantized[1], *images


def help_pages(pictures):
    """One or two images for the help page of each node that draws."""
    graph = pictures.graph
    model, report, before, after = landscape(graph, "dusk")
    nearest = graph.add("StochasticFP8Quantize", model=model, **{**RECIPE, "rounding": "nearest"})[1]
    for name, each in (("stochastic", report), ("nearest", nearest)):
        histogram = graph.add("StochasticFP8ErrorHistogram", report=each, layers="all")
        pictures.want(HELP / f"error_histogram_{name}.png", histogram)
        curve = {"format": "float8_e4m3fn", "rounding": name, "low": 0.5, "high": 2.5, "draws": 1000}
        pictures.want(HELP / f"rounding_curve_{name}.png", graph.add("StochasticFP8RoundingCurve", **curve))
    pictures.want(HELP / "layer_report.png", graph.add("StochasticFP8LayerReport", report=report))
    pictures.want(HELP / "compare_roundings.png", graph.add("StochasticFP8Compare", model=model, **COMPARED))
    sheet = graph.add("StochasticFP8ImageCompare", image_a=before, image_b=after, amplify=8, width=1024)
    pictures.want(HELP / "compare_images.jpg", sheet)


def calibration_pages():
    """The same image from two FP8 models of the same size, each beside the original, and the effect of calibration."""
    pictures = Pictures()
    graph = pictures.graph
    model = graph.add("StochasticFP8DemoModel", scene="dusk")
    calibration = calibrate(graph, model)
    nearest, calibrated, report = sheets_of_two_roundings(graph, model, calibration)
    pictures.want(HELP / "original_and_nearest.jpg", nearest)
    pictures.want(HELP / "original_and_calibrated.jpg", calibrated)
    pictures.want(HELP / "layer_report_calibrated.png", graph.add("StochasticFP8LayerReport", report=report))
    compared = graph.add("StochasticFP8Compare", model=model, calibration=calibration, height=1024, **COMPARED)
    pictures.want(HELP / "compare_calibrated.png", compared)
    measured = measure(graph, model, calibration)
    study = graph.add("StochasticFP8SizeQuality", model=model, calibration=measured)
    pictures.want(HELP / "size_and_quality.png", study)
    quantized = graph.add("StochasticFP8Quantize", model=model, **{**RECIPE, "rounding": "nearest"})
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    probe = {"positive": model[1], "negative": model[2], "latent_image": latent, "seed": 42, "steps": 20, "cfg": 2.5}
    probe |= {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    probed = graph.add("StochasticFP8ActivationProbe", model_a=model, model_b=quantized, **probe)
    pictures.want(HELP / "activation_probe.png", probed)
    return pictures


def main():
    pictures = Pictures()
    help_pages(pictures)
    with tempfile.TemporaryDirectory() as folder, ComfyUIServer(Path(folder)) as server:
        pictures.make(server)
        calibration_pages().make(server)
        make_thumbnails(server)
        draw_icon(GITHUB / "icon.png")
        draw_banner(GITHUB / "banner.png", demo_landscape(server, "dusk", seed=2))


if __name__ == "__main__":
    main()
