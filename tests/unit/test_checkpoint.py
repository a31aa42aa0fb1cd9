"""The file job: what is in the new file, what is refused, and that nothing is left behind."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels.engine.file_job import plan_file, quantize_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.numerics.quantized_tensor import dequantize_tensor, quantize_tensor
from stochastic_fp8_pack.kernels.state_dict.inspection import inspect_file

QKV = "joint_blocks.0.x_block.attn.qkv"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture
def source(tmp_path):
    save_file(checkpoints.sd3(), tmp_path / "in.safetensors", {"config": "{}", "format": "pt"})
    return tmp_path / "in.safetensors"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


def bits(tensor):
    return bytes(tensor.flatten().contiguous().view(torch.uint8))


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def save(path, tensors, entries=None):
    save_file(tensors, path, entries)
    return path


# The result


def test_quantized_layers_are_what_quantize_tensor_makes(source, target):
    quantize_file(source, target, seed=7, rounding="owlshift", scaling="owlscale")
    result = load_file(target)
    expected = quantize_tensor(
        load_file(source)[f"{QKV}.weight"], seed=7, rounding="owlshift", scaling="owlscale", key=f"{QKV}.weight"
    )
    assert result[f"{QKV}.weight"].dtype == E4M3
    assert bits(result[f"{QKV}.weight"]) == bits(expected.codes)
    assert bits(result[f"{QKV}.weight_scale"]) == bits(expected.scale)
    assert (result[f"{QKV}.weight_scale"].dtype, result[f"{QKV}.weight_scale"].shape) == (torch.float32, ())


def test_a_native_file_holds_codes_scales_entries_and_the_rest_bit_for_bit(source, target):
    quantize_file(source, target)
    before, after = load_file(source), load_file(target)
    quantized = {name for name, tensor in after.items() if tensor.dtype == E4M3}
    assert quantized == {
        f"joint_blocks.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("context_block.attn.qkv", "x_block.attn.qkv", "x_block.mlp.fc1", "x_block.mlp.fc2")
    }
    layers = {name.removesuffix(".weight") for name in quantized}
    assert after.keys() - before.keys() == {
        f"{layer}{end}" for layer in layers for end in (".weight_scale", ".comfy_quant")
    }
    assert all(bits(after[name]) == bits(before[name]) for name in before.keys() - quantized)
    entry = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert json.loads(bytes(after[f"{QKV}.comfy_quant"])) == entry
    assert json.loads(metadata(target)["_quantization_metadata"]) == {
        "format_version": "1.0",
        "layers": dict.fromkeys(layers, entry),
    }


@pytest.mark.parametrize(("matmul", "elements"), [("full", 2), ("fp8", 0)])
@pytest.mark.parametrize(("format", "dtype"), [("float8_e4m3fn", E4M3), ("float8_e5m2", E5M2)])
def test_a_legacy_file_holds_a_marker_and_scales(source, target, format, dtype, matmul, elements):
    quantize_file(source, target, layout="legacy", format=format, matmul=matmul)
    result = load_file(target)
    assert (result["scaled_fp8"].dtype, result["scaled_fp8"].shape) == (dtype, (elements,))
    assert result[f"{QKV}.weight"].dtype == dtype
    assert result[f"{QKV}.scale_weight"].shape == ()
    assert "_quantization_metadata" not in metadata(target)
    assert not [name for name in result if name.endswith((".weight_scale", ".comfy_quant"))]


def test_matmul_fp8_leaves_the_switch_out_of_the_entries(source, target):
    report = quantize_file(source, target, matmul="fp8")
    assert json.loads(bytes(load_file(target)[f"{QKV}.comfy_quant"])) == {"format": "float8_e4m3fn"}
    assert any("clamp activations" in note for note in report.notes)


def test_the_source_and_given_metadata_stay_beside_the_recipe(source, target):
    quantize_file(source, target, seed=3, keep=["fc2"], metadata={"workflow": "{…}"})
    entries = metadata(target)
    assert entries.keys() == {"config", "format", "workflow", "_quantization_metadata", "stochastic_fp8"}
    assert (entries["config"], entries["workflow"]) == ("{}", "{…}")
    recipe = json.loads(entries["stochastic_fp8"])
    assert recipe | {"quantized": 0, "kept_layers": 0} == {
        "version": "0.1.0",
        "source": "in.safetensors",
        "family": "sd3",
        "quantized": 0,
        "kept_layers": 0,
        "format": "float8_e4m3fn",
        "rounding": "stochastic",
        "scaling": "absmax",
        "seed": 3,
        "layers": "auto",
        "keep": ["fc2"],
        "only": [],
        "suffixes": [".weight"],
        "layout": "native",
        "matmul": "full",
        "nonfinite": "error",
        "calibration": "",
        "size_limit": 0.0,
        "target_quality": 0.0,
    }
    assert f"{QKV}.weight" in recipe["quantized"]
    assert "context_embedder.weight" in recipe["kept_layers"]


def test_the_same_source_and_recipe_give_the_same_file(source, tmp_path):
    for name in ("a", "b"):
        quantize_file(source, tmp_path / f"{name}.safetensors", statistics=name == "a")
    quantize_file(source, tmp_path / "c.safetensors", seed=1)
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "owlshift", "complex_neighbor", "shift_perturb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_rounding_and_source_dtype_gives_a_sound_file(tmp_path, target, dtype, rounding):
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoints.sd3().items()}
    report = quantize_file(save(tmp_path / "in.safetensors", tensors), target, rounding=rounding)
    assert inspect_file(target, deep=True).ok
    assert {layer.source_dtype for layer in report.layers} == {str(dtype).removeprefix("torch.")}
    scaled = load_file(target)
    back = dequantize_tensor(scaled[f"{QKV}.weight"], scaled[f"{QKV}.weight_scale"])
    original = tensors[f"{QKV}.weight"].float()
    assert ((back - original).abs() <= original.abs() / 8 + original.abs().max() / 448 / 512).all()


def test_the_layers_of_an_all_in_one_file_carry_their_prefix(tmp_path, target):
    source = save(tmp_path / "in.safetensors", checkpoints.all_in_one())
    report = quantize_file(source, target)
    result = load_file(target)
    prefixes = {"model.diffusion_model": 8, "text_encoders.t5xxl.transformer": 2}
    layers = json.loads(metadata(target)["_quantization_metadata"])["layers"]
    assert {prefix: sum(layer.startswith(prefix) for layer in layers) for prefix in prefixes} == prefixes
    assert {layer.key.split(".")[0] for layer in report.layers} == {"joint_blocks", "encoder"}
    alone = quantize_tensor(checkpoints.sd3()[f"{QKV}.weight"], key=f"{QKV}.weight")
    assert bits(result[f"model.diffusion_model.{QKV}.weight"]) == bits(alone.codes)
    assert any("ComfyUI 0.3.75: wrong image; all-in-one" in note for note in report.notes)
    assert inspect_file(target).ok


def test_an_all_in_one_legacy_file_has_a_marker_for_each_network(tmp_path, target):
    quantize_file(save(tmp_path / "in.safetensors", checkpoints.all_in_one()), target, layout="legacy")
    markers = {name for name in load_file(target) if name.endswith("scaled_fp8")}
    assert markers == {"model.diffusion_model.scaled_fp8", "text_encoders.t5xxl.transformer.scaled_fp8"}
    assert inspect_file(target).ok


def test_the_files_of_an_index_become_one(tmp_path, target):
    tensors = list(checkpoints.sd3().items())
    shards = {"a.safetensors": dict(tensors[:6]), "b.safetensors": dict(tensors[6:])}
    for name, shard in shards.items():
        save_file(shard, tmp_path / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    quantize_file(tmp_path / "m.safetensors.index.json", target)
    quantize_file(save(tmp_path / "whole.safetensors", dict(tensors)), tmp_path / "other.safetensors")
    one, other = load_file(target), load_file(tmp_path / "other.safetensors")
    assert {name: bits(tensor) for name, tensor in one.items()} == {
        name: bits(tensor) for name, tensor in other.items()
    }


def test_odd_tensor_names_survive(tmp_path, target):
    odd = {name: torch.ones(2) for name in ("", 'quote"', "new\nline", "重み", "a" * 500)}
    quantize_file(save(tmp_path / "in.safetensors", checkpoints.sd3() | odd), target)
    assert odd.keys() <= load_file(target).keys()


def test_input_scales_stay_with_their_layers(tmp_path, target):
    tensors = checkpoints.sd3() | {f"{QKV}.scale_input": torch.tensor(0.5)}
    quantize_file(save(tmp_path / "in.safetensors", tensors), target, matmul="fp8")
    assert load_file(target)[f"{QKV}.input_scale"].item() == 0.5


# The report


def test_the_report_tells_each_layer_and_each_kept_tensor(source, target):
    report = quantize_file(source, target)
    assert (report.source, report.family, len(report.layers), len(report.kept)) == ("in.safetensors", "sd3", 8, 6)
    layer = next(layer for layer in report.layers if layer.key == f"{QKV}.weight")
    original = load_file(source)[f"{QKV}.weight"]
    assert (layer.shape, layer.source_dtype, layer.bytes_before) == ((32, 16), "bfloat16", 1024)
    assert layer.amax == original.abs().max().item()
    assert layer.scale == load_file(target)[f"{QKV}.weight_scale"].item()
    assert layer.error.count == 512
    assert {tensor.key: tensor.reason.text for tensor in report.kept} == {
        "joint_blocks.0.x_block.attn.qkv.bias": "not a Linear layer",
        "x_embedder.proj.weight": "not a Linear layer",
        "context_embedder.weight": "kept by pattern 'context_embedder' of preset sd3",
        "final_layer.linear.weight": "kept by pattern 'final_layer' of preset sd3",
        "joint_blocks.0.x_block.adaLN_modulation.1.weight": "kept by pattern 'adaLN_modulation' of preset sd3",
        "joint_blocks.1.x_block.adaLN_modulation.1.weight": "kept by pattern 'adaLN_modulation' of preset sd3",
    }


def test_statistics_can_be_left_out(source, target):
    assert quantize_file(source, target, statistics=False).error is None


def test_a_plan_tells_the_same_without_writing(source, target):
    choices = {"keep": ["fc1"], "format": "float8_e5m2", "layout": "legacy"}
    plan = plan_file(source, **choices)
    assert not target.exists()
    report = quantize_file(source, target, **choices)
    assert [(layer.key, layer.shape, layer.bytes_after) for layer in plan.layers] == [
        (layer.key, layer.shape, layer.bytes_after) for layer in report.layers
    ]
    assert (plan.kept, plan.notes, plan.pattern_hits) == (report.kept, report.notes, report.pattern_hits)
    assert (plan.recipe, plan.bytes_after) == (report.recipe, report.bytes_after)
    assert {(layer.amax, layer.scale, layer.error) for layer in plan.layers} == {(0.0, 0.0, None)}


@pytest.mark.parametrize(
    ("choices", "note"),
    [
        ({}, "ComfyUI 0.3.75: exact; on an FP8 GPU or with little memory"),
        ({"format": "float8_e5m2"}, "ComfyUI 0.3.75: fails to load; float8_e5m2 entries are unknown (KeyError)"),
        ({"format": "float8_e5m2"}, "ComfyUI 0.33: exact; if its comfy.quant_ops.QUANT_ALGOS lists float8_e5m2"),
        (
            {"format": "float8_e5m2", "layout": "legacy"},
            "ComfyUI 0.33: wrong image; legacy E5M2",
        ),
        ({"layout": "legacy"}, "ComfyUI 0.3.75: degraded; every unquantized Linear weight and every bias is cast"),
    ],
)
def test_what_each_comfyui_makes_of_the_file_is_noted(source, choices, note):
    assert any(line.startswith(note) for line in plan_file(source, **choices).notes)


def test_t5_is_noted_to_need_legacy_in_0_3_75(tmp_path):
    source = save(tmp_path / "in.safetensors", checkpoints.t5xxl())
    assert "ComfyUI 0.3.75: wrong image; T5 is read in the legacy layout only" in plan_file(source).notes


def test_progress_counts_the_bytes_of_the_source(source, target):
    calls = []
    quantize_file(source, target, progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in checkpoints.sd3().values())
    assert calls[0][:2] == (0, total)
    assert calls[-1] == (total, total, "")
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert f"{QKV}.weight" in {key for _, _, key in calls}


# Already quantized sources


@pytest.mark.parametrize("layout", ["native", "legacy"])
def test_scaled_fp8_is_dequantized_first(source, tmp_path, target, layout):
    quantize_file(source, tmp_path / "e5m2.safetensors", format="float8_e5m2", layout=layout)
    report = quantize_file(tmp_path / "e5m2.safetensors", target, seed=2)
    first = load_file(tmp_path / "e5m2.safetensors")
    ending = {"native": "weight_scale", "legacy": "scale_weight"}[layout]
    between = dequantize_tensor(first[f"{QKV}.weight"], first[f"{QKV}.{ending}"])
    expected = quantize_tensor(between, seed=2, key=f"{QKV}.weight")
    assert bits(load_file(target)[f"{QKV}.weight"]) == bits(expected.codes)
    assert "8 layers already in scaled FP8: dequantized first, so the error of the first rounding stays" in report.notes
    assert inspect_file(target, deep=True).ok


def test_inline_only_fp8_is_dequantized_too(source, tmp_path, target):
    quantize_file(source, tmp_path / "native.safetensors", format="float8_e5m2")
    inline = save(tmp_path / "inline.safetensors", load_file(tmp_path / "native.safetensors"))
    report = quantize_file(inline, target)
    assert "8 layers already in scaled FP8: dequantized first, so the error of the first rounding stays" in report.notes


def test_the_same_format_again_is_refused_unless_asked(source, tmp_path, target):
    quantize_file(source, tmp_path / "once.safetensors")
    with pytest.raises(CheckpointError, match="8 layers are already float8_e4m3fn, e.g. .*; start from"):
        quantize_file(tmp_path / "once.safetensors", target)
    with pytest.raises(CheckpointError, match="already float8_e4m3fn"):
        plan_file(tmp_path / "once.safetensors")
    assert len(quantize_file(tmp_path / "once.safetensors", target, requantize=True).layers) == 8


def test_layers_that_are_scaled_already_and_kept_stay_scaled(source, tmp_path, target):
    once = tmp_path / "once.safetensors"
    quantize_file(source, once, layout="legacy", layers="all_linear", format="float8_e5m2")
    report = quantize_file(once, target)
    before, after = load_file(once), load_file(target)
    assert bits(after["context_embedder.weight"]) == bits(before["context_embedder.weight"])
    assert bits(after["context_embedder.weight_scale"]) == bits(before["context_embedder.scale_weight"])
    assert json.loads(bytes(after["context_embedder.comfy_quant"]))["format"] == "float8_e5m2"
    assert "4 layers already in scaled FP8: left unchanged, bit for bit" in report.notes
    assert inspect_file(target).ok
    with pytest.raises(CheckpointError, match="the legacy layout holds one format .* choose layout native"):
        quantize_file(once, tmp_path / "mixed.safetensors", layout="legacy")


def test_fp8_without_scales_is_taken_at_its_value(tmp_path, target):
    tensors = {name: tensor.to(E5M2) for name, tensor in checkpoints.sd3().items()}
    report = quantize_file(save(tmp_path / "in.safetensors", tensors), target)
    expected = quantize_tensor(tensors[f"{QKV}.weight"].float(), key=f"{QKV}.weight")
    assert bits(load_file(target)[f"{QKV}.weight"]) == bits(expected.codes)
    assert "8 layers in FP8 without a scale: what that lost cannot be recovered" in report.notes


def test_a_broken_scale_is_refused(source, tmp_path, target):
    quantize_file(source, tmp_path / "once.safetensors", format="float8_e5m2")
    tensors = load_file(tmp_path / "once.safetensors") | {f"{QKV}.weight_scale": torch.tensor(float("nan"))}
    with pytest.raises(CheckpointError, match=r"qkv\.weight_scale' is nan; start from the 16-bit file"):
        quantize_file(save(tmp_path / "bad.safetensors", tensors), target)


def test_another_quantization_is_refused(tmp_path, target):
    entry = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    source = save(tmp_path / "in.safetensors", checkpoints.sd3() | {f"{QKV}.comfy_quant": entry})
    with pytest.raises(CheckpointError, match="is already quantized as nvfp4; start from the 16-bit file"):
        quantize_file(source, target)


# Refusals


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        *[("format", "fp8"), ("rounding", "up"), ("scaling", "max"), ("layers", "all"), ("layout", "new")],
        *[("matmul", "fast"), ("nonfinite", "zero")],
    ],
)
def test_an_unknown_choice_lists_the_valid_ones(source, target, choice, value):
    with pytest.raises(ValueError, match=f"unknown {choice} '{value}': choose one of "):
        quantize_file(source, target, **{choice: value})
    assert not target.exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (checkpoints.clip_l(), "nothing to quantize: ComfyUI has no FP8 detection for CLIP-L"),
        (checkpoints.weights("decoder.conv_in.weight"), "nothing to quantize: a VAE is never quantized"),
        (checkpoints.weights("a.bias"), "nothing to quantize: there is no Linear layer that FP8 can hold"),
        ({}, "nothing to quantize: there is no Linear layer that FP8 can hold"),
        (
            checkpoints.weights("encoder.block.23.layer.1.DenseReluDense.wi.weight", shape=(16, 24)),
            "a side is not divisible by 16, which text encoders need",
        ),
        (
            checkpoints.weights("single_transformer_blocks.0.attn.to_q.weight"),
            "holds Flux .* in the diffusers layout, .* quantize the ComfyUI version",
        ),
    ],
)
def test_a_file_that_cannot_be_quantized_is_refused_with_the_reason(tmp_path, target, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        quantize_file(save(tmp_path / "in.safetensors", tensors), target)
    assert not target.exists()


def test_the_source_is_never_overwritten(source, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    for target in (source, tmp_path / "link.safetensors", tmp_path / "." / "in.safetensors"):
        with pytest.raises(CheckpointError, match="is the source itself"):
            quantize_file(source, target, overwrite=True)
    assert source.read_bytes() == before


def test_an_existing_target_is_kept_unless_asked(source, target):
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"out.safetensors: already exists; choose another name, or ask"):
        quantize_file(source, target)
    assert target.read_bytes() == b"mine"
    quantize_file(source, target, overwrite=True)
    assert inspect_file(target).ok


def nonfinite_source(tmp_path):
    tensors = checkpoints.sd3()
    tensors[f"{QKV}.weight"][0, :3] = float("nan")
    tensors["joint_blocks.1.x_block.mlp.fc1.weight"][0, 0] = float("-inf")
    tensors["context_embedder.weight"][0, 0] = float("nan")
    return save(tmp_path / "in.safetensors", tensors)


def test_every_tensor_that_is_not_finite_is_named_and_nothing_is_left(tmp_path, target):
    with pytest.raises(CheckpointError) as caught:
        quantize_file(nonfinite_source(tmp_path), target)
    assert str(caught.value) == (
        "in.safetensors: holds values that are not finite: joint_blocks.0.x_block.attn.qkv.weight (3 NaN, 0 infinite); "
        "joint_blocks.1.x_block.mlp.fc1.weight (0 NaN, 1 infinite); nonfinite 'keep' leaves these tensors unchanged"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_tensor_that_is_not_finite_can_be_kept(tmp_path, target):
    source = nonfinite_source(tmp_path)
    report = quantize_file(source, target, nonfinite="keep")
    assert len(report.layers) == 6
    kept = {tensor.key: tensor.reason.text for tensor in report.kept}
    assert kept[f"{QKV}.weight"] == "holds 3 NaN and 0 infinite values"
    assert bits(load_file(target)[f"{QKV}.weight"]) == bits(load_file(source)[f"{QKV}.weight"])
    assert f"{QKV}.weight is kept: it holds 3 NaN and 0 infinite values" in report.notes
    assert inspect_file(target).ok


def test_a_file_in_which_nothing_is_finite_is_refused(tmp_path, target):
    tensors = {name: torch.full_like(tensor, float("inf")) for name, tensor in checkpoints.sd3().items()}
    with pytest.raises(CheckpointError, match="nothing to quantize: .*holds 0 NaN and 512 infinite values"):
        quantize_file(save(tmp_path / "in.safetensors", tensors), target, nonfinite="keep")


NORM, TABLE = "joint_blocks.0.x_block.attn.ln_q.weight", "joint_blocks.0.x_block.attn.table"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nonfinite", ["error", "keep"])
def test_values_that_are_not_finite_in_a_kept_tensor_are_counted(tmp_path, target, dtype, nonfinite, monkeypatch):
    """Over the pieces in which a tensor is copied; a tensor without any is not mentioned."""
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.reader.COPY_CHUNK", 64)
    tensors = checkpoints.sd3() | {NORM: torch.ones(200).to(dtype), TABLE: torch.arange(200)}
    tensors[NORM][[0, 77, 199]] = float("nan")
    tensors[NORM][100] = float("-inf")
    report = quantize_file(save(tmp_path / "in.safetensors", tensors), target, nonfinite=nonfinite)
    assert [note for note in report.notes if "finite" in note] == [
        f"1 kept tensor with values that are not finite, copied as they are: {NORM} (3 NaN, 1 infinite). Images can be "
        "black: start from a sound copy of the model"
    ]
    assert bits(load_file(target)[NORM]) == bits(tensors[NORM])


def test_several_kept_tensors_that_are_not_finite_share_a_note(tmp_path, target):
    tensors = checkpoints.sd3() | {f"norm.{i}.weight": torch.full((2,), float("nan")) for i in range(3)}
    report = quantize_file(save(tmp_path / "in.safetensors", tensors), target)
    (note,) = (note for note in report.notes if "finite" in note)
    assert note.startswith("3 kept tensors with values that are not finite, copied as they are: norm.")
    assert "(2 NaN, 0 infinite) and others" in note


@pytest.mark.parametrize(("format", "codes"), [("float8_e4m3fn", (0x7F, 0xFF, 0x7E)), ("float8_e5m2", (0x7F, 0xFC, 1))])
def test_codes_that_are_not_finite_in_a_kept_layer_are_counted(source, tmp_path, target, format, codes):
    """E4M3 has no infinities: both codes are NaN. In E5M2, one is NaN and one infinite."""
    quantize_file(source, tmp_path / "fp8.safetensors", format=format)
    tensors = load_file(tmp_path / "fp8.safetensors")
    tensors[f"{QKV}.weight"].view(torch.uint8)[0, :3] = torch.tensor(codes, dtype=torch.uint8)
    damaged = save(tmp_path / "damaged.safetensors", tensors, metadata(tmp_path / "fp8.safetensors"))
    report = quantize_file(damaged, target, keep=[QKV], format=format, requantize=True)
    counts = "2 NaN, 0 infinite" if format == "float8_e4m3fn" else "1 NaN, 1 infinite"
    assert [f"{QKV}.weight ({counts})" in note for note in report.notes if "not finite" in note] == [True]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, PermissionError, FileExistsError, OSError])
@pytest.mark.parametrize("at", [0, 5, 1000])
def test_a_cancel_leaves_the_target_as_it_was(source, target, tmp_path, exception, at):
    """The callback's exception goes through as it is: an OSError is not a fault of the target."""
    target.write_bytes(b"mine")
    calls, raised = [], exception("of the callback")

    def cancel(done, total, key):
        calls.append(key)
        if len(calls) > at or done == total:
            raise raised

    with pytest.raises(exception) as caught:
        quantize_file(source, target, overwrite=True, progress=cancel)
    assert caught.value is raised
    assert target.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_a_result_that_comfyui_could_not_use_is_not_written(source, tmp_path, target):
    """A source with a quantized norm keeps it, and so its fault."""
    quantize_file(source, tmp_path / "e5m2.safetensors", format="float8_e5m2")
    tensors = load_file(tmp_path / "e5m2.safetensors")
    tensors |= {"norm.weight": torch.ones(16).to(E5M2), "norm.weight_scale": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match="was not written, .* norm.weight: is quantized, but is not a Linear"):
        quantize_file(save(tmp_path / "norm.safetensors", tensors), target)
    assert not target.exists()


