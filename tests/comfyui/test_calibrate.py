"""Calibration in a real ComfyUI: what is recorded and saved, that nothing stays behind, and what it gains."""

import json
import re

import pytest
import torch
from comfyui.graph import Graph
from comfyui.pack import quantize, recipe_of, save
from comfyui.server import ExecutionError, ExecutionInterrupted
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels.calibration.file import load_calibration
from tiny_models import LANDSCAPES, write_sd3_lora

ROWS_A_STEP = {"x": 2 * 256, "context": 2 * 8, "vector": 2}
"""Rows for one 256 x 256 image, prompt and empty prompt together: latent patches, tokens, conditioning vectors."""


def calibrate(graph, scene, latent, **settings):
    defaults = {"seed": 0, "steps": 2, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs = {"model": scene[0], "positive": scene[1], "negative": scene[2], "latent_image": latent}
    return graph.add("StochasticFP8Calibrate", **inputs, **{**defaults, "runs": 1, **settings})


def landscape(graph, word="day"):
    scene = graph.add("StochasticFP8DemoModel", scene=word)
    return scene, graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=1)


def saved_calibration(bench, graph, calibration, name):
    node = graph.add("StochasticFP8SaveCalibration", calibration=calibration, filename_prefix=name)
    shown = graph.add("TestShowText", value=node)
    (text,) = bench.texts(graph, shown)
    return json.loads(text)


@pytest.fixture(scope="module")
def calibration_file(bench):
    """The name of a calibration file: two scenes, four steps each."""
    graph = Graph()
    calibration = {}
    for word in ("day", "night"):
        calibration = {"calibration": calibrate(graph, *landscape(graph, word), steps=4, **calibration)}
    return saved_calibration(bench, graph, calibration["calibration"], "landscapes")


def path_of(bench, name):
    return bench.server.output / "fp8_calibrations" / name


def loaded(graph, name):
    return graph.add("StochasticFP8LoadCalibration", calibration_name=name)


def test_every_linear_layer_is_recorded_over_all_runs(bench, calibration_file):
    layers = load_calibration(path_of(bench, calibration_file)).layers
    linear = {key: tensor for key, tensor in load_file(LANDSCAPES).items() if tensor.ndim == 2 and "pos" not in key}
    assert {key: layer.width for key, layer in layers.items()} == {key: w.shape[1] for key, w in linear.items()}
    assert len(layers) == 34
    steps = 8  # two words, four steps
    assert layers["joint_blocks.0.x_block.attn.qkv.weight"].rows == steps * ROWS_A_STEP["x"]
    assert layers["joint_blocks.0.context_block.attn.qkv.weight"].rows == steps * ROWS_A_STEP["context"]
    assert layers["joint_blocks.0.x_block.adaLN_modulation.1.weight"].rows == steps * ROWS_A_STEP["vector"]


def test_recorded_moments_are_those_of_the_inputs(bench):
    """The context embedder's inputs are the prompt and zeros, so its moment is known."""
    graph = Graph()
    name = saved_calibration(bench, graph, calibrate(graph, *landscape(graph, "dusk"), steps=1), "known")
    layer = load_calibration(path_of(bench, name)).layers["context_embedder.weight"]
    prompt = load_file(LANDSCAPES.parent / "tiny_conditioning.safetensors")["dusk.cond"][0].double()
    tolerance = 1e-3 if bench.exact else 2e-2
    torch.testing.assert_close(layer.moment()[0].double(), prompt.T @ prompt / 16, rtol=tolerance, atol=tolerance / 10)
    assert layer.amax == pytest.approx(prompt.abs().max().item(), rel=tolerance)


