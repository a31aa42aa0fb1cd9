"""What a MODEL carries into Quantize: patches on scaled weights, functions bound to its network, unloaded weights."""

import json

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import FAMILIES, Bench, quantize, save
from comfyui.server import ExecutionError
from safetensors.torch import load_file, save_file

NEAREST = {"rounding": "nearest"}
LORA = "carried_lora.safetensors"


@pytest.fixture(scope="module")
def bench(comfyui):
    bench = Bench(comfyui)
    tiny_models.write_sd3_lora(comfyui.models("loras") / LORA, rank=16, strength=0.2)
    save_file(weights(1), comfyui.models("diffusion_models") / "carried.safetensors")
    return bench


def weights(seed):
    generator = torch.Generator().manual_seed(seed)

    def values(shape):
        spread = 0.02 if len(shape) < 2 else torch.tensor(shape[1:]).prod().item() ** -0.5
        return (torch.randn(shape, generator=generator) * spread).bfloat16()

    return {name: values(shape) for name, shape in tiny_models.sd3_shapes().items()}


def scaled_fp8(tensors):
    """Every 2-D weight as E4M3 with a scale, the metadata that marks it, and the values that this stands for."""
    stored, values = dict(tensors), {name: tensor.float() for name, tensor in tensors.items()}
    names = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    for name in names:
        scale = tensors[name].float().abs().max() / 448
        stored[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + "weight_scale"] = scale
        values[name] = stored[name].float() * scale
    layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in names}
    return stored, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}, values


def dequantized(path):
    tensors = load_file(path)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight_scale")}
    return {
        name: tensor.float() * scales.get(name.removesuffix("weight") + "weight_scale", torch.tensor(1.0))
        for name, tensor in tensors.items()
        if name not in scales and not name.endswith((".comfy_quant", ".input_scale"))
    }


def distance(one, other):
    return float((one - other).norm() / other.norm())


def sampled_and_saved(bench, graph, model, prefix, timeout=120):
    """The latents that a MODEL of the graph gives, and those of the file that is saved from it."""
    kept = bench.keep(graph, FAMILIES["sd3"].sample(graph, model))
    saver = save(graph, prefix, model=model)
    entry = bench.server.queue(graph.prompt, timeout=timeout)
    latents = load_file(bench.server.files(entry, kept.id, "tensors")[0])["samples"]
    name = entry["outputs"][saver.id]["text"][0]
    return latents, bench.sampled("sd3", name), dequantized(bench.saved(name))


# Patches on weights that are scaled FP8 already


def test_a_lora_on_a_kept_scaled_layer_is_baked_in(bench):
    stored, metadata, values = scaled_fp8(weights(2))
    save_file(stored, bench.server.models("diffusion_models") / "carried_fp8.safetensors", metadata)
    graph = Graph()
    patched = graph.add(
        "LoraLoaderModelOnly", model=bench.load(graph, "carried_fp8.safetensors"), lora_name=LORA, strength_model=1.0
    )
    _, _, saved = sampled_and_saved(bench, graph, quantize(graph, patched, keep="x_block", **NEAREST), "kept_lora")
    lora = load_file(bench.server.models("loras") / LORA)
    checked = 0
    for name, value in values.items():
        path = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{path}.lora_up.weight" not in lora or "x_block" not in name:
            continue
        up, down = lora[f"{path}.lora_up.weight"].float(), lora[f"{path}.lora_down.weight"].float()
        expected = value + lora[f"{path}.alpha"] / len(down) * (up @ down)
        assert distance(saved[name], expected) < 0.005, name
        assert distance(value, expected) > 0.05, name
        checked += 1
    assert checked


def test_a_merge_with_a_scaled_model_is_merged_everywhere(bench):
    stored, metadata, values = scaled_fp8(weights(2))
    save_file(stored, bench.server.models("diffusion_models") / "carried_fp8.safetensors", metadata)
    graph = Graph()
    one, other = bench.load(graph, "carried_fp8.safetensors"), bench.load(graph, "carried.safetensors")
    merged = graph.add("ModelMergeSimple", model1=one, model2=other, ratio=0.5)
    _, _, saved = sampled_and_saved(bench, graph, quantize(graph, merged, **NEAREST), "merged")
    for name, value in weights(1).items():
        expected = (value.float() + values[name]) / 2
        assert distance(saved[name], expected) < (0.04 if value.ndim == 2 else 0.005), name


