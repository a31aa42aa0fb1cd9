"""Text encoders in the graph, in files and in all-in-one checkpoints: T5 becomes FP8, CLIP-L never does."""

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import FILE_OPTIONS, RECIPE, metadata_of, quantize, save
from comfyui.server import ExecutionError
from safetensors.torch import load_file, save_file

LAYERS = 24 * 7
"""q, k, v, o, wi_0, wi_1 and wo of each block."""


@pytest.fixture(scope="module")
def t5(bench):
    return tiny_models.write_t5xxl(bench.server.models("text_encoders") / "t5.safetensors").name


@pytest.fixture(scope="module")
def clip_l(bench):
    return tiny_models.write_clip_l(bench.server.models("text_encoders") / "clip_l.safetensors").name


@pytest.fixture
def layout(bench):
    """The one in which this ComfyUI reads T5 files."""
    return "native" if bench.new else "legacy"


def quantize_clip(graph, clip, **choices):
    return graph.add("StochasticFP8QuantizeTextEncoder", clip=clip, **{**RECIPE, **choices})


def encoded(bench, graph, clip):
    prompt = graph.add("CLIPTextEncode", clip=clip, text="a lake at dawn")
    return bench.keep(graph, prompt, conditioning=True)


def load_clips(graph, *names):
    if len(names) == 1:
        return graph.add("CLIPLoader", clip_name=names[0], type="sd3", device="default")
    return graph.add("DualCLIPLoader", clip_name1=names[0], clip_name2=names[1], type="sd3", device="default")


def plain_t5(path):
    tensors = load_file(path)
    scales = {key: tensors[key] for key in tensors if key.endswith(("weight_scale", "scale_weight"))}
    plain = {}
    for key, tensor in tensors.items():
        layer = key.removesuffix(".weight")
        scale = scales.get(f"{layer}.weight_scale", scales.get(f"{layer}.scale_weight"))
        if key not in scales and not key.endswith(("comfy_quant", "scaled_fp8")):
            plain[key] = tensor if scale is None else tensor.float() * scale
    plain["encoder.final_layer_norm.weight"] = plain["encoder.final_layer_norm.weight"].float()
    return plain


def test_t5_encodes_what_its_file_holds(bench, t5, clip_l, layout):
    """In the graph, reloaded and multiplied out by hand, beside a CLIP-L that stays as it is."""
    graph = Graph()
    quantized = quantize_clip(graph, load_clips(graph, clip_l, t5))
    in_graph = encoded(bench, graph, quantized)
    report = graph.add("TestShowText", value=quantized[1])
    saver = save(graph, "t5", layout, clip=quantized)
    outputs = bench.server.queue(graph.prompt)["outputs"]
    in_graph = load_file(bench.server.output / outputs[in_graph.id]["tensors"][0]["filename"])["samples"]
    name, shown = outputs[saver.id]["text"][0], outputs[report.id]["text"][0]
    path = bench.saved(name, "clip")
    assert (
        sum(tensor.dtype == torch.float8_e4m3fn and tensor.dim() == 2 for tensor in load_file(path).values()) == LAYERS
    )
    assert "ComfyUI has no FP8 detection for CLIP-L" in shown
    save_file(plain_t5(path), bench.server.models("text_encoders") / "t5_oracle.safetensors")
    graph = Graph()
    kept = [encoded(bench, graph, load_clips(graph, clip_l, other)) for other in (name, "t5_oracle.safetensors", t5)]
    reloaded, oracle, unquantized = bench.run(graph, *kept)
    scale = oracle.abs().max()
    assert (in_graph - oracle).abs().max() <= 1e-3 * scale
    assert (reloaded - oracle).abs().max() <= 1e-3 * scale
    assert (unquantized - oracle).abs().max() > 1e-2 * scale
    if bench.new:
        assert torch.equal(in_graph, reloaded)


def test_clip_l_alone_passes_through(bench, clip_l):
    graph = Graph()
    clip = load_clips(graph, clip_l)
    quantized = quantize_clip(graph, clip)
    before, after = bench.run(graph, *(encoded(bench, graph, either) for either in (clip, quantized)))
    assert torch.equal(before, after)


def test_saving_clip_l_says_what_to_do(bench, clip_l):
    graph = Graph()
    save(graph, "never", clip=load_clips(graph, clip_l))
    with pytest.raises(ExecutionError, match="put Stochastic FP8 Quantize Text Encoder before"):
        bench.server.queue(graph.prompt)


def test_the_file_node_writes_the_same_t5(bench, t5, layout):
    graph = Graph()
    file_node = graph.add(
        "StochasticFP8QuantizeFile",
        file=f"text_encoders/{t5}",
        filename_prefix="t5_by_file",
        **RECIPE,
        **{**FILE_OPTIONS, "layout": layout},
    )
    saver = save(graph, "t5_by_graph", layout, clip=quantize_clip(graph, load_clips(graph, t5)))
    names = bench.texts(graph, file_node, saver)
    one, other = (load_file(bench.saved(name, "clip")) for name in names)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].float(), other[key].float()) for key in one)


def test_all_in_one_checkpoint(bench, layout):
    """Model, text encoder and VAE in one file, each as it was in the graph."""
    name = tiny_models.write_sd3_checkpoint(bench.server.models("checkpoints") / "all.safetensors").name
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    quantized = quantize(graph, checkpoint)
    saver = save(graph, "all_fp8", layout, model=quantized, clip=checkpoint[1], vae=checkpoint[2])
    before = image(bench, graph, quantized, checkpoint[1], checkpoint[2])
    outputs = bench.server.queue(graph.prompt)["outputs"]
    before = load_file(bench.server.output / outputs[before.id]["tensors"][0]["filename"])["samples"]
    path = bench.saved(outputs[saver.id]["text"][0], "checkpoints")
    source, saved = load_file(bench.server.models("checkpoints") / name), load_file(path)
    untouched = [key for key in source if key.startswith(("text_encoders.", "first_stage_model."))]
    assert all(torch.equal(saved[key].float(), source[key].float()) for key in untouched)
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=path.name)
    after = bench.run(graph, image(bench, graph, loaded, loaded[1], loaded[2]))
    if bench.new:
        assert torch.equal(before, after)
    else:  # the rest of a legacy file is cast to FP8 there
        assert 1e-4 < (before - after).abs().mean() < 0.1
    assert "family" in metadata_of(path)["stochastic_fp8"]


def image(bench, graph, model, clip, vae):
    prompt = graph.add("CLIPTextEncode", clip=clip, text="a lake at dawn")
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    decoded = graph.add("VAEDecode", samples=graph.sample(model, prompt, prompt, latent), vae=vae)
    return bench.keep(graph, decoded, as_="image")
