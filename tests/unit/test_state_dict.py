"""Scaled state dicts whose weights are coded already: written, verified, loaded and joined."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.state_dict.layouts import LAYOUTS, ScaledLayer
from stochastic_fp8_pack.kernels.state_dict.load import native_tensors
from stochastic_fp8_pack.kernels.state_dict.scaled_state_dict import (
    PendingWeight,
    ScaledStateDict,
    ScaledWeight,
    TensorEntry,
)
from stochastic_fp8_pack.kernels.state_dict.write import write_state_dict

LAYER = "joint_blocks.0.x_block.attn.proj"
CODES = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
CODES = torch.where((CODES & 0x7F) == 0x7F, 0, CODES)


def state_dict(format="float8_e4m3fn", scale=0.5, input_scale=None, **options):
    """One scaled layer, its bias, and a small weight that is not scaled."""
    state = ScaledStateDict(**options)
    codes = CODES.view(getattr(torch, format))
    state.add_tensors(
        {
            f"{LAYER}.bias": torch.arange(16.0).bfloat16(),
            "joint_blocks.0.context_block.attn.qkv.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        }
    )
    state.add_weight(
        f"{LAYER}.weight",
        ScaledWeight(
            ScaledLayer(LAYER, format),
            (16, 16),
            TensorEntry.of(codes),
            torch.tensor(scale),
            input_scale,
            source_bytes=256,
        ),
    )
    return state


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_native(tmp_path, format):
    inspection = write_state_dict(state_dict(format, metadata={"config": "{}"}), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert torch.equal(tensors[f"{LAYER}.weight"].view(torch.uint8), CODES)
    assert tensors[f"{LAYER}.weight_scale"].item() == 0.5
    assert tensors[f"{LAYER}.weight_scale"].shape == ()
    assert bytes(tensors[f"{LAYER}.comfy_quant"].tolist()) == (
        b'{"format": "%s", "full_precision_matrix_mult": true}' % format.encode()
    )
    assert torch.equal(tensors[f"{LAYER}.bias"], torch.arange(16.0).bfloat16())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["config"] == "{}"
    entry = {"format": format, "full_precision_matrix_mult": True}
    assert json.loads(metadata["_quantization_metadata"]) == {"format_version": "1.0", "layers": {LAYER: entry}}
    assert (inspection.ok, inspection.scaled) == (True, 1)


def test_legacy(tmp_path):
    write_state_dict(state_dict(input_scale=torch.tensor(2.0)), tmp_path / "x.safetensors", layout="legacy")
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["scaled_fp8"].dtype == torch.float8_e4m3fn
    assert tensors["scaled_fp8"].shape == (2,)
    assert tensors[f"{LAYER}.scale_weight"].item() == 0.5
    assert tensors[f"{LAYER}.scale_input"].item() == 2.0


def test_legacy_e5m2_is_written_since_it_was_asked_for(tmp_path):
    inspection = write_state_dict(state_dict("float8_e5m2"), tmp_path / "x.safetensors", layout="legacy")
    assert [finding.code for finding in inspection.findings if finding.severity == "error"] == ["legacy_e5m2"]
    assert (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_file_that_comfyui_could_not_use_does_not_appear(tmp_path, scale):
    with pytest.raises(CheckpointError, match="was not written"):
        write_state_dict(state_dict(scale=scale), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_cancelling_leaves_nothing(tmp_path):
    seen = []

    def cancel_at_the_second(done, total, name):
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_state_dict(state_dict(), tmp_path / "x.safetensors", progress=cancel_at_the_second)
    assert list(tmp_path.iterdir()) == []
    assert seen[0] == (0, 256 + 32 + 32)


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="already exists"):
        write_state_dict(state_dict(), path)
    assert path.read_bytes() == b"precious"
    write_state_dict(state_dict(), path, overwrite=True)
    assert load_file(path)[f"{LAYER}.weight_scale"].item() == 0.5


def test_an_unknown_layout_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="choose one of native, legacy"):
        write_state_dict(state_dict(), tmp_path / "x.safetensors", layout="new")


def test_the_tensors_for_a_loader_are_those_of_the_file_without_markers(tmp_path):
    state = state_dict(input_scale=torch.tensor(2.0))
    write_state_dict(state, tmp_path / "x.safetensors")
    written = load_file(tmp_path / "x.safetensors")
    del written[f"{LAYER}.comfy_quant"]
    loaded = native_tensors(state)
    assert loaded.keys() == written.keys()
    for name, tensor in loaded.items():
        assert (tensor.dtype, tensor.shape) == (written[name].dtype, written[name].shape), name
        assert torch.equal(tensor.float(), written[name].float()), name


def test_networks_are_joined_under_their_prefixes():
    state = ScaledStateDict()
    state.add(state_dict(), "model.diffusion_model.")
    state.add(state_dict(), "text_encoders.t5xxl.transformer.")
    infos = state.infos(LAYOUTS["legacy"])
    assert {name for name in infos if name.endswith("scaled_fp8")} == {
        "model.diffusion_model.scaled_fp8",
        "text_encoders.t5xxl.transformer.scaled_fp8",
    }
    assert infos[f"text_encoders.t5xxl.transformer.{LAYER}.scale_weight"] == TensorInfo("float32", ())
    assert infos[f"text_encoders.t5xxl.transformer.{LAYER}.weight"] == TensorInfo("float8_e4m3fn", (16, 16))


def test_a_scaled_weight_replaces_what_marked_the_layer_before():
    state = ScaledStateDict()
    obsolete = ("weight", "weight_scale", "scale_weight", "input_scale", "scale_input", "comfy_quant")
    state.add_tensors({f"{LAYER}.{name}": torch.zeros(1) for name in (*obsolete, "bias")})
    state.add_pending(f"{LAYER}.weight", PendingWeight(ScaledLayer(LAYER, "float8_e4m3fn"), (16, 16)))
    assert list(state.tensors) == [f"{LAYER}.bias"]
    assert list(state.pending) == [f"{LAYER}.weight"]
