"""Save Scaled FP8 Model: the names of its files."""

import pytest
import tiny_models
from comfyui.graph import Graph
from comfyui.pack import RECIPE, quantize, save
from safetensors.torch import load_file

TOKENS = "%model%_%format%"


def text_encoder(bench, name):
    return tiny_models.write_t5xxl(bench.server.models("text_encoders") / name).name


def quantized_clip(graph, clip):
    return graph.add("StochasticFP8QuantizeTextEncoder", clip=clip, **RECIPE)


def test_a_model_is_saved_under_its_files_name(bench):
    graph = Graph()
    name = bench.place("named 1.5.safetensors", load_file(bench.model_file("sd3")))
    saver = save(graph, TOKENS, model=quantize(graph, bench.load(graph, name)))
    assert bench.texts(graph, saver) == ["named 1.5_float8_e4m3fn_00001_.safetensors"]


def test_the_tokens_may_name_folders(bench):
    graph = Graph()
    model = graph.add("StochasticFP8DemoModel", scene="dawn")
    saver = save(graph, "%format%/%model%", model=quantize(graph, model))
    assert bench.texts(graph, saver) == ["float8_e4m3fn/tiny_sd3_landscapes_00001_.safetensors"]


def test_a_text_encoder_is_saved_under_its_files_name(bench):
    graph = Graph()
    clip = graph.add("CLIPLoader", clip_name=text_encoder(bench, "alone.safetensors"), type="sd3", device="default")
    saver = save(graph, TOKENS, layout="legacy", clip=quantized_clip(graph, clip))
    assert bench.texts(graph, saver) == ["alone_float8_e4m3fn_00001_.safetensors"]


@pytest.mark.parametrize(
    ("file", "name"), [("my_t5xxl_fp16.safetensors", "my_t5xxl_fp16"), ("big.safetensors", "t5xxl")]
)
def test_of_several_files_the_encoders_is_meant(bench, file, name):
    graph = Graph()
    clip_l = tiny_models.write_clip_l(bench.server.models("text_encoders") / "small.safetensors")
    files = {"clip_name1": clip_l.name, "clip_name2": text_encoder(bench, file)}
    clip = graph.add("DualCLIPLoader", **files, type="sd3", device="default")
    saver = save(graph, TOKENS, layout="legacy", clip=quantized_clip(graph, clip))
    assert bench.texts(graph, saver) == [f"{name}_float8_e4m3fn_00001_.safetensors"]


def test_a_prompt_does_not_overwrite_its_own_files(bench):
    """Nor does it number them on from an earlier prompt's."""
    names = ["both.safetensors", "both_2.safetensors", "both_3.safetensors"]
    for seed in (1, 11):
        graph = Graph()
        models = [quantize(graph, bench.load(graph, "sd3"), seed=seed + i) for i in range(3)]
        savers = [save(graph, "both", model=model, overwrite=True) for model in models]
        assert sorted(bench.texts(graph, *savers)) == names
        assert sorted(path.name for path in bench.saved("").glob("both*")) == names
        assert len({bench.saved(name).read_bytes() for name in names}) == 3


def test_overwriting_replaces_the_file(bench):
    saved = []
    for seed in (1, 2):
        graph = Graph()
        saver = save(graph, "replaced", model=quantize(graph, bench.load(graph, "sd3"), seed=seed), overwrite=True)
        assert bench.texts(graph, saver) == ["replaced.safetensors"]
        saved.append(bench.saved("replaced.safetensors").read_bytes())
    assert saved[0] != saved[1]
    assert [path.name for path in bench.saved("").glob("replaced*")] == ["replaced.safetensors"]
