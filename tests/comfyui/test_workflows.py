"""Every example workflow opens without a missing node, has its thumbnail, and runs in a real server."""

import re

import numpy as np
import pytest
import tiny_models
import torch
from comfyui.pack import quantize_and_save
from comfyui.workflows import PAGE_ONLY, WORKFLOWS, read_workflow, replace_models, to_prompt
from PIL import Image
from safetensors.torch import load_file, save_file
from tools import demo

NAMES = [
    "Try it now",
    "Quantize and save",
    "Quantize after LoRA",
    "File to file",
    "Text encoder",
    "Inspect and repair",
    "Calibrate, quantize, compare",
    "Fit my memory",
]


def run(bench, name, models=()):
    """Run an example as it is. Returns its outputs by node type, each a list."""
    workflow = read_workflow(name)
    prompt = replace_models(to_prompt(workflow, bench.server.object_info()), dict(models))
    entry = bench.server.queue(prompt, timeout=240, workflow=workflow)
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
def test_nodes_lie_apart_and_have_no_missing_links(bench, name):
    workflow = read_workflow(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    types = bench.server.object_info().keys() | PAGE_ONLY
    assert {node["type"] for node in nodes.values()} <= types
    for link, source, out, target, slot, _ in workflow["links"]:
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
    boxes = [(*node["pos"], *node["size"]) for node in nodes.values()]
    for index, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:index]:
            apart_x = x >= other_x + other_width or other_x >= x + width
            apart_y = y - 30 >= other_y + other_height or other_y - 30 >= y + height
            assert apart_x or apart_y


@pytest.mark.parametrize("name", NAMES)
def test_thumbnails(name):
    with Image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.size == (768, 432)
        colours = picture.convert("RGB").getcolors(768 * 432)
    assert len(colours) > 200
    assert (WORKFLOWS / f"{name}.jpg").stat().st_size < 120_000


def test_try_it_now(bench):
    outputs = run(bench, "Try it now")
    sheet, histogram = sorted(pictures(bench, outputs), key=lambda picture: picture.size, reverse=True)
    assert sheet.size[0] == 1536
    assert histogram.size == (1024, 480)
    compared = outputs["StochasticFP8ImageCompare"][0]
    before, after = (bench.server.view(compared[f"{side}_images"][0]) for side in "ab")
    assert before.size == after.size == (256, 256)
    assert before.tobytes() != after.tobytes()
    assert is_numbered(outputs["StochasticFP8Save"][0]["text"], "tiny_landscapes_fp8")


def test_quantize_and_save(bench):
    outputs = run(bench, "Quantize and save", {"sd3.5_large.safetensors": bench.model_file("sd3").name})
    assert is_numbered(outputs["StochasticFP8Save"][0]["text"], "sd3.5_large_fp8")
    assert pictures(bench, outputs)[0].size == (1024, 768)


def test_quantize_after_lora(bench):
    checkpoint = tiny_models.write_sd3_checkpoint(bench.server.models("checkpoints") / "example.safetensors")
    lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "example_lora.safetensors")
    models = {
        "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": checkpoint.name,
        "my_lora.safetensors": lora.name,
    }
    outputs = run(bench, "Quantize after LoRA", models)
    assert is_numbered(outputs["StochasticFP8Save"][0]["text"], "my_lora_fp8")
    assert pictures(bench, outputs)[0].size[0] == 1536
    assert "lora key not loaded" not in bench.server.log()


def test_file_to_file(bench):
    bench.model_file("sd3")
    models = {"diffusion_models/sd3.5_large.safetensors": "diffusion_models/sd3.safetensors"}
    outputs = run(bench, "File to file", models)
    name = outputs["StochasticFP8QuantizeFile"][0]["text"][0]
    assert outputs["PreviewAny"][0]["text"] == [name]
    assert len(pictures(bench, outputs)) == 2
    assert bench.saved(name).exists()


