"""Sources in FP8 with scales of every kind: dequantized exactly, or refused in one line. Nothing is dropped."""

import json

import key_lists
import pytest
import torch
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import CheckpointError, inspect_file, quantize_file, repair_file
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.state_dict.markings import Markings, unknown_scales
from stochastic_fp8_pack.kernels.state_dict.source_scales import block_size, check_shapes, dequantize_blocks

E4M3 = torch.float8_e4m3fn
LAYER = "blocks.0.self_attn.q"
MODELS = key_lists.read()


def weight(out, inputs):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(out + inputs)) * 0.05


def per_block(values, rows, columns):
    """Codes, scales and dequantized values, block by block in a loop: the oracle."""
    out, inputs = values.shape
    codes, exact = torch.empty(out, inputs, dtype=E4M3), torch.empty(out, inputs)
    scales = torch.empty(-(-out // rows), -(-inputs // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = values[block].abs().max() / 448
            codes[block] = (values[block] / scales[i, j]).to(E4M3)
            exact[block] = codes[block].float() * scales[i, j]
    return codes, scales, exact


KINDS = {
    "row": (256, 128, 1, 128, lambda s: s),
    "row, flat": (256, 128, 1, 128, lambda s: s.reshape(-1)),
    "blocks of a row": (128, 256, 1, 64, lambda s: s[:, :, None]),
    "2-D blocks": (256, 384, 128, 128, lambda s: s),
    "2-D blocks, partial": (208, 304, 128, 128, lambda s: s),
    "2-D blocks, one row": (96, 256, 128, 128, lambda s: s),
    "tensor": (128, 128, 128, 128, lambda s: s),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_is_multiplied_by_its_scale(kind):
    out, inputs, rows, columns, shaped = KINDS[kind]
    codes, scales, exact = per_block(weight(out, inputs), rows, columns)
    assert torch.equal(dequantize_blocks(codes, shaped(scales)), exact)


@pytest.mark.parametrize(
    ("side", "count", "size"),
    [(256, 2, 128), (320, 3, 128), (384, 3, 128), (192, 3, 64), (96, 3, 32), (5120, 40, 128), (4480, 35, 128)],
)
def test_block_sizes_follow_from_the_shapes(side, count, size):
    assert block_size(side, count) == size


@pytest.mark.parametrize(("side", "count"), [(96, 2), (160, 2), (192, 2), (200, 2), (300, 3), (256, 3), (256, 0)])
def test_a_block_size_that_does_not_follow_is_refused(side, count):
    """96 values in 2 blocks: 48 + 48, or 64 + 32."""
    with pytest.raises(ValueError, match=f"{count} scales for {side} values do not tell the block size"):
        block_size(side, count)
    for shape in [(64, count, 1), (64, count)] if count else []:
        with pytest.raises(ValueError, match="do not tell the block size"):
            dequantize_blocks(torch.zeros(64, side, dtype=E4M3), torch.ones(shape))


@pytest.mark.parametrize("out", [64, 160, 192, 256, 300])
@pytest.mark.parametrize("inputs", [128, 192, 320])
def test_a_grid_of_the_usual_blocks_needs_no_other_hint(out, inputs):
    codes, scales, exact = per_block(weight(out, inputs), 128, 128)
    assert torch.equal(dequantize_blocks(codes, scales), exact)
    check_shapes(codes.shape, scales.shape)


@pytest.mark.parametrize("shape", [(2, 256), (1, 256)])
@pytest.mark.parametrize("out", [256, 384])
def test_a_scale_per_column_is_not_taken_for_something_else(out, shape):
    for check in (check_shapes, lambda codes, scale: dequantize_blocks(torch.zeros(codes), torch.ones(scale))):
        with pytest.raises(ValueError, match="does not tell rows from columns"):
            check((out, 256), shape)


@pytest.mark.parametrize("shape", [(3,), (128, 3, 2), (129, 1), (2, 2, 2, 2), (128,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="does not fit a weight of shape"):
        dequantize_blocks(torch.zeros(128, 128, dtype=E4M3), torch.ones(shape))


def wan(**layers):
    return {"head.modulation": torch.zeros(1, 2, 128).bfloat16(), **layers}


def quantized(tmp_path, tensors, metadata=None, **options):
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    options = {"rounding": "nearest", **options}
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", overwrite=True, **options)
    return load_file(tmp_path / "out.safetensors"), report


@pytest.mark.parametrize("ending", ["weight_scale", "scale_weight", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["row", "blocks of a row", "2-D blocks, partial"])
def test_a_file_is_quantized_from_the_values_that_its_scales_give(tmp_path, kind, dtype, ending):
    out, inputs, rows, columns, shaped = KINDS[kind]
    codes, scales, _ = per_block(weight(out, inputs), rows, columns)
    scales = shaped(scales).to(dtype)
    values = dequantize_blocks(codes, scales)
    source = wan(**{f"{LAYER}.weight": codes, f"{LAYER}.{ending}": scales.contiguous()})
    result, report = quantized(tmp_path, source)
    scale = values.abs().max() / 448
    assert torch.equal(result[f"{LAYER}.weight"].view(torch.uint8), (values / scale).to(E4M3).view(torch.uint8))
    assert result[f"{LAYER}.weight_scale"].item() == pytest.approx(scale.item(), rel=1e-6)
    assert f"{LAYER}.weight_scale_inv" not in result
    assert "1 layer in FP8 with a scale per row or block: dequantized first" in " ".join(report.notes)
    other = {f"{name}.weight": weight(128, 128).bfloat16() for name in ("blocks.0.ffn.0", "blocks.1.ffn.0")}
    kept, _ = quantized(tmp_path, source | other, keep=[LAYER])
    assert torch.equal(kept[f"{LAYER}.weight"], values.bfloat16())
    assert not [name for name in kept if name.startswith(f"{LAYER}.") and "scale" in name]


def test_a_scalar_weight_scale_inv_needs_no_permission_to_requantize(tmp_path):
    codes, scales, values = per_block(weight(128, 128), 128, 128)
    result, _ = quantized(tmp_path, wan(**{f"{LAYER}.weight": codes, f"{LAYER}.weight_scale_inv": scales.reshape(())}))
    assert torch.allclose(result[f"{LAYER}.weight"].float() * result[f"{LAYER}.weight_scale"], values, rtol=1e-6)


def scaled(**other):
    codes, scales, _ = per_block(weight(128, 128), 128, 128)
    return wan(**{f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": scales.reshape(()), **other})


def without_scale():
    tensors = scaled()
    del tensors[f"{LAYER}.weight_scale"]
    return tensors


HEADER = {
    "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}}})
}


UNKNOWN = (
    "{}.weight.scale {}.weight.scale_inv {}.weight.weight_scale {}.weight_s {}.weight_amax {}.weight_max "
    "{}.weight_scales {}.weight_quantizer._amax {}.weightScale {}_scale {}_scale_inv {}_amax {}.scaling_factor "
    "{}.scaler {}.dequant {}.qscale {}.s {}.max {}.WEIGHT_SCALE scales.{} weight_scales.{}.weight"
)
"""Names of a scale that no program here reads, with {} for the layer."""


@pytest.mark.parametrize("name", [name.format(LAYER) for name in UNKNOWN.split()] + [f"{LAYER}.weight_scale".upper()])
@pytest.mark.parametrize("others", [False, True])
def test_a_scale_of_another_name_stops_the_job(tmp_path, name, others):
    codes, scales, _ = per_block(weight(128, 128), 128, 128)
    tensors = wan(**{f"{LAYER}.weight": codes, name: scales.reshape(1)})
    if others:
        tensors |= {"blocks.1.ffn.0.weight": codes.clone(), "blocks.1.ffn.0.weight_scale": scales.reshape(()).clone()}
    with pytest.raises(CheckpointError, match=rf"'{LAYER}.weight' is FP8, and '{name}' beside it looks like a scale"):
        quantized(tmp_path, tensors, format="float8_e5m2")
    assert not (tmp_path / "out.safetensors").exists()
    inspection = inspect_file(tmp_path / "in.safetensors")
    codes_found = [finding.code for finding in inspection.findings]
    assert "unknown_scale" in codes_found and "unscaled" not in codes_found
    assert {verdict.outcome for verdict in inspection.verdicts} == {"wrong image"}
    tensors[f"{LAYER}.weight"] = codes.bfloat16()
    assert quantized(tmp_path, tensors, requantize=True)[1].layers


@pytest.mark.parametrize("model", MODELS)
def test_no_tensor_of_a_published_model_looks_like_a_scale(model):
    tensors = {
        name: TensorInfo("float8_e4m3fn" if name.endswith(".weight") or len(shape) > 1 else "bfloat16", shape)
        for name, shape in MODELS[model].shapes.items()
    }
    assert unknown_scales(tensors, Markings()) == {}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (without_scale(), HEADER, f"layer '{LAYER}' is marked as scaled FP8 but has no scale"),
        (
            without_scale() | {"scaled_fp8": torch.zeros(0, dtype=E4M3)},
            None,
            f"layer '{LAYER}' is marked as scaled FP8",
        ),
        (without_scale() | {f"{LAYER}.scales": torch.ones(4)}, None, f"'{LAYER}.scales' beside it looks like a scale"),
        (scaled(**{f"{LAYER}.scale_weight": torch.tensor(2.0)}), None, f"layer '{LAYER}' has two scales"),
        (scaled(**{f"{LAYER}.weight_scale": torch.ones(7)}), None, "is not understood: shape \\(7,\\) does not fit"),
        (scaled(**{f"{LAYER}.weight_scale": torch.tensor([float("nan")])}), None, "weight_scale' is nan"),
        (scaled(**{f"{LAYER}.weight_scale": torch.tensor(3)}), None, "is int64, which is not a floating-point dtype"),
        (scaled(**{f"{LAYER}.input_scale": torch.tensor(float("inf"))}), HEADER, "input_scale' is inf"),
        (scaled(**{f"{LAYER}.input_scale": torch.ones(2)}), HEADER, "input_scale' has shape \\(2,\\)"),
    ],
)
def test_a_scale_that_is_missing_or_not_understood_stops_the_job(tmp_path, tensors, metadata, message):
    with pytest.raises(CheckpointError, match=f"^in.safetensors: .*{message}.*16-bit file$"):
        quantized(tmp_path, tensors, metadata, requantize=True)
    assert not (tmp_path / "out.safetensors").exists()


def foreign():
    """int8 and NVFP4 layers without any marker, beside a layer in 16 bits."""
    return wan(
        **{
            f"{LAYER}.weight": torch.ones(128, 128, dtype=torch.int8),
            f"{LAYER}.weight_scale": torch.tensor(0.5),
            "blocks.0.ffn.0.weight": torch.ones(256, 64, dtype=torch.uint8),
            "blocks.0.ffn.0.weight_scale": torch.ones(256, 8).to(E4M3),
            "blocks.0.ffn.0.weight_scale_2": torch.tensor(0.01),
            "blocks.0.ffn.2.weight": weight(128, 256).bfloat16(),
        }
    )


def test_scales_of_other_formats_stay_with_their_codes(tmp_path):
    result, _ = quantized(tmp_path, foreign())
    for name, tensor in foreign().items():
        if name != "blocks.0.ffn.2.weight":
            assert torch.equal(result[name].float(), tensor.float()), name
            assert result[name].dtype == tensor.dtype, name
    assert result["blocks.0.ffn.2.weight"].dtype == E4M3


def test_repair_keeps_them_too(tmp_path):
    codes, scales, _ = per_block(weight(128, 128), 128, 128)
    tensors = foreign() | {"blocks.1.ffn.0.weight": codes, "blocks.1.ffn.0.weight_scale": scales.bfloat16().reshape(())}
    save_file(tensors, tmp_path / "in.safetensors")
    repair_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")
    assert foreign().keys() <= result.keys()
