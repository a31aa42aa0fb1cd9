"""Every example workflow opens without a missing node, has its thumbnail, and runs as it is in a real server."""

import re

import numpy as np
import pytest
import tiny_models
import torch
from comfyui.workflows import PAGE_ONLY, WORKFLOWS, read_workflow, to_prompt
from PIL import Image
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels import inspect_file
from tools import demo, demo_files

NAMES = [
    "1 Try it now",
    "2 Quantize and save",
    "3 Which rounding",
    "4 Quantize after a LoRA",
    "5 File to file",
    "6 Calibrate, quantize, compare",
    "7 Fit my memory",
    "8 Text encoder",
    "9 Inspect and repair",
]
PREVIEW_THEMSELVES = {
    "StochasticFP8Compare",
    "StochasticFP8ErrorHistogram",
    "StochasticFP8ImageCompare",
    "StochasticFP8LayerReport",
    "StochasticFP8SizeQuality",
}


def run(bench, name, change=None):
    """Run an example. Returns its outputs by node type, each a list. change: alters the workflow before."""
    workflow = read_workflow(name)
    if change:
        change({node["type"]: node for node in workflow["nodes"]})
    prompt = to_prompt(workflow, bench.server.object_info())
    entry = bench.server.queue(prompt, timeout=600, workflow=workflow)
    outputs = {}
    for node, output in entry["outputs"].items():
        outputs.setdefault(prompt[node]["class_type"], []).append(output)
    return outputs


def pictures(bench, outputs, node_type="PreviewImage"):
    return [bench.server.view(image) for output in outputs[node_type] for image in output["images"]]


def is_numbered(names, prefix):
    """Whether this is one numbered name. The number varies: other tests may have run the workflow before."""
    return len(names) == 1 and re.fullmatch(rf"{re.escape(prefix)}_\d{{5}}_\.safetensors", names[0])


