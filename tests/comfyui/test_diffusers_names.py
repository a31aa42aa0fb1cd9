"""Model files in the diffusers layout, which Convert File to FP8 converts to ComfyUI's names by ComfyUI's own map."""

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from comfyui.pack import FAMILIES, FILE_OPTIONS, RECIPE, Family, recipe_of
from comfyui.server import ExecutionError
from safetensors.torch import load_file, save_file

FLUX = Family(
    "flux.safetensors", tiny_models.write_flux, 64, 64, ("EmptySD3LatentImage", {"width": 128, "height": 128})
)

WRITTEN = {"sd3": "mmdit_to_diffusers", "flux": "flux_to_diffusers"}
"""Family -> ComfyUI's map, whose inverse writes its model in the diffusers layout."""


def quantized(bench, name, prefix, **choices):
    """The path of a quantized file."""
    graph = Graph()
    options = {**RECIPE, **FILE_OPTIONS, "for_another_comfyui": True, **choices}
    file = f"diffusion_models/{name}"
    return bench.saved(
        bench.texts(graph, graph.add("StochasticFP8QuantizeFile", file=file, filename_prefix=prefix, **options))[0]
    )


def written(bench, family):
    """The names of a model file in ComfyUI's layout, and of one in the diffusers layout."""
    if family == "flux" and bench.server.version < (0, 33):
        pytest.skip("this ComfyUI loads no small Flux")
    folder, name = bench.server.models("diffusion_models"), f"diffusers_{family}.safetensors"
    if family == "flux":
        tiny_models.write_flux(folder / FLUX.name)
    else:
        bench.model_file(family)
    graph = Graph()
    bench.texts(
        graph, graph.add("TestWriteDiffusers", source=f"{family}.safetensors", function=WRITTEN[family], name=name)
    )
    return f"{family}.safetensors", name


def same_bytes(one, other):
    """Whether two files have the same tensors, byte for byte."""
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and torch.equal(one[key].reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8))
        for key in one
    )


@pytest.mark.parametrize("family", WRITTEN)
def test_the_same_file_as_from_comfyuis_layout(bench, family):
    """Random words depend on the names of the layers, so stochastic rounding shows a wrong one."""
    native, diffusers = written(bench, family)
    paths = [quantized(bench, name, f"{family}_from_{name[:4]}", layers="all_linear") for name in (native, diffusers)]
    assert same_bytes(*paths)
    assert recipe_of(paths[0])["quantized"] == recipe_of(paths[1])["quantized"]


@pytest.mark.parametrize("family", WRITTEN)
def test_it_samples_like_the_file_from_comfyuis_layout(bench, family):
    sources = written(bench, family)
    sample = FLUX.sample if family == "flux" else FAMILIES[family].sample
    latents = []
    for name in (*sources, *(quantized(bench, name, "sampled").name for name in sources)):
        graph = Graph()
        latents.append(bench.run(graph, bench.keep(graph, sample(graph, bench.load(graph, name)))))
    plain, converted, quantized_native, quantized_diffusers = latents
    assert torch.equal(plain, converted), "ComfyUI reads the two sources as the same model"
    assert torch.equal(quantized_native, quantized_diffusers)
    assert not torch.equal(plain, quantized_native)


@pytest.mark.parametrize("layout", ["auraflow", "pixart", "z_image", "sdxl", "sd15"])
def test_the_same_file_as_from_what_comfyui_converts(bench, layout):
    diffusers, native = f"made_{layout}.safetensors", f"converted_{layout}.safetensors"
    graph = Graph()
    bench.texts(graph, graph.add("TestMakeDiffusers", layout=layout, name=diffusers))
    graph = Graph()
    (converted,) = bench.texts(graph, graph.add("TestConvertDiffusers", source=diffusers, name=native))
    if layout == "z_image" and converted != native:
        pytest.skip("this ComfyUI does not load Z-Image in the diffusers layout")
    assert converted == native
    paths = [quantized(bench, name, name[:9], layers="all_linear") for name in (native, diffusers)]
    assert len(recipe_of(paths[1])["quantized"]) > 10
    assert same_bytes(*paths)


def plan(bench, name, **choices):
    return bench.server.post("/stochastic_fp8/plan", {"file": f"diffusion_models/{name}", **choices})


def test_the_plan_and_the_report_say_that_names_were_converted(bench):
    native, diffusers = written(bench, "sd3")
    plans = [plan(bench, name, part=part) for name in (native, diffusers) for part in ("file", "model")]
    assert plans[0]["quantized"] == plans[2]["quantized"]
    assert plans[1]["quantized"] == plans[3]["quantized"]
    assert plans[2]["family"] == "sd3"
    (note,) = set(plans[2]["notes"]) - set(plans[0]["notes"])
    assert note.startswith("SD3 in the diffusers layout: ")
    assert note.endswith(" joined from several")
    mark = len(bench.server.log())
    quantized(bench, diffusers, "noted")
    assert note in bench.server.log()[mark:]


