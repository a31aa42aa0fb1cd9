"""Text encoders in the graph, in files and in all-in-one checkpoints: T5 becomes FP8, CLIP-L never does."""

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import FILE_OPTIONS, RECIPE, metadata_of, multiplied_out, quantize, save
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


@pytest.fixture(scope="module")
def layout(bench):
    """The layout in which this ComfyUI reads T5 files."""
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


@pytest.fixture(scope="module")
def quantized(bench, t5, clip_l, layout):
    """One run: T5 and CLIP-L quantized in the graph, encoded, saved, and the T5 file quantized by the file node.

    Scaling "none" gives weights that the oracle's 16 bits hold exactly.
    """
    recipe = RECIPE | {"scaling": "none"}
    graph = Graph()
    source = load_clips(graph, clip_l, t5)
    clip = graph.add("StochasticFP8QuantizeTextEncoder", clip=source, **recipe)
    encodings = [encoded(bench, graph, either) for either in (source, clip)]
    report = graph.add("TestShowText", value=clip[1])
    saver = save(graph, "t5", layout, clip=clip)
    options = recipe | FILE_OPTIONS | {"layout": layout}
    by_file = graph.add("StochasticFP8QuantizeFile", file=f"text_encoders/{t5}", filename_prefix="t5_file", **options)
    entry = bench.server.queue(graph.prompt)
    before, after = (load_file(bench.server.files(entry, node.id, "tensors")[0])["samples"] for node in encodings)
    texts = [entry["outputs"][node.id]["text"][0] for node in (report, saver, by_file)]
    return before, after, *texts


def test_t5_in_the_graph_reloaded_and_dequantized_encodes_the_same(bench, quantized, clip_l):
    """In the graph, reloaded, and as dequantized weights, together with a CLIP-L that is not changed."""
    before, in_graph, _, name, _ = quantized
    plain = {key: tensor.to(torch.bfloat16) for key, tensor in multiplied_out(bench.saved(name, "clip")).items()}
    save_file(plain, bench.server.models("text_encoders") / "t5_oracle.safetensors")
    graph = Graph()
    kept = [encoded(bench, graph, load_clips(graph, clip_l, other)) for other in (name, "t5_oracle.safetensors")]
    reloaded, oracle = bench.run(graph, *kept)
    assert (in_graph - oracle).abs().max() <= 1e-3
    assert (reloaded - oracle).abs().max() <= 1e-3
    assert (before - oracle).abs().max() > 0.1
    if bench.new:
        assert torch.equal(in_graph, reloaded)


def test_the_report_says_why_clip_l_stays(quantized):
    assert "ComfyUI has no FP8 detection for CLIP-L" in quantized[2]


def test_every_linear_layer_of_t5_is_quantized(bench, quantized):
    tensors = load_file(bench.saved(quantized[3], "clip"))
    assert sum(tensor.dtype == torch.float8_e4m3fn and tensor.dim() == 2 for tensor in tensors.values()) == LAYERS


def test_the_file_node_writes_the_same_t5(bench, quantized):
    one, other = (load_file(bench.saved(name, "clip")) for name in quantized[3:])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].float(), other[key].float()) for key in one)


def test_scales_reach_the_encoder(bench, t5, layout):
    """With scales, the 16-bit reference is not exact, but far closer than the original."""
    graph = Graph()
    source = load_clips(graph, t5)
    clip = quantize_clip(graph, source)
    saver = save(graph, "t5_scaled", layout, clip=clip)
    kept = [encoded(bench, graph, either) for either in (source, clip)]
    entry = bench.server.queue(graph.prompt)
    original, in_graph = (load_file(bench.server.files(entry, node.id, "tensors")[0])["samples"] for node in kept)
    tensors = multiplied_out(bench.saved(entry["outputs"][saver.id]["text"][0], "clip"))
    save_file(
        {key: tensor.half() for key, tensor in tensors.items()},
        bench.server.models("text_encoders") / "t5_scaled_oracle.safetensors",
    )
    graph = Graph()
    oracle = bench.run(graph, encoded(bench, graph, load_clips(graph, "t5_scaled_oracle.safetensors")))
    assert (in_graph - oracle).square().mean() < 0.02 * (original - oracle).square().mean()