def test_large_batches_are_subsampled(bench):
    """Of 8,192 patches in one call, every second one is recorded."""
    graph = Graph()
    scene, _ = landscape(graph)
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=16)
    name = saved_calibration(bench, graph, calibrate(graph, scene, latent, steps=1), "many")
    layers = load_calibration(path_of(bench, name)).layers
    assert layers["joint_blocks.0.x_block.attn.qkv.weight"].rows == 4096
    assert layers["joint_blocks.0.context_block.attn.qkv.weight"].rows == 16 * ROWS_A_STEP["context"]


def test_calibrating_gives_the_samplers_latents_and_leaves_no_hooks(bench):
    """The latent is the same with and without recording, and afterwards with the same model."""
    graph = Graph()
    scene, latent = landscape(graph)
    node = calibrate(graph, (scene[0], scene[1], scene[2]), latent, seed=7)
    observed = bench.keep(graph, node[1])
    plain = bench.keep(graph, graph.sample(scene[0], scene[1], scene[2], latent, seed=7, cfg=2.5))
    first, second = bench.run(graph, observed, plain)
    assert torch.equal(first, second)


def test_every_run_has_the_noise_levels_of_its_model(bench):
    """With dynamic VRAM, ComfyUI puts those of the model that was loaded before into the next one."""

    def scene(graph, model, shift=False):
        prompt = graph.add("TestRandomConditioning", seed=1, tokens=8, width=64, pooled_width=64)
        latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
        return (graph.add("ModelSamplingSD3", model=model, shift=7.0) if shift else model), prompt, latent

    def sampled(load, seed, **shift):
        graph = Graph()
        model, prompt, latent = scene(graph, load(graph, "sd3"), **shift)
        return bench.run(graph, bench.keep(graph, graph.sample(model, prompt, prompt, latent, seed=seed)))

    sampled(bench.load_dynamic, 6)  # it stays loaded
    graph = Graph()
    model, prompt, latent = scene(graph, bench.load_dynamic(graph, "sd3"), shift=True)
    node = calibrate(graph, (model, prompt, prompt), latent, seed=7, runs=2, cfg=1.0)
    last_run = bench.run(graph, bench.keep(graph, node[1]))
    sampled(bench.load_dynamic, 9)  # its noise levels are read before it is loaded
    afterwards = sampled(bench.load_dynamic, 10)
    bench.server.free()
    assert torch.equal(last_run, sampled(bench.load, 8, shift=True))
    bench.server.free()
    assert torch.equal(afterwards, sampled(bench.load, 10))


def observed(bench, share=None, lora=None):
    """(recorded layers, how the model was loaded) for two steps of a model of which a share is loaded."""
    if share is not None and bench.dynamic_vram:
        pytest.skip("with dynamic VRAM there is no partial load: every weight is fetched for its call")
    bench.server.free()
    graph = Graph()
    scene, latent = landscape(graph)
    model = scene[0]
    if lora:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    if share is not None:
        model = graph.add("TestLowVramModel", model=model, share=share)
    calibration = calibrate(graph, (model, scene[1], scene[2]), latent)
    saver = graph.add("StochasticFP8SaveCalibration", calibration=calibration, filename_prefix=f"share_{share}")
    texts = bench.texts(
        graph,
        graph.add("TestShowText", value=saver),
        graph.add("TestLoadState", model=model, after=calibration[0]),
    )
    name, state = map(json.loads, texts)
    return load_calibration(path_of(bench, name)).layers, state


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_partially_loaded_model_gives_the_same_calibration(bench, share):
    """ComfyUI then casts a layer's weight for each call, and the layer's inputs are still recorded."""
    whole, loaded_whole = observed(bench)
    part, loaded_in_part = observed(bench, share)
    assert loaded_whole["left_behind"] == 0 < loaded_in_part["left_behind"] <= loaded_in_part["linear"] == 34
    assert (loaded_in_part["left_behind"] == 34) == (share == 0)
    assert part.keys() == whole.keys()
    for key, layer in part.items():
        assert (layer.rows, layer.amax) == (whole[key].rows, whole[key].amax), key
        assert torch.equal(layer.moment(), whole[key].moment()), key


