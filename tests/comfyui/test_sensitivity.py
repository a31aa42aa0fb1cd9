"""Layer Sensitivity in a real ComfyUI: effects, no trace, errors and the choice."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from comfyui.graph import Graph
from comfyui.pack import FILE_OPTIONS, RECIPE, lora_of, metadata_of, quantize, save
from comfyui.server import ExecutionError, ExecutionInterrupted, PromptRejected
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels.calibration.file import load_calibration
from tiny_models import LANDSCAPES, write_sd3_lora

SAMPLER = {"steps": 2, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
LAYERS = (
    "joint_blocks.0.x_block.attn.qkv.weight",
    "joint_blocks.1.x_block.mlp.fc2.weight",
    "joint_blocks.2.context_block.attn.qkv.weight",
    "context_embedder.weight",
    "final_layer.linear.weight",
)


def scene_of(graph, model=None, word="day"):
    """(model, positive, negative) of the landscape model, or another model with its prompts."""
    scene = graph.add("StochasticFP8DemoModel", scene=word)
    return (model or scene[0]), scene[1], scene[2]


def latent_of(graph, batch_size=1):
    return graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=batch_size)


def measure(graph, scene, latent, **settings):
    inputs = {"model": scene[0], "positive": scene[1], "negative": scene[2], "latent_image": latent}
    return graph.add("StochasticFP8Sensitivity", **inputs, **{"seed": 5, "seeds": 1, **SAMPLER, **settings})


def run(bench, graph, calibration, name):
    """The calibration that a node makes, from its file, whose name comes with it."""
    saver = graph.add("StochasticFP8SaveCalibration", calibration=calibration, filename_prefix=name)
    shown = graph.add("TestShowText", value=saver)
    file = json.loads(bench.texts(graph, shown)[0])
    return load_calibration(bench.server.output / "fp8_calibrations" / file), file


def measured(bench, name, model=None, **settings):
    graph = Graph()
    scene = scene_of(graph, model(graph) if model else None)
    return run(bench, graph, measure(graph, scene, latent_of(graph), **settings), name)


@pytest.fixture(scope="module")
def calibration(bench):
    """(calibration, the name of its file): two seeds, two steps."""
    return measured(bench, "sensitive", seeds=2)


def rounded(weight):
    """The weight rounded to nearest E4M3, its amax scaled to 448, by ml_dtypes."""
    values = weight.float().numpy()
    scale = np.float32(np.abs(values).max() / np.float32(448))
    return torch.from_numpy((values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale)


def latents_of(bench, tensors, seeds, steps=2):
    """The latents that KSampler makes with these weights."""
    name = bench.place("one_layer.safetensors", {key: tensor.float() for key, tensor in tensors.items()})
    bench.server.free()
    graph = Graph()
    model, positive, negative = scene_of(graph, bench.load(graph, name))
    latent = latent_of(graph)
    samples = [graph.sample(model, positive, negative, latent, seed=seed, steps=steps, cfg=2.5) for seed in seeds]
    kept = [bench.keep(graph, each) for each in samples]
    found = bench.run(graph, *kept)
    return torch.stack(found) if len(kept) > 1 else found[None]


def close(bench, one, other):
    """Equal up to the rounding of the computation."""
    return one == pytest.approx(other, rel=1e-3 if bench.exact else 0.5, abs=1e-9 if bench.exact else 1e-4)


def test_effects_are_those_of_models_with_one_rounded_layer(bench, calibration):
    """KSampler renders each model from a file of its own."""
    weights, found = load_file(LANDSCAPES), calibration[0].sensitivity
    original = latents_of(bench, weights, (5, 6))
    assert close(bench, found.power, original.square().mean().item())
    assert len(found.layers) == 34 and found.renders == 2
    for name in LAYERS:
        changed = latents_of(bench, weights | {name: rounded(weights[name])}, (5, 6))
        assert close(bench, found.layers[name].change, (changed - original).square().mean().item()), name
        assert found.layers[name].alone
    assert found.how == "2 seeds, 2 steps, euler/simple, cfg 2.5, latent 1×16×8×8"


def test_the_gain_is_that_of_whole_blocks_in_long_renders(bench, calibration):
    """What the three blocks do in 20 steps, over the sum of what their layers do alone in 2 steps."""
    weights, found = load_file(LANDSCAPES), calibration[0].sensitivity
    original = latents_of(bench, weights, (5, 6), steps=20)
    gains = []
    for block in range(3):
        names = [name for name in found.layers if name.startswith(f"joint_blocks.{block}.")]
        changed = latents_of(bench, weights | {name: rounded(weights[name]) for name in names}, (5, 6), steps=20)
        shares = (changed - original).square().mean((1, 2, 3, 4)) / original.square().mean((1, 2, 3, 4))
        alone = sum(found.layers[name].change for name in names) / found.power
        gains.append(shares.log().mean().exp().item() / alone)
    expected = np.prod(gains) ** (1 / 3)
    assert found.gain == pytest.approx(expected, rel=1e-3 if bench.exact else 0.5)
    assert found.calibrated_gain is None


def test_loras_are_measured_with_the_model(bench):
    """As if the LoRA were merged in the file."""
    path = write_sd3_lora(bench.server.models("loras") / "measured.safetensors", depth=3)
    add_lora = {"lora_name": path.name, "strength_model": 1.0}

    def with_lora(graph):
        return graph.add("LoraLoaderModelOnly", model=graph.add("StochasticFP8DemoModel", scene="day"), **add_lora)

    found = measured(bench, "lora", with_lora)[0].sensitivity
    weights = {key: tensor.float() for key, tensor in load_file(LANDSCAPES).items()}
    merged = weights | {key: weights[key] + delta for key, delta in lora_of(path).items()}
    name = "joint_blocks.1.x_block.mlp.fc1.weight"
    assert name in lora_of(path)
    original = latents_of(bench, merged, [5])
    changed = latents_of(bench, merged | {name: rounded(merged[name])}, [5])
    plain = latents_of(bench, weights | {name: rounded(weights[name])}, [5]) - latents_of(bench, weights, [5])
    effect = found.layers[name].change
    assert effect == pytest.approx((changed - original).square().mean().item(), rel=0.02 if bench.exact else 0.5)
    assert effect != pytest.approx(plain.square().mean().item(), rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_partially_loaded_model_has_the_same_effects(bench, calibration, share):
    """ComfyUI then fetches a layer's weight for each call."""
    if bench.dynamic_vram:
        pytest.skip("with dynamic VRAM there is no partial load: every weight is fetched for its call")
    bench.server.free()

    def in_part(graph):
        return graph.add("TestLowVramModel", model=graph.add("StochasticFP8DemoModel", scene="day"), share=share)

    found = measured(bench, f"share_{share}", in_part, seeds=2)[0].sensitivity
    for name, layer in calibration[0].sensitivity.layers.items():
        assert close(bench, found.layers[name].change, layer.change), name