def test_every_example_is_tested():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_and_links_are_complete(bench, name):
    workflow = read_workflow(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    types = bench.server.object_info().keys() | PAGE_ONLY
    assert {node["type"] for node in nodes.values()} <= types
    for link, source, out, target, slot, _ in workflow["links"]:
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link


@pytest.mark.parametrize("name", NAMES)
def test_no_picture_is_shown_twice(name):
    """A PreviewImage may show the picture of a node that is collapsed, or has no preview of its own."""
    workflow = read_workflow(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, _, target, _, _ in workflow["links"]:
        node = nodes[source]
        if nodes[target]["type"] == "PreviewImage" and node["type"] in PREVIEW_THEMSELVES:
            assert node["flags"].get("collapsed"), node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_thumbnails(name):
    with Image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.size == (768, 432)
        colours = picture.convert("RGB").getcolors(768 * 432)
    assert len(colours) > 200
    assert (WORKFLOWS / f"{name}.jpg").stat().st_size < 120_000


@pytest.mark.parametrize("name", demo_files.FILES)
def test_demo_files(tmp_path, name):
    made = demo_files.FILES[name](tmp_path / name)
    assert made.read_bytes() == (demo_files.FOLDER / name).read_bytes()


def sides(bench, outputs):
    """The pairs of images that the slider compares, as arrays."""
    (compared,) = outputs["StochasticFP8ImageCompare"]
    images = [
        [np.asarray(bench.server.view(image), dtype=float) for image in compared[f"{side}_images"]] for side in "ab"
    ]
    return list(zip(*images, strict=True))


def saved_name(outputs, prefix):
    (saved,) = outputs["StochasticFP8Save"]
    assert is_numbered(saved["text"], prefix)
    return saved["text"][0]


def test_try_it_now(bench):
    outputs = run(bench, "1 Try it now")
    ((before, after),) = sides(bench, outputs)
    assert before.shape == after.shape == (256, 256, 3)
    assert 0 < np.square(before - after).mean() < 255**2 / 10**2.5  # PSNR above 25 dB
    assert len(pictures(bench, outputs)) == 1
    saved_name(outputs, "tiny_landscapes_fp8")


def test_quantize_and_save(bench):
    outputs = run(bench, "2 Quantize and save")
    name = saved_name(outputs, "tiny_sd3_landscapes_float8_e4m3fn")
    assert inspect_file(bench.saved(name)).ok


def test_which_rounding(bench):
    outputs = run(bench, "3 Which rounding")
    assert pictures(bench, outputs, "StochasticFP8Compare")[0].size == (1024, 832)
    assert pictures(bench, outputs, "StochasticFP8RoundingCurve")[0].size == (1024, 768)


def test_quantize_after_a_lora(bench):
    """As it is, and with the LoRA switched on: its picture is another."""
    ((without, _),) = sides(bench, run(bench, "4 Quantize after a LoRA"))
    lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "example_lora.safetensors", depth=3)

    def switch_on(nodes):
        nodes["LoraLoaderModelOnly"] |= {"mode": 0, "widgets_values": [lora.name, 1.0]}

    outputs = run(bench, "4 Quantize after a LoRA", switch_on)
    ((before, after),) = sides(bench, outputs)
    assert np.square(before - without).mean() > 4 * np.square(before - after).mean()
    saved_name(outputs, "my_lora_fp8")
    assert "lora key not loaded" not in bench.server.log()


def test_file_to_file(bench):
    outputs = run(bench, "5 File to file")
    (name,) = outputs["StochasticFP8QuantizeFile"][0]["text"]
    assert bench.saved(name).stat().st_size < 0.75 * tiny_models.LANDSCAPES.stat().st_size
    assert pictures(bench, outputs, "StochasticFP8LayerReport")[0].size == (1024, 768)


def test_calibrate_quantize_compare(bench):
    def to_nearest(nodes):
        values = nodes["StochasticFP8Quantize"]["widgets_values"]
        values[values.index("calibrated")] = "nearest"

    compared = [sides(bench, run(bench, "6 Calibrate, quantize, compare", change)) for change in (to_nearest, None)]
    nearest, calibrated = (np.square(original - image).mean() for ((original, image),) in compared)
    assert calibrated < 0.5 * nearest, (calibrated, nearest)
    assert (bench.server.output / "fp8_calibrations" / "tiny_landscapes_00001_.safetensors").exists()


def test_fit_my_memory(bench):
    outputs = run(bench, "7 Fit my memory")
    name = saved_name(outputs, "tiny_landscapes_6MB")
    assert 4.8e6 < bench.saved(name).stat().st_size <= 6e6
    assert pictures(bench, outputs, "StochasticFP8SizeQuality")[0].size == (1024, 832)


def test_text_encoder(bench):
    """The file as it is, and the nodes in the graph when they are switched on."""
    (converted,) = run(bench, "8 Text encoder")["StochasticFP8QuantizeFile"]
    path = bench.saved(converted["text"][0], "clip")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in load_file(path).values()) == 144 + 1  # and the marker
    encoder = tiny_models.write_t5xxl(bench.server.models("text_encoders") / "example_t5.safetensors").name

    def switch_on(nodes):
        nodes["CLIPLoader"]["widgets_values"][0] = encoder
        for type_ in ("CLIPLoader", "StochasticFP8QuantizeTextEncoder", "StochasticFP8Save"):
            nodes[type_]["mode"] = 0

    outputs = run(bench, "8 Text encoder", switch_on)
    weights = load_file(bench.saved(outputs["StochasticFP8Save"][0]["text"][0], "clip"))
    quantized = [key for key, tensor in weights.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len([key for key in quantized if key.endswith(".weight")]) == 168


def test_inspect_and_repair(bench):
    outputs = run(bench, "9 Inspect and repair")
    (text,) = outputs["StochasticFP8Inspect"][0]["text"]
    assert "must be float32" in text
    name = re.search(r"Repaired copy: (\S+)", text)[1]
    assert inspect_file(bench.saved(name)).ok
    assert pictures(bench, outputs)[0].size[0] == 1024


def test_the_demo(bench):
    """The parts of ``make demo``."""
    outputs, in_graph, prompt = demo.run_example(bench.server)
    name = outputs["StochasticFP8Save"]["text"][0]
    assert torch.equal(demo.run_reloaded(bench.server, prompt, name), in_graph)
    sizes = {title: picture.size for title, picture in demo.made_pictures(bench.server, outputs).items()}
    assert sizes["before"] == sizes["after"] == (256, 256)
    assert sizes["compared"][0] == 1536 and sizes["error_histogram"] == (1024, 480)
    black, grey = (Image.new("RGB", (8, 8), (level, level, level)) for level in (0, 51))
    assert demo.psnr(black, grey) == pytest.approx(13.979, abs=1e-3)  # 20 log10(255 / 51)
    assert demo.psnr(grey, grey) == float("inf")
