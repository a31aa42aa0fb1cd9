"""Activation Probe and Size and Quality in a real ComfyUI."""

import json

import pytest
import torch
from comfyui.graph import Graph
from comfyui.pack import quantize
from comfyui.server import ExecutionError
from comfyui.test_sensitivity import failing, hooks_on, latent_of, measure, scene_of
from safetensors.torch import load_file, save_file
from tiny_models import LANDSCAPES

SAMPLER = {"steps": 2, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def probe(graph, model_a, model_b, scene, **settings):
    inputs = {"model_a": model_a, "model_b": model_b, "positive": scene[1], "negative": scene[2]}
    latent = {"latent_image": latent_of(graph)}
    return graph.add("StochasticFP8ActivationProbe", **inputs, **latent, **{"seed": 3, **SAMPLER, **settings})


def probed(bench, graph, node):
    """(relative difference in % by block, the list of layers, the size of the picture)."""
    shown = [graph.add("TestShowText", value=node[i]) for i in (1, 2)]
    outputs = bench.server.queue(graph.prompt)["outputs"]
    table, layers = (json.loads(outputs[each.id]["text"][0]) for each in shown)
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| ")]
    differences = {row[1]: float(row[2].removesuffix(" %").replace("<", "")) for row in rows[1:]}
    return differences, layers, bench.server.view(outputs[node.id]["images"][0]).size


BLOCKS = ["joint_blocks.0", "joint_blocks.1", "joint_blocks.2"]


def test_it_finds_the_block_that_was_changed(bench):
    """At the first step nothing before this block differs."""
    weights = load_file(LANDSCAPES)
    name = "joint_blocks.1.x_block.mlp.fc2.weight"
    changed = bench.place("changed.safetensors", weights | {name: weights[name] * 1.1})
    graph = Graph()
    scene = scene_of(graph)
    node = probe(graph, scene[0], bench.load(graph, changed), scene, steps=1)
    differences, layers, size = probed(bench, graph, node)
    assert list(differences) == ["input", *BLOCKS, "output"]
    assert differences["input"] == differences["joint_blocks.0"] == 0
    assert min(differences[block] for block in ("joint_blocks.1", "joint_blocks.2", "output")) > 0.05
    assert size == (1024, 768)
    lines = layers.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [*BLOCKS, "outside of the blocks"]
    assert "  joint_blocks.1.x_block.mlp.fc2  192×768" in lines
    assert len(lines) == 34 + 4
    assert hooks_on(bench, "day") == 0


def test_every_render_has_the_noise_levels_of_its_model(bench):
    """With dynamic VRAM, ComfyUI puts those of the model that was loaded before into the next one."""
    graph = Graph()
    model, *prompts = scene_of(graph, bench.load_dynamic(graph, "sd3"))
    bench.run(graph, bench.keep(graph, graph.sample(model, *prompts, latent_of(graph), seed=1)))  # it stays loaded
    graph = Graph()
    scene = scene_of(graph, bench.load_dynamic(graph, "sd3"))
    shifted = graph.add("ModelSamplingSD3", model=scene[0], shift=7.0)
    differences, _, _ = probed(bench, graph, probe(graph, shifted, shifted, scene))
    assert set(differences.values()) == {0}


def test_a_quantized_model_differs_and_the_same_model_does_not(bench):
    graph = Graph()
    scene = scene_of(graph)
    quantized = quantize(graph, scene[0], layers="all_linear", rounding="nearest")
    differences, _, _ = probed(bench, graph, probe(graph, scene[0], quantized, scene))
    assert 0.1 < differences["output"] < 30
    graph = Graph()
    scene = scene_of(graph)
    differences, _, _ = probed(bench, graph, probe(graph, scene[0], scene[0], scene, seed=4))
    assert set(differences.values()) == {0} or not bench.exact


def test_models_of_two_classes_are_refused(bench):
    graph = Graph()
    scene = scene_of(graph)
    node = probe(graph, scene[0], bench.load(graph, "wan"), scene)
    with pytest.raises(ExecutionError, match="model_a is SD3 and model_b is WAN21: connect two versions of the same"):
        bench.server.queue(graph.prompt)
    assert node


def test_nan_is_an_error_and_leaves_no_hook(bench):
    broken = {"nan.cond": torch.full((1, 8, 64), float("nan")), "nan.pooled_output": torch.zeros(1, 64)}
    bench.server.base.joinpath("input").mkdir(exist_ok=True)
    save_file(broken, bench.server.base / "input" / "broken.safetensors")
    graph = Graph()
    scene = scene_of(graph, word="night")
    positive = graph.add("TestFileConditioning", file="broken.safetensors", word="nan")
    probe(graph, scene[0], scene[0], (scene[0], positive[0], scene[2]))
    with pytest.raises(ExecutionError, match="the outputs of 'joint_blocks.0' of model_a hold NaN"):
        bench.server.queue(graph.prompt)
    assert hooks_on(bench, "night") == 0


def test_size_and_quality_of_a_model(bench):
    graph = Graph()
    scene = scene_of(graph)
    measured = measure(graph, scene, latent_of(graph))
    node = graph.add("StochasticFP8SizeQuality", model=scene[0], calibration=measured)
    shown = [graph.add("TestShowText", value=node[i]) for i in (1, 2)]
    outputs = bench.server.queue(graph.prompt)["outputs"]
    assert bench.server.view(outputs[node.id]["images"][0]).size == (1024, 832)
    table, data = (json.loads(outputs[each.id]["text"][0]) for each in shown)
    assert "Layers auto (preset sd3)" in table
    assert [curve["rounding"] for curve in json.loads(data)["curves"]] == ["nearest"]


def test_size_and_quality_needs_measured_effects(bench):
    graph = Graph()
    scene = scene_of(graph)
    inputs = {"model": scene[0], "positive": scene[1], "negative": scene[2], "latent_image": latent_of(graph)}
    recorded = graph.add("StochasticFP8Calibrate", **inputs, **SAMPLER, seed=1, runs=1)
    graph.add("StochasticFP8SizeQuality", model=scene[0], calibration=recorded)
    assert "measure them with Layer Sensitivity" in failing(bench, graph, recorded)