def test_a_set_in_the_diffusers_layout(bench):
    _, diffusers = written(bench, "sd3")
    folder = bench.server.models("diffusion_models")
    tensors = load_file(folder / diffusers)
    names = sorted(tensors)
    tiny_models.write_set(folder / "split" / "model.safetensors", [names[::2], names[1::2]], tensors)
    paths = [quantized(bench, name, "split") for name in (diffusers, "split/model.safetensors.index.json")]
    assert same_bytes(*paths)


def remove_one(tensors):
    del tensors["transformer_blocks.0.attn.to_k.weight"]


def remove_the_last_part(tensors):
    del tensors["transformer_blocks.0.attn.to_v.weight"]


def remove_a_layer(tensors):
    del tensors["norm_out.linear.weight"]


def add_one(tensors):
    tensors["a.weight"] = torch.ones(16, 16)


def other_dtype(tensors):
    tensors["transformer_blocks.0.attn.to_v.weight"] = tensors["transformer_blocks.0.attn.to_v.weight"].float()


def other_width(tensors):
    tensors["transformer_blocks.0.attn.to_v.weight"] = tensors["transformer_blocks.0.attn.to_v.weight"][
        :, ::2
    ].contiguous()


def refused(bench, tensors, name, model):
    """Whether Convert File to FP8 refuses a file with these tensors in one line, and writes nothing."""
    save_file(tensors, bench.server.models("diffusion_models") / name)
    with pytest.raises(ExecutionError, match=f"holds {model} in the diffusers layout") as error:
        quantized(bench, name, "never")
    return "\n" not in error.value.message and not list(bench.saved("").glob("never*"))


@pytest.mark.parametrize(
    "change", [remove_one, remove_the_last_part, remove_a_layer, add_one, other_dtype, other_width]
)
def test_what_comfyui_cannot_convert_completely_is_refused(bench, change):
    _, diffusers = written(bench, "sd3")
    tensors = load_file(bench.server.models("diffusion_models") / diffusers)
    change(tensors)
    assert refused(bench, tensors, f"{change.__name__}.safetensors", "SD3")


def test_a_missing_part_is_found_where_layers_have_no_weights_yet(bench):
    """With dynamic VRAM, ComfyUI makes layers without weights."""
    if bench.server.version < (0, 33):
        pytest.skip("this ComfyUI makes every layer with its weights")
    _, whole = written(bench, "sd3")
    folder = bench.server.models("diffusion_models")
    names = [whole]
    for change in (remove_the_last_part, remove_a_layer):
        tensors = load_file(folder / whole)
        change(tensors)
        save_file(tensors, folder / f"dynamic_{change.__name__}.safetensors")
        names.append(f"dynamic_{change.__name__}.safetensors")
    graph = Graph()
    converted = bench.texts(graph, *(graph.add("TestConvertedNames", name=name) for name in names))
    assert int(converted[0]) > 30
    assert converted[1:] == ["0", "0"]


@pytest.mark.parametrize(
    "missing",
    [
        "transformer_blocks.0.attn.to_v.weight",
        "transformer_blocks.0.attn.add_v_proj.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
        "norm_out.linear.weight",
    ],
)
def test_a_missing_part_of_flux_is_refused(bench, missing):
    _, diffusers = written(bench, "flux")
    tensors = load_file(bench.server.models("diffusion_models") / diffusers)
    del tensors[missing]
    assert refused(bench, tensors, f"without_{missing}.safetensors", "Flux or another double-stream model")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.", "net."])
def test_the_diffusers_layout_under_a_prefix_is_refused(bench, prefix):
    _, diffusers = written(bench, "flux")
    tensors = load_file(bench.server.models("diffusion_models") / diffusers)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    assert refused(bench, tensors, f"{prefix}flux.safetensors", "Flux or another double-stream model")


def test_two_tensors_for_one_place_are_refused(bench):
    """ComfyUI knows an embedding by two names, and keeps one of two tensors."""
    graph = Graph()
    bench.texts(graph, graph.add("TestMakeDiffusers", layout="sdxl", name="two.safetensors"))
    tensors = load_file(bench.server.models("diffusion_models") / "two.safetensors")
    tensors |= {
        key.replace("add_embedding", "class_embedding"): tensor.clone()
        for key, tensor in tensors.items()
        if key.startswith("add_embedding.")
    }
    assert refused(bench, tensors, "two_names.safetensors", "SD 1.x or SDXL")
