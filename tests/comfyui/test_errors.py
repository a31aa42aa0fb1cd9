"""Errors appear on the node, name the way out, and leave the server and the disk unchanged."""

import json
import shutil
import time

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import (
    FAMILIES,
    FILE_OPTIONS,
    RECIPE,
    log_since,
    quantize,
    quantize_and_save,
    save,
    temporary_files,
)
from comfyui.server import ExecutionError, ExecutionInterrupted, PromptRejected
from safetensors.torch import load_file


def fails(bench, graph):
    """(the error's message, the type of the node that shows it). The server must keep running."""
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


UNUSABLE = {  # for both versions: what this one cannot use, why, and the ways out
    True: {
        ("sd3", "legacy", "float8_e5m2"): ("is read as E4M3", "Choose layout native or float8_e4m3fn"),
    },
    False: {
        ("sd3", "native", "float8_e5m2"): ("would not load this file", "Choose layout legacy or float8_e4m3fn"),
        ("checkpoint", "native", "float8_e4m3fn"): ("would show a wrong image", "Choose layout legacy"),
        ("t5", "native", "float8_e4m3fn"): ("T5 is read in the legacy layout only", "Choose layout legacy"),
    },
}


def quantize_file(bench, what, prefix, layout, format, **choices):
    """A graph with the file node, that node, and the folder that it writes to."""
    folder, file, write = {
        "sd3": ("diffusion_models", "sd3.safetensors", None),
        "checkpoint": ("checkpoints", "errors_all.safetensors", tiny_models.write_sd3_checkpoint),
        "t5": ("text_encoders", "errors_t5.safetensors", tiny_models.write_t5xxl),
    }[what]
    bench.model_file("sd3")
    path = bench.server.models(folder) / file
    if not path.exists():
        write(path)
    graph = Graph()
    choices = RECIPE | FILE_OPTIONS | {"layout": layout, "format": format, "rounding": "nearest"} | choices
    node = graph.add("StochasticFP8QuantizeFile", file=f"{folder}/{file}", filename_prefix=prefix, **choices)
    return graph, node, bench.saved("", "clip" if folder == "text_encoders" else folder)


def test_a_file_that_this_comfyui_cannot_use(bench):
    for (what, layout, format), texts in UNUSABLE[bench.new].items():
        graph, node, folder = quantize_file(bench, what, "unusable", layout, format)
        message, _ = fails(bench, graph)
        for text in (*texts, "unusable_00001_.safetensors: ComfyUI", "turn on for_another_comfyui"):
            assert text in message
        assert "\n" not in message
        assert not list(folder.glob("unusable*"))
        graph, node, folder = quantize_file(bench, what, "unusable", layout, format, for_another_comfyui=True)
        assert (folder / bench.texts(graph, node)[0]).exists()
        (folder / "unusable_00001_.safetensors").unlink()


def test_a_file_that_this_comfyui_degrades(bench):
    """Version 0.3.75 casts the rest of a legacy file to FP8: a warning, first in the report and in the log."""
    graph, node, _ = quantize_file(bench, "sd3", "degraded", "legacy", "float8_e4m3fn")
    table = graph.add("StochasticFP8LayerReport", report=node[1])
    report = graph.add("TestShowText", value=table[2])
    mark = len(bench.server.log())
    shown = bench.texts(graph, report)[0]
    notes = json.loads(json.loads(shown))["notes"]
    warning = "ComfyUI 0.3.75: degraded; every unquantized Linear weight and every bias is cast to FP8"
    assert notes[-1 if bench.new else 0].startswith(warning)
    logged = "degraded_00001_.safetensors: ComfyUI 0.3.75: degraded" in log_since(bench.server, mark)
    assert logged != bench.new


def test_saving_what_this_comfyui_cannot_use(bench):
    """The layout decides whether it can; in 0.3.75 an all-in-one checkpoint needs legacy, in 0.33 E5M2 needs native."""
    if bench.new:
        kind, layout, choices, vae = "diffusion_models", "legacy", {"format": "float8_e5m2"}, None
    else:
        kind, layout, choices, vae = "checkpoints", "native", {}, "vae"
    for another in (False, True):
        graph = Graph()
        what = {"model": quantize(graph, bench.load(graph, "sd3"), **choices)}
        if vae:
            shutil.copy(tiny_models.LANDSCAPES_VAE, bench.server.models("vae") / "errors_vae.safetensors")
            what["vae"] = graph.add("VAELoader", vae_name="errors_vae.safetensors")
        saver = save(graph, "unusable_saved", layout, for_another_comfyui=another, **what)
        if another:
            assert bench.saved(bench.texts(graph, saver)[0], kind).exists()
        else:
            message, node = fails(bench, graph)
            assert node == "StochasticFP8Save"
            assert "nothing was saved: ComfyUI" in message
            assert "would show a wrong image" in message
            assert "turn on for_another_comfyui" in message
            assert not list(bench.saved("", kind).glob("unusable_saved*"))


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
    if bench.dynamic_vram:
        pytest.skip("dynamic VRAM keeps the file's own weights, and casts them for each call")
    message = quantize_fails(bench, load=lambda graph: bench.load(graph, "sd3", weight_dtype))
    assert "set weight_dtype to default" in message