def test_blocks_without_effect_are_not_measured_layer_by_layer(bench):
    """In this model, block 1 adds nothing to either stream, so none of its layers has an effect."""
    weights = load_file(LANDSCAPES)
    ends = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    silent = {key: torch.zeros_like(w) for key, w in weights.items() if "joint_blocks.1." in key and key.endswith(ends)}
    name = bench.place("silent.safetensors", weights | silent)
    layers = measured(bench, "silent", lambda graph: bench.load(graph, name))[0].sensitivity.layers
    apart = {key for key, layer in layers.items() if not layer.alone}
    assert apart == {key for key in layers if key.startswith("joint_blocks.1.")}
    assert all((layers[key].change == 0) == (key in apart) for key in layers)


def test_measurements_are_added_to_a_calibration(bench, calibration):
    graph = Graph()
    scene = scene_of(graph)
    inputs = {"model": scene[0], "positive": scene[1], "negative": scene[2], "latent_image": latent_of(graph)}
    recorded = graph.add("StochasticFP8Calibrate", **inputs, **SAMPLER, seed=1, runs=1)
    once = measure(graph, scene, latent_of(graph), calibration=recorded)
    twice = measure(graph, scene, latent_of(graph), calibration=once, seed=6)
    both, _ = run(bench, graph, twice, "both")
    alone = calibration[0].sensitivity
    assert len(both.layers) == 34 and both.sensitivity.renders == 2
    for name, layer in both.sensitivity.layers.items():
        assert close(bench, layer.change, alone.layers[name].change)
        nearest, calibrated = layer.errors.output
        assert 0 < calibrated <= nearest < 0.1


