"""What cannot work says so on the node, names the way out, and leaves the server and the disk as they were."""

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import FAMILIES, FILE_OPTIONS, RECIPE, quantize, quantize_and_save, save, temporary_files
from comfyui.server import ExecutionError, ExecutionInterrupted, PromptRejected
from safetensors.torch import load_file


def fails(bench, graph):
    """The error's message and the type of the node that shows it; the server must live on."""
    with pytest.raises(ExecutionError) as failed:
        bench.server.queue(graph.prompt)
    assert "StochasticFP8" in bench.server.object_info("StochasticFP8Save")["name"]
    return failed.value.message, failed.value.node_type


def quantize_fails(bench, change=None, load=None, **choices):
    graph = Graph()
    model = load(graph) if load else bench.load(graph, "sd3")
    model = change(graph, model) if change else model
    save(graph, "never", model=quantize(graph, model, **choices))
    message, node = fails(bench, graph)
    assert node == "StochasticFP8Quantize"
    assert not list(bench.saved("").glob("never_*"))
    return message


def test_a_pattern_without_a_hit_lists_near_names(bench):
    message = quantize_fails(bench, keep="joint_block.0")
    assert "'joint_block.0' matches no tensor" in message
    assert "joint_blocks.0" in message


def test_a_pattern_that_leaves_nothing(bench):
    assert "nothing to quantize" in quantize_fails(bench, keep="joint_blocks")


def test_e5m2_where_the_version_cannot_run_it(bench):
    if bench.new:
        graph = Graph()
        saver = save(graph, "e5m2", model=quantize(graph, bench.load(graph, "sd3"), format="float8_e5m2"))
        tensors = load_file(bench.saved(bench.texts(graph, saver)[0]))
        assert tensors["joint_blocks.0.x_block.attn.qkv.weight"].dtype == torch.float8_e5m2
        return
    message = quantize_fails(bench, format="float8_e5m2")
    assert "0.3.75 cannot run float8_e5m2" in message
    assert "choose float8_e4m3fn" in message
    assert "layout legacy" in message


def test_a_gguf_like_model(bench):
    message = quantize_fails(
        bench,
        change=lambda graph, model: graph.add("TestForeignModel", model=model),
        load=lambda graph: bench.load(graph, fresh(bench, "foreign")),
    )
    assert "GGMLTensor" in message
    assert "Load Diffusion Model" in message


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_a_model_loaded_as_unscaled_fp8(bench, weight_dtype):
    if bench.new and not bench.exact:
        pytest.skip("dynamic VRAM keeps the file's own weights, and casts them for each call")
    message = quantize_fails(bench, load=lambda graph: bench.load(graph, "sd3", weight_dtype))
    assert "set weight_dtype to default" in message


def test_a_model_without_linear_layers(bench):
    message = quantize_fails(
        bench,
        change=lambda graph, model: graph.add("TestUnlinearModel", model=model),
        load=lambda graph: bench.load(graph, fresh(bench, "unlinear")),
    )
    assert "nothing to quantize in SD3" in message
    assert "no Linear layers" in message


def test_values_that_are_not_finite(bench):
    tensors = load_file(bench.model_file("sd3"))
    first, second = "joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.1.x_block.mlp.fc1.weight"
    tensors[first][0, :3] = float("nan")
    tensors[second][5, 7] = float("-inf")
    name = bench.place("nonfinite.safetensors", tensors)
    message = quantize_fails(bench, load=lambda graph: bench.load(graph, name))
    assert f"{first} (3 NaN, 0 infinite)" in message
    assert f"{second} (0 NaN, 1 infinite)" in message
    graph = Graph()
    kept = quantize(graph, bench.load(graph, name), nonfinite="keep")
    saver = save(graph, "nonfinite_kept", model=kept)
    saved = load_file(bench.saved(bench.texts(graph, saver)[0]))
    assert saved[first].isnan().sum() == 3
    assert saved[second].isinf().sum() == 1
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in saved.values()) == 19


def test_a_lora_between_quantize_and_save(bench):
    lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "between.safetensors", depth=3)
    graph = Graph()
    quantized = quantize(graph, bench.load(graph, "sd3"))
    patched = graph.add("LoraLoaderModelOnly", model=quantized, lora_name=lora.name, strength_model=1.0)
    save(graph, "never", model=patched)
    message, node = fails(bench, graph)
    assert node == "StochasticFP8Save"
    assert "move it before Quantize" in message
    assert not list(bench.saved("").glob("never_*"))


