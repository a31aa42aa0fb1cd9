"""The nodes that work on files: quantize a file, inspect and repair."""

import json
import re
import shutil

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import (
    FAMILIES,
    FILE_OPTIONS,
    RECIPE,
    multiplied_out,
    quantize,
    quantize_and_save,
    save,
    temporary_files,
    write_oracle,
)
from comfyui.server import ExecutionError, PromptRejected, comfyui_dir
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


def listed(bench, node="StochasticFP8QuantizeFile"):
    """The choices of the input `file`."""
    kind, *options = bench.server.object_info(node)["input"]["required"]["file"]
    return kind if isinstance(kind, list) else options[0]["options"]


def write_set(bench, name, seed=0, **tensors):
    """A model as a set of two files under models/diffusion_models. Returns the path of its index."""
    tensors |= tiny_models.state_dict(tiny_models.sd3_shapes(), seed=seed)
    names = sorted(tensors)
    return tiny_models.write_set(bench.server.models("diffusion_models") / name, [names[::2], names[1::2]], tensors)


def test_a_set_is_listed_once_as_its_index(bench):
    write_set(bench, "sets/one.safetensors")
    lonely = write_set(bench, "sets/lonely.safetensors")
    lonely.unlink()
    variant = write_set(bench, "sets/two.fp16.safetensors")
    variant.rename(variant.with_name("two.safetensors.index.fp16.json"))
    for node in ("StochasticFP8QuantizeFile", "StochasticFP8Inspect"):
        assert [file for file in listed(bench, node) if "/sets/" in file] == [
            f"diffusion_models/sets/{name}"
            for name in (
                "lonely-00001-of-00002.safetensors",
                "lonely-00002-of-00002.safetensors",
                "one.safetensors.index.json",
                "two.safetensors.index.fp16.json",
            )
        ]


def test_a_set_gives_the_file_that_its_model_in_one_piece_gives(bench):
    index = write_set(bench, "split/one.safetensors")
    tiny_models.write_sd3(bench.server.models("diffusion_models") / "whole.safetensors")
    files = []
    for file in (f"diffusion_models/split/{index.name}", "diffusion_models/whole.safetensors"):
        graph = Graph()
        files.append(load_file(bench.saved(bench.texts(graph, quantize_file(graph, file, "of_set"))[0])))
        answer = bench.server.post("/stochastic_fp8/plan", {"file": file})
        quantized = sum(tensor.dtype == torch.float8_e4m3fn for tensor in files[-1].values())
        assert answer["quantized"]["count"] == quantized == 13
    assert files[0].keys() == files[1].keys()
    assert all(
        torch.equal(files[0][key].view(torch.uint8), files[1][key].view(torch.uint8))
        for key in files[0]
        if files[0][key].ndim
    )


def test_a_set_is_quantized_again_when_one_of_its_files_changes(bench):
    index = write_set(bench, "growing/one.safetensors")
    graph = Graph()
    node = quantize_file(graph, f"diffusion_models/growing/{index.name}", "growing")
    assert bench.texts(graph, node) == ["growing_00001_.safetensors"]
    assert bench.texts(graph, node) == ["growing_00001_.safetensors"]
    second = index.with_name("one-00002-of-00002.safetensors")
    save_file({key: tensor + 1 for key, tensor in load_file(second).items()}, second)
    assert bench.texts(graph, node) == ["growing_00002_.safetensors"]


def test_inspecting_a_set(bench):
    path = quantize_and_save(bench, "sd3", "whole_fp8")
    tensors = load_file(path)
    names = sorted(tensors)
    target = bench.server.models("diffusion_models") / "fp8" / "one.safetensors"
    index = tiny_models.write_set(target, [names[::2], names[1::2]], tensors)
    graph = Graph()
    text = bench.texts(graph, inspect(graph, f"diffusion_models/fp8/{index.name}", repair=True, prefix="joined"))[0]
    assert "one.safetensors.index.json" in text
    assert "21 scaled FP8 layers" in text
    assert "Repaired copy: joined_00001_.safetensors" in text  # the set has no header entries
    joined = load_file(bench.saved("joined_00001_.safetensors"))
    assert joined.keys() == tensors.keys()


