"""The file job with a calibration: what is written, what the report says, and what stops it before it begins."""

import json
import logging
import subprocess
import sys

import pytest
import tiny_models
import torch
from conftest import PACK_ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels.calibration.calibrate_tensor import calibrate_tensor
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.moments import Calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.engine.file_job import plan_file, quantize_file
from stochastic_fp8_pack.kernels.errors import CalibrationError, CheckpointError
from stochastic_fp8_pack.kernels.state_dict.inspection import inspect_file

QKV, PROJ = "joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.attn.proj"


def correlated(rows, width):
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(16, width, generator=generator)
    return torch.randn(rows, 16, generator=generator) @ mixing + 0.3 * torch.randn(rows, width, generator=generator)


@pytest.fixture
def source(tmp_path):
    return tiny_models.write_sd3(tmp_path / "in.safetensors")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.fixture
def calibration():
    """Two layers of block 0: enough rows for one, few for the other."""
    observer = ActivationRecorder()
    observer.observe(f"{QKV}.weight", correlated(4000, 128))
    observer.observe(f"{PROJ}.weight", correlated(500, 128))
    return observer.result("two layers")


def calibrated(source, target, calibration, **choices):
    return quantize_file(source, target, rounding="calibrated", calibration=calibration, **choices)


def test_layers_that_were_seen_are_calibrated_and_the_others_nearest(source, target, calibration, tmp_path):
    calibrated(source, target, calibration)
    quantize_file(source, tmp_path / "nearest.safetensors", rounding="nearest")
    result, nearest, weights = load_file(target), load_file(tmp_path / "nearest.safetensors"), load_file(source)
    changed = {name for name in nearest if not torch.equal(result[name].float(), nearest[name].float())}
    assert changed <= {f"{layer}.{ending}" for layer in (QKV, PROJ) for ending in ("weight", "weight_scale")}
    for layer in (QKV, PROJ):
        expected = calibrate_tensor(weights[f"{layer}.weight"], calibration.layers[f"{layer}.weight"])
        assert torch.equal(result[f"{layer}.weight"].view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(result[f"{layer}.weight_scale"], expected.scale)
    assert inspect_file(target).ok


def test_a_calibration_file_does_the_same(source, target, calibration, tmp_path):
    save_calibration(calibration, tmp_path / "calibration.safetensors")
    calibrated(source, target, calibration)
    calibrated(source, tmp_path / "again.safetensors", tmp_path / "calibration.safetensors")
    assert target.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_the_report_tells_of_every_layer(source, target, calibration):
    report = calibrated(source, target, calibration)
    errors = {layer.key: layer.output_error for layer in report.layers}
    assert errors[f"{QKV}.weight"].rows == 4000
    assert errors[f"{QKV}.weight"].chosen < errors[f"{QKV}.weight"].nearest
    assert [key for key, error in errors.items() if error] == [f"{PROJ}.weight", f"{QKV}.weight"]
    notes = " ".join(report.notes)
    assert (
        f"{len(errors) - 2} of {len(errors)} layers were rounded to nearest, because the calibration has no inputs"
        in notes
    )
    assert f"fewer than 3,000 rows: calibrate on 32 images, or a text encoder on 20 prompts: {PROJ}.weight" in notes
    assert report.recipe.calibration == "two layers"


def test_the_file_says_which_calibration_it_rests_on(source, target, calibration):
    calibrated(source, target, calibration)
    with safe_open(target, "pt") as file:
        recipe = json.loads(file.metadata()["stochastic_fp8"])
    assert (recipe["rounding"], recipe["calibration"]) == ("calibrated", "two layers")


def test_an_all_in_one_checkpoint_takes_the_same_calibration(tmp_path, target, calibration):
    """Layers have prefixed names in it; the calibration knows their bare ones."""
    whole = tiny_models.write_sd3_checkpoint(tmp_path / "all.safetensors")
    report = calibrated(whole, target, calibration)
    assert {layer.key for layer in report.layers if layer.output_error} == {f"{QKV}.weight", f"{PROJ}.weight"}


@pytest.mark.parametrize("rounding", ["calibrated", "nearest"])
def test_matmul_fp8_gets_the_scales_of_the_inputs(source, target, calibration, rounding):
    report = quantize_file(source, target, rounding=rounding, matmul="fp8", calibration=calibration)
    result = load_file(target)
    scale = result[f"{QKV}.input_scale"]
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert float(scale) == pytest.approx(1.25 * calibration.layers[f"{QKV}.weight"].amax / 448)
    assert [name for name in result if name.endswith("input_scale")] == [f"{PROJ}.input_scale", f"{QKV}.input_scale"]
    assert not any("clamp activations" in note for note in report.notes)
    assert inspect_file(target).ok


def test_full_precision_needs_no_input_scales(source, target, calibration):
    calibrated(source, target, calibration)
    assert not [name for name in load_file(target) if "input" in name]


def test_a_legacy_file_calls_them_scale_input(source, target, calibration):
    calibrated(source, target, calibration, matmul="fp8", layout="legacy")
    assert f"{QKV}.scale_input" in load_file(target)


@pytest.mark.parametrize(
    "job", [plan_file, lambda source, **choices: quantize_file(source, "x.safetensors", **choices)]
)
def test_without_a_calibration_nothing_begins(source, job):
    with pytest.raises(CalibrationError, match="--calibration FILE"):
        job(source, rounding="calibrated")


def test_a_file_that_is_no_calibration_is_refused(source, target):
    with pytest.raises(CheckpointError, match="in.safetensors: does not hold an FP8 calibration"):
        calibrated(source, target, source)
    assert not target.exists()


def test_a_plan_takes_a_calibration(source, calibration):
    report = plan_file(source, rounding="calibrated", calibration=calibration)
    assert not any("never saw" in note for note in report.notes)
    assert report.layers


def test_the_calibration_of_another_model_is_told_of(source, target):
    observer = ActivationRecorder()
    observer.observe("blocks.0.ffn.0.weight", correlated(4000, 128))
    report = calibrated(source, target, Calibration(observer.result().layers, "another"))
    count = len(report.layers)
    assert any(f"{count} of {count} layers were rounded to nearest" in note for note in report.notes)


def test_the_trace_says_why_a_code_was_chosen(source, target, calibration, caplog):
    with caplog.at_level(logging.DEBUG, "stochastic_fp8"):
        calibrated(source, target, calibration)
    traces = {record.getMessage().partition(":")[0]: record.getMessage() for record in caplog.records}
    assert "minimizing the error of the layer's output" in traces[f"{QKV}.weight"]
    assert ", nearest: " in traces["joint_blocks.1.x_block.attn.qkv.weight"]


EVERYTHING = """
import contextlib, hashlib, json, sys
from pathlib import Path
import torch

setting, source, folder, keys = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
autocast = contextlib.nullcontext()
if setting == "autocast":
    autocast = torch.autocast("cpu", torch.bfloat16)
else:
    torch.set_default_dtype(getattr(torch, setting))

from kernels.calibration.file import load_calibration, save_calibration
from kernels.calibration.recorder import ActivationRecorder
from kernels.engine.file_job import quantize_file
from kernels.files.reader import open_source
from kernels.recipe import METHODS
from kernels.state_dict.inspection import inspect_file
from kernels.studies.comparison import compare_roundings
from kernels.studies.rounding_curve import measure_rounding

with autocast:
    recorder = ActivationRecorder()
    for i, key in enumerate(keys):
        x = torch.arange(4000 * 128, dtype=torch.float64).mul_(0.37 + i).sin_().view(4000, 128)
        recorder.observe(key, (x + x.roll(1, 1) + x.roll(2, 1)).bfloat16())
    save_calibration(recorder.result("two layers"), folder / "calibration.safetensors")
    calibration = load_calibration(folder / "calibration.safetensors")
    found = {}
    for i, rounding in enumerate(METHODS):
        path = folder / f"{rounding}.safetensors"
        choices = {"layout": ("native", "legacy")[i % 2], "format": ("float8_e4m3fn", "float8_e5m2")[i % 2]}
        report = quantize_file(source, path, rounding=rounding, calibration=calibration, matmul="fp8", **choices)
        found[rounding] = repr(report), repr(inspect_file(path, deep=True))
        quantize_file(path, folder / f"again_{path.name}", requantize=True, seed=3, only=keys)
    with open_source(source) as opened:
        weights = [(key, opened.read(key)) for key in keys]
    found["compare"] = repr(compare_roundings(weights, calibration=calibration))
    found["curve"] = repr(measure_rounding("float8_e4m3fn", "stochastic", draws=16))
files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
print(json.dumps({**files, **found}))
"""
"""Files, reports and measurements, made in a process whose torch is set up in another way."""


def everything(setting, source, folder):
    folder.mkdir()
    command = [sys.executable, "-c", EVERYTHING, setting, source, folder, f"{QKV}.weight", f"{PROJ}.weight"]
    run = subprocess.run(command, cwd=PACK_ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_default_dtype_and_autocast_change_no_byte(source, tmp_path):
    """Other packs may set them. A process of its own for each, because constants are made once."""
    expected = everything("float32", source, tmp_path / "normal")
    assert len(expected) > 15
    for setting in ("float64", "bfloat16", "autocast"):
        assert everything(setting, source, tmp_path / setting) == expected, setting