def test_saving_a_model_that_is_not_quantized(bench):
    graph = Graph()
    save(graph, "never", model=bench.load(graph, "sd3"))
    message, node = fails(bench, graph)
    assert node == "StochasticFP8Save"
    assert "put Stochastic FP8 Quantize before" in message


def test_saving_nothing(bench):
    graph = Graph()
    save(graph, "never")
    assert "connect a model" in fails(bench, graph)[0]


def test_a_prefix_that_leads_out_of_the_output_folder(bench):
    graph = Graph()
    save(graph, "../../../escaped", model=quantize(graph, bench.load(graph, "sd3")))
    assert "outside the output folder" in fails(bench, graph)[0]
    assert not list(bench.server.base.parent.rglob("escaped*"))


@pytest.mark.parametrize(
    ("choice", "value", "valid"),
    [
        ("format", "float4", "float8_e5m2"),
        ("rounding", "up", "complex_neighbor"),
        ("scaling", "max", "owlscale"),
        ("layers", "flx", "all_linear"),
        ("matmul", "half", "full precision"),
        ("nonfinite", "drop", "keep"),
    ],
)
def test_an_unknown_choice_lists_the_valid_ones(bench, choice, value, valid):
    """Some versions of ComfyUI check before the run, others leave it to the node."""
    graph = Graph()
    save(graph, "never", model=quantize(graph, bench.load(graph, "sd3"), **{choice: value}))
    with pytest.raises((PromptRejected, ExecutionError)) as refused:
        bench.server.queue(graph.prompt)
    assert choice in str(refused.value)
    assert valid in str(refused.value)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_out_of_range_is_rejected_before_the_run(bench, seed):
    graph = Graph()
    save(graph, "never", model=quantize(graph, bench.load(graph, "sd3"), seed=seed))
    with pytest.raises(PromptRejected) as rejected:
        bench.server.queue(graph.prompt)
    assert "seed" in str(rejected.value.node_errors)


def test_the_largest_seed(bench):
    assert quantize_and_save(bench, "sd3", "largest_seed", seed=(1 << 64) - 1).exists()


def test_cancelling_while_quantizing(bench):
    """Nothing is written, and the next run works."""
    large = large_model(bench)
    graph = Graph()
    saver = save(graph, "cancelled", model=quantize(graph, bench.load(graph, large.name)))
    cancel(bench, graph, "StochasticFP8Quantize")
    assert not list(bench.saved("").glob("cancelled_*"))
    assert bench.saved(bench.texts(graph, saver)[0]).exists()


def test_cancelling_the_file_job(bench):
    graph = Graph()
    node = graph.add(
        "StochasticFP8QuantizeFile",
        file=f"diffusion_models/{large_model(bench).name}",
        filename_prefix="cancelled_file",
        **RECIPE,
        **FILE_OPTIONS,
    )
    cancel(bench, graph, "StochasticFP8QuantizeFile")
    assert not list(bench.saved("").glob("cancelled_file*"))
    assert not temporary_files(bench.server)
    assert bench.saved(bench.texts(graph, node)[0]).exists()


def large_model(bench):
    """A model whose quantization takes some tenths of a second: 35 MB of one number, random weights take too long."""
    path = bench.server.models("diffusion_models") / "large.safetensors"
    if not path.exists():
        shapes = tiny_models.sd3_shapes(depth=6)
        tiny_models.save({key: torch.full(shape, 0.01, dtype=torch.bfloat16) for key, shape in shapes.items()}, path)
    return path


def cancel(bench, graph, node_type):
    """Interrupt a run at the first sign of progress of a node of that type."""
    node = next(node for node, entry in graph.prompt.items() if entry["class_type"] == node_type)
    steps = []

    def interrupt(kind, data):
        if kind == "progress" and data.get("node") == node:
            if not steps:
                bench.server.interrupt()
            steps.append(data["value"])

    with pytest.raises(ExecutionInterrupted):
        bench.server.queue(graph.prompt, on_event=interrupt)
    assert steps
    assert max(steps) < 1000


def fresh(bench, name):
    """A model file of its own: the test node changes the loaded MODEL, which ComfyUI caches by file."""
    return bench.place(f"{name}.safetensors", load_file(bench.model_file("sd3")))


def test_families_are_sampled_after_all_this(bench):
    graph = Graph()
    latent = FAMILIES["sd3"].sample(graph, quantize(graph, bench.load(graph, "sd3")))
    assert bench.run(graph, bench.keep(graph, latent)).isfinite().all()