@pytest.fixture(scope="module")
def clip_l_lora(bench, clip_l):
    """A LoRA on the feed-forward weights of CLIP-L alone."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, weight in load_file(bench.server.models("text_encoders") / clip_l).items():
        if ".mlp." in name and name.endswith(".weight"):
            layer = f"text_encoders.clip_l.transformer.{name.removesuffix('.weight')}"
            for part, shape in (("up", (len(weight), 4)), ("down", (4, weight.shape[1]))):
                tensors[f"{layer}.lora_{part}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    assert tensors
    save_file(tensors, bench.server.models("loras") / "clip_l_lora.safetensors")
    return "clip_l_lora.safetensors"


@pytest.mark.parametrize("node", ["LoraLoader", "LoraLoaderBypass"])
def test_a_lora_on_clip_l_is_kept_beside_a_quantized_t5(bench, t5, clip_l, clip_l_lora, node):
    """Put before or after Quantize, it does the same, since CLIP-L is not quantized."""
    if node not in bench.server.object_info():
        pytest.skip("this ComfyUI has no bypass mode for LoRAs")

    def with_lora(clip, node):
        strengths = {"strength_model": 0.0, "strength_clip": 1.0}
        return graph.add(node, model=bench.load(graph, "sd3"), clip=clip, lora_name=clip_l_lora, **strengths)[1]

    graph = Graph()
    source = load_clips(graph, clip_l, t5)
    quantized = quantize_clip(graph, source)
    before, after = quantize_clip(graph, with_lora(source, node)), with_lora(quantized, "LoraLoader")
    kept = [encoded(bench, graph, clip) for clip in (before, after, quantized)]
    lora_first, lora_last, without = bench.run(graph, *kept)
    assert (lora_first - lora_last).abs().max() <= 1e-5
    assert (lora_first - without).abs().max() > 1e-2
    assert torch.equal(lora_first[..., tiny_models.CLIP_WIDTH :], without[..., tiny_models.CLIP_WIDTH :])


@pytest.mark.parametrize("what", ["quantize", "save"])
def test_a_clip_l_in_scaled_fp8_is_refused_before_the_work(bench, t5, clip_l, what):
    """Before T5, whose weights hold a NaN, is looked at."""
    if not bench.new:
        pytest.skip("this ComfyUI cannot hold CLIP-L in scaled FP8")
    tensors = load_file(bench.server.models("text_encoders") / t5)
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight"][0, 0] = torch.nan
    save_file(tensors, bench.server.models("text_encoders") / "t5_nan.safetensors")
    graph = Graph()
    clip = graph.add("TestScaledClipL", clip=load_clips(graph, clip_l, "t5_nan.safetensors"))
    save(graph, "never", clip=quantize_clip(graph, clip) if what == "quantize" else clip)
    with pytest.raises(ExecutionError, match="clip_l is in scaled FP8, and ComfyUI has no FP8 detection for CLIP-L"):
        bench.server.queue(graph.prompt)


def test_clip_l_alone_passes_through(bench, clip_l):
    graph = Graph()
    clip = load_clips(graph, clip_l)
    quantized = quantize_clip(graph, clip)
    before, after = bench.run(graph, *(encoded(bench, graph, either) for either in (clip, quantized)))
    assert torch.equal(before, after)


def test_saving_clip_l_says_what_to_do(bench, clip_l):
    graph = Graph()
    save(graph, "never", clip=load_clips(graph, clip_l))
    with pytest.raises(ExecutionError, match="put Stochastic FP8 Text Encoder before"):
        bench.server.queue(graph.prompt)


def test_all_in_one_checkpoint(bench, layout):
    """Model, text encoder and VAE in one file work as they did in the graph."""
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
    assert [key for key in untouched if not bench.same_values(saved[key], source[key])] == []
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