def test_a_model_without_linear_layers(bench):
    name = fresh(bench, "unlinear")
    message = quantize_fails(
        bench,
        change=lambda graph, model: graph.add("TestUnlinearModel", model=model),
        load=lambda graph: bench.load(graph, name),
    )
    assert f"{name} has nothing to quantize" in message
    assert "no Linear layer" in message


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


def test_kept_values_that_are_not_finite_are_named(bench):
    """In the graph as in the file job. The job goes on, but images can be black."""
    tensors = load_file(bench.model_file("sd3"))
    tensors["final_layer.linear.bias"][:2] = float("nan")
    tensors["y_embedder.mlp.0.weight"][0, 0] = float("inf")
    name = bench.place("nonfinite_kept_tensors.safetensors", tensors)
    graph = Graph()
    in_graph = quantize(graph, bench.load(graph, name))
    choices = {**RECIPE, **FILE_OPTIONS}
    by_file = graph.add(
        "StochasticFP8QuantizeFile", file=f"diffusion_models/{name}", filename_prefix="kept_nonfinite", **choices
    )
    tables = [graph.add("StochasticFP8LayerReport", report=node[1]) for node in (in_graph, by_file)]
    for text in bench.texts(graph, *(graph.add("TestShowText", value=table[2]) for table in tables)):
        (note,) = [note for note in json.loads(json.loads(text))["notes"] if "not finite" in note]
        assert note.startswith("2 kept tensors with values that are not finite, copied as they are: ")
        assert "final_layer.linear.bias (2 NaN, 0 infinite)" in note or "y_embedder.mlp.0.weight (0 NaN, 1" in note


def test_a_lora_between_quantize_and_save(bench):
    lora = tiny_models.write_sd3_lora(bench.server.models("loras") / "between.safetensors", depth=3)
    graph = Graph()
    quantized = quantize(graph, bench.load(graph, "sd3"))
    patched = graph.add("LoraLoaderModelOnly", model=quantized, lora_name=lora.name, strength_model=1.0)
    save(graph, "never", model=patched)
    message, node = fails(bench, graph)
    assert node == "StochasticFP8Save"
    assert "move it before Stochastic FP8" in message
    assert not list(bench.saved("").glob("never_*"))


def test_saving_a_model_that_is_not_quantized(bench):
    graph = Graph()
    save(graph, "never", model=bench.load(graph, "sd3"))
    message, node = fails(bench, graph)
    assert node == "StochasticFP8Save"
    assert "put Stochastic FP8 before" in message


def test_the_type_of_an_error_has_no_path(bench):
    graph = Graph()
    save(graph, "never", model=bench.load(graph, "sd3"))
    with pytest.raises(ExecutionError) as failed:
        bench.server.queue(graph.prompt)
    assert failed.value.type == "stochastic_fp8.ModelError"


def test_saving_without_an_input(bench):
    graph = Graph()
    save(graph, "never")
    assert "connect a model" in fails(bench, graph)[0]


LEADING_OUT = (
    "../escaped",
    "../../../escaped",
    "a/../../escaped",
    "diffusion_models/../../escaped",
    "..\\escaped",
    ".. /escaped",
    "/tmp/escaped",
    "C:/escaped",
    "C:escaped",
    "\\\\server\\share\\escaped",
    "link/escaped",
    "link/deeper/escaped",
    "..",
)


@pytest.fixture(scope="module")
def link(bench):
    """A folder elsewhere, and links to it in the folders that nodes write to."""
    elsewhere = bench.server.base.parent / "elsewhere"
    elsewhere.mkdir()
    for folder in ("diffusion_models", "checkpoints", "clip", "fp8_calibrations"):
        (bench.server.output / folder).mkdir(exist_ok=True)
        (bench.server.output / folder / "link").symlink_to(elsewhere, target_is_directory=True)
    yield elsewhere
    for path in bench.server.output.glob("*/link"):
        path.unlink()


def writers(bench, prefix):
    """A graph for each node that writes a file, with this prefix."""
    source = f"diffusion_models/{bench.model_file('sd3').name}"
    graph = Graph()
    save(graph, prefix, model=quantize(graph, bench.load(graph, "sd3")))
    yield graph
    graph = Graph()
    options = RECIPE | FILE_OPTIONS
    graph.add("StochasticFP8QuantizeFile", file=source, filename_prefix=prefix, **options)
    yield graph
    graph = Graph()
    graph.add("StochasticFP8Inspect", file=source, deep=False, repair=True, filename_prefix=prefix)
    yield graph
    graph = Graph()
    nothing = graph.add("TestAnything", text="null")
    graph.add("StochasticFP8SaveCalibration", calibration=nothing, filename_prefix=prefix)
    yield graph


