"""Every known problem of a scaled FP8 file is found, described and, where possible, repaired."""

import json

import checkpoints
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels.engine.file_job import quantize_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.state_dict.inspection import inspect_file
from stochastic_fp8_pack.kernels.state_dict.repair import repair_file

QKV = "joint_blocks.0.x_block.attn.qkv"
FC1 = "joint_blocks.0.x_block.mlp.fc1"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HEADER = "_quantization_metadata"


class Checkpoint:
    """The parts of a scaled FP8 file, to be changed and saved again."""

    def __init__(self, folder, tensors, **choices):
        self.folder = folder
        save_file(tensors, folder / "source.safetensors", {"config": "{}"})
        quantize_file(folder / "source.safetensors", folder / "made.safetensors", **choices)
        self.tensors = load_file(folder / "made.safetensors")
        with safe_open(folder / "made.safetensors", "pt") as file:
            self.metadata = file.metadata()

    @property
    def header(self):
        return json.loads(self.metadata[HEADER])["layers"]

    @header.setter
    def header(self, layers):
        self.metadata[HEADER] = json.dumps({"format_version": "1.0", "layers": layers})

    def save(self):
        save_file(self.tensors, self.folder / "bad.safetensors", self.metadata)
        return self.folder / "bad.safetensors"

    def codes(self, deep=False):
        return {finding.code: finding.severity for finding in inspect_file(self.save(), deep).findings}

    def repaired(self, **options):
        return repair_file(self.save(), self.folder / "repaired.safetensors", overwrite=True, **options)

    def assert_repaired(self):
        """The repaired file has no findings, and the codes and scales of the original."""
        inspection = self.repaired()
        assert (inspection.ok, inspection.findings, inspection.ways) == (True, (), ("header", "inline"))
        made = load_file(self.folder / "made.safetensors")
        repaired = load_file(self.folder / "repaired.safetensors")
        assert repaired.keys() == made.keys()
        assert all(
            bytes(repaired[n].flatten().view(torch.uint8)) == bytes(made[n].flatten().view(torch.uint8)) for n in made
        )


@pytest.fixture
def native(tmp_path):
    return Checkpoint(tmp_path, checkpoints.sd3())


@pytest.fixture
def legacy(tmp_path):
    return Checkpoint(tmp_path, checkpoints.sd3(), layout="legacy")


