"""Reports as tables."""

import json
import re
from dataclasses import replace

import pytest
import torch
from reports import heavy_tailed, report_on, small_report
from stochastic_fp8_pack.kernels import display
from stochastic_fp8_pack.kernels.numerics.output_error import OutputError
from stochastic_fp8_pack.kernels.report.table import (
    describe_output_error,
    layer_kind,
    sizes_by_kind,
    table_rows,
    to_json,
    to_markdown,
)

KEYS = {
    "joint_blocks.0.x_block.attn.qkv.weight": "attention",
    "joint_blocks.0.x_block.mlp.fc1.weight": "MLP",
    "joint_blocks.0.x_block.adaLN_modulation.1.weight": "modulation",
    "double_blocks.3.img_attn.proj.weight": "attention",
    "double_blocks.3.img_mlp.0.weight": "MLP",
    "double_blocks.3.img_mod.lin.weight": "modulation",
    "single_blocks.3.linear1.weight": "other",
    "single_blocks.3.modulation.lin.weight": "modulation",
    "blocks.7.self_attn.q.weight": "attention",
    "blocks.7.ffn.0.weight": "MLP",
    "transformer_blocks.5.attn.to_q.weight": "attention",
    "transformer_blocks.5.img_mod.1.weight": "modulation",
    "transformer_blocks.5.ff.net.0.proj.weight": "MLP",
    "layers.4.feed_forward.w1.weight": "MLP",
    "layers.4.attention.out.weight": "attention",
    "encoder.block.3.layer.0.SelfAttention.q.weight": "attention",
    "encoder.block.3.layer.1.DenseReluDense.wi_0.weight": "MLP",
    "model.layers.3.self_attn.k_proj.weight": "attention",
    "model.layers.3.mlp.gate_proj.weight": "MLP",
    "t_embedder.mlp.0.weight": "other",
    "model.final_layer.linear.weight": "other",
}


@pytest.mark.parametrize("key", KEYS)
def test_layer_kind(key):
    assert layer_kind(key) == KEYS[key]


def test_sizes_by_kind():
    assert sizes_by_kind(small_report()) == {
        "modulation": (4096, 2052),
        "attention": (4096, 2052),
        "MLP": (4096, 2052),
        "other": (4096, 2052),
        "kept": (64, 64),
    }


def test_rows_are_worst_first_and_exact():
    report = report_on({"a.weight": torch.zeros(4, 4), "b.weight": heavy_tailed(0, 8, 8), "c.weight": torch.ones(2, 2)})
    unmeasured = replace(report.layers[2], key="d.weight", error=None)
    rows = table_rows(replace(report, layers=(unmeasured, *report.layers)))
    assert [row["layer"] for row in rows] == ["b.weight", "a.weight", "c.weight", "d.weight"]
    error = report.layers[1].error
    assert rows[0]["sqnr"] == error.sqnr
    assert rows[0]["bias"] == error.bias
    assert rows[0]["flushed"] == error.flushed / 64
    assert rows[1]["sqnr"] is None
    assert rows[3]["bias"] is None


def test_json_is_strict_and_complete():
    def refuse(constant):
        raise AssertionError(constant)

    report = small_report()
    table = json.loads(to_json(report), parse_constant=refuse)
    assert table["recipe"]["format"] == "float8_e4m3fn"
    assert (table["bytes_before"], table["bytes_after"], table["kept"]) == (16448, 8272, 1)
    assert {row["layer"]: row["amax"] for row in table["layers"]} == {layer.key: layer.amax for layer in report.layers}


def test_markdown_has_one_row_per_layer():
    report = report_on(
        {"a|b.weight": torch.tensor([[1.0, 448.0], [300.0, 1000.0]])}, rounding="nearest", scaling="none"
    )
    lines = to_markdown(report).splitlines()
    assert lines[0] == "**made_up.safetensors**: float8_e4m3fn, nearest, scaling none, seed 0"
    assert lines[2] == "1 layer in FP8, 0 tensors kept: 16 B → 8 B (−50 %)"
    # 1000 saturates to 448, 300 rounds to 288: errors -552 and -12
    assert lines[6] == r"| a\|b.weight | other | 2 × 2 | 1,000 | 1 | 6.3 dB | 48.6 % | −1.4e2 | 25 % | 0 % |"
    assert {line.count(" | ") for line in lines[4:5] + lines[6:]} == {9}


def calibrated_report():
    first, *others = small_report(rounding="nearest").layers
    layers = (replace(first, output_error=OutputError(5000, nearest=0.0141, chosen=0.0036)), *others)
    return replace(small_report(rounding="nearest"), layers=layers)


def test_calibrated_layers_add_columns():
    text = to_markdown(calibrated_report())
    assert (
        "Output error: median 0.36 % of the output, 1.41 % with nearest (predicted, 1 calibrated layer)"
        in text.splitlines()
    )
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.endswith("| flushed | output error | with nearest | input rows |")
    assert {line.count("|") for line in (head, rule, *rows)} == {14}
    (row,) = (row for row in rows if "attn.qkv" in row)
    assert row.endswith("| 0.36 % | 1.41 % | 5,000 |")
    assert sum(row.endswith("|  |  |  |") for row in rows) == 3


def test_calibrated_layers_in_json():
    rows = json.loads(to_json(calibrated_report()))["layers"]
    errors = {row["layer"]: row.get("output_error") for row in rows}
    assert errors.pop("blocks.0.attn.qkv.weight") == {"rows": 5000, "nearest": 0.0141, "chosen": 0.0036}
    assert set(errors.values()) == {None}


def test_other_reports_do_not_mention_outputs():
    assert describe_output_error(small_report()) == ""
    assert "output error" not in to_markdown(small_report()).lower()


HOSTILE = "<img src=http://evil.example/x.png>![a](http://evil.example)|*b*\x1b[2J\u202e\n| c"


def test_hostile_names_are_text_in_markdown():
    report = replace(report_on({f"{HOSTILE}.weight": torch.ones(4, 4)}), source=HOSTILE)
    lines = to_markdown(report).splitlines()
    assert len(lines) == 7
    for line in (lines[0], lines[6]):
        assert "<" not in line
        assert "://" not in line
        assert r"!\[a\](" in line
        assert r"\*b\*" in line
        assert line.isprintable()
    assert len(re.findall(r"(?<!\\)\|", lines[6])) == 11


def test_ordinary_names_are_unchanged_in_markdown():
    assert display.markdown("joint_blocks.0.x_block.attn.qkv.weight") == "joint_blocks.0.x_block.attn.qkv.weight"