def test_a_model_with_row_scales_is_quantized_from_its_values(bench):
    """Layout legacy with scale_weight (out, 1), as musubi-tuner writes it; 0.3.75 cannot load it."""
    if not bench.new:
        pytest.skip("this ComfyUI cannot load row scales")
    generator = torch.Generator().manual_seed(5)
    tensors, values = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for name, shape in tiny_models.wan_shapes().items():
        values[name] = torch.randn(shape, generator=generator).mul(0.05).bfloat16()
        tensors[name] = values[name]
        if name.startswith("blocks.") and len(shape) == 2 and name.endswith(".weight"):
            scales = values[name].float().abs().amax(1, keepdim=True) / 448
            tensors[name] = (values[name].float() / scales).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "scale_weight"] = scales
            values[name] = tensors[name].float() * scales
    save_file(tensors, bench.server.models("diffusion_models") / "row_scales.safetensors")
    graph = Graph()
    quantized = quantize(graph, bench.load(graph, "row_scales.safetensors"), keep="blocks.0", **NEAREST)
    report = graph.add("TestShowText", value=quantized[1])
    saved, shown = bench.texts(graph, save(graph, "row_scales", model=quantized), report)
    assert "in FP8 with a scale per row or block" in shown
    for name, tensor in dequantized(bench.saved(saved)).items():
        bound = 0.005 if name.startswith("blocks.0.") else 0.04
        assert distance(tensor, values[name].float()) < bound, name


# What holds on to the network


@pytest.mark.parametrize("way", ["method", "wrapper", "partial"])
def test_functions_bound_to_the_network_run_the_quantized_weights(bench, way):
    graph = Graph()
    plain = bench.keep(graph, FAMILIES["sd3"].sample(graph, bench.load(graph, "carried.safetensors")))
    original = load_file(bench.server.files(bench.server.queue(graph.prompt), plain.id, "tensors")[0])["samples"]
    graph = Graph()
    bound = graph.add("TestBoundModel", model=bench.load(graph, "carried.safetensors"), way=way)
    sampled, reloaded, _ = sampled_and_saved(bench, graph, quantize(graph, bound, **NEAREST), f"bound_{way}")
    assert torch.equal(sampled, reloaded)
    assert distance(sampled, original) > 1e-3


def test_the_sampling_of_a_loaded_model_is_carried_over(bench):
    """While a model is loaded, ComfyUI keeps its object patches in the model itself.

    With dynamic VRAM, it mixes up the noise levels of samplings that one network is loaded with: each has its own.
    """

    def shifted(graph, model):
        return graph.add("ModelSamplingSD3", model=model, shift=7.0)

    bench.server.free()
    graph = Graph()
    bench.keep(graph, FAMILIES["sd3"].sample(graph, shifted(graph, bench.load(graph, "carried.safetensors"))))
    bench.server.queue(graph.prompt)
    graph = Graph()  # other seeds, so that ComfyUI does not give two nodes one result
    before = quantize(graph, shifted(graph, bench.load(graph, "carried.safetensors")), **NEAREST)
    after = shifted(graph, quantize(graph, bench.load(graph, "carried.safetensors"), **NEAREST, seed=1))
    plain = quantize(graph, bench.load(graph, "carried.safetensors"), **NEAREST, seed=2)
    kept = [bench.keep(graph, FAMILIES["sd3"].sample(graph, model)) for model in (before, after, plain)]
    one, other, unshifted = bench.run(graph, *kept)
    assert torch.equal(one, other)
    assert distance(one, unshifted) > 1e-3


