"""How a file says that a layer is scaled FP8: literal entries written, every way read back."""

import json

import pytest
import torch
from checkpoints import weights
from safetensors.torch import save_file
from stochastic_fp8_pack.kernels.files.reader import open_source
from stochastic_fp8_pack.kernels.state_dict.layouts import LAYOUTS, ScaledLayer
from stochastic_fp8_pack.kernels.state_dict.markings import read_markings, read_scale, scaled_layers

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAYERS = [ScaledLayer("b", "float8_e5m2", full_precision=False), ScaledLayer("a", "float8_e4m3fn")]


def read(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    with open_source(path) as source:
        markings = read_markings(source)
        return markings, scaled_layers(source.tensors, markings, lambda name: "")


def codes(name, dtype=E4M3):
    return {f"{name}.weight": torch.zeros(16, 16).to(dtype)}


def json_tensor(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def test_native_writes_header_and_inline_entries():
    native = LAYOUTS["native"]
    assert (native.weight_scale, native.input_scale) == (".weight_scale", ".input_scale")
    assert {name: bytes(tensor) for name, tensor in native.markers(LAYERS).items()} == {
        "a.comfy_quant": b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}',
        "b.comfy_quant": b'{"format": "float8_e5m2"}',
    }
    assert native.metadata(LAYERS) == {
        "_quantization_metadata": '{"format_version": "1.0", "layers": {"a": {"format": "float8_e4m3fn", '
        '"full_precision_matrix_mult": true}, "b": {"format": "float8_e5m2"}}}'
    }


@pytest.mark.parametrize(("full_precision", "elements"), [(True, 2), (False, 0)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_legacy_writes_one_marker_a_network(dtype, full_precision, elements):
    legacy = LAYOUTS["legacy"]
    assert (legacy.weight_scale, legacy.input_scale) == (".scale_weight", ".scale_input")
    name = str(dtype).removeprefix("torch.")
    layers = [ScaledLayer(f"{prefix}{i}", name, full_precision, prefix) for prefix in ("", "p.") for i in (0, 1)]
    markers = legacy.markers(layers)
    assert list(markers) == ["scaled_fp8", "p.scaled_fp8"]
    assert all(marker.dtype == dtype and marker.shape == (elements,) for marker in markers.values())
    assert legacy.metadata(layers) == {}


def test_legacy_cannot_say_that_layers_differ():
    with pytest.raises(ValueError, match="choose layout native"):
        LAYOUTS["legacy"].markers(LAYERS)


def test_legacy_multiplies_in_full_precision_as_soon_as_one_layer_asks_for_it():
    layers = [ScaledLayer(name, "float8_e4m3fn", full_precision=full) for name, full in (("a", False), ("b", True))]
    elsewhere = ScaledLayer("net.c", "float8_e4m3fn", full_precision=False, prefix="net.")
    markers = LAYOUTS["legacy"].markers([*layers, elsewhere])
    assert {name: len(marker) for name, marker in markers.items()} == {"scaled_fp8": 2, "net.scaled_fp8": 0}


def test_each_way_is_read(tmp_path):
    entry = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": entry}})}
    scale = torch.tensor(2.0)
    path = tmp_path / "a.safetensors"
    _, native = read(path, codes("a") | {"a.weight_scale": scale}, header)
    _, inline = read(path, codes("a") | {"a.weight_scale": scale, "a.comfy_quant": json_tensor(entry)})
    marker = torch.zeros(2).to(E4M3)
    _, legacy = read(path, codes("a") | {"a.scale_weight": scale, "scaled_fp8": marker})
    assert native == inline == legacy == {"a.weight": ScaledLayer("a", "float8_e4m3fn", full_precision=True)}


def test_the_header_overrides_inline(tmp_path):
    header = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})}
    inline = json_tensor({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    tensors = codes("a") | {"a.weight_scale": torch.tensor(2.0), "a.comfy_quant": inline}
    assert not read(tmp_path / "a.safetensors", tensors, header)[1]["a.weight"].full_precision


def test_what_is_no_parameter_is_told_from_parameters(tmp_path):
    tensors = codes("a") | {
        "a.weight_scale": torch.tensor(2.0),
        "a.input_scale": torch.tensor(1.0),
        "b.scale_weight": torch.tensor(2.0),
        "b.scale_input": torch.tensor(1.0),
        "a.comfy_quant": json_tensor({}),
        "p.scaled_fp8": torch.zeros(0).to(E4M3),
        **weights("c.weight", "scale_weight", "x.weight_scale_2"),
    }
    markings, layers = read(tmp_path / "a.safetensors", tensors)
    assert markings.tensors.keys() == tensors.keys() - {"a.weight", "c.weight", "scale_weight", "x.weight_scale_2"}
    assert markings.input_scales == {"a": "a.input_scale", "b": "b.scale_input"}
    assert list(markings.legacy) == ["p."]
    assert list(layers) == ["a.weight"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layers": []}', "[" * 100000])
def test_a_header_entry_that_cannot_be_read_is_a_fault(tmp_path, text):
    markings, _ = read(tmp_path / "a.safetensors", weights("a"), {"_quantization_metadata": text})
    assert list(markings.faults) == ["_quantization_metadata"]


def test_an_inline_entry_that_cannot_be_read_is_a_fault(tmp_path):
    tensors = {"a.comfy_quant": torch.zeros(4, dtype=torch.uint8), "b.comfy_quant": torch.zeros(1 << 17)}
    markings, _ = read(tmp_path / "a.safetensors", tensors)
    assert markings.faults["a.comfy_quant"].startswith("is not JSON")
    assert markings.faults["b.comfy_quant"] == "is too large for an inline entry"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_of_any_dtype_and_one_element_is_read(tmp_path, dtype, shape):
    save_file({"s": torch.full(shape, 0.25, dtype=dtype)}, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as source:
        scale = read_scale(source, "s")
    assert (scale.dtype, scale.shape, scale.item()) == (torch.float32, (), 0.25)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), [1.0, 2.0], []])
def test_a_scale_that_cannot_be_one_is_refused(tmp_path, value):
    save_file({"s": torch.tensor(value)}, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as source, pytest.raises(ValueError, match="scale 's'"):
        read_scale(source, "s")
