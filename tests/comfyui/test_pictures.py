"""The nodes that draw, in a real ComfyUI: their outputs, what they show, and their errors."""

import io
import json
import re

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import quantize
from comfyui.server import ExecutionError
from PIL import Image
from safetensors.torch import load_file

NODES = (
    "StochasticFP8ErrorHistogram",
    "StochasticFP8LayerReport",
    "StochasticFP8Compare",
    "StochasticFP8RoundingCurve",
    "StochasticFP8ImageCompare",
)


@pytest.fixture
def graph():
    return Graph()


@pytest.fixture
def report(graph):
    """The report socket of a quantized landscape model."""
    return quantize(graph, graph.add("StochasticFP8DemoModel", scene="dawn"))[1]


def test_histogram_of_all_layers_is_one_image(bench, graph, report):
    node = graph.add("StochasticFP8ErrorHistogram", report=report, layers="all", width=800, height=400)
    image = bench.run(graph, bench.keep(graph, node, as_="image"))
    assert image.shape == (1, 400, 800, 3)
    assert 0 <= image.min() < 0.3
    assert image.max() == 1


def test_histograms_of_the_worst_layers_are_shown_in_the_node(comfyui, graph, report):
    node = graph.add("StochasticFP8ErrorHistogram", report=report, layers="worst", count=3)
    entry = comfyui.queue(graph.prompt)
    shown = entry["outputs"][node.id]["images"]
    assert len(shown) == 3
    assert comfyui.view(shown[0]).size == (1024, 480)


def test_histograms_of_a_pattern(bench, graph, report):
    node = graph.add("StochasticFP8ErrorHistogram", report=report, layers="pattern", pattern="joint_blocks.0.*.attn")
    image = bench.run(graph, bench.keep(graph, node, as_="image"))
    assert len(image) == 4  # qkv and proj, of context_block and x_block


def test_a_pattern_that_matches_nothing_is_named(comfyui, graph, report):
    graph.add("StochasticFP8ErrorHistogram", report=report, layers="pattern", pattern="no_such_layer")
    with pytest.raises(
        ExecutionError, match="pattern 'no_such_layer' matches no quantized layer: use names such as joint_blocks"
    ):
        comfyui.queue(graph.prompt)


def test_layer_report_tells_each_layers_numbers(bench, comfyui, graph, report):
    node = graph.add("StochasticFP8LayerReport", report=report)
    shown = [graph.add("TestShowText", value=node[i]) for i in (1, 2)]
    image = bench.keep(graph, node, as_="image")
    entry = comfyui.queue(graph.prompt)
    markdown, table = (json.loads(entry["outputs"][text.id]["text"][0]) for text in shown)
    table = json.loads(table)
    weights = load_file(tiny_models.LANDSCAPES)
    assert len(table["layers"]) == 21
    for row in table["layers"]:
        weight = weights[row["layer"]]
        assert row["shape"] == list(weight.shape)
        assert row["amax"] == weight.abs().max().item()
        assert row["layer"] in markdown
    assert table["layers"][0]["sqnr"] == min(row["sqnr"] for row in table["layers"])
    (picture,) = comfyui.files(entry, image.id, "tensors")
    assert load_file(picture)["samples"].shape == (1, 768, 1024, 3)


def test_compare_recommends_from_the_models_weights(comfyui, graph):
    node = graph.add(
        "StochasticFP8Compare",
        model=graph.add("StochasticFP8DemoModel", scene="dawn"),
        scaling="absmax",
        layers="auto",
        most_layers=4,
    )
    shown = graph.add("TestShowText", value=node[1])
    entry = comfyui.queue(graph.prompt)
    text = json.loads(entry["outputs"][shown.id]["text"][0])
    assert text.startswith("Choose nearest in float8_e4m3fn for weights closest to the original: its error is 2.6")
    assert "tiny_sd3_landscapes.safetensors: 4 of 21 layers, evenly spaced, scaling absmax" in text
    assert text.count("| float8_e5m2 |") == 5
    assert comfyui.view(entry["outputs"][node.id]["images"][0]).size == (1024, 832)


def test_theme_changes_the_paper(bench, graph):
    curve = {"format": "float8_e5m2", "rounding": "nearest", "low": 0.0, "high": 1.0, "draws": 1}
    nodes = [graph.add("StochasticFP8RoundingCurve", **curve, **theme) for theme in ({}, {"theme": "light"})]
    dark, light = bench.run(graph, *(bench.keep(graph, node, as_="image") for node in nodes))
    assert dark[0, 0, 0].max() < 0.2
    assert light[0, 0, 0].min() == 1