def test_a_lora_on_a_partially_loaded_model_is_recorded(bench):
    """ComfyUI then applies it for each call, and the layers get the same inputs as in a fully loaded model."""
    lora = write_sd3_lora(bench.server.models("loras") / "calibrated.safetensors", depth=3).name
    plain, _ = observed(bench)
    whole, loaded_whole = observed(bench, lora=lora)
    part, loaded_in_part = observed(bench, share=0.0, lora=lora)
    assert loaded_whole["patched_at_each_use"] == 0 < loaded_in_part["patched_at_each_use"]
    key = "joint_blocks.2.x_block.mlp.fc1.weight"
    moments = [layers[key].moment() for layers in (plain, whole, part)]
    assert distance(moments[0], moments[1]) > 0.2, "the LoRA does something"
    assert distance(moments[1], moments[2]) < 0.01


def distance(moment, other):
    return float((moment - other).norm() / other.norm())


def test_calibrated_rounding_gives_closer_latents(bench, calibration_file):
    """The median ratio of squared errors over eight images is near 0.5.

    After two steps, errors have not yet changed the shapes in an image. After many steps that can hide the gain.
    """
    ratios = torch.cat([ratios_of_squared_errors(bench, word, calibration_file) for word in ("day", "night")])
    assert ratios.median() < 0.75, ratios


def ratios_of_squared_errors(bench, word, calibration_file):
    """Squared error of calibrated relative to nearest for four latents, both all_linear."""
    graph = Graph()
    scene = graph.add("StochasticFP8DemoModel", scene=word)
    latent = graph.add("EmptySD3LatentImage", width=256, height=256, batch_size=4)
    calibration = loaded(graph, calibration_file)
    models = [scene[0]] + [
        quantize(graph, scene, rounding=rounding, layers="all_linear", calibration=calibration)
        for rounding in ("nearest", "calibrated")
    ]
    kept = [bench.keep(graph, graph.sample(each, scene[1], scene[2], latent, seed=99, cfg=2.5)) for each in models]
    original, nearest, calibrated = bench.run(graph, *kept)
    errors = [(latents - original).square().mean((1, 2, 3)) for latents in (calibrated, nearest)]
    return errors[0] / errors[1]


def test_graph_and_file_give_the_same_bytes(bench, calibration_file):
    graph = Graph()
    choices = {"rounding": "calibrated", "layers": "all_linear", "calibration": loaded(graph, calibration_file)}
    saver = save(graph, "calibrated_graph", model=quantize(graph, bench.load(graph, "sd3"), **choices))
    bench.model_file("sd3")
    job = graph.add(
        "StochasticFP8QuantizeFile",
        file="diffusion_models/sd3.safetensors",
        filename_prefix="calibrated_file",
        format="float8_e4m3fn",
        scaling="absmax",
        seed=0,
        layout="native",
        overwrite=False,
        requantize=False,
        **choices,
    )
    names = bench.texts(graph, saver, job)
    graph_file, file_file = (load_file(bench.saved(name)) for name in names)
    for key, tensor in file_file.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor.view(torch.uint8), graph_file[key].view(torch.uint8)), key
    recipe = recipe_of(bench.saved(names[0]))
    assert (recipe["rounding"], recipe["calibration"]) == (
        "calibrated",
        "SD3, 1 run of 4 steps + SD3, 1 run of 4 steps",
    )


def test_fp8_matmul_gets_input_scales(bench, calibration_file):
    graph = Graph()
    model = quantize(
        graph, bench.load(graph, "sd3"), rounding="nearest", matmul="fp8", calibration=loaded(graph, calibration_file)
    )
    saver = save(graph, "with_input_scales", model=model)
    tensors = load_file(bench.saved(bench.texts(graph, saver)[0]))
    seen = load_calibration(path_of(bench, calibration_file)).layers
    scales = {name.removesuffix(".input_scale"): tensors[name] for name in tensors if name.endswith(".input_scale")}
    assert len(scales) == len([name for name in tensors if name.endswith(".weight_scale")])
    for layer, scale in scales.items():
        assert float(scale) == pytest.approx(1.25 * seen[f"{layer}.weight"].amax / 448)


