"""The engine over two kinds of sources, a file and tensors in memory: the same state dict, reasons and notes."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import CheckpointError, Recipe, plan_file, quantize_file, quantize_tensor
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.engine.quantization import Quantization
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.numerics.transfers import to_device
from stochastic_fp8_pack.kernels.state_dict.layouts import ScaledLayer
from stochastic_fp8_pack.kernels.state_dict.load import make_codes, native_tensors
from stochastic_fp8_pack.kernels.state_dict.scaled_state_dict import ScaledWeight, TensorEntry

CPU = torch.device("cpu")
QKV, PROJ = "joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.attn.proj"


class MemoryWeights:
    """Weights in memory: all that a new kind of source has to implement."""

    name, kind, linear_names, metadata, notes, nonfinite = "memory", None, None, {}, (), {}

    def __init__(self, tensors, scaled=(), patched=()):
        self._tensors, self.patched = tensors, patched
        self.scaled = dict(scaled)
        self.tensors = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}

    def check(self, names, recipe):
        pass

    def entry(self, name):
        return TensorEntry.of(self._value(name))

    def input_scale(self, name):
        return None

    @contextmanager
    def reading(self, names, device):
        yield ((lambda name=name: (self._value(name), to_device)) for name in names)

    def error(self, text):
        return ValueError(f"{self.name}: {text}")

    def _value(self, name):
        value = self._tensors[name]
        if name in self.scaled:
            value = (value.float() * self.scaled[name].scale).bfloat16()
        return value + 1 if name in self.patched else value


def sd3(**other):
    generator = torch.Generator().manual_seed(1)
    shapes = {QKV: (192, 64), PROJ: (64, 64), "joint_blocks.0.context_block.attn.qkv": (8, 64)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return {**tensors, f"{QKV}.bias": torch.ones(192).bfloat16(), **other}


def in_memory(tensors, recipe, calibration=None, **weights):
    """(tensors for a loader, report) of a pass in memory."""
    quantization = Quantization(MemoryWeights(tensors, **weights), recipe, calibration)
    state = quantization.state_dict()
    make_codes(state, CPU)
    return native_tensors(state), quantization.report()


def to_file(tmp_path, tensors, recipe, calibration=None, **options):
    """(tensors of the file, report) of the file job."""
    save_file(tensors, tmp_path / "in.safetensors")
    report = quantize_file(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", recipe, calibration=calibration, **options
    )
    return load_file(tmp_path / "out.safetensors"), report


def by_key(entries):
    return {entry.key: entry for entry in entries}


def with_nan():
    tensors = sd3()
    tensors[f"{PROJ}.weight"][3, 5] = float("nan")
    tensors[f"{PROJ}.weight"][3, 6] = float("inf")
    return tensors


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_every_source_gives_the_same_state_dict(tmp_path, format, rounding):
    recipe = Recipe(format=format, rounding=rounding, seed=3)
    loaded, in_graph = in_memory(sd3(), recipe)
    written, in_file = to_file(tmp_path, sd3(), recipe)
    written = {name: tensor for name, tensor in written.items() if not name.endswith(".comfy_quant")}
    assert loaded.keys() == written.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == written[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), written[name].flatten().view(torch.uint8)), name
    assert by_key(in_graph.layers) == by_key(in_file.layers)
    assert by_key(in_graph.kept) == by_key(in_file.kept)


def test_a_plan_is_the_report_without_the_pass():
    quantization = Quantization(MemoryWeights(sd3()), Recipe())
    plan = quantization.report()
    make_codes(quantization.state_dict(), CPU)
    report = quantization.report()
    assert [layer.key for layer in plan.layers] == [layer.key for layer in report.layers] != []
    assert {(layer.amax, layer.scale, layer.error) for layer in plan.layers} == {(0.0, 0.0, None)}
    assert all(layer.amax > 0 and layer.error.count for layer in report.layers)
    assert (plan.kept, plan.notes, plan.bytes_after) == (report.kept, report.notes, report.bytes_after)


# What used to differ between file and graph


def test_a_non_finite_weight_is_kept_for_the_same_reason_with_the_same_note(tmp_path):
    recipe = Recipe(nonfinite="keep")
    loaded, in_graph = in_memory(with_nan(), recipe)
    written, in_file = to_file(tmp_path, with_nan(), recipe)
    for tensors, report in ((loaded, in_graph), (written, in_file)):
        reasons = {tensor.key: tensor.reason.text for tensor in report.kept}
        assert reasons[f"{PROJ}.weight"] == "holds 1 NaN and 1 infinite values"
        assert f"{PROJ}.weight is kept: it holds 1 NaN and 1 infinite values" in report.notes
        assert tensors[f"{PROJ}.weight"].dtype == torch.bfloat16
        assert tensors[f"{PROJ}.weight"][3, 5].isnan()
        assert f"{PROJ}.weight_scale" not in tensors


def test_a_non_finite_weight_is_the_same_error(tmp_path):
    text = f"holds values that are not finite: {PROJ}.weight \\(1 NaN, 1 infinite\\)"
    with pytest.raises(ValueError, match=f"memory: {text}"):
        in_memory(with_nan(), Recipe())
    with pytest.raises(CheckpointError, match=f"in.safetensors: {text}"):
        to_file(tmp_path, with_nan(), Recipe())


def test_looking_for_non_finite_weights_shows_progress_and_can_be_cancelled(tmp_path):
    """The file job reads every weight once before it writes the header; each of these reads counts."""
    calls = []

    def progress(done, total, key):
        calls.append((done, total, key))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_file(tmp_path, with_nan(), Recipe(nonfinite="keep"), progress=progress)
    assert not (tmp_path / "out.safetensors").exists()

    calls.clear()
    done = []
    to_file(tmp_path, with_nan(), Recipe(nonfinite="keep"), progress=lambda *call: done.append(call))
    total = sum(tensor.nbytes for tensor in sd3().values()) + 2 * (192 + 64 + 8) * 64
    assert {call[1] for call in done} == {total}
    assert done[0][0] == 0
    assert done[-1] == (total, total, "")


def test_fp8_matmul_without_input_scales_is_the_same_note(tmp_path):
    note = "matmul fp8 without input scales: FP8 GPUs clamp activations at ±448, which costs quality"
    recipe = Recipe(matmul="fp8")
    assert note in in_memory(sd3(), recipe)[1].notes
    assert note in to_file(tmp_path, sd3(), recipe)[1].notes
    assert note in plan_file(tmp_path / "in.safetensors", recipe).notes
    recorder = ActivationRecorder()
    recorder.observe(f"{QKV}.weight", torch.ones(4, 64))
    loaded, report = in_memory(sd3(), recipe, recorder.result("one layer"))
    assert note not in report.notes
    assert loaded[f"{QKV}.input_scale"].item() == pytest.approx(1.25 / 448)


# Weights that are scaled FP8 already


def scaled_source(patched=()):
    """The SD3 tensors with one weight in scaled FP8, and its dequantized values."""
    tensors = sd3()
    q = quantize_tensor(tensors[f"{PROJ}.weight"], rounding="nearest")
    tensors[f"{PROJ}.weight"] = q.codes
    weight = ScaledWeight(ScaledLayer(PROJ, "float8_e4m3fn"), (64, 64), TensorEntry.of(q.codes), q.scale, None, 4096)
    return tensors, {f"{PROJ}.weight": weight}, (q.codes.float() * q.scale).bfloat16()


def test_a_kept_scaled_weight_stays_bit_for_bit():
    tensors, scaled, _ = scaled_source()
    loaded, report = in_memory(tensors, Recipe(keep=[PROJ]), scaled=scaled)
    assert torch.equal(loaded[f"{PROJ}.weight"].view(torch.uint8), tensors[f"{PROJ}.weight"].view(torch.uint8))
    assert loaded[f"{PROJ}.weight_scale"] == scaled[f"{PROJ}.weight"].scale
    assert "1 layer already in scaled FP8: left unchanged, bit for bit" in report.notes


def test_a_kept_scaled_weight_with_a_patch_is_kept_with_the_patch():
    tensors, scaled, values = scaled_source()
    loaded, report = in_memory(tensors, Recipe(keep=[PROJ]), scaled=scaled, patched=[f"{PROJ}.weight"])
    assert torch.equal(loaded[f"{PROJ}.weight"], values + 1)
    assert f"{PROJ}.weight_scale" not in loaded
    assert any("but patched: kept in high precision, patches applied" in note for note in report.notes)


def test_a_quantized_scaled_weight_with_a_patch_is_rounded_with_the_patch():
    tensors, scaled, values = scaled_source()
    loaded, _ = in_memory(tensors, Recipe(rounding="nearest"), scaled=scaled, patched=[f"{PROJ}.weight"])
    expected = quantize_tensor(values + 1, rounding="nearest")
    assert torch.equal(loaded[f"{PROJ}.weight"].view(torch.uint8), expected.codes.view(torch.uint8))


# One way to give the recipe


def test_a_recipe_and_its_fields_are_two_ways_to_say_the_same(tmp_path):
    recipe = Recipe(rounding="nearest", keep=["attn.proj"], seed=4)
    written, report = to_file(tmp_path, sd3(), recipe)
    by_fields = quantize_file(
        tmp_path / "in.safetensors", tmp_path / "b.safetensors", rounding="nearest", keep=["attn.proj"], seed=4
    )
    assert by_fields == report
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(TypeError, match="not both: seed"):
        quantize_file(tmp_path / "in.safetensors", tmp_path / "c.safetensors", recipe, seed=4)
    with pytest.raises(TypeError, match="sead"):
        quantize_file(tmp_path / "in.safetensors", tmp_path / "c.safetensors", sead=4)


@pytest.mark.parametrize("field", ["format", "rounding", "scaling", "layers", "layout", "matmul", "nonfinite"])
def test_a_recipe_refuses_unknown_choices(field):
    with pytest.raises(ValueError, match=f"unknown {field} 'x': choose one of"):
        Recipe(**{field: "x"})


def test_patterns_of_a_recipe_become_tuples():
    assert Recipe(keep=["a", "b"], only="c").keep == ("a", "b")
    assert Recipe(only="c").only == ("c",)