def test_one_file_of_a_set_is_refused_with_the_way_out(bench):
    write_set(bench, "shards/alone.safetensors").unlink()
    file = "diffusion_models/shards/alone-00001-of-00002.safetensors"
    graph = Graph()
    quantize_file(graph, file, "never")
    way_out = "is file 1 of the 2 that hold one model; give the .safetensors.index.json of the set"
    with pytest.raises(ExecutionError, match=way_out):
        bench.server.queue(graph.prompt)


@pytest.mark.parametrize("name", ["capitals.SAFETENSORS", "short.sft", "SHORT.SFT"])
def test_other_endings_of_safetensors_files(bench, name):
    shutil.copy(bench.model_file("sd3"), bench.server.models("diffusion_models") / name)
    file = f"diffusion_models/{name}"
    assert file in listed(bench)
    assert file in listed(bench, "StochasticFP8Inspect")
    assert bench.server.post("/stochastic_fp8/plan", {"file": file})["quantized"]["count"] == 21
    graph = Graph()
    saved = bench.texts(graph, quantize_file(graph, file, "ending"))[0]
    graph = Graph()
    assert "has no FP8 weights" in bench.texts(graph, inspect(graph, file))[0]
    assert bench.sampled("sd3", saved).isfinite().all()


def test_a_model_that_this_comfyui_does_not_know_is_refused(bench):
    if (comfyui_dir() / "comfy" / "ldm" / "krea2").exists():
        pytest.skip("this ComfyUI knows Krea 2")
    names = ("txtfusion.projector", "first", "last.linear", *(f"blocks.{n}.attn.wq" for n in range(4)))
    path = bench.server.models("diffusion_models") / "krea2.safetensors"
    save_file({f"{name}.weight": torch.ones(32, 32) for name in names}, path)
    graph = Graph()
    quantize_file(graph, f"diffusion_models/{path.name}", "unknown_here")
    with pytest.raises(ExecutionError, match=r"does not recognise this model \(Krea 2\)"):
        bench.run(graph)
    graph = Graph()
    node = quantize_file(graph, f"diffusion_models/{path.name}", "unknown_here", for_another_comfyui=True)
    assert bench.texts(graph, node) == ["unknown_here_00001_.safetensors"]


def plan(bench, file, **choices):
    return bench.server.post("/stochastic_fp8/plan", {"file": file, **choices})


WRONG_FOLDERS = {
    ("text_encoders", "wan"): "diffusion_models",
    ("diffusion_models", "t5xxl"): "text_encoders",
    ("checkpoints", "t5xxl"): "text_encoders",
}
"""(folder, model) -> where it belongs."""


@pytest.mark.parametrize(("folder", "model"), WRONG_FOLDERS)
def test_a_model_in_the_folder_of_another_kind_is_refused(bench, folder, model):
    file, belongs = f"{folder}/misplaced_{model}.safetensors", WRONG_FOLDERS[folder, model]
    write = {"wan": tiny_models.write_wan, "t5xxl": tiny_models.write_t5xxl}[model]
    write(bench.server.models(folder) / f"misplaced_{model}.safetensors")
    way_out = f"Move the file to models/{belongs}, or turn on for_another_comfyui"
    (problem,) = plan(bench, file, layout="legacy")["problems"]
    assert way_out in problem
    assert not plan(bench, file, layout="legacy", for_another_comfyui=True)["problems"]
    graph = Graph()
    quantize_file(graph, file, "misplaced", layout="legacy")
    with pytest.raises(ExecutionError, match=way_out):
        bench.server.queue(graph.prompt)
    graph = Graph()
    node = quantize_file(graph, file, "misplaced", layout="legacy", for_another_comfyui=True)
    assert bench.texts(graph, node)[0].startswith("misplaced")


@pytest.mark.parametrize("folder", ["diffusion_models", "checkpoints", "text_encoders"])
def test_an_unknown_model_belongs_to_any_folder(bench, folder):
    bench.place("anything.safetensors", {f"layers.{i}.fc.weight": torch.ones(32, 32) for i in range(3)}, folder)
    file = f"{folder}/anything.safetensors"
    assert not any("Move" in problem for problem in plan(bench, file)["problems"])