def test_a_patched_model_is_calibrated(bench, calibration_file):
    """The patched weights are rounded, as with a LoRA."""
    graph = Graph()
    scene, _ = landscape(graph)
    halved = graph.add("ModelMergeSimple", model1=scene[0], model2=scene[0], ratio=0.5)
    quantized = quantize(graph, halved, rounding="calibrated", calibration=loaded(graph, calibration_file))
    assert "rounded to nearest" not in " ".join(report_notes(bench, graph, quantized))


def report_notes(bench, graph, quantized):
    text = graph.add("StochasticFP8LayerReport", report=quantized[1])
    shown = graph.add("TestShowText", value=text[2])
    return json.loads(json.loads(bench.texts(graph, shown)[0]))["notes"]


def compared(bench, graph, model, calibration, **choices):
    """The text of Compare FP8 Roundings for a model with a calibration, and the size of its image."""
    inputs = {"scaling": "absmax", "layers": "all_linear", "most_layers": 6, **choices}
    node = graph.add("StochasticFP8Compare", model=model, calibration=calibration, **inputs)
    shown = graph.add("TestShowText", value=node[1])
    outputs = bench.server.queue(graph.prompt)["outputs"]
    return json.loads(outputs[shown.id]["text"][0]), bench.server.view(outputs[node.id]["images"][0]).size


def test_compare_shows_what_calibrating_would_gain(bench, calibration_file):
    graph = Graph()
    text, size = compared(bench, graph, bench.load(graph, "sd3"), loaded(graph, calibration_file), height=1024)
    assert text.startswith("Choose calibrated in float8_e4m3fn for images closest to the original: ")
    assert "6 of 34 layers, evenly spaced, scaling absmax, calibration SD3, 1 run of 4 steps + SD3" in text
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| float8")]
    errors = {(row[1], row[2]): float(row[-2].removesuffix(" %")) for row in cells}
    assert len(errors) == 12
    for format in ("float8_e4m3fn", "float8_e5m2"):
        assert errors[format, "calibrated"] < 0.6 * errors[format, "nearest"] < errors[format, "stochastic"]
    assert size == (1024, 1024)


def test_compare_notes_another_models_calibration(bench, calibration_file):
    graph = Graph()
    text, _ = compared(bench, graph, bench.load(graph, "wan"), loaded(graph, calibration_file), most_layers=2)
    assert text.startswith("None of these layers is in the calibration.")


def test_without_a_calibration_the_error_says_what_to_connect(bench):
    graph = Graph()
    bench.keep(graph, landscape(graph)[1])
    quantized = quantize(graph, bench.load(graph, "sd3"), rounding="calibrated")
    save(graph, "never", model=quantized)
    with pytest.raises(ExecutionError, match="connect FP8 Calibration or Load Calibration"):
        bench.server.queue(graph.prompt)


def test_another_models_calibration_is_noted(bench, calibration_file):
    graph = Graph()
    model = bench.load(graph, "wan")
    quantized = quantize(graph, model, rounding="calibrated", calibration=loaded(graph, calibration_file))
    notes = " ".join(report_notes(bench, graph, quantized))
    assert "rounded to nearest, because the calibration has no inputs of this width for them" in notes


def test_a_cancel_leaves_no_hook(bench):
    """A leftover hook would also record the next run of the same cached model."""
    graph = Graph()
    scene, latent = landscape(graph, "dawn")
    node = calibrate(graph, scene, latent, steps=200)
    bench.keep(graph, node[1])
    seen = []

    def interrupt_once(kind, data):
        if kind == "progress" and not seen:
            seen.append(data)
            bench.server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        bench.server.queue(graph.prompt, on_event=interrupt_once)
    assert seen
    assert hooks_on(bench, "dawn") == 0