def test_calibrated_rounding_is_measured_in_long_renders_too(bench):
    """Against models in which Stochastic FP8 rounds one block."""
    graph = Graph()
    scene, latent = scene_of(graph), latent_of(graph)
    inputs = {"model": scene[0], "positive": scene[1], "negative": scene[2], "latent_image": latent}
    recorded = graph.add("StochasticFP8Calibrate", **inputs, **SAMPLER, seed=1, runs=1)
    found, file = run(bench, graph, measure(graph, scene, latent, calibration=recorded), "calibrated_gain")
    graph, recipe = Graph(), {**RECIPE, "rounding": "calibrated", "layers": "all_linear"}
    scene, latent = scene_of(graph), latent_of(graph)
    loaded = graph.add("StochasticFP8LoadCalibration", calibration_name=file)
    models = [scene[0]] + [
        quantize(graph, scene[0], **{**recipe, "calibration": loaded, "only": f"joint_blocks.{block}"})
        for block in range(3)
    ]
    sampled = [graph.sample(model, scene[1], scene[2], latent, seed=5, steps=20, cfg=2.5) for model in models]
    original, *changed = bench.run(graph, *(bench.keep(graph, each) for each in sampled))
    gains = []
    for block, latents in enumerate(changed):
        layers = [layer for name, layer in found.sensitivity.layers.items() if f"joint_blocks.{block}." in name]
        alone = sum(layer.with_rounding("float8_e4m3fn", "calibrated") for layer in layers) / found.sensitivity.power
        gains.append(((latents - original).square().mean() / original.square().mean()).item() / alone)
    expected = np.prod(gains) ** (1 / 3)
    assert found.sensitivity.calibrated_gain == pytest.approx(expected, rel=0.01 if bench.exact else 0.5)


# No trace


def test_measuring_leaves_the_model_as_it_was(bench):
    graph = Graph()
    scene, latent = scene_of(graph, word="dusk"), latent_of(graph)
    before = bench.keep(graph, graph.sample(*scene, latent, seed=7, steps=2, cfg=2.5))
    unmeasured = bench.run(graph, before)  # before the digest: on first use, ComfyUI may cast some weights
    digest = graph.add("TestModelDigest", model=scene[0])
    first = json.loads(bench.texts(graph, digest)[0])
    again = Graph()
    scene, latent = scene_of(again, word="dusk"), latent_of(again)
    effects = measure(again, scene, latent)
    digest = again.add("TestModelDigest", model=scene[0], after=effects)
    after = bench.keep(again, again.sample(*scene, latent, seed=8, steps=2, cfg=2.5))
    repeated = bench.keep(again, again.sample(*scene, latent, seed=7, steps=2, cfg=2.5))
    assert json.loads(bench.texts(again, digest)[0]) == first
    assert bench.close(bench.run(again, after, repeated)[1], unmeasured)
    assert hooks_on(bench, "dusk") == 0


def hooks_on(bench, word):
    """The number of forward hooks on the cached model."""
    graph = Graph()
    return json.loads(bench.texts(graph, graph.add("TestHooks", model=scene_of(graph, word=word)[0]))[0])


def test_a_cancel_leaves_no_hook(bench):
    graph = Graph()
    calibration = measure(graph, scene_of(graph, word="night"), latent_of(graph), steps=50)
    graph.add("StochasticFP8SaveCalibration", calibration=calibration, filename_prefix="never")
    seen = []

    def interrupt_later(kind, data):
        if kind == "progress" and data["value"] > 60 and not seen:
            seen.append(data)
            bench.server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        bench.server.queue(graph.prompt, on_event=interrupt_later)
    assert seen
    assert hooks_on(bench, "night") == 0


def test_layers_without_use_are_left_out_of_result_and_bar(bench):
    file = bench.place("idle.safetensors", load_file(LANDSCAPES))  # its network is changed
    graph = Graph()
    scene = scene_of(graph, graph.add("TestIdleLayers", model=bench.load(graph, file)))
    node = measure(graph, scene, latent_of(graph))
    saver = graph.add("StochasticFP8SaveCalibration", calibration=node, filename_prefix="idle")
    shown = graph.add("TestShowText", value=saver)
    bars = []

    def note(kind, data):
        if kind == "progress" and data["node"] == node.id:
            bars.append((data["value"], data["max"]))

    outputs = bench.server.queue(graph.prompt, on_event=note)["outputs"]
    file = json.loads(outputs[shown.id]["text"][0])
    found = load_calibration(bench.server.output / "fp8_calibrations" / file)
    assert not any("idle" in name for name in found.sensitivity.layers) and len(found.sensitivity.layers) == 34
    assert bars[-1][0] == bars[-1][1]