def entry(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


# Valid files, and what each ComfyUI version makes of them


@pytest.mark.parametrize(
    ("tensors", "choices", "ways", "outcomes"),
    [
        (checkpoints.sd3(), {}, ("header", "inline"), ("exact", "exact")),
        (checkpoints.sd3(), {"format": "float8_e5m2"}, ("header", "inline"), ("fails to load", "exact")),
        (checkpoints.sd3(), {"layout": "legacy"}, ("legacy",), ("degraded", "exact")),
        (checkpoints.t5xxl(), {}, ("header", "inline"), ("wrong image", "exact")),
        (checkpoints.t5xxl(), {"layout": "legacy"}, ("legacy",), ("degraded", "exact")),
        (checkpoints.all_in_one(), {}, ("header", "inline"), ("wrong image", "exact")),
        (checkpoints.all_in_one(), {"layout": "legacy"}, ("legacy",), ("degraded", "exact")),
        (
            checkpoints.weights(
                "model.layers.0.self_attn.k_proj.weight", "model.layers.0.post_attention_layernorm.weight"
            ),
            {},
            ("header", "inline"),
            ("degraded", "exact"),
        ),
    ],
)
def test_a_valid_file_has_no_findings(tmp_path, tensors, choices, ways, outcomes):
    Checkpoint(tmp_path, tensors, **choices)
    inspection = inspect_file(tmp_path / "made.safetensors", deep=True)
    assert (inspection.ok, inspection.findings) == (True, ())
    assert inspection.ways == ways
    assert [verdict.generation for verdict in inspection.verdicts] == ["ComfyUI 0.3.75", "ComfyUI 0.33"]
    assert tuple(verdict.outcome for verdict in inspection.verdicts) == outcomes
    assert not inspection.repairable


def test_the_summary_is_readable(native):
    lines = inspect_file(native.save()).summary.splitlines()
    assert lines[0] == (
        "bad.safetensors: SD3, SD3.5, 8 scaled FP8 layers (float8_e4m3fn; marked: header, inline): no problems"
    )
    assert lines[2] == "ComfyUI 0.33: exact"
    del native.tensors[f"{QKV}.weight_scale"]
    assert inspect_file(native.save()).summary.splitlines()[0].endswith(": 1 error")


def test_an_inspection_is_plain_data(native):
    data = inspect_file(native.save()).to_dict()
    assert json.loads(json.dumps(data))["ok"] is True


def test_a_file_without_fp8_is_fine(tmp_path):
    save_file(checkpoints.sd3(), tmp_path / "a.safetensors")
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert (inspection.ok, inspection.verdicts) == (True, ())
    assert [finding.code for finding in inspection.findings] == ["no_fp8"]


def test_an_unknown_family_is_a_note(tmp_path):
    Checkpoint(tmp_path, checkpoints.weights("blocks.0.attn.q.weight", "blocks.1.attn.q.weight"))
    assert [finding.code for finding in inspect_file(tmp_path / "made.safetensors").findings] == ["unknown_family"]


def test_a_file_that_is_not_safetensors_raises(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="truncated|pickle"):
        inspect_file(tmp_path / "a.safetensors")


# Invalid files that can be repaired


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_scale_of_another_dtype(native, dtype):
    native.tensors[f"{QKV}.weight_scale"] = native.tensors[f"{QKV}.weight_scale"].to(dtype)
    assert native.codes() == {"scale_dtype": "error"}
    assert native.repaired().ok
    assert load_file(native.folder / "repaired.safetensors")[f"{QKV}.weight_scale"].dtype == torch.float32


@pytest.mark.parametrize(("shape", "severity"), [((1,), "warning"), ((1, 1), "error")])
def test_a_scale_that_is_not_0_dim(native, shape, severity):
    native.tensors[f"{QKV}.weight_scale"] = native.tensors[f"{QKV}.weight_scale"].reshape(shape)
    assert native.codes() == {"scale_shape": severity}
    native.assert_repaired()


def test_a_missing_marker(legacy):
    del legacy.tensors["scaled_fp8"]
    assert legacy.codes() == {"missing_marker": "error"}
    assert legacy.repaired().ok


def test_a_marker_of_another_dtype(legacy):
    legacy.tensors["scaled_fp8"] = torch.zeros(2).to(E5M2)
    assert legacy.codes() == {"marker_dtype": "error"}
    assert legacy.repaired(layout="legacy").findings == ()


def test_legacy_e5m2(tmp_path):
    checkpoint = Checkpoint(tmp_path, checkpoints.sd3(), layout="legacy", format="float8_e5m2")
    assert checkpoint.codes() == {"legacy_e5m2": "error"}
    inspection = checkpoint.repaired()
    assert (inspection.findings, inspection.formats, inspection.ways) == ((), ("float8_e5m2",), ("header", "inline"))


def test_header_entries_that_are_plain_strings(native):
    native.header = dict.fromkeys(native.header, "float8_e4m3fn")
    assert native.codes() == {"entry_not_object": "error"}
    assert native.repaired().findings == ()


def test_a_header_entry_that_cannot_be_read(native):
    native.metadata[HEADER] = "{"
    assert native.codes() == {"unreadable_entry": "error", "inline_only": "warning"}
    native.assert_repaired()


def test_an_entry_of_another_format(native):
    native.header = native.header | {QKV: {"format": "float8_e5m2", "full_precision_matrix_mult": True}}
    assert native.codes() == {"entry_format": "error"}
    native.assert_repaired()


def test_a_layer_without_any_entry(native):
    native.header = {name: value for name, value in native.header.items() if name != QKV}
    del native.tensors[f"{QKV}.comfy_quant"]
    assert native.codes() == {"missing_entry": "error"}
    native.assert_repaired()


def test_inline_entries_alone(native):
    del native.metadata[HEADER]
    assert native.codes() == {"inline_only": "warning"}
    inspection = inspect_file(native.save())
    assert [verdict.outcome for verdict in inspection.verdicts] == ["wrong image", "exact"]
    native.assert_repaired()


def test_the_header_alone_is_valid_and_repair_adds_inline_entries(native):
    native.tensors = {name: tensor for name, tensor in native.tensors.items() if not name.endswith(".comfy_quant")}
    assert native.codes() == {}
    native.assert_repaired()


def test_names_without_the_prefix_in_an_all_in_one_file(tmp_path):
    checkpoint = Checkpoint(tmp_path, checkpoints.all_in_one())
    checkpoint.header = {
        name.removeprefix("model.diffusion_model."): value for name, value in checkpoint.header.items()
    }
    checkpoint.tensors = {n: tensor for n, tensor in checkpoint.tensors.items() if not n.endswith(".comfy_quant")}
    assert checkpoint.codes() == {"unprefixed_name": "error"}
    checkpoint.assert_repaired()


def test_orphan_scales_and_entries(native):
    native.tensors["gone.weight_scale"] = torch.tensor(1.0)
    native.tensors["context_embedder.weight_scale"] = torch.tensor(1.0)
    native.header = native.header | {"gone": {"format": "float8_e4m3fn"}}
    native.tensors["gone.comfy_quant"] = entry({"format": "float8_e4m3fn"})
    native.tensors["p.scaled_fp8"] = torch.zeros(2).to(E4M3)
    assert native.codes() == {"orphan_scale": "warning", "orphan_entry": "warning", "orphan_marker": "warning"}
    native.assert_repaired()


def test_an_entry_for_a_weight_that_is_not_quantized(native):
    native.header = native.header | {"context_embedder": {"format": "float8_e4m3fn"}}
    assert native.codes() == {"orphan_entry": "error"}
    native.assert_repaired()


def test_legacy_scales_beside_header_entries(native):
    for name in [name for name in native.tensors if name.endswith(".weight_scale")]:
        native.tensors[name.replace(".weight_scale", ".scale_weight")] = native.tensors.pop(name)
    native.tensors["scaled_fp8"] = torch.zeros(2).to(E4M3)
    assert native.codes() == {"mixed_layouts": "error"}
    native.assert_repaired()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("joint_blocks.0.norm.weight", (16,)), ("proj.weight", (16, 16, 2, 2)), ("model.embed_tokens.weight", (32, 16))],
)
def test_a_quantized_norm_convolution_or_embedding_is_dequantized(native, name, shape):
    layer = name.removesuffix(".weight")
    native.tensors |= {name: torch.full(shape, 3.0).to(E4M3), f"{layer}.weight_scale": torch.tensor(0.5)}
    native.tensors[f"{layer}.comfy_quant"] = entry({"format": "float8_e4m3fn"})
    native.header = native.header | {layer: {"format": "float8_e4m3fn"}}
    assert native.codes() == {"quantized_no_linear": "error"}
    assert native.repaired().findings == ()
    assert torch.equal(load_file(native.folder / "repaired.safetensors")[name], torch.full(shape, 1.5))