def test_text_encoder(bench):
    folder = bench.server.models("text_encoders")
    models = {
        "clip_l.safetensors": tiny_models.write_clip_l(folder / "example_clip_l.safetensors").name,
        "t5xxl_fp16.safetensors": tiny_models.write_t5xxl(folder / "example_t5.safetensors").name,
    }
    outputs = run(bench, "Text encoder", models)
    path = bench.saved(outputs["StochasticFP8Save"][0]["text"][0], "clip")
    assert is_numbered([path.name], "t5xxl_fp8")
    weights = [tensor for key, tensor in load_file(path).items() if key.endswith(".weight")]
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in weights) == 168


def test_inspect_and_repair(bench):
    tensors = load_file(quantize_and_save(bench, "sd3", "example"))
    scales_in_16_bits = {
        key: tensor.bfloat16() if key.endswith("weight_scale") else tensor for key, tensor in tensors.items()
    }
    save_file(scales_in_16_bits, bench.server.models("diffusion_models") / "faulty_example.safetensors")
    models = {"diffusion_models/my_fp8_model.safetensors": "diffusion_models/faulty_example.safetensors"}
    outputs = run(bench, "Inspect and repair", models)
    shown = [text for output in outputs["PreviewAny"] for text in output["text"]]
    assert any("must be float32" in text and "Repaired copy" in text for text in shown)
    assert "false" in [text.lower() for text in shown]
    assert pictures(bench, outputs)[0].size[0] == 1024


def test_calibrate_quantize_compare(bench):
    workflow = read_workflow("Calibrate, quantize, compare")
    prompt = to_prompt(workflow, bench.server.object_info())
    outputs = bench.server.queue(prompt, timeout=240, workflow=workflow)["outputs"]
    sheets = sorted((node for node in prompt if prompt[node]["class_type"] == "StochasticFP8ImageCompare"), key=int)
    nearest, calibrated = (
        [np.asarray(bench.server.view(outputs[node][f"{side}_images"][0]), dtype=float) for side in "ab"]
        for node in sheets
    )
    assert [outputs[node]["names"] for node in sheets] == [["original", "nearest"], ["original", "calibrated"]]
    (comparison,) = (node for node in prompt if prompt[node]["class_type"] == "StochasticFP8Compare")
    assert bench.server.view(outputs[comparison]["images"][0]).size == (1024, 1024)
    assert np.array_equal(nearest[0], calibrated[0])
    errors = [np.square(original - image).mean() for original, image in (nearest, calibrated)]
    assert errors[1] < 0.5 * errors[0], errors
    assert (bench.server.output / "fp8_calibrations" / "tiny_landscapes_00001_.safetensors").exists()


def test_fit_my_memory(bench):
    """The measured file is smaller than that of the preset, and its image is closer to the original."""
    workflow = read_workflow("Fit my memory")
    prompt = to_prompt(workflow, bench.server.object_info())
    outputs = bench.server.queue(prompt, timeout=600, workflow=workflow)["outputs"]
    sheets = sorted((node for node in prompt if prompt[node]["class_type"] == "StochasticFP8ImageCompare"), key=int)
    errors = []
    for sheet, label in zip(sheets, ("preset", "measured"), strict=True):
        assert outputs[sheet]["names"] == ["original", label]
        one, other = (np.asarray(bench.server.view(outputs[sheet][f"{side}_images"][0]), dtype=float) for side in "ab")
        errors.append(np.square(one - other).mean())
    assert errors[1] < 0.8 * errors[0], errors
    by_type = {prompt[node]["class_type"]: output for node, output in outputs.items()}
    (name,) = by_type["StochasticFP8Save"]["text"]
    assert is_numbered([name], "tiny_landscapes_6MB")
    assert 4.8e6 < bench.saved(name).stat().st_size <= 6e6
    assert bench.server.view(by_type["StochasticFP8SizeQuality"]["images"][0]).size == (1024, 832)
    assert bench.server.view(by_type["StochasticFP8ActivationProbe"]["images"][0]).size == (1024, 768)


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
