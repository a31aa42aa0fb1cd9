"""Makes the thumbnails of the example workflows from what they render. ``make pictures`` calls this.

Each is 768 x 432. ComfyUI's list of templates shows them about 230 pixels wide, so they have few and large parts: two
pictures, one detail of a figure, or files.
"""

from pathlib import Path

import matplotlib
import tiny_models
from comfyui.graph import Graph
from comfyui.server import PACK_ROOT
from comfyui.workflows import read_workflow, to_prompt
from PIL import Image, ImageChops, ImageDraw, ImageFont
from safetensors.torch import load_file

SIZE = (768, 432)
GAP = 6
PAPER, INK, BLUE, GREEN, RED = "#171b20", "#f2f4f6", "#3f789e", "#4caf7a", "#e0605a"
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
TEXT = 44
EXAMPLES = PACK_ROOT / "example_workflows"
RECIPE = {"format": "float8_e4m3fn", "rounding": "stochastic", "scaling": "absmax", "seed": 0}


def make_thumbnails(server):
    """Run the examples and write ``example_workflows/<name>.jpg``."""
    for name, draw in THUMBNAILS.items():
        picture = draw(server, name)
        assert picture.size == SIZE, name
        picture.save(EXAMPLES / f"{name}.jpg", quality=88, optimize=True)


# --- what the examples render


class Run:
    """A finished run of an example. change: alters the workflow before."""

    def __init__(self, server, name, change=None):
        self.server = server
        workflow = read_workflow(name)
        if change:
            change({node["type"]: node for node in workflow["nodes"]})
        self.prompt = to_prompt(workflow, server.object_info())
        self.outputs = server.queue(self.prompt, timeout=600)["outputs"]

    def __getitem__(self, type_):
        """What the first node of this type reported."""
        ids = (id_ for id_, node in self.prompt.items() if node["class_type"] == type_)
        return self.outputs[min(ids, key=int)]

    def pictures(self, type_, key="images"):
        return [self.server.view(image).convert("RGB") for image in self[type_][key]]

    def sides(self):
        """The first images of the comparison, A and B."""
        return [self.pictures("StochasticFP8ImageCompare", f"{side}_images")[0] for side in "ab"]

    def sizes(self, type_="StochasticFP8Quantize"):
        """Bytes of the model before and after, as text."""
        (summary,) = self[type_]["stochastic_fp8"]
        return [f"{summary[key] / 1e6:.1f} MB" for key in ("bytes_before", "bytes_after")]


def before_and_after(server, name):
    return beside(*Run(server, name).sides(), "16 bits", "FP8")


def with_a_lora(server, name):
    path = server.models("loras") / "thumbnail.safetensors"
    tiny_models.write_sd3_lora(path, depth=3, rank=2, strength=0.12)

    def switch_on(nodes):
        nodes["LoraLoaderModelOnly"] |= {"mode": 0, "widgets_values": [path.name, 1.0]}

    return beside(*Run(server, name, switch_on).sides(), "with LoRA", "in FP8")


def two_files(server, name):
    (before, after), picture = Run(server, name).sizes(), demo_landscape(server, "day", 42)
    return files(before, after, picture=picture)


def converted_file(server, name):
    return files(*Run(server, name).sizes("StochasticFP8QuantizeFile"))


def text_encoder(server, name):
    return files("T5", "T5 FP8")


def inspected(server, name):
    return files("✗", "✓", colours=(RED, GREEN), small=1)


def two_roundings(server, name):
    """The values of one rounding curve each."""
    curves = []
    for rounding in ("nearest", "stochastic"):
        graph = Graph()
        values = {"format": "float8_e4m3fn", "rounding": rounding, "low": 0.5, "high": 2.5, "draws": 1000}
        curve = graph.add("StochasticFP8RoundingCurve", **values, width=1024, height=768)
        curves.append(render(server, graph, curve)[0].crop((95, 130, 480, 345)))
    return beside(*curves, "nearest", "stochastic")