def test_a_quantized_clip_l_is_dequantized(tmp_path):
    checkpoint = Checkpoint(tmp_path, checkpoints.sd3("model.diffusion_model."))
    layer = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    checkpoint.tensors |= {f"{layer}.weight": torch.full((16, 16), 3.0).to(E4M3)}
    checkpoint.tensors |= {f"{layer}.weight_scale": torch.tensor(0.5)}
    checkpoint.header = checkpoint.header | {layer: {"format": "float8_e4m3fn"}}
    codes = checkpoint.codes()
    assert codes == {"quantized_untouchable": "error"}
    assert checkpoint.repaired().findings == ()
    repaired = load_file(checkpoint.folder / "repaired.safetensors")
    assert torch.equal(repaired[f"{layer}.weight"], torch.full((16, 16), 1.5))


def test_repair_can_turn_native_into_legacy_and_back(native, tmp_path):
    native.repaired(layout="legacy")
    inspection = repair_file(tmp_path / "repaired.safetensors", tmp_path / "again.safetensors")
    assert inspection.ways == ("header", "inline")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "made.safetensors").read_bytes()


def test_repair_keeps_the_matmul_switch_and_input_scales(tmp_path):
    tensors = checkpoints.sd3() | {f"{QKV}.input_scale": torch.tensor(0.25)}
    checkpoint = Checkpoint(tmp_path, tensors, matmul="fp8", layout="legacy")
    assert checkpoint.repaired().ok
    repaired = load_file(tmp_path / "repaired.safetensors")
    assert json.loads(bytes(repaired[f"{QKV}.comfy_quant"])) == {"format": "float8_e4m3fn"}
    assert repaired[f"{QKV}.input_scale"].item() == 0.25


