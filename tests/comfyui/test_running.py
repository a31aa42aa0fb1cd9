"""Reports, figures and files call a model by the file it was loaded from."""

import json

import pytest
import tiny_models
from comfyui.graph import Graph
from comfyui.pack import RECIPE, quantize
from safetensors.torch import load_file


def reported_source(bench, graph, report):
    """The source that Layer Report shows."""
    shown = graph.add("TestShowText", value=graph.add("StochasticFP8LayerReport", report=report)[2])
    (text,) = bench.texts(graph, shown)
    return json.loads(json.loads(text))["source"]


@pytest.fixture
def graph():
    return Graph()


def test_the_demo_model_has_its_files_name(bench, graph):
    model = graph.add("StochasticFP8DemoModel", scene="dawn")
    assert reported_source(bench, graph, quantize(graph, model)[1]) == "tiny_sd3_landscapes.safetensors"


def test_a_model_is_named_behind_its_patches(bench, graph):
    bench.server.models("diffusion_models").joinpath("in_a_folder").mkdir(exist_ok=True)
    name = bench.place("in_a_folder/named.safetensors", load_file(bench.model_file("sd3")))
    lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "of_named.safetensors", depth=3)
    model = graph.add("ModelSamplingSD3", model=bench.load(graph, name), shift=3.0)
    model = graph.add("LoraLoaderModelOnly", model=model, lora_name=lora.name, strength_model=1.0)
    assert reported_source(bench, graph, quantize(graph, model)[1]) == "named.safetensors"


def test_a_model_behind_a_chooser_of_files_has_its_class(bench, graph):
    chosen = graph.add("TestChooser", name=bench.model_file("sd3").name)
    model = graph.add("UNETLoader", unet_name=chosen, weight_dtype="default")
    assert reported_source(bench, graph, quantize(graph, model)[1]) == "SD3"


def test_a_text_encoder_has_the_names_of_its_files(bench, graph):
    t5 = tiny_models.write_t5xxl(bench.server.models("text_encoders") / "named_t5.safetensors")
    clip_l = tiny_models.write_clip_l(bench.server.models("text_encoders") / "named_l.safetensors")
    files = {"clip_name1": clip_l.name, "clip_name2": t5.name}
    clip = graph.add("DualCLIPLoader", **files, type="sd3", device="default")
    report = graph.add("StochasticFP8QuantizeTextEncoder", clip=clip, **RECIPE)[1]
    assert reported_source(bench, graph, report) == "named_l.safetensors + named_t5.safetensors"
