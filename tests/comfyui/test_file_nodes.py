"""The nodes that work on files: quantize a file, inspect and repair."""

import json
import shutil

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import (
    FILE_OPTIONS,
    RECIPE,
    multiplied_out,
    quantize_and_save,
    temporary_files,
    write_oracle,
)
from comfyui.server import ExecutionError, PromptRejected
from safetensors.torch import load_file, save_file


def quantize_file(graph, file, prefix, **choices):
    options = {**RECIPE, **FILE_OPTIONS, **choices}
    return graph.add("StochasticFP8QuantizeFile", file=file, filename_prefix=prefix, **options)


def inspect(graph, file, deep=False, repair=False, prefix="repaired"):
    return graph.add("StochasticFP8Inspect", file=file, deep=deep, repair=repair, filename_prefix=prefix)


def test_the_quantized_file_samples_like_its_dequantized_weights(bench):
    bench.model_file("sd3")
    graph = Graph()
    node = quantize_file(graph, "diffusion_models/sd3.safetensors", "from_file", rounding="nearest")
    path = bench.saved(bench.texts(graph, node)[0])
    oracle = write_oracle(bench, "oracle_from_file.safetensors", multiplied_out(path))
    assert bench.close(bench.sampled("sd3", path.name), bench.sampled("sd3", oracle))


def test_names_count_up_unless_overwriting(bench):
    bench.model_file("sd3")
    names = []
    for seed, overwrite in ((1, False), (2, False), (3, True), (4, True)):
        graph = Graph()
        file = "diffusion_models/sd3.safetensors"
        names += bench.texts(graph, quantize_file(graph, file, "counted", seed=seed, overwrite=overwrite))
    assert names == [
        "counted_00001_.safetensors",
        "counted_00002_.safetensors",
        "counted.safetensors",
        "counted.safetensors",
    ]
    assert not temporary_files(bench.server)


def test_a_sub_folder_in_the_prefix(bench):
    bench.model_file("sd3")
    graph = Graph()
    names = bench.texts(graph, quantize_file(graph, "diffusion_models/sd3.safetensors", "sub/folder/name"))
    assert names == ["sub/folder/name_00001_.safetensors"]
    assert bench.sampled("sd3", names[0]).isfinite().all()


def test_a_changed_file_is_quantized_again(bench):
    path = bench.server.models("diffusion_models") / "changing.safetensors"
    tiny_models.write_sd3(path, seed=1)
    graph = Graph()
    node = quantize_file(graph, f"diffusion_models/{path.name}", "changing")
    assert bench.texts(graph, node) == ["changing_00001_.safetensors"]
    assert bench.texts(graph, node) == ["changing_00001_.safetensors"]
    tiny_models.write_sd3(path, seed=2, depth=3)
    assert bench.texts(graph, node) == ["changing_00002_.safetensors"]


def test_quantizing_twice_is_refused_unless_asked(bench):
    name = f"diffusion_models/{quantize_and_save(bench, 'sd3', 'twice').name}"
    graph = Graph()
    quantize_file(graph, name, "again")
    with pytest.raises(ExecutionError, match="ask to requantize"):
        bench.server.queue(graph.prompt)
    graph = Graph()
    assert bench.texts(graph, quantize_file(graph, name, "again", requantize=True)) == ["again_00001_.safetensors"]