def test_an_error_leaves_no_hook(bench):
    """A NaN prompt makes the first layer's inputs NaN. The error names the layer."""
    bench.server.base.joinpath("input").mkdir(exist_ok=True)
    broken = {"nan.cond": torch.full((1, 8, 64), float("nan")), "nan.pooled_output": torch.zeros(1, 64)}
    save_file(broken, bench.server.base / "input" / "broken.safetensors")
    graph = Graph()
    scene, latent = landscape(graph, "dawn")
    positive = graph.add("TestFileConditioning", file="broken.safetensors", word="nan")
    bench.keep(graph, calibrate(graph, (scene[0], positive[0], scene[2]), latent)[1])
    with pytest.raises(ExecutionError, match="the inputs of layer 'context_embedder' hold (512 )?NaN"):
        bench.server.queue(graph.prompt)
    assert hooks_on(bench, "dawn") == 0


def hooks_on(bench, word):
    """The number of forward hooks on the cached model."""
    graph = Graph()
    scene, _ = landscape(graph, word)
    node = graph.add("TestHooks", model=scene[0])
    return json.loads(bench.texts(graph, node)[0])


def test_calibrated_is_offered_where_a_calibration_can_be_connected(bench):
    def roundings(node):
        description = bench.server.object_info(node)["input"]
        (type_, *options) = description["required"]["rounding"]
        choices = type_ if isinstance(type_, list) else options[0]["options"]
        return choices, "calibration" in description["optional"]

    for node in ("StochasticFP8Quantize", "StochasticFP8QuantizeFile", "StochasticFP8QuantizeTextEncoder"):
        choices, connects = roundings(node)
        assert choices[:3] == ["stochastic", "nearest", "calibrated"] and connects


def test_one_progress_bar_covers_all_runs(bench):
    """ComfyUI's sampler makes a bar per run."""
    graph = Graph()
    scene, latent = landscape(graph)
    node = calibrate(graph, scene, latent, steps=3, runs=4, seed=77)
    plain = graph.sample(scene[0], scene[1], scene[2], latent, seed=78, steps=3)
    bench.keep(graph, node[1])
    bench.keep(graph, plain)
    seen, texts = {node.id: [], plain.id: []}, []

    def note(kind, data):
        if kind == "progress" and data["node"] in seen:
            seen[data["node"]].append((data["value"], data["max"]))
        if kind == "progress_text":
            texts.append((data["node"], data["text"]))

    bench.server.queue(graph.prompt, on_event=note)
    assert texts[-1][0] == node.id and re.fullmatch(r"4 runs in .+ s", texts[-1][1])
    assert all(re.fullmatch(r"run [1-4] of 4\n.+ left", text) for _, text in texts[:-1])
    values = [value for value, _ in seen[node.id]]
    assert values == sorted(values) and values[-1] == 12
    assert {most for _, most in seen[node.id]} == {12}
    assert {most for _, most in seen[plain.id]} == {3}, "the bars of other nodes stay as they are"


def test_saving_shows_progress_and_can_be_cancelled(bench, calibration_file):
    graph = Graph()
    node = graph.add(
        "StochasticFP8SaveCalibration", calibration=loaded(graph, calibration_file), filename_prefix="cancelled"
    )
    seen = []

    def interrupt_once(kind, data):
        if kind == "progress" and data["node"] == node.id:
            if not seen:
                bench.server.interrupt()
            seen.append(data["value"])

    try:
        bench.server.queue(graph.prompt, on_event=interrupt_once)
    except ExecutionInterrupted:
        assert not list((bench.server.output / "fp8_calibrations").glob("cancelled*"))
    assert seen == sorted(seen) and seen