def test_one_bar_counts_the_steps_of_all_renders(bench):
    graph = Graph()
    calibration = measure(graph, scene_of(graph), latent_of(graph), seed=9)
    graph.add("StochasticFP8SaveCalibration", calibration=calibration, filename_prefix="bar")
    bars = []
    bench.server.queue(graph.prompt, on_event=lambda kind, data: bars.append(data) if kind == "progress" else None)
    values = [bar["value"] for bar in bars if bar["node"] == calibration.id]
    assert values == sorted(values)
    assert bars[-1]["value"] == bars[-1]["max"] >= 34 * SAMPLER["steps"]


# Errors


def failing(bench, graph, node):
    graph.add("StochasticFP8SaveCalibration", calibration=node, filename_prefix="never")
    with pytest.raises(ExecutionError) as error:
        bench.server.queue(graph.prompt)
    assert "\n" not in error.value.message
    return error.value.message


def test_a_quantized_model_is_refused(bench):
    graph = Graph()
    scene = scene_of(graph)
    node = measure(graph, (quantize(graph, scene[0]), *scene[1:]), latent_of(graph))
    assert "is already quantized: measure the 16-bit model" in failing(bench, graph, node)


def test_a_latent_with_nan_is_an_error_and_leaves_no_hook(bench):
    bench.server.base.joinpath("input").mkdir(exist_ok=True)
    broken = {"nan.cond": torch.full((1, 8, 64), float("nan")), "nan.pooled_output": torch.zeros(1, 64)}
    save_file(broken, bench.server.base / "input" / "broken.safetensors")
    graph = Graph()
    scene = scene_of(graph, word="dawn")
    positive = graph.add("TestFileConditioning", file="broken.safetensors", word="nan")
    node = measure(graph, (scene[0], positive[0], scene[2]), latent_of(graph))
    assert "the latent of seed 5 holds NaN or infinite values" in failing(bench, graph, node)
    assert hooks_on(bench, "dawn") == 0


def test_no_effect_anywhere_is_an_error(bench):
    """With denoise 0, ComfyUI returns the latent image without a step."""
    graph = Graph()
    node = measure(graph, scene_of(graph), latent_of(graph), denoise=0.0)
    assert "does not change the latent at all: set denoise above 0" in failing(bench, graph, node)


