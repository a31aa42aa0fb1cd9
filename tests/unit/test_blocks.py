"""Blocks that are missing from a model, or lack tensors that the other blocks have."""

import key_lists
import pytest
from checkpoints import sd3
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import inspect_file, plan_file, quantize_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.selection.blocks import incomplete_blocks
from stochastic_fp8_pack.kernels.selection.components import Components

MODELS = key_lists.read()


def found(names, prefix=""):
    infos = {prefix + name: TensorInfo("bfloat16", (16, 16)) for name in names}
    return dict(incomplete_blocks(Components(infos), infos))


def without(names, start):
    assert any(name.startswith(start) for name in names)
    return [name for name in names if not name.startswith(start)]


@pytest.mark.parametrize("model", MODELS)
def test_published_models_are_complete(model):
    infos = {name: TensorInfo("bfloat16", shape) for name, shape in MODELS[model].shapes.items()}
    assert list(incomplete_blocks(Components(infos), infos)) == []


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("model", "block", "last"),
    [
        ("sd35_large", "joint_blocks.17", 37),
        ("flux_dev", "double_blocks.1", 18),
        ("flux_dev", "single_blocks.0", 37),
        ("wan21_t2v_14b", "blocks.38", 39),
        ("ltxv_2b", "transformer_blocks.5", 27),
        ("sd15", "input_blocks.5", 11),
    ],
)
def test_a_missing_block(model, block, last, prefix):
    names = without(MODELS[model].shapes, f"{block}.")
    assert found(names, prefix) == {prefix + block: f"is missing from the blocks 0 to {last}"}


@pytest.mark.parametrize(
    ("model", "tensor", "block", "fault"),
    [
        ("sd35_large", "joint_blocks.9.x_block.attn.qkv.weight", "joint_blocks.9", "lacks x_block.attn.qkv.weight"),
        ("flux_dev", "single_blocks.20.linear1", "single_blocks.20", "lacks linear1.bias and 1 other tensor"),
        ("wan21_t2v_14b", "blocks.1.self_attn.q.weight", "blocks.1", "lacks self_attn.q.weight"),
        ("ltxv_2b", "transformer_blocks.5.scale_shift_table", "transformer_blocks.5", "lacks scale_shift_table"),
    ],
)
def test_a_missing_layer(model, tensor, block, fault):
    names = without(MODELS[model].shapes, tensor)
    assert found(names) == {block: f"{fault}, which the other blocks have"}


@pytest.mark.parametrize("names", [["mlp.0.a.weight", "mlp.2.a.weight", "mlp.4.a.weight"], ["b.²", "b.99999.a", "b."]])
def test_lists_that_are_no_blocks(names):
    assert found([*sd3(), *names]) == {}


def test_blocks_of_another_kind_at_the_end():
    """As in the decoder of KOALA, whose last two blocks have no attention."""
    names = [f"joint_blocks.{i}.{part}.weight" for i in range(6) for part in ("res.0", "attn")[: 1 + (i < 4)]]
    assert found([*sd3(blocks=1), *names]) == {}


def test_blocks_of_a_pruned_unet():
    """One of them has no attention, and nor has the last."""
    names = [f"joint_blocks.{i}.{j}.{part}.weight" for i in range(6) for j in range(2 - (i in (1, 5))) for part in "ab"]
    assert found([*sd3(blocks=1), *names]) == {}


@pytest.mark.parametrize("ending", ["weight_scale_2", "weight_scale_inv", "weight.absmax", "scale_input"])
def test_a_weight_without_the_scale_that_others_have(ending):
    """It stayed in 16 bits."""
    layers = [f"joint_blocks.{i}.x_block.attn.qkv" for i in range(5) if i != 2]
    assert found([*sd3(blocks=5), *(f"{layer}.{ending}" for layer in layers)]) == {}


def test_one_file_of_a_set_has_one_fault(tmp_path):
    tensors = sd3(blocks=5)
    cut = tmp_path / "model-00001-of-00002.safetensors"
    save_file({name: tensors[name] for name in without(tensors, "joint_blocks.2.")}, cut)
    findings = inspect_file(cut).findings
    assert [finding.code for finding in findings if finding.severity == "error"] == ["not_a_model"]


@pytest.mark.parametrize("layout", ["native", "legacy"])
@pytest.mark.parametrize("cut", ["joint_blocks.2.", "joint_blocks.2.x_block.attn.qkv."])
def test_a_scaled_file_that_lacks_a_part_is_not_exact(tmp_path, cut, layout):
    save_file(sd3(blocks=5), tmp_path / "whole.safetensors")
    quantize_file(tmp_path / "whole.safetensors", tmp_path / "made.safetensors", layout=layout)
    with safe_open(tmp_path / "made.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "made.safetensors")
    cut_file = tmp_path / "cut.safetensors"
    save_file({name: tensors[name] for name in without(tensors, cut)}, cut_file, metadata)
    assert inspect_file(tmp_path / "made.safetensors").ok
    inspection = inspect_file(cut_file)
    (finding,) = [finding for finding in inspection.findings if finding.severity == "error"]
    assert (finding.code, finding.where, finding.repairable) == ("incomplete_block", "joint_blocks.2", False)
    assert [verdict.outcome for verdict in inspection.verdicts] == ["wrong image", "wrong image"]


def test_a_job_refuses_before_the_work(tmp_path):
    tensors = sd3(blocks=5)
    save_file({name: tensors[name] for name in without(tensors, "joint_blocks.2.")}, tmp_path / "cut.safetensors")
    message = "cut.safetensors: joint_blocks.2 is missing from the blocks 0 to 4; download the model again"
    for job in (plan_file, lambda source: quantize_file(source, tmp_path / "out.safetensors")):
        with pytest.raises(CheckpointError, match=message):
            job(tmp_path / "cut.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