def two_differences(server, name):
    """What nearest and calibrated change in the same picture, eight times as bright."""

    def to_nearest(nodes):
        values = nodes["StochasticFP8Quantize"]["widgets_values"]
        values[values.index("calibrated")] = "nearest"

    differences = [
        ImageChops.difference(*Run(server, name, change).sides()).point(lambda value: min(255, 8 * value))
        for change in (to_nearest, None)
    ]
    return beside(*differences, "nearest", "calibrated")


def sizes_and_qualities(server, name):
    (figure,) = Run(server, name).pictures("StochasticFP8SizeQuality")
    sheet = fill(figure.crop((60, 114, 629, 434)), SIZE)
    label(sheet, "quality by size", (SIZE[0] // 2, SIZE[1] - 44))
    return sheet


THUMBNAILS = {
    "1 Try it now": before_and_after,
    "2 Quantize and save": two_files,
    "3 Which rounding": two_roundings,
    "4 Quantize after a LoRA": with_a_lora,
    "5 File to file": converted_file,
    "6 Calibrate, quantize, compare": two_differences,
    "7 Fit my memory": sizes_and_qualities,
    "8 Text encoder": text_encoder,
    "9 Inspect and repair": inspected,
}


# --- parts of graphs


def render(server, graph, *images):
    """Run a graph and fetch the given images as PIL pictures."""
    savers = [
        graph.add("TestSaveTensor", name=f"thumbnail_{i}.safetensors", image=image) for i, image in enumerate(images)
    ]
    entry = server.queue(graph.prompt, timeout=300)
    tensors = [load_file(server.files(entry, saver.id, "tensors")[0])["samples"][0] for saver in savers]
    return [Image.fromarray((tensor * 255).round().byte().numpy()) for tensor in tensors]


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


def measure(graph, demo, calibration):
    """Add a measurement of the demo model's layers."""
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    inputs = {"model": demo, "positive": demo[1], "negative": demo[2], "latent_image": latent}
    sampler = {"steps": 4, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return graph.add("StochasticFP8Sensitivity", **inputs, **sampler, seed=2000, seeds=2, calibration=calibration)


# --- drawing


def fill(picture, size):
    """The middle of the picture, scaled and cropped to that size."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    large = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    left, top = (large.width - size[0]) // 2, (large.height - size[1]) // 2
    return large.crop((left, top, left + size[0], top + size[1]))


def beside(left, right, *labels):
    """Two pictures with a label each."""
    half = (SIZE[0] - GAP) // 2
    sheet = Image.new("RGB", SIZE, PAPER)
    for x, picture, text in zip((0, SIZE[0] - half), (left, right), labels, strict=True):
        sheet.paste(fill(picture, (half, SIZE[1])), (x, 0))
        label(sheet, text, (x + half // 2, SIZE[1] - 44))
    return sheet


def label(sheet, text, middle):
    """Text on a dark plate."""
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(FONT, TEXT)
    left, top, right, bottom = draw.textbbox(middle, text, font, anchor="mm")
    draw.rounded_rectangle((left - 14, top - 10, right + 14, bottom + 10), 10, fill=PAPER)
    draw.text(middle, text, INK, font, anchor="mm")


def files(before, after, colours=(BLUE, BLUE), picture=None, small=0.72):
    """A file, an arrow, and what became of it. small: the height of the second file, relative to the first."""
    sheet = fill(picture, SIZE) if picture else Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, text, colour, scale in ((196, before, colours[0], 1), (572, after, colours[1], small)):
        width, height = 280 * scale, 340 * scale
        left, top, right, bottom = x - width / 2, 216 - height / 2, x + width / 2, 216 + height / 2
        fold = 70 * scale
        outline = [(left, top), (right - fold, top), (right, top + fold), (right, bottom), (left, bottom)]
        draw.polygon(outline, fill=colour)
        draw.polygon([(right - fold, top), (right - fold, top + fold), (right, top + fold)], fill=INK)
        draw.text((x, 232), text, INK, ImageFont.truetype(FONT, TEXT if len(text) > 1 else 4 * TEXT), anchor="mm")
    draw.polygon([(356, 176), (412, 216), (356, 256)], fill=INK)
    return sheet
