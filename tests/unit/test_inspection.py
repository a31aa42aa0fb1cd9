"""Every known problem of a scaled FP8 file is found, described and, where possible, repaired."""

import json
import os
import re

import checkpoints
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels.engine.file_job import plan_file, quantize_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.files.bounded_json import parse_json
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.selection.foreign import foreign_kind, other_quantizer
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
    (tmp_path / "legacy").mkdir()
    return Checkpoint(tmp_path / "legacy", checkpoints.sd3(), layout="legacy")


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
        (checkpoints.t5xxl(), {"layout": "legacy"}, ("legacy",), ("exact", "exact")),
        (checkpoints.all_in_one(), {}, ("header", "inline"), ("wrong image", "exact")),
        (checkpoints.all_in_one(), {"layout": "legacy"}, ("legacy",), ("degraded", "exact")),
        (
            checkpoints.weights(
                "model.layers.0.self_attn.k_proj.weight", "model.layers.0.post_attention_layernorm.weight"
            ),
            {},
            ("header", "inline"),
            ("fails to load", "exact"),
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


# Files that are not what they should be


@pytest.mark.parametrize(
    ("data", "what", "repair"),
    [
        (b"\x80\x04", "is a Python pickle", "Convert it to safetensors first"),
        (b"PK\x03\x04" + bytes(100), "is a PyTorch pickle", "Convert it to safetensors first"),
        (b"GGUF" + bytes(100), "is a GGUF file", "Start from the 16-bit safetensors file of this model"),
        (b"<!DOCTYPE html><html>" + b" " * 100, "is a web page", "Download the model again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "is a Git LFS pointer",
            "Download the model itself",
        ),
        (b"", "is truncated", "Download it again"),
        (b"\2\0\0\0\0\0\0\0{]", "has an invalid header", "Download it again"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_finding(tmp_path, data, what, repair):
    (tmp_path / "a.safetensors").write_bytes(data)
    inspection = inspect_file(tmp_path / "a.safetensors", deep=True)
    (finding,) = inspection.findings
    assert (finding.severity, finding.code, finding.repair, finding.repairable) == (
        "error",
        "unreadable",
        repair,
        False,
    )
    assert finding.what.startswith(what)
    assert not inspection.ok
    assert [verdict.outcome for verdict in inspection.verdicts] == ["fails to load", "fails to load"]


LIMITS = {
    "tensors": ("files.header.MAX_TENSORS", 2, "lists more than 2 tensors"),
    "name": ("files.header.MAX_NAME", 10, "has a name of"),
    "entry": ("files.header.MAX_ENTRY", 10, "has more than 10 characters"),
    "metadata": ("files.header.MAX_METADATA", 0, "metadata has more than 0 entries"),
    "header": ("files.reader.MAX_HEADER", 100, "has a header of"),
    "header entry": ("files.bounded_json.MAX_VALUES", 10, "has more than 10 values"),
    "inline entries": ("state_dict.markings.MAX_ALL_INLINE", 2, "bytes of inline entries"),
    "values of inline entries": ("state_dict.markings.MAX_VALUES", 0, "inline entries of more than"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_file_beyond_the_limits_of_the_pack_may_be_fine(native, monkeypatch, limit):
    """Other programs read it, so it is not said to fail."""
    name, value, reason = LIMITS[limit]
    if limit == "header entry":  # the limit is the default of an argument
        monkeypatch.setattr(parse_json, "__defaults__", (value, None))
    else:
        monkeypatch.setattr(f"stochastic_fp8_pack.kernels.{name}", value)
    inspection = inspect_file(native.save())
    (finding,) = inspection.findings
    assert (finding.severity, finding.code) == ("error", "beyond_limits")
    assert reason in finding.what
    assert [verdict.outcome for verdict in inspection.verdicts] == ["cannot tell", "cannot tell"]
    assert reason in str(inspection.verdicts[0])
    assert not inspection.ok


def test_an_index_beyond_the_limits_of_the_pack_may_be_fine(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {str(i): "one.safetensors" for i in range(3)}}))
    for name in ("MAX_TENSORS", "MAX_JSON"):
        monkeypatch.setattr(f"stochastic_fp8_pack.kernels.files.reader.{name}", 2)
        inspection = inspect_file(path)
        assert inspection.findings[0].code == "beyond_limits"
        assert {verdict.outcome for verdict in inspection.verdicts} == {"cannot tell"}


def test_a_header_that_the_safetensors_library_refuses_fails(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    os.truncate(path, 100_000_200)
    assert {verdict.outcome for verdict in inspect_file(path).verdicts} == {"fails to load"}
    with pytest.raises(SafetensorError, match="(?i)header ?too ?large"):
        load_file(path)


def test_an_inline_entry_that_is_not_read_may_be_fine(native, monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.state_dict.markings.MAX_INLINE", 2)
    inspection = inspect_file(native.save())
    assert "unreadable_entry" in {finding.code for finding in inspection.findings}
    new = {finding.outcomes.get("ComfyUI 0.33") for finding in inspection.findings if "large" in finding.what}
    assert new == {"cannot tell"}


def test_a_truncated_file_says_how_much_is_missing(native):
    path = native.save()
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    text = inspect_file(path).summary
    assert f"is truncated: 1,000 of {len(data):,} bytes are missing. Download it again." in text


def test_a_missing_file_of_a_set_is_a_finding(tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a.weight": "m-00001-of-00002.safetensors"}}))
    (finding,) = inspect_file(path).findings
    assert str(finding).startswith("error: m-00001-of-00002.safetensors: cannot be opened: ")
    assert str(finding).endswith(". Check that the file is complete and can be read.")


@pytest.mark.parametrize("name", ["a\0.safetensors", "a\ud800.safetensors"])
def test_an_index_with_a_name_that_no_file_has_is_a_finding(tmp_path, name):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a.weight": name}}))
    (finding,) = inspect_file(path).findings
    assert (finding.code, finding.repair) == ("unreadable", "Download it again")
    assert finding.what == f"names {name!r}, which is not a .safetensors file in the same folder"


@pytest.mark.parametrize("name", ["missing.safetensors", "model.ckpt"])
def test_a_file_that_is_not_there_or_of_another_kind_raises(tmp_path, name):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be opened|not a .safetensors file"):
        inspect_file(tmp_path / name)


def linear(*names, shape=(32, 16)):
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name in names}


FOREIGN = {
    "LoRA": linear(
        "lora_unet_blocks_0_q.lora_down.weight", "lora_unet_blocks_0_q.lora_up.weight", "lora_unet_blocks_0_q.alpha"
    ),
    "LoRA ": linear("transformer.blocks.0.q.lora_A.weight", "transformer.blocks.0.q.lora_B.weight"),
    "LoRA  ": linear("blocks.0.q.lokr_w1", "blocks.0.q.lokr_w2_a", "blocks.0.q.alpha"),
    "LoRA   ": linear("unet.blocks.0.q.hada_w1_a", "unet.blocks.0.q.hada_w1_b"),
    "LoRA    ": linear("blocks.0.q.down.weight", "blocks.0.q.up.weight", "blocks.0.q.alpha"),
    "LoRA     ": linear("unet_blocks_0_q.down", "unet_blocks_0_q.up"),
    "IP-Adapter": linear("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
    "ControlNet": linear("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"),
    "ControlNet ": linear(
        "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "controlnet_cond_embedding.conv_in.weight"
    ),
    "ControlNet  ": linear(
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "img_in.weight",
        "time_in.in_layer.weight",
        "controlnet_blocks.0.weight",
    ),
    "ControlNet   ": linear("input_hint_block.0.weight", "blocks.0.weight"),
    "ControlNet    ": linear("after_proj_list.0.weight", "before_proj.weight", "blocks.0.attn1.q_proj.weight"),
    "textual-inversion embedding": linear("clip_l", "clip_g"),
    "textual-inversion embedding ": linear("emb_params"),
}


Q = "joint_blocks.0.x_block.attn.qkv"
UNMERGED = "a model with LoRA layers that are not merged into its weights; merge them and save the model first"
TRAINING = "a training checkpoint with an optimizer's state or averaged weights; save the model alone first"
BESIDE = {
    f"{Q}.lora_A.weight {Q}.lora_B.weight": UNMERGED,
    f"{Q}.lora_A.default.weight {Q}.lora_B.default.weight": UNMERGED,
    f"{Q}.lora_down.weight {Q}.lora_up.weight": UNMERGED,
    f"{Q}.base_layer.weight": UNMERGED,
    "optimizer.state.0.weight": TRAINING,
    "model_ema.decay": TRAINING,
}
"""Names beside those of a whole model -> what the file is."""


@pytest.mark.parametrize("names", BESIDE)
def test_a_model_that_is_not_ready_is_refused(tmp_path, names):
    path = tmp_path / "a.safetensors"
    save_file(checkpoints.sd3() | linear(*names.split()), path)
    assert inspect_file(path).findings[0].code == "not_a_model"
    with pytest.raises(CheckpointError, match=f"^a.safetensors: is {re.escape(BESIDE[names])}$"):
        plan_file(path)
    save_file(checkpoints.all_in_one() | linear(*names.split()), path)
    allowed = BESIDE[names] == TRAINING  # outside the networks of a checkpoint
    assert ("not_a_model" in [finding.code for finding in inspect_file(path).findings]) != allowed


@pytest.mark.parametrize("scales", [0, 1, 9])
def test_unmerged_layers_are_found_whatever_their_share(tmp_path, scales):
    names = [f"{Q}.base_layer.weight", f"{Q}.base_layer.bias", f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]
    save_file(linear(*names, *(f"{Q}.{i}.weight_scale" for i in range(scales))), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="LoRA layers that are not merged"):
        plan_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_not_a_model_is_refused(tmp_path, kind):
    save_file(FOREIGN[kind], tmp_path / "a.safetensors")
    inspection = inspect_file(tmp_path / "a.safetensors")
    finding = inspection.findings[0]
    assert (finding.code, inspection.ok) == ("not_a_model", False)
    assert kind.strip() in finding.what
    assert {verdict.outcome for verdict in inspection.verdicts} == {"not recognised"}
    for job in (plan_file, lambda path: quantize_file(path, tmp_path / "b.safetensors")):
        with pytest.raises(
            CheckpointError, match=rf"a.safetensors: is an? .*{kind.strip()}.*; (use it|quantize the model)"
        ):
            job(tmp_path / "a.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_one_file_of_a_set_is_refused_and_the_index_is_not(tmp_path):
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = checkpoints.sd3()
    names = sorted(tensors)
    halves = [{name: tensors[name] for name in half} for half in (names[:6], names[6:])]
    for part, half in zip(parts, halves, strict=True):
        save_file(half, tmp_path / part)
        assert inspect_file(tmp_path / part).findings[0].code == "not_a_model"
        with pytest.raises(CheckpointError, match=r"one model; give the .safetensors.index.json of the set"):
            plan_file(tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: parts[i] for i, half in enumerate(halves) for name in half}}))
    assert inspect_file(index).ok
    assert len(plan_file(index).layers) == 8


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00001.safetensors",
        "best_of_2024.safetensors",
        "1024x1024_off.safetensors",
        "wan2.1_1_of_2.safetensors",  # no index names a file so
        "wan 1 of 2.safetensors",
        "model-1-of-2-merged.safetensors",
    ],
)
def test_names_that_are_not_those_of_a_shard(tmp_path, name):
    save_file(checkpoints.sd3(), tmp_path / name)
    assert inspect_file(tmp_path / name).ok


@pytest.mark.parametrize("model", [checkpoints.sd3(), checkpoints.all_in_one(), checkpoints.t5xxl()])
def test_a_model_is_not_taken_for_something_else(model):
    assert foreign_kind({name: TensorInfo.of(tensor) for name, tensor in model.items()}, "model.safetensors") is None
    assert other_quantizer(model) is None


@pytest.mark.parametrize(
    ("names", "program"),
    [
        (["blocks.0.q.weight.absmax", "blocks.0.q.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["blocks.0.q.qweight", "blocks.0.q.wscales", "blocks.0.q.smooth_factor"], "SVDQuant"),
        (["blocks.0.q.weight._data", "blocks.0.q.weight._scale"], "quanto"),
        (["blocks.0.q.qweight", "blocks.0.q.qzeros", "blocks.0.q.scales"], "GPTQ"),
    ],
)
def test_files_of_other_quantizers(tmp_path, names, program):
    save_file(
        checkpoints.sd3() | {name: torch.zeros(16, dtype=torch.uint8) for name in names}, tmp_path / "a.safetensors"
    )
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert inspection.ok
    assert "other_format" in [finding.code for finding in inspection.findings]
    with pytest.raises(CheckpointError, match=f"already quantized by {program}.*; start from the 16-bit file"):
        plan_file(tmp_path / "a.safetensors")


def test_the_verdict_looks_at_every_network(tmp_path):
    """The diffusion model is read by both versions; 0.3.75 does not know the text encoder beside it."""
    encoder = checkpoints.weights(
        "text_encoders.qwen3.transformer.model.language_model.layers.0.input_layernorm.weight", shape=(16,)
    )
    encoder |= checkpoints.weights("text_encoders.qwen3.transformer.model.language_model.layers.0.mlp.up_proj.weight")
    tensors = checkpoints.sd3("model.diffusion_model.")
    Checkpoint(tmp_path, tensors, layout="legacy")
    assert [each.outcome for each in inspect_file(tmp_path / "made.safetensors").verdicts] == ["degraded", "exact"]
    Checkpoint(tmp_path, tensors | encoder, layout="legacy", overwrite=True)
    inspection = inspect_file(tmp_path / "made.safetensors")
    assert [each.outcome for each in inspection.verdicts] == ["not recognised", "exact"]
    assert inspection.verdicts[0].text == "text_encoders.qwen3.transformer: this version does not know the model"
    assert str(inspection.verdicts[0]) in plan_file(tmp_path / "source.safetensors", layout="legacy").notes


@pytest.mark.parametrize(
    ("name", "code", "outcome"),
    [
        ("first_stage_model.decoder.mid.attn", "quantized_untouchable", "wrong image"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            "quantized_untouchable",
            "wrong image",
        ),
        ("somewhere.else", "outside_networks", "cannot tell"),
    ],
)
def test_scaled_layers_beside_the_diffusion_model(tmp_path, name, code, outcome):
    made = Checkpoint(tmp_path, checkpoints.all_in_one())
    made.tensors[f"{name}.weight"] = torch.ones(32, 16).to(E4M3)
    made.tensors[f"{name}.weight_scale"] = torch.tensor(0.5)
    made.tensors[f"{name}.comfy_quant"] = entry({"format": "float8_e4m3fn"})
    made.header = made.header | {name: {"format": "float8_e4m3fn"}}
    assert code in made.codes()
    assert outcomes(made)[1] == outcome


@pytest.mark.parametrize("prefix", ["transformer.", "module.", "diffusion_model.", "pipe.dit_model."])
def test_a_prefix_under_which_nothing_is_detected(tmp_path, prefix):
    save_file(checkpoints.sd3(prefix), tmp_path / "a.safetensors")
    report = quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert sum("not recognised" in note for note in report.notes) == 2
    inspection = inspect_file(tmp_path / "b.safetensors")
    assert [verdict.outcome for verdict in inspection.verdicts] == ["not recognised", "not recognised"]
    assert "undetected_prefix" in [finding.code for finding in inspection.findings]
    with pytest.raises(CheckpointError, match="would not recognise"):
        quantize_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors", for_comfyui="0.33.0")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.", "net.", ""])
def test_a_prefix_that_is_detected(tmp_path, prefix):
    save_file(checkpoints.sd3(prefix), tmp_path / "a.safetensors")
    quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    outcomes = [verdict.outcome for verdict in inspect_file(tmp_path / "b.safetensors").verdicts]
    assert outcomes == ["wrong image" if prefix else "exact", "exact"]


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
def test_the_verdict_on_an_unknown_family(tmp_path, prefix):
    names = [f"{prefix}blocks.{i}.attn.q.weight" for i in range(8)]
    Checkpoint(tmp_path, checkpoints.weights(*names))
    outcomes = {verdict.outcome for verdict in inspect_file(tmp_path / "made.safetensors").verdicts}
    assert "exact" not in outcomes
    assert "cannot tell" in outcomes


def test_hunyuan_video_under_the_names_of_its_publisher(tmp_path):
    names = [f"double_blocks.{i}.img_attn_{part}.weight" for i in range(2) for part in ("qkv", "proj")]
    tensors = checkpoints.weights("txt_in.individual_token_refiner.blocks.0.norm1.weight", shape=(16,))
    checkpoint = Checkpoint(tmp_path, tensors | checkpoints.weights(*names))
    assert checkpoint.codes() == {"renamed_layers": "warning"}
    assert [verdict.outcome for verdict in inspect_file(checkpoint.save()).verdicts] == ["wrong image", "exact"]
    checkpoint.repaired(layout="legacy")
    inspection = inspect_file(tmp_path / "repaired.safetensors")
    assert (inspection.findings, [v.outcome for v in inspection.verdicts]) == ((), ["degraded", "exact"])


def test_what_the_job_says_of_codes_of_another_format(tmp_path):
    """The int8 layers stay in the new file, which no ComfyUI reads without a custom node."""
    tensors = checkpoints.sd3()
    tensors[f"{QKV}.weight"] = torch.ones(32, 16, dtype=torch.int8)
    save_file(tensors | {f"{QKV}.weight_scale": torch.tensor(0.5)}, tmp_path / "a.safetensors")
    report = quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert sum("cannot tell" in note for note in report.notes) == 2
    assert not any("exact" in note for note in report.notes)


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
    native.tensors["context_embedder.weight_scale"] = torch.tensor(1.0)
    native.header = native.header | {"gone": {"format": "float8_e4m3fn"}}
    native.tensors["scaled_fp8"] = torch.zeros(2).to(E4M3)
    assert native.codes() == {"orphan_scale": "warning", "orphan_entry": "warning"}
    native.assert_repaired()


def test_a_marker_without_scaled_layers(tmp_path):
    """Of a network that ComfyUI detects."""
    tensors = checkpoints.sd3("model.diffusion_model.")
    markers = {prefix + "scaled_fp8": torch.zeros(2).to(E4M3) for prefix in ("", "model.diffusion_model.")}
    save_file(tensors | markers, tmp_path / "marked.safetensors")
    inspection = inspect_file(tmp_path / "marked.safetensors")
    assert [f.code for f in inspection.findings if f.severity == "warning"] == ["orphan_marker"] * 2
    repair_file(tmp_path / "marked.safetensors", tmp_path / "repaired.safetensors")
    assert load_file(tmp_path / "repaired.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("layout", ["native", "legacy"])
@pytest.mark.parametrize("job", ["repair", "quantize"])
def test_what_is_only_named_like_a_marking_stays_as_it_is(native, tmp_path, layout, job):
    """Scales without a weight and markers under unknown prefixes: nobody knows what they belong to."""
    strange = {
        "experts.w1.weight_scale": torch.rand(3, 5),
        "experts.w1.scale_weight": torch.rand(2),
        "experts.w1.input_scale": torch.tensor([7, 9]),
        "experts.w1.comfy_quant": entry({"format": "float8_e4m3fn"}),
        "experts.w1.weight_scale_inv": torch.rand(4).bfloat16(),
        ".weight_scale": torch.rand(1),
        "p.scaled_fp8": torch.rand(3).to(E5M2),
        "p.q.scaled_fp8": torch.rand(3).half(),
    }
    native.tensors |= strange
    target = tmp_path / "out.safetensors"
    if job == "repair":
        assert not any(finding.repairable for finding in repair_file(native.save(), target, layout=layout).findings)
    else:
        quantize_file(native.save(), target, format="float8_e5m2", layout=layout)
    written = load_file(target)
    for name, tensor in strange.items():
        assert written[name].dtype == tensor.dtype
        assert bytes(written[name].view(-1).view(torch.uint8)) == bytes(tensor.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("layout", ["native", "legacy"])
@pytest.mark.parametrize("job", ["repair", "quantize"])
def test_a_marker_of_an_unknown_network_keeps_its_place(tmp_path, layout, job):
    """It marks the layers below it, in whatever order prefixes are nested."""
    names = [f"{prefix}attn.{i}" for prefix in ("odd.", "odd.model.") for i in range(2)]
    tensors = {f"{name}.weight": torch.randn(16, 16).to(E4M3) for name in names}
    tensors |= {f"{name}.scale_weight": torch.tensor(0.25) for name in names}
    tensors |= {f"{prefix}scaled_fp8": torch.zeros(2).to(E4M3) for prefix in ("odd.", "odd.model.")}
    tensors["odd.other.0.weight"] = torch.randn(16, 16).bfloat16()
    save_file(tensors, tmp_path / "odd.safetensors")
    assert "missing_marker" not in {finding.code for finding in inspect_file(tmp_path / "odd.safetensors").findings}
    target = tmp_path / "out.safetensors"
    if job == "repair":
        repair_file(tmp_path / "odd.safetensors", target, layout=layout)
    else:
        quantize_file(tmp_path / "odd.safetensors", target, layout=layout, layers="all_linear", only=["other"])
    written = load_file(target)
    markers = {"odd.scaled_fp8", "odd.model.scaled_fp8"}
    if layout == "native":
        assert not any("scaled_fp8" in name for name in written)
    else:
        assert markers == {name for name in written if "scaled_fp8" in name} - {"scaled_fp8"}
        assert all(written[name].numel() == 2 for name in markers)
        assert ("scaled_fp8" in written) == (job == "quantize")
    for name in names:
        assert torch.equal(written[f"{name}.weight"].float(), tensors[f"{name}.weight"].float())


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
    assert not {"exact", "degraded"} & {*outcomes(checkpoint)}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_scale(native, value):
    native.tensors[f"{QKV}.weight_scale"] = torch.tensor(value)
    assert_not_repairable(native, "scale_value")


def outcomes(checkpoint):
    return [verdict.outcome for verdict in inspect_file(checkpoint.save()).verdicts]


def test_a_scale_for_each_row(native, legacy):
    """Loaded in both versions on a CPU: exact, except layout legacy in 0.3.75, which expects a 0-dim parameter."""
    native.tensors[f"{QKV}.weight_scale"] = torch.ones(32, 1)
    assert native.codes() == {"scale_rows": "warning"}
    assert outcomes(native) == ["exact", "exact"]
    assert all("on a CPU" in verdict.text for verdict in inspect_file(native.save()).verdicts[1:])
    with pytest.raises(CheckpointError, match="cannot be repaired: warning: "):
        native.repaired()
    legacy.tensors[f"{QKV}.scale_weight"] = torch.ones(32, 1)
    assert legacy.codes() == {"scale_rows": "warning"}
    assert outcomes(legacy) == ["fails to load", "exact"]


@pytest.mark.parametrize("shape", [(32, 2, 1), (2, 1), (1, 2)])
def test_a_scale_for_each_block(native, legacy, shape):
    for checkpoint, name in ((native, "weight_scale"), (legacy, "scale_weight")):
        checkpoint.tensors[f"{QKV}.{name}"] = torch.ones(shape)
        assert_not_repairable(checkpoint, "scale_shape")
        old = "fails to load" if checkpoint is legacy else "fails in the sampler"
        assert outcomes(checkpoint) == [old, "fails in the sampler"]


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_an_invalid_value_among_several_scales(native, value):
    native.tensors[f"{QKV}.weight_scale"] = torch.ones(32, 1)
    native.tensors[f"{QKV}.weight_scale"][3] = value
    assert_not_repairable(native, "scale_value")


def test_a_scale_that_comfyui_does_not_read(native):
    scale = native.tensors.pop(f"{QKV}.weight_scale")
    native.tensors[f"{QKV}.weight_scale_inv"] = scale
    assert native.codes() == {"unread_scale": "error"}
    assert outcomes(native) == ["wrong image", "wrong image"]
    native.assert_repaired()
    (native.folder / "repaired.safetensors").unlink()
    native.tensors[f"{QKV}.weight_scale_inv"] = torch.ones(2, 2)
    assert_not_repairable(native, "unread_scale")
    assert "Quantize this file again: its scales are read" in inspect_file(native.save()).summary


def test_two_scales(native):
    native.tensors[f"{QKV}.scale_weight"] = torch.tensor(1.0)
    assert_not_repairable(native, "two_scales")


def test_a_second_scale_of_an_unknown_kind(native, tmp_path):
    """As NVFP4 has: which values are meant is not known."""
    native.tensors[f"{QKV}.weight_scale_2"] = torch.tensor(0.5)
    assert native.codes() == {"second_scale": "warning"}
    assert outcomes(native) == ["cannot tell", "cannot tell"]
    with pytest.raises(CheckpointError, match=f"'{QKV}.weight_scale_2' beside it looks like a scale"):
        quantize_file(native.save(), tmp_path / "again.safetensors", requantize=True)


def test_a_scale_of_an_unknown_kind(native):
    native.tensors["joint_blocks.7.mlp.weight"] = torch.zeros(16, 16).to(E4M3)
    native.tensors["joint_blocks.7.mlp.dequant_scale"] = torch.tensor(1.0)
    assert_not_repairable(native, "unknown_scale")


@pytest.mark.parametrize("scale", [torch.tensor(float("nan")), torch.tensor(0.0), torch.tensor(-1.0), torch.ones(2)])
def test_an_invalid_input_scale(native, scale):
    native.tensors[f"{QKV}.input_scale"] = scale
    assert_not_repairable(native, "input_scale")


def test_a_valid_input_scale(native):
    native.tensors[f"{QKV}.input_scale"] = torch.tensor([0.5])
    assert native.codes() == {}


def test_the_diffusers_layout(native):
    native.tensors |= checkpoints.weights("single_transformer_blocks.0.attn.to_q.weight")
    assert_not_repairable(native, "diffusers_layout")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_deep_inspection_finds_nan_codes(native, code):
    native.tensors[f"{QKV}.weight"].view(torch.uint8)[0, 0] = code
    assert native.codes() == {}
    assert native.codes(deep=True) == {"nan_codes": "error"}


def test_a_deep_inspection_finds_nan_in_kept_tensors(native):
    native.tensors["context_embedder.weight"][0, 0] = float("nan")
    assert native.codes() == {}
    assert native.codes(deep=True) == {"nan_values": "error"}


def test_every_error_makes_a_verdict_worse(native):
    """A deep inspection included: "exact" never stands beside an error that concerns the version."""
    native.tensors["context_embedder.weight"][0, 0] = float("nan")
    assert {verdict.outcome for verdict in inspect_file(native.save(), deep=True).verdicts} == {"wrong image"}


def test_an_inline_entry_that_the_header_overrides_is_harmless_for_the_verdicts(native):
    native.tensors[f"{QKV}.comfy_quant"] = entry({"format": "float8_e5m2"})
    assert native.codes() == {"entry_format": "error"}
    assert outcomes(native) == ["exact", "exact"]


# Other formats


def mxfp8(native):
    native.tensors |= {"joint_blocks.0.mx.weight": torch.zeros(128, 128).to(E4M3)}
    native.tensors |= {"joint_blocks.0.mx.weight_scale": torch.full((128, 4), 127, dtype=torch.uint8)}
    native.tensors["joint_blocks.0.mx.comfy_quant"] = entry({"format": "mxfp8"})
    return native


def test_mxfp8_is_another_format(native):
    checkpoint = mxfp8(native)
    assert checkpoint.codes(deep=True) == {"other_format": "note"}
    assert inspect_file(checkpoint.save()).scaled == 8
    with pytest.raises(CheckpointError, match="cannot be repaired: .*mxfp8"):
        checkpoint.repaired()


def test_mxfp8_with_a_scale_of_another_kind_is_an_error(native):
    checkpoint = mxfp8(native)
    checkpoint.tensors["joint_blocks.0.mx.weight_scale"] = torch.tensor(1.0)
    assert checkpoint.codes()["entry_format"] == "error"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_scales_of_other_codes_without_an_entry(native, dtype):
    native.tensors |= {"other.weight": torch.ones(16, 16, dtype=dtype), "other.weight_scale": torch.tensor(0.5)}
    assert native.codes() == {"other_scale": "note"}
    assert "exact" not in outcomes(native)
    native.repaired()
    repaired = load_file(native.folder / "repaired.safetensors")
    assert torch.equal(repaired["other.weight"], native.tensors["other.weight"])
    assert repaired["other.weight_scale"] == 0.5


# Texts


def test_one_line_for_each_kind_of_finding(native):
    for name in [name for name in native.tensors if name.endswith(".weight_scale")]:
        native.tensors[name] = native.tensors[name].bfloat16()
    inspection = inspect_file(native.save())
    assert len(inspection.findings) == len(inspection.to_dict()["findings"]) == 8
    lines = inspection.summary.splitlines()
    assert len(lines) == 4
    assert [line.split(": ")[0] for line in lines[1:]] == ["ComfyUI 0.3.75", "ComfyUI 0.33", "error"]
    assert lines[3].endswith("(7 more like this)")
    assert lines[0].endswith(": 8 errors")


def test_hostile_names_in_the_summary(native):
    name = "a\x1b[2J\nComfyUI 0.33: exact\u202e"
    native.tensors[f"{name}.weight_scale"] = torch.tensor(1.0)
    summary = inspect_file(native.save()).summary
    assert len(summary.splitlines()) == 4
    assert summary.replace("\n", "").isprintable()
    assert "a\\x1b[2J\\nComfyUI 0.33: exact\\u202e" in summary


# The file job


def test_a_network_that_is_fp8_already_can_be_kept(tmp_path):
    encoder = {
        n: t.to(E4M3) if t.ndim == 2 else t for n, t in checkpoints.t5xxl("text_encoders.t5xxl.transformer.").items()
    }
    save_file(checkpoints.sd3("model.diffusion_model.") | encoder, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"\(--keep text_encoders.t5xxl\)"):
        plan_file(tmp_path / "a.safetensors")
    report = plan_file(tmp_path / "a.safetensors", keep=("text_encoders.t5xxl",))
    assert len(report.layers) == 8
    assert not any("text_encoders.t5xxl' keeps" in note for note in report.notes)


# Warnings


def test_a_scale_too_small_for_fp16(native):
    native.tensors[f"{QKV}.weight_scale"] = torch.tensor(2.0**-15)
    assert native.codes() == {"scale_small": "warning"}


@pytest.mark.parametrize(("matmul", "codes"), [("fp8", {"odd_side": "warning"}), ("full", {})])
def test_a_side_that_is_not_divisible_by_16(tmp_path, matmul, codes):
    """Only FP8 matmul cannot take it."""
    checkpoint = Checkpoint(tmp_path, checkpoints.sd3(), matmul=matmul)
    checkpoint.tensors[f"{QKV}.weight"] = torch.zeros(24, 16).to(E4M3)
    assert checkpoint.codes() == codes


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