# Invalid files that cannot be repaired without the 16-bit model


def assert_not_repairable(checkpoint, code):
    assert checkpoint.codes(deep=True)[code] == "error"
    with pytest.raises(CheckpointError, match="cannot be repaired: error: "):
        checkpoint.repaired()
    assert not (checkpoint.folder / "repaired.safetensors").exists()


@pytest.mark.parametrize("layout", ["native", "legacy"])
def test_a_missing_scale(tmp_path, layout):
    checkpoint = Checkpoint(tmp_path, checkpoints.sd3(), layout=layout)
    del checkpoint.tensors[f"{QKV}.{'weight_scale' if layout == 'native' else 'scale_weight'}"]
    assert_not_repairable(checkpoint, "missing_scale")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_scale(native, value):
    native.tensors[f"{QKV}.weight_scale"] = torch.tensor(value)
    assert_not_repairable(native, "scale_value")


def test_a_scale_for_each_row(native):
    native.tensors[f"{QKV}.weight_scale"] = torch.ones(32, 1)
    assert_not_repairable(native, "scale_shape")


def test_the_diffusers_layout(native):
    native.tensors |= checkpoints.weights("single_transformer_blocks.0.attn.to_q.weight")
    assert_not_repairable(native, "diffusers_layout")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_deep_inspection_finds_nan_codes(native, code):
    native.tensors[f"{QKV}.weight"].view(torch.uint8)[0, 0] = code
    assert native.codes() == {}
    assert native.codes(deep=True) == {"nan_codes": "error"}


# Warnings


def test_a_scale_too_small_for_fp16(native):
    native.tensors[f"{QKV}.weight_scale"] = torch.tensor(2.0**-15)
    assert native.codes() == {"scale_small": "warning"}


def test_a_side_that_is_not_divisible_by_16(native):
    native.tensors[f"{QKV}.weight"] = torch.zeros(24, 16).to(E4M3)
    assert native.codes() == {"odd_side": "warning"}


def test_fp8_without_scale_or_entry_beside_scaled_layers(native):
    native.tensors["joint_blocks.7.mlp.weight"] = torch.zeros(16, 16).to(E4M3)
    assert native.codes() == {"unscaled_weight": "warning"}


def test_plain_fp8(tmp_path):
    save_file({name: tensor.to(E4M3) for name, tensor in checkpoints.sd3().items()}, tmp_path / "a.safetensors")
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert [finding.code for finding in inspection.findings] == ["unscaled"]
    assert inspection.ok


def test_other_quantizations_are_noted_and_not_repaired(native):
    native.tensors |= {"other.weight": torch.zeros(16, 8, dtype=torch.uint8), "other.weight_scale": torch.ones(16, 1)}
    native.header = native.header | {"other": {"format": "nvfp4"}}
    assert native.codes() == {"other_format": "note"}
    with pytest.raises(CheckpointError, match="nvfp4"):
        native.repaired()


def test_repair_never_overwrites_its_source(native):
    path = native.save()
    with pytest.raises(CheckpointError, match="is the source itself"):
        repair_file(path, path, overwrite=True)
