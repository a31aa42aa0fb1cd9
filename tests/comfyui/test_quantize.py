"""Quantizing a MODEL in the graph: it samples like its saved file and like its dequantized weights."""

import json
from itertools import pairwise

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import (
    FAMILIES,
    FILE_OPTIONS,
    RECIPE,
    codes_and_scales,
    equal,
    lora_of,
    metadata_of,
    multiplied_out,
    quantize,
    quantize_and_save,
    recipe_of,
    rest_cast_to_float8,
    save,
    write_oracle,
)
from safetensors.torch import load_file

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def runs(bench, format):
    return format == E4M3 or bench.new


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_graph_reloaded_file_and_dequantized_weights_sample_the_same(bench, family, format):
    """Graph and reloaded file: bit for bit. Dequantized weights: up to fp32 rounding."""
    if not runs(bench, format):
        pytest.skip("this ComfyUI runs no E5M2")
    graph = Graph()
    source = bench.load(graph, family)
    quantized = quantize(graph, source, format=format)
    before, in_graph = (bench.keep(graph, FAMILIES[family].sample(graph, model)) for model in (source, quantized))
    saver = save(graph, f"{family}_{format}", model=quantized)
    entry = bench.server.queue(graph.prompt)
    before, in_graph = (
        load_file(bench.server.files(entry, node.id, "tensors")[0])["samples"] for node in (before, in_graph)
    )
    name = entry["outputs"][saver.id]["text"][0]
    reloaded = bench.sampled(family, name)
    oracle = write_oracle(bench, f"oracle_{family}_{format}.safetensors", multiplied_out(bench.saved(name)))
    assert torch.equal(in_graph, reloaded)
    assert bench.close(in_graph, bench.sampled(family, oracle))
    assert (in_graph - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_legacy_files(bench, family):
    path = quantize_and_save(bench, family, f"legacy_{family}", "legacy")
    reloaded = bench.sampled(family, path.name)
    if bench.new:
        expected = multiplied_out(path)
        graph = Graph()
        latent = FAMILIES[family].sample(graph, quantize(graph, bench.load(graph, family)))
        assert torch.equal(reloaded, bench.run(graph, bench.keep(graph, latent)))
    else:
        expected = rest_cast_to_float8(path)
    oracle = write_oracle(bench, f"oracle_legacy_{family}.safetensors", expected)
    assert bench.close(reloaded, bench.sampled(family, oracle))


def test_the_source_model_is_not_changed(bench):
    graph = Graph()
    source = bench.load(graph, "sd3")
    first = graph.add("TestModelDigest", model=source)
    report = quantize(graph, source)[1]
    second = graph.add("TestModelDigest", model=source, after=report)
    digests = bench.texts(graph, first, second)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_untouched_tensors_keep_their_names_and_values(bench, family):
    """Under the published names: newer versions rename some tensors inside the module (HunyuanVideo's norms)."""
    source = load_file(bench.model_file(family))
    path = quantize_and_save(bench, family, f"untouched_{family}")
    codes, _ = codes_and_scales(path)
    saved = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(("_scale", ".comfy_quant"))}
    assert saved.keys() == source.keys()
    rest = source.keys() - codes.keys()
    assert len(rest) > 30
    assert [key for key in rest if not bench.same_values(saved[key], source[key])] == []
    assert path.stat().st_size < 0.95 * bench.model_file(family).stat().st_size


def test_only_linear_weights_of_the_preset_are_quantized(bench):
    """The preset keeps 13 of SD3's 34 Linear layers. Convolutions, norms and embeddings are never quantized."""
    codes, scales = codes_and_scales(quantize_and_save(bench, "sd3", "preset"))
    assert len(codes) == len(scales) == 21
    assert all(key.startswith("joint_blocks.") and "adaLN" not in key for key in codes)
    assert all(scale.dtype == torch.float32 and scale.shape == () for scale in scales.values())
    everything, _ = codes_and_scales(quantize_and_save(bench, "sd3", "everything", layers="all_linear"))
    assert len(everything) == 34