JOB = """
    import importlib, os, resource, signal, sys, types
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    for name, path in (("pack", {root!r}), ("pack.kernels", {root!r} + "/kernels")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    checkpoint = importlib.import_module("pack.kernels.engine.file_job")
    calls = []
    def progress(done, total, key):
        calls.append(key)
        if len(calls) == 5:
            {halfway}
    try:
        checkpoint.quantize_file({source!r}, {target!r}, overwrite=True, progress=progress)
    except ValueError as error:
        print(error)
"""


def run_job(source, target, halfway):
    root = str(Path(__file__).resolve().parents[2])
    code = textwrap.dedent(JOB).format(root=root, source=str(source), target=str(target), halfway=halfway)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.posix
@pytest.mark.parametrize(("number", "left"), [("SIGTERM", 0), ("SIGINT", 0), ("SIGKILL", 1)])
def test_a_signal_half_way_leaves_the_target_as_it_was(source, target, tmp_path, number, left):
    target.write_bytes(b"mine")
    assert run_job(source, target, f"os.kill(os.getpid(), signal.{number})").returncode != 0
    assert target.read_bytes() == b"mine"
    assert len(list(tmp_path.glob(".stochastic_fp8-*.tmp"))) == left
    quantize_file(source, target, overwrite=True)
    assert not list(tmp_path.glob(".stochastic_fp8-*.tmp"))


@pytest.mark.posix
def test_a_full_disk_half_way_leaves_the_target_as_it_was(source, target, tmp_path):
    target.write_bytes(b"mine")
    done = run_job(source, target, "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))")
    assert done.stdout == "out.safetensors: cannot be written: File too large; nothing was changed\n", done.stderr
    assert target.read_bytes() == b"mine"
    assert not list(tmp_path.glob(".stochastic_fp8-*.tmp"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_small_disk_is_noticed(source, tmp_path):
    (tmp_path / "disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path / "disk")], check=False
    ).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        with pytest.raises(CheckpointError, match="are needed, .* are free: free .* on this disk first"):
            quantize_file(source, tmp_path / "disk" / "out.safetensors")
        assert list((tmp_path / "disk").iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)