def test_a_plan_for_the_text_encoders_of_a_file_without_any(bench):
    tensors = tiny_models.state_dict(tiny_models.wan_shapes())
    name = "prefixed_wan.safetensors"
    bench.place(name, {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()})
    answer = plan(bench, f"diffusion_models/{name}", part="clip")
    assert answer == {"error": f"{name}: holds no text encoder: load one with a CLIP loader"}


def test_the_plan_knows_the_format_of_layers_that_stay(bench):
    """Each layout is read wrong with E5M2 by one generation of versions, and choosing E4M3 does not change the layers
    that stay."""
    tensors, layers = tiny_models.state_dict(tiny_models.wan_shapes()), {}
    for key in [key for key, tensor in tensors.items() if key.startswith("blocks.0.") and tensor.ndim == 2]:
        if key.endswith(".weight"):
            layer = key.removesuffix(".weight")
            tensors[key], tensors[f"{layer}.weight_scale"] = tensors[key].to(torch.float8_e5m2), torch.tensor(1.0)
            layers[layer] = {"format": "float8_e5m2"}
    entries = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    file = f"diffusion_models/{bench.place('stays_e5m2.safetensors', tensors, metadata=entries)}"
    layout, other = ("legacy", "native") if bench.new else ("native", "legacy")
    (problem,) = plan(bench, file, keep="blocks.0", layout=layout)["problems"]
    assert f"Choose layout {other}, or turn on" in problem
    graph = Graph()
    quantize_file(graph, file, "stays", keep="blocks.0", layout=layout)
    with pytest.raises(ExecutionError, match=re.escape(problem)):
        bench.server.queue(graph.prompt)


def test_quantizing_twice_is_refused_unless_asked(bench):
    name = f"diffusion_models/{quantize_and_save(bench, 'sd3', 'twice').name}"
    graph = Graph()
    quantize_file(graph, name, "second_time")
    with pytest.raises(ExecutionError, match="ask to requantize"):
        bench.server.queue(graph.prompt)
    graph = Graph()
    assert bench.texts(graph, quantize_file(graph, name, "second_time", requantize=True)) == [
        "second_time_00001_.safetensors"
    ]


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
    """Convert File to FP8 fails. Inspect reports."""
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
    assert 0 < image.mean() < 0.5  # dark


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


def presets(bench, node):
    """The choices of the input `layers`."""
    kind, *options = bench.server.object_info(node)["input"]["required"]["layers"]
    return set(kind if isinstance(kind, list) else options[0]["options"])


def test_lists_of_presets_fit_the_input(bench):
    model, clip, file, compare = (
        presets(bench, f"StochasticFP8{node}")
        for node in ("Quantize", "QuantizeTextEncoder", "QuantizeFile", "Compare")
    )
    encoders = {"t5xxl", "llm"}
    assert encoders <= clip
    assert not encoders & (model | compare)
    assert {"auto", "all_linear", "flux", "sd3", "unknown"} <= model & compare
    assert {"auto", "all_linear"} <= clip
    assert not {"flux", "sd3", "unknown"} & clip
    assert file == model | clip


def test_saved_presets_outside_the_list_run(bench):
    """The list had every preset before."""
    graph = Graph()
    model = quantize(graph, bench.load(graph, "sd3"), layers="t5xxl")
    assert bench.run(graph, bench.keep(graph, FAMILIES["sd3"].sample(graph, model))).isfinite().all()
    graph = Graph()
    compare = graph.add(
        "StochasticFP8Compare", model=bench.load(graph, "sd3"), scaling="absmax", layers="t5xxl", most_layers=1
    )
    assert "nearest" in bench.texts(graph, graph.add("TestShowText", value=compare[1]))[0]


def test_unknown_presets_are_refused_with_the_known_ones(bench):
    graph = Graph()
    save(graph, "never", model=quantize(graph, bench.load(graph, "sd3"), layers="flx"))
    with pytest.raises(PromptRejected, match="unknown layers 'flx': choose one of auto, all_linear, flux"):
        bench.server.queue(graph.prompt)


def test_unknown_presets_of_a_file_are_refused(bench):
    """By ComfyUI, which has the whole list; by the node in 0.3.75, which does not look."""
    graph = Graph()
    bench.model_file("sd3")
    quantize_file(graph, "diffusion_models/sd3.safetensors", "never", layers="flx")
    with pytest.raises((PromptRejected, ExecutionError), match="layers:? 'flx'"):
        bench.server.queue(graph.prompt)
