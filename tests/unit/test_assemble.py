"""Writing weights that are scaled FP8 already: nothing is rounded, and the file is checked before it appears."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.state_dict.assemble import write_scaled
from stochastic_fp8_pack.kernels.state_dict.layouts import ScaledLayer

LAYER = "joint_blocks.0.x_block.attn.proj"
CODES = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
CODES = torch.where((CODES & 0x7F) == 0x7F, 0, CODES)


def parts(format="float8_e4m3fn", scale=0.5, **other):
    """The arguments of write_scaled for one layer and its bias."""
    tensors = {
        f"{LAYER}.weight": CODES.view(getattr(torch, format)),
        f"{LAYER}.bias": torch.arange(16.0).bfloat16(),
        "joint_blocks.0.context_block.attn.qkv.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        **other,
    }
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    layers = {f"{LAYER}.weight": ScaledLayer(LAYER, format)}
    return infos, tensors.__getitem__, layers, {f"{LAYER}.weight": torch.tensor(scale)}


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_native(tmp_path, format):
    infos, read, layers, scales = parts(format)
    inspection = write_scaled(tmp_path / "x.safetensors", infos, read, layers, scales, metadata={"config": "{}"})
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
    write_scaled(tmp_path / "x.safetensors", *parts(), layout="legacy", input_scales={LAYER: torch.tensor(2.0)})
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["scaled_fp8"].dtype == torch.float8_e4m3fn
    assert tensors["scaled_fp8"].shape == (2,)
    assert tensors[f"{LAYER}.scale_weight"].item() == 0.5
    assert tensors[f"{LAYER}.scale_input"].item() == 2.0


def test_legacy_e5m2_is_written_since_it_was_asked_for(tmp_path):
    inspection = write_scaled(tmp_path / "x.safetensors", *parts("float8_e5m2"), layout="legacy")
    assert [finding.code for finding in inspection.findings if finding.severity == "error"] == ["legacy_e5m2"]
    assert (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_file_that_comfyui_could_not_use_does_not_appear(tmp_path, scale):
    with pytest.raises(CheckpointError, match="was not written"):
        write_scaled(tmp_path / "x.safetensors", *parts(scale=scale))
    assert list(tmp_path.iterdir()) == []


def test_cancelling_leaves_nothing(tmp_path):
    seen = []

    def cancel_at_the_second(done, total, name):
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scaled(tmp_path / "x.safetensors", *parts(), progress=cancel_at_the_second)
    assert list(tmp_path.iterdir()) == []
    assert seen[0] == (0, 256 + 32 + 32)


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="already exists"):
        write_scaled(path, *parts())
    assert path.read_bytes() == b"precious"
    write_scaled(path, *parts(), overwrite=True)
    assert load_file(path)[f"{LAYER}.weight_scale"].item() == 0.5


def test_an_unknown_layout_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="choose one of native, legacy"):
        write_scaled(tmp_path / "x.safetensors", *parts(), layout="new")
