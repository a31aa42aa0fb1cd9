"""Calibration of text encoders in a real ComfyUI: what is recorded, what it gains, and what is refused."""

import json

import pytest
import tiny_models
from comfyui.graph import Graph
from comfyui.pack import RECIPE
from comfyui.server import ExecutionError
from safetensors.torch import load_file

PROMPTS = ["an old man with a red hat, oil painting", "two cats on a wooden bench in the rain"]
LAYERS = 24 * 7
"""q, k, v, o, wi_0, wi_1 and wo of each block of T5-XXL."""


@pytest.fixture(scope="module")
def t5(bench):
    return tiny_models.write_t5xxl(bench.server.models("text_encoders") / "t5_to_calibrate.safetensors").name


@pytest.fixture(scope="module")
def clip_l(bench):
    return tiny_models.write_clip_l(bench.server.models("text_encoders") / "clip_l_beside.safetensors").name


def load_clips(graph, *names):
    if len(names) == 1:
        return graph.add("CLIPLoader", clip_name=names[0], type="sd3", device="default")
    return graph.add("DualCLIPLoader", clip_name1=names[0], clip_name2=names[1], type="sd3", device="default")


def calibrate(graph, clip, prompts=PROMPTS, **inputs):
    return graph.add("StochasticFP8CalibrateTextEncoder", clip=clip, prompts="\n".join(prompts), **inputs)


def quantize(graph, clip, rounding="calibrated", only="encoder.block.23.", **inputs):
    choices = {**RECIPE, "rounding": rounding, "layers": "all_linear"}
    return graph.add("StochasticFP8QuantizeTextEncoder", clip=clip, **choices, only=only, **inputs)


def shown(bench, graph, calibration):
    """(source, layers: tensor key -> width, rows, amax) of a calibration."""
    (text,) = bench.texts(graph, graph.add("TestCalibrationInfo", calibration=calibration))
    info = json.loads(text)
    return info["source"], info["layers"]


def test_every_linear_layer_of_the_large_encoder_is_recorded_by_name(bench, t5, clip_l):
    """Of a CLIP with T5-XXL and CLIP-L. Padded positions count: SD3 pads to 77 tokens and uses all of them."""
    graph = Graph()
    source, layers = shown(bench, graph, calibrate(graph, load_clips(graph, clip_l, t5)))
    weights = load_file(bench.server.models("text_encoders") / t5)
    linear = {f"t5xxl.{key}": weight.shape[1] for key, weight in weights.items() if f"t5xxl.{key}" in layers}
    assert {key: width for key, (width, _, _) in layers.items()} == linear
    assert len(layers) == LAYERS
    assert {rows for _, rows, _ in layers.values()} == {2 * 77}
    amaxes = {layers[f"t5xxl.encoder.block.3.layer.0.SelfAttention.{name}.weight"][2] for name in "qkv"}
    assert len(amaxes) == 1, "all three read the same inputs"
    assert source == "t5xxl, 2 prompts"


def test_calibrated_encodings_are_closer_than_those_of_nearest(bench, t5):
    """For a recorded prompt: nothing else is like it, since the weights are random."""
    graph = Graph()
    clip = load_clips(graph, t5)
    calibration = calibrate(graph, clip)
    clips = [clip] + [
        quantize(graph, clip, rounding, calibration=calibration) for rounding in ("nearest", "calibrated")
    ]
    texts = [graph.add("CLIPTextEncode", clip=each, text=PROMPTS[0]) for each in clips]
    original, nearest, calibrated = bench.run(graph, *(bench.keep(graph, text, conditioning=True) for text in texts))
    assert (calibrated - original).square().mean() < 0.8 * (nearest - original).square().mean()


def test_the_report_names_the_calibration(bench, t5):
    graph = Graph()
    clip = load_clips(graph, t5)
    only = "encoder.block.1.layer.0.SelfAttention.o"
    quantized = quantize(graph, clip, only=only, calibration=calibrate(graph, clip))
    text = graph.add("StochasticFP8LayerReport", report=quantized[1])
    (report,) = bench.texts(graph, graph.add("TestShowText", value=text[2]))
    report = json.loads(json.loads(report))
    assert report["recipe"]["calibration"] == "t5xxl, 2 prompts"
    assert not [note for note in report["notes"] if "no inputs of this width" in note]


def test_another_calibration_can_be_added_to(bench, t5):
    graph = Graph()
    clip = load_clips(graph, t5)
    earlier = calibrate(graph, clip)
    source, layers = shown(bench, graph, calibrate(graph, clip, ["a lake at dawn"], calibration=earlier))
    assert source == "t5xxl, 2 prompts + t5xxl, 1 prompt"
    assert {rows for _, rows, _ in layers.values()} == {3 * 77}


@pytest.mark.parametrize("prompts", [[""], [" ", "\t"]])
def test_no_prompt_is_an_error(bench, t5, prompts):
    graph = Graph()
    saver(graph, calibrate(graph, load_clips(graph, t5), prompts))
    with pytest.raises(ExecutionError, match="prompts is empty: write at least one prompt"):
        bench.server.queue(graph.prompt)


def saver(graph, calibration):
    return graph.add("StochasticFP8SaveCalibration", calibration=calibration, filename_prefix="never")


def test_clip_l_alone_is_an_error(bench, clip_l):
    graph = Graph()
    saver(graph, calibrate(graph, load_clips(graph, clip_l)))
    with pytest.raises(ExecutionError, match="this CLIP has only clip_l, which stays in 16 bits"):
        bench.server.queue(graph.prompt)


def test_a_calibration_of_a_diffusion_model_is_an_error(bench, t5):
    graph = Graph()
    scene = graph.add("StochasticFP8DemoModel", scene="day")
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    settings = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs = {"model": scene[0], "positive": scene[1], "negative": scene[2], "latent_image": latent, "runs": 1}
    other = graph.add("StochasticFP8Calibrate", **inputs, **settings)
    quantized = quantize(graph, load_clips(graph, t5), calibration=other)
    graph.add("TestShowText", value=quantized[1])
    text = (
        r"the calibration \(SD3, 1 run of 1 step\) has no inputs that fit t5xxl: record this text encoder with Text Enc"
    )
    with pytest.raises(ExecutionError, match=text):
        bench.server.queue(graph.prompt)


def test_calibrated_without_a_calibration_is_an_error(bench, t5):
    graph = Graph()
    graph.add("TestShowText", value=quantize(graph, load_clips(graph, t5))[1])
    with pytest.raises(ExecutionError, match="needs the recorded inputs"):
        bench.server.queue(graph.prompt)


def test_one_bar_moves_once_per_prompt(bench, t5):
    graph = Graph()
    node = calibrate(graph, load_clips(graph, t5), ["a", "b", "c"])
    graph.add("TestCalibrationInfo", calibration=node)
    seen = []

    def note(kind, data):
        if kind == "progress" and data["node"] == node.id:
            seen.append((data["value"], data["max"]))

    bench.server.queue(graph.prompt, on_event=note)
    assert seen[-1] == (3, 3)
    assert {most for _, most in seen} == {3}