def test_rounding_curve(bench, graph):
    node = graph.add(
        "StochasticFP8RoundingCurve", format="float8_e5m2", rounding="owlshift", low=-1.0, high=1.0, draws=50
    )
    assert bench.run(graph, bench.keep(graph, node, as_="image")).shape == (1, 768, 1024, 3)


def test_an_empty_range_is_named(comfyui, graph):
    graph.add("StochasticFP8RoundingCurve", format="float8_e5m2", rounding="nearest", low=1.0, high=1.0, draws=1)
    with pytest.raises(ExecutionError, match="the range from 1.0 to 1.0 is not valid"):
        comfyui.queue(graph.prompt)


def grey(graph, level, size=64, batch=1):
    """A batch of images in one grey level from 0 to 255."""
    colour = level << 16 | level << 8 | level
    return graph.add("EmptyImage", width=size, height=size, batch_size=batch, color=colour)


def test_compare_images_measures_the_difference(bench, comfyui, graph):
    node = graph.add("StochasticFP8ImageCompare", image_a=grey(graph, 100), image_b=grey(graph, 151), amplify=2)
    shown = [graph.add("TestShowText", value=node[i]) for i in (1, 2)]
    image = bench.keep(graph, node, as_="image")
    entry = comfyui.queue(graph.prompt)
    psnr, ssim = (json.loads(entry["outputs"][text.id]["text"][0]) for text in shown)
    assert psnr == pytest.approx(13.979, abs=0.001)  # 20 log10(255 / 51)
    # flat images differ in luminance alone: (2ab + c) / (a² + b² + c) with c = 0.01²
    a, b = 100 / 255, 151 / 255
    assert ssim == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=0.001)
    sheet = load_file(comfyui.files(entry, image.id, "tensors")[0])["samples"][0]
    assert torch.equal((sheet[300, [256, 768, 1280]] * 255).round().int()[:, 0], torch.tensor([100, 151, 102]).int())
    for name, level in (("a_images", 100), ("b_images", 151)):
        (picture,) = entry["outputs"][node.id][name]
        assert comfyui.view(picture).getpixel((32, 32)) == (level,) * 3


def test_compare_images_shows_the_labels(bench, comfyui, graph):
    images = {"image_a": grey(graph, 100), "image_b": grey(graph, 151), "amplify": 2}
    labels = ({}, {"label_a": "A", "label_b": " "}, {"label_a": "original", "label_b": " nearest "})
    nodes = [graph.add("StochasticFP8ImageCompare", **images, **each) for each in labels]
    kept = [bench.keep(graph, node, as_="image") for node in nodes]
    entry = comfyui.queue(graph.prompt)
    assert [entry["outputs"][node.id]["names"] for node in nodes] == [["A", "B"], ["A", "B"], ["original", "nearest"]]
    plain, same, named = (load_file(comfyui.files(entry, node.id, "tensors")[0])["samples"] for node in kept)
    assert torch.equal(plain, same)
    assert not torch.equal(plain, named)


def test_a_single_image_is_compared_with_each_of_a_batch(bench, graph):
    node = graph.add("StochasticFP8ImageCompare", image_a=grey(graph, 9), image_b=grey(graph, 8, batch=3), amplify=8)
    sheets = bench.run(graph, bench.keep(graph, node, as_="image"))
    assert len(sheets) == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": 32}, "image A has 64 × 64 pixels and image B has 32 × 32: resize one of them"),
        ({"batch": 3}, "batch A has 2 images and batch B has 3: give both the same number of images"),
    ],
)
def test_images_that_do_not_pair_up_are_named(comfyui, graph, other, message):
    graph.add("StochasticFP8ImageCompare", image_a=grey(graph, 0, batch=2), image_b=grey(graph, 0, **other), amplify=8)
    with pytest.raises(ExecutionError, match=message):
        comfyui.queue(graph.prompt)


@pytest.mark.parametrize("node", NODES)
def test_pictures_of_help_pages_are_served(comfyui, node):
    docs = "/extensions/stochastic-fp8/docs/"
    page = comfyui.get(f"{docs}{node}.md").decode()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert pictures
    for picture in pictures:
        assert Image.open(io.BytesIO(comfyui.get(docs + picture))).width == 1024