def test_a_calibration_of_another_model_is_refused(bench, calibration):
    graph = Graph()
    other = graph.add("StochasticFP8LoadCalibration", calibration_name=calibration[1])
    prompt = graph.add("TestRandomConditioning", seed=1, tokens=8, width=4096, pooled_width=0)
    latent = graph.add("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    node = measure(graph, (bench.load(graph, "wan"), prompt, prompt), latent, calibration=other)
    assert "the calibration is of another model than wan.safetensors" in failing(bench, graph, node)


# The choice


def test_graph_and_file_make_the_same_file_within_the_limit(bench, calibration):
    graph = Graph()
    loaded = graph.add("StochasticFP8LoadCalibration", calibration_name=calibration[1])
    choices = {**RECIPE, "layers": "measured", "size_limit": 0.0055, "calibration": loaded}
    saver = save(graph, "fits_graph", model=quantize(graph, bench.load(graph, "sd3"), **choices))
    bench.model_file("sd3")
    job = graph.add(
        "StochasticFP8QuantizeFile",
        file="diffusion_models/sd3.safetensors",
        filename_prefix="fits_file",
        **FILE_OPTIONS,
        **choices,
    )
    paths = [bench.saved(name) for name in bench.texts(graph, saver, job)]
    graph_file, file_file = map(load_file, paths)
    assert graph_file.keys() == file_file.keys()
    for key, tensor in file_file.items():
        assert bench.same_values(tensor, graph_file[key]), key
    assert all(4.2e6 < path.stat().st_size <= 5.5e6 for path in paths)
    kept = {key for key, w in file_file.items() if w.ndim == 2 and w.dtype == torch.bfloat16 and "pos_embed" not in key}
    effects = calibration[0].sensitivity.layers
    density = {key: effects[key].change / load_file(LANDSCAPES)[key].numel() for key in effects}
    assert max(density, key=density.get) in kept
    assert min(density, key=density.get) not in kept


def test_a_large_workflow_counts(bench, calibration):
    """Known when the layers are chosen, or grown since then: ComfyUI answers the second run from its cache."""
    graph = Graph()
    loaded = graph.add("StochasticFP8LoadCalibration", calibration_name=calibration[1])
    choices = {"layers": "measured", "size_limit": 0.0062, "calibration": loaded}
    quantized = quantize(graph, bench.load(graph, "sd3"), **choices)
    sizes = []
    for prefix, extent in (("large", 1_300_000), ("grown", 2_600_000)):
        saver = save(graph, prefix, model=quantized)
        entry = bench.server.queue(graph.prompt, workflow={"note": "x" * extent})
        path = bench.saved(entry["outputs"][saver.id]["text"][0])
        sizes.append(path.stat().st_size)
        assert ("workflow" in metadata_of(path)) == (prefix == "large")
        del graph.prompt[saver.id]
    assert 5.6e6 < sizes[0] <= 6.2e6
    assert sizes[1] <= sizes[0] - 1.3e6
    assert "the workflow is not in the file, which it would make larger than 0.0062 GB" in bench.server.log()


def test_a_kept_lora_counts_as_it_is_saved(bench):
    """On a CPU, a layer with a LoRA is saved in fp32."""
    path = write_sd3_lora(bench.server.models("loras") / "kept.safetensors", depth=3)
    graph = Graph()
    scene = scene_of(graph)
    model = graph.add("LoraLoaderModelOnly", model=scene[0], lora_name=path.name, strength_model=1.0)
    measured_ = measure(graph, (model, *scene[1:]), latent_of(graph))
    choices = {"layers": "measured", "size_limit": 0.0065, "calibration": measured_}
    saver = save(graph, "lora_fits", model=quantize(graph, model, **choices))
    size = bench.saved(bench.texts(graph, saver)[0]).stat().st_size
    assert 4e6 < size <= 6.5e6


def test_a_limit_above_the_16_bit_size_gives_the_same_latents(bench, calibration):
    graph = Graph()
    loaded = graph.add("StochasticFP8LoadCalibration", calibration_name=calibration[1])
    scene, latent = scene_of(graph), latent_of(graph)
    whole = quantize(graph, scene[0], layers="measured", size_limit=1.0, calibration=loaded)
    kept = [bench.keep(graph, graph.sample(model, *scene[1:], latent)) for model in (scene[0], whole)]
    original, unchanged = bench.run(graph, *kept)
    assert bench.close(original, unchanged)
    saver = save(graph, "whole", model=whole)
    path = bench.saved(bench.texts(graph, saver)[0])
    assert load_file(path).keys() == load_file(LANDSCAPES).keys()


def test_a_target_is_reached_in_real_renders(bench, calibration):
    """Effects add up only roughly. These are long renders of the seeds that were measured."""
    graph = Graph()
    loaded = graph.add("StochasticFP8LoadCalibration", calibration_name=calibration[1])
    scene, latent = scene_of(graph), latent_of(graph)
    choices = {"rounding": "nearest", "layers": "measured", "calibration": loaded}
    models = [scene[0], *(quantize(graph, scene[0], **choices, target_quality=level) for level in (25.0, 40.0))]
    kept = [
        bench.keep(graph, graph.sample(model, *scene[1:], latent, seed=seed, cfg=2.5, steps=20))
        for model in models
        for seed in (5, 6)
    ]
    latents = torch.stack(bench.run(graph, *kept)).unflatten(0, (3, 2)).flatten(2)
    changes = (latents[1:] - latents[0]).square().mean(2)
    found = (10 * torch.log10(latents[0].square().mean(1) / changes)).mean(1)
    assert found.tolist() == [pytest.approx(25, abs=6), pytest.approx(40, abs=6)]


def test_measured_needs_a_calibration(bench):
    graph = Graph()
    save(graph, "never", model=quantize(graph, scene_of(graph)[0], layers="measured", size_limit=1.0))
    with pytest.raises(ExecutionError, match="connect Layer Sensitivity or Load Calibration"):
        bench.server.queue(graph.prompt)


def test_measured_is_offered_for_models_only(bench):
    graph = Graph()
    graph.add("StochasticFP8QuantizeTextEncoder", clip=["1", 0], **{**RECIPE, "layers": "measured"})
    with pytest.raises(PromptRejected):
        bench.server.queue(graph.prompt)