def test_an_object_bound_to_the_network_is_refused(bench):
    graph = Graph()
    bound = graph.add("TestBoundModel", model=bench.load(graph, "carried.safetensors"), way="object")
    save(graph, "refused", model=quantize(graph, bound, **NEAREST))
    with pytest.raises(ExecutionError, match="put that node after Stochastic FP8"):
        bench.server.queue(graph.prompt)


def test_a_compiled_model_is_compiled_again(bench):
    if bench.dynamic_vram:
        pytest.skip("inductor fails on FP8 layers with dynamic VRAM: input mutations on views with different dtypes")
    graph = Graph()
    compiled = graph.add("TorchCompileModel", model=bench.load(graph, "carried.safetensors"), backend="inductor")
    quantized = quantize(graph, compiled, **NEAREST)
    sampled, reloaded, _ = sampled_and_saved(bench, graph, quantized, "compiled", timeout=600)  # to compile takes long
    assert distance(sampled, reloaded) < (1e-4 if bench.exact else 0.01)


def test_a_lora_in_bypass_mode_is_baked_in_like_any_other(bench):
    if "LoraLoaderBypassModelOnly" not in bench.server.object_info():
        pytest.skip("this ComfyUI has no bypass mode for LoRAs")
    saved = []
    for node in ("LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"):
        graph = Graph()
        model = bench.load(graph, "carried.safetensors")
        patched = graph.add(node, model=model, lora_name=LORA, strength_model=0.7)
        sampled, reloaded, tensors = sampled_and_saved(bench, graph, quantize(graph, patched, **NEAREST), node)
        assert torch.equal(sampled, reloaded)
        saved.append(tensors)
    baked_in, bypassed = saved  # on a GPU, products of LoRA matrices can differ in their last bit
    assert baked_in.keys() == bypassed.keys()
    for name, value in baked_in.items():
        assert torch.equal(bypassed[name], value) or not bench.exact and distance(bypassed[name], value) < 0.005, name


def test_a_lora_in_bypass_mode_after_quantize_is_not_saved(bench):
    if "LoraLoaderBypassModelOnly" not in bench.server.object_info():
        pytest.skip("this ComfyUI has no bypass mode for LoRAs")
    graph = Graph()
    quantized = quantize(graph, bench.load(graph, "carried.safetensors"), **NEAREST)
    patched = graph.add("LoraLoaderBypassModelOnly", model=quantized, lora_name=LORA, strength_model=1.0)
    save(graph, "bypass_after", model=patched)
    with pytest.raises(ExecutionError, match="move it before Stochastic FP8"):
        bench.server.queue(graph.prompt)


# What the loader makes of the quantized weights


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("class", "would load the quantized AnotherModel as another model, SD3"),
        ("parameter", "without 1 of its tensors, e.g. 'added'"),
        ("marking", "without 1 of its tensors, e.g. 'x_embedder.input_scale'"),
        ("config", "would load the quantized SD3 as another model, SD3"),
    ],
)
def test_a_model_that_the_loader_would_change_is_refused(bench, how, message):
    """What ComfyUI would take for another model is refused before the work: a weight with NaN is not reached."""
    graph = Graph()
    tensors = weights(3)
    if how == "config":
        tensors["joint_blocks.0.x_block.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(tensors, bench.server.models("diffusion_models") / f"unfamiliar_{how}.safetensors")
    model = graph.add("TestUnfamiliarModel", model=bench.load(graph, f"unfamiliar_{how}.safetensors"), how=how)
    save(graph, "refused", model=quantize(graph, model, **NEAREST))
    with pytest.raises(ExecutionError, match=message):
        bench.server.queue(graph.prompt)


# Weights after "Unload Models"


def test_an_unloaded_model_can_be_quantized_compared_and_saved(bench):
    graph = Graph()
    unloaded = graph.add("TestUnloadedModel", model=bench.load(graph, "carried.safetensors"))
    compared = graph.add("StochasticFP8Compare", model=unloaded, scaling="absmax", layers="auto", most_layers=2)
    sampled, reloaded, _ = sampled_and_saved(bench, graph, quantize(graph, unloaded, **NEAREST), "unloaded")
    assert compared.id
    assert torch.equal(sampled, reloaded)