def test_patterns(bench):
    path = quantize_and_save(bench, "sd3", "patterns", keep="joint_blocks.0\nmlp.fc1", only="x_block")
    codes, _ = codes_and_scales(path)
    assert codes.keys() == {
        f"joint_blocks.{block}.x_block.{layer}.weight"
        for block in (1, 2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc2")
    }
    assert recipe_of(path)["keep"] == ["joint_blocks.0", "mlp.fc1"]


def test_transfers_overlap_with_rounding(bench):
    """Each weight leaves for the GPU before the one before it is rounded."""
    seen = on_fake_gpu(bench, lambda graph: bench.load(graph, "wan"))
    at = {tuple(event): index for index, event in enumerate(seen["events"])}
    for layer, following in pairwise(seen["layers"]):
        assert at["send", following] < at["round", layer]
    assert sorted(seen["quantized"]) == sorted(seen["layers"])
    (room,) = seen["room"]
    assert room >= 2 * seen["largest"], "ComfyUI was asked for room for a weight and the prefetched one"


@pytest.mark.parametrize("weights", ["32 bits", "nan", "patched"])
def test_transfers_in_flight_are_bounded(bench, weights):
    """At most two weights and the codes of one are in flight, and nothing at the end, whatever the weights are like."""

    def load(graph):
        model = bench.load(graph, "sd3")
        if weights != "patched":
            return model
        lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "on_some_layers.safetensors", depth=1)
        return graph.add("LoraLoaderModelOnly", model=model, lora_name=lora.name, strength_model=1.0)

    seen = on_fake_gpu(bench, load, "16 bits" if weights == "patched" else weights)
    sent, fetching = [], 0
    for event, layer in seen["events"]:
        if event == "send":
            sent.append(layer)
        elif event == "round":
            assert layer not in seen["patched"] or sent == [layer], "a patched weight needs the room for itself"
            sent.remove(layer)
        else:
            fetching += 1 if event == "fetch" else -1
        assert len(sent) <= 2 and 0 <= fetching <= 1
    assert sent == [] and fetching == 0
    kept = set(seen["layers"][::3]) if weights == "nan" else set()
    assert set(seen["quantized"]) == set(seen["layers"]) - kept
    assert (0 < len(seen["patched"]) < len(seen["layers"])) == (weights == "patched")


def on_fake_gpu(bench, load, weights="16 bits"):
    """What TestFakeGPU reports; the codes must be the CPU's."""
    graph = Graph()
    node = graph.add("TestFakeGPU", model=load(graph), weights=weights)
    seen = json.loads(bench.texts(graph, node)[0])
    assert seen["same"]
    return seen


def test_the_same_seed_gives_the_same_bytes(bench):
    """Quantized twice, with the cache emptied in between, and once with another seed."""
    first = codes_and_scales(quantize_and_save(bench, "sd3", "seed", seed=7))
    bench.server.free()
    second = codes_and_scales(quantize_and_save(bench, "sd3", "seed_again", seed=7))
    other = codes_and_scales(quantize_and_save(bench, "sd3", "seed_other", seed=8))
    assert equal(first[0], second[0])
    assert equal(first[1], second[1])
    assert not any(torch.equal(first[0][key], other[0][key]) for key in first[0])
    assert equal(first[1], other[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_node_writes_the_same(bench, family):
    """Codes and scales are equal byte for byte, everything else has the same values."""
    bench.model_file(family)
    recipe = RECIPE | {"rounding": "owlshift", "scaling": "owlscale", "seed": 3}
    graph = Graph()
    file = f"diffusion_models/{FAMILIES[family].name}"
    node = graph.add("StochasticFP8QuantizeFile", file=file, filename_prefix=f"file_{family}", **recipe, **FILE_OPTIONS)
    by_file = bench.saved(bench.texts(graph, node)[0])
    by_graph = quantize_and_save(bench, family, f"graph_{family}", **recipe)
    one, other = load_file(by_file), load_file(by_graph)
    assert one.keys() == other.keys()
    codes, scales = codes_and_scales(by_file)
    assert [key for key in one.keys() - codes.keys() if not bench.same_values(one[key], other[key])] == []
    assert equal(codes, codes_and_scales(by_graph)[0])
    assert equal(scales, codes_and_scales(by_graph)[1])


def test_a_lora_before_is_baked_in_at_full_precision(bench):
    """Each saved weight is within one FP8 step of the weight plus the LoRA, computed from its definition."""
    lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "before.safetensors", depth=3, strength=1.0)
    graph = Graph()
    patched = graph.add("LoraLoaderModelOnly", model=bench.load(graph, "sd3"), lora_name=lora.name, strength_model=0.8)
    path = bench.saved(bench.texts(graph, save(graph, "lora_before", model=quantize(graph, patched)))[0])
    source, saved, scales = load_file(bench.model_file("sd3")), multiplied_out(path), codes_and_scales(path)[1]
    deltas = lora_of(lora, 0.8)
    changed = {key: source[key].float() + delta for key, delta in deltas.items() if saved[key].shape == delta.shape}
    assert len(changed) == 21
    for key, expected in changed.items():
        quantum = scales[key.removesuffix("weight") + "weight_scale"] * 2**-9
        step = torch.maximum(expected.abs() * 2**-3, quantum)
        assert ((saved[key] - expected).abs() <= step * 1.0001).all(), key
        assert ((saved[key] - source[key].float()).abs() > step).any(), key


def test_a_lora_after_works(bench):
    """The result is close to the same LoRA on the dequantized model, and far from the model without it."""
    lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "after.safetensors", depth=3, strength=1.0)
    path = quantize_and_save(bench, "sd3", "lora_after")
    oracle = write_oracle(bench, "oracle_lora_after.safetensors", multiplied_out(path))
    graph = Graph()
    quantized = quantize(graph, bench.load(graph, "sd3"))
    after, expected = (
        graph.add("LoraLoaderModelOnly", model=model, lora_name=lora.name, strength_model=1.0)
        for model in (quantized, bench.load(graph, oracle))
    )
    kept = [bench.keep(graph, FAMILIES["sd3"].sample(graph, model)) for model in (quantized, after, expected)]
    without, with_lora, expected = bench.run(graph, *kept)
    assert (with_lora - expected).square().mean() < 0.2 * (without - expected).square().mean()
    assert "lora key not loaded" not in bench.server.log()