@pytest.mark.parametrize("prefix", [*LEADING_OUT, "a\nb", "x" * 250, "x" * 250 + "/y"])
def test_a_prefix_that_leads_out_of_its_folder_is_refused_before_any_node_runs(bench, link, prefix):
    bench.model_file("sd3")  # made by the first test that wants it
    before = set(bench.server.base.rglob("*"))
    for graph in writers(bench, prefix):
        with pytest.raises((PromptRejected, ExecutionError)) as refused:
            bench.server.queue(graph.prompt)
        if isinstance(refused.value, PromptRejected):
            (error,) = (error for node in refused.value.node_errors.values() for error in node["errors"])
            message = error["details"].partition(" - ")[2] or error["details"]
        else:
            assert refused.value.node_type == "StochasticFP8Inspect"  # nothing runs before it
            message = refused.value.message
        assert f"filename_prefix {prefix!r}"[:50] in message
        assert "\n" not in message
    assert set(bench.server.base.rglob("*")) <= before
    assert not list(link.iterdir())


@pytest.mark.parametrize("prefix", ["../escaped", "link/escaped", ["a"], None])
def test_a_linked_prefix_is_checked_by_the_node(bench, link, prefix):
    for graph in writers(bench, prefix):
        node = next(node for node in graph.prompt.values() if "filename_prefix" in node["inputs"])
        node["inputs"]["filename_prefix"] = graph.add("TestAnything", text=json.dumps(prefix))[0]
        message, _ = fails(bench, graph)
        assert f"filename_prefix {prefix!r}" in message
        assert "\n" not in message
    assert not list(bench.server.base.rglob("escaped*"))
    assert not list(link.iterdir())


PREFIXES = [
    ("a/", ["a/stochastic_fp8_00001_", "a/stochastic_fp8_00002_"]),
    ("a/.", ["a/stochastic_fp8_00003_"]),
    ("b//./c", ["b/c_00001_", "b/c_00002_"]),
    ("b/../b/c", ["b/c_00003_"]),
    ("diffusion_models/../c", ["c_00001_"]),
    ("diffusion_models/b\\c.safetensors", ["b/c_00004_"]),
    ("%year%/x", [f"{time.localtime().tm_year}/x_00001_"]),
    ("%model%_%format%", ["sd3_float8_e4m3fn_00001_"]),
    ("%models%/%seed%%format%", ["%models%/%seed%float8_e4m3fn_00001_"]),
]
"""A prefix, and the names that the next runs with it get."""


def test_a_prefix_gives_every_run_a_name_of_its_own(bench):
    for prefix, names in PREFIXES:
        for seed, name in enumerate(names):
            graph = Graph()
            file = f"diffusion_models/{bench.model_file('sd3').name}"
            choices = RECIPE | FILE_OPTIONS | {"seed": seed}
            node = graph.add("StochasticFP8QuantizeFile", file=file, filename_prefix=prefix, **choices)
            assert bench.texts(graph, node) == [f"{name}.safetensors"]
            assert bench.saved(f"{name}.safetensors").exists()


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


CHOICES = ("format", "rounding", "scaling", "layers", "matmul", "nonfinite", "device")


@pytest.mark.parametrize("value", [[], ["float8_e4m3fn", "auto"], {"a": 1}, None, 3])
@pytest.mark.parametrize("name", [*CHOICES, "layout", "file", "keep", "only"])
def test_a_choice_of_a_wrong_type(bench, name, value):
    """Over a wire, and in the prompt itself, where ComfyUI 0.3.75 does not check it."""
    file = f"diffusion_models/{bench.model_file('sd3').name}"
    for linked in (True, False):
        graph = Graph()
        sent = graph.add("TestAnything", text=json.dumps(value)) if linked else {"__value__": value}
        choices = RECIPE | FILE_OPTIONS | {"file": file, "filename_prefix": "never", name: sent}
        graph.add("StochasticFP8QuantizeFile", **choices)
        with pytest.raises((PromptRejected, ExecutionError)) as refused:
            bench.server.queue(graph.prompt)
        if isinstance(refused.value, ExecutionError):
            assert refused.value.type.rpartition(".")[2] not in ("TypeError", "AttributeError", "KeyError")
            assert "\n" not in refused.value.message
        else:
            assert not linked
    assert not list(bench.saved("").glob("never*"))


def test_choices_of_a_wrong_type_in_the_graph(bench):
    for name in CHOICES:
        graph = Graph()
        model = quantize(graph, bench.load(graph, "sd3"), **{name: graph.add("TestAnything", text='["a"]')})
        save(graph, "never", model=model)
        assert f"unknown {name} ['a']" in fails(bench, graph)[0]
    graph = Graph()
    save(graph, "never", graph.add("TestAnything", text='["a"]'), model=quantize(graph, bench.load(graph, "sd3")))
    assert "unknown layout ['a']: choose one of native, legacy" in fails(bench, graph)[0]


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
    """A 35 MB model of one number, whose quantization can be cancelled. Random weights would take too long to make."""
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
    """A new model file: the test node changes the loaded MODEL, which ComfyUI caches by file."""
    return bench.place(f"{name}.safetensors", load_file(bench.model_file("sd3")))


def test_sampling_still_works_after_the_errors(bench):
    graph = Graph()
    latent = FAMILIES["sd3"].sample(graph, quantize(graph, bench.load(graph, "sd3")))
    assert bench.run(graph, bench.keep(graph, latent)).isfinite().all()