def test_an_all_in_one_checkpoint(bench):
    path = tiny_models.write_sd3_checkpoint(bench.server.models("checkpoints") / "file_all.safetensors", with_t5=False)
    graph = Graph()
    layout = "native" if bench.new else "legacy"
    node = quantize_file(graph, f"checkpoints/{path.name}", "file_all_fp8", layout=layout)
    name = bench.texts(graph, node)[0]
    source, saved = load_file(path), load_file(bench.saved(name, "checkpoints"))
    quantized = {key for key in source if saved[key].dtype == torch.float8_e4m3fn}
    assert len(quantized) == 13
    assert all(key.startswith("model.diffusion_model.joint_blocks.") for key in quantized)
    assert all(torch.equal(saved[key], source[key]) for key in source.keys() - quantized)
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    prompt = graph.add("CLIPTextEncode", clip=checkpoint[1], text="a lake")
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    sampled = bench.run(graph, bench.keep(graph, graph.sample(checkpoint, prompt, prompt, latent)))
    assert sampled.isfinite().all()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04pickle", b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_broken_file_is_named(bench, content):
    """Quantize File fails. Inspect reports."""
    path = bench.server.models("diffusion_models") / "broken.safetensors"
    path.write_bytes(content)
    graph = Graph()
    quantize_file(graph, f"diffusion_models/{path.name}", "never")
    with pytest.raises(ExecutionError, match="broken.safetensors"):
        bench.server.queue(graph.prompt)
    graph = Graph()
    node = inspect(graph, f"diffusion_models/{path.name}", deep=True, repair=True, prefix="never")
    text, ok = bench.texts(graph, node, graph.add("TestShowText", value=node[2]))
    assert "broken.safetensors" in text
    assert "None of these problems can be repaired." in text
    assert ok == "false"
    path.unlink()
    assert not list(bench.saved("").glob("never*"))


@pytest.mark.parametrize("file", ["diffusion_models/../../secret.safetensors", "loras/x.safetensors", "/etc/passwd"])
def test_only_listed_files_are_opened(bench, file):
    for add in (lambda graph: quantize_file(graph, file, "never"), lambda graph: inspect(graph, file)):
        graph = Graph()
        add(graph)
        with pytest.raises((PromptRejected, ExecutionError)):
            bench.server.queue(graph.prompt)
    assert not list(bench.saved("").glob("never*"))


def test_inspecting_a_file_without_faults(bench):
    path = quantize_and_save(bench, "sd3", "sound")
    graph = Graph()
    node = inspect(graph, f"diffusion_models/{path.name}", deep=True)
    ok = graph.add("TestShowText", value=node[2])
    picture = bench.keep(graph, node[1], as_="image")
    outputs = bench.server.queue(graph.prompt)["outputs"]
    text = outputs[node.id]["text"][0]
    assert "21 scaled FP8 layers" in text
    assert "no problems" in text
    assert outputs[ok.id]["text"] == ["true"]
    image = load_file(bench.server.output / outputs[picture.id]["tensors"][0]["filename"])["samples"]
    assert image.shape[0] == 1
    assert image.shape[2:] == (1024, 3)
    assert image.amin() >= 0
    assert 0.5 < image.mean() < 1


def faulty(bench, name):
    """Scales in bf16 and no header entry, as some converters write them."""
    tensors = load_file(quantize_and_save(bench, "sd3", "to_break"))
    broken = {
        key: tensor.to(torch.bfloat16) if key.endswith(".weight_scale") else tensor
        for key, tensor in tensors.items()
        if not key.endswith(".comfy_quant")
    }
    save_file(broken, bench.server.models("diffusion_models") / name)
    return tensors


def test_a_faulty_file_is_diagnosed_and_repaired(bench):
    original = faulty(bench, "faulty.safetensors")
    graph = Graph()
    node = inspect(graph, "diffusion_models/faulty.safetensors", repair=True, prefix="mended")
    ok = graph.add("TestShowText", value=node[2])
    text, sound = bench.texts(graph, node, ok)
    assert "no header entry and no inline entry" in text
    assert "must be float32" in text
    assert sound == "false"
    assert "Repaired copy: mended_00001_.safetensors" in text
    mended = load_file(bench.saved("mended_00001_.safetensors"))
    for key, tensor in original.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(mended[key].view(torch.uint8), tensor.view(torch.uint8))
    assert json.loads(json.dumps(sorted(mended))) == sorted(original)
    oracle = write_oracle(bench, "oracle_mended.safetensors", multiplied_out(bench.saved("mended_00001_.safetensors")))
    assert bench.close(bench.sampled("sd3", "mended_00001_.safetensors"), bench.sampled("sd3", oracle))


def test_a_file_without_faults_is_not_copied(bench):
    path = bench.server.models("diffusion_models") / "plain.safetensors"
    shutil.copy(bench.model_file("sd3"), path)
    graph = Graph()
    node = inspect(graph, f"diffusion_models/{path.name}", repair=True, prefix="unneeded")
    assert "There is nothing to repair" in bench.texts(graph, node)[0]
    assert not list(bench.saved("").glob("unneeded*"))