def test_the_sampling_shift_is_carried_over(bench):
    graph = Graph()
    plain = bench.load(graph, "sd3")
    shifted_first = quantize(graph, graph.add("ModelSamplingSD3", model=plain, shift=8.0))
    shifted_last = graph.add("ModelSamplingSD3", model=quantize(graph, plain), shift=8.0)
    kept = [
        bench.keep(graph, FAMILIES["sd3"].sample(graph, model, steps=4))
        for model in (shifted_first, shifted_last, quantize(graph, plain))
    ]
    first, last, unshifted = bench.run(graph, *kept)
    assert torch.equal(first, last)
    assert (first - unshifted).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["model_options", "wrapper", "object_patch"])
def test_patches_of_every_kind_are_carried_over(bench, way):
    graph = Graph()
    plain = bench.load(graph, "sd3")
    halved_first = quantize(graph, graph.add("TestHalvingModel", model=plain, way=way))
    halved_last = graph.add("TestHalvingModel", model=quantize(graph, plain), way=way)
    kept = [
        bench.keep(graph, FAMILIES["sd3"].sample(graph, model))
        for model in (halved_first, halved_last, quantize(graph, plain))
    ]
    first, last, whole = bench.run(graph, *kept)
    assert torch.equal(first, last)
    assert (first - whole).abs().max() > 1e-3


def test_quantizing_a_quantized_model(bench):
    """Nearest does not change values on the grid. The report says that the model was quantized before."""
    graph = Graph()
    once = quantize(graph, bench.load(graph, "sd3"))
    twice = quantize(graph, once, rounding="nearest")
    report = graph.add("TestShowText", value=twice[1])
    savers = [save(graph, f"requantized_{i}", model=model) for i, model in enumerate((once, twice))]
    first, second, shown = bench.texts(graph, *savers, report)
    assert "21 layers already in scaled FP8" in shown
    assert equal(codes_and_scales(bench.saved(first))[0], codes_and_scales(bench.saved(second))[0])


def test_a_loaded_file_is_saved_without_rounding(bench):
    first = quantize_and_save(bench, "sd3", "loaded")
    graph = Graph()
    second = bench.saved(bench.texts(graph, save(graph, "saved_again", model=bench.load(graph, first.name)))[0])
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].view(-1).view(torch.uint8), other[key].view(-1).view(torch.uint8)) for key in one)


def test_comfyuis_own_save_node(bench):
    if not bench.new:
        pytest.skip("this ComfyUI cannot save mixed-precision models itself")
    if bench.server.version <= (0, 8, 0):
        pytest.skip("ModelSave of ComfyUI 0.8.0 writes other codes than the model holds")
    graph = Graph()
    quantized = quantize(graph, bench.load(graph, "sd3"))
    saver = save(graph, "ours", model=quantized)
    graph.add("ModelSave", model=quantized, filename_prefix="diffusion_models/theirs")
    ours = bench.saved(bench.texts(graph, saver)[0])
    theirs = {
        key.removeprefix("model.diffusion_model."): tensor
        for key, tensor in load_file(bench.saved("theirs_00001_.safetensors")).items()
    }
    codes, scales = codes_and_scales(ours)
    assert all(torch.equal(theirs[key].view(torch.uint8), codes[key]) for key in codes)
    assert all(torch.equal(theirs[key], scales[key]) for key in scales)
    difference = bench.sampled("sd3", "theirs_00001_.safetensors") - bench.sampled("sd3", ours.name)
    assert difference.abs().max() <= 1e-5  # the same weights, at other addresses: another order of summation


def test_metadata(bench):
    graph = Graph()
    saver = save(graph, "metadata", model=quantize(graph, bench.load(graph, "sd3"), seed=5))
    workflow = {"nodes": [], "version": 0.4}
    entry = bench.server.queue(graph.prompt, workflow=workflow)
    metadata = metadata_of(bench.saved(entry["outputs"][saver.id]["text"][0]))
    recipe = json.loads(metadata["stochastic_fp8"])
    assert json.loads(metadata["workflow"]) == workflow
    assert json.loads(metadata["prompt"])[saver.id]["class_type"] == "StochasticFP8Save"
    assert (recipe["format"], recipe["rounding"], recipe["seed"]) == (E4M3, "stochastic", 5)
    assert (recipe["family"], len(recipe["quantized"])) == ("sd3", 21)
    assert "joint_blocks.0.x_block.attn.qkv.weight" in recipe["quantized"]


def test_the_second_queue_is_cached(bench):
    graph = Graph()
    saver = save(graph, "cached", model=quantize(graph, bench.load(graph, "sd3"), seed=11))
    bench.server.queue(graph.prompt)
    messages = dict(bench.server.queue(graph.prompt)["status"]["messages"])
    assert set(messages["execution_cached"]["nodes"]) == set(graph.prompt)
    assert [path.name for path in bench.saved("").glob("cached_*")] == ["cached_00001_.safetensors"]
    assert saver.id in graph.prompt
