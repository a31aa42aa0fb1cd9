"""Sensitivities: merged, scaled to other roundings, stored in the calibration file, and refused when damaged."""

import json
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stochastic_fp8_pack.kernels import CheckpointError, NonFiniteError, load_calibration
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.moments import Calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.calibration.sensitivity import (
    LayerEffect,
    RoundingErrors,
    Sensitivity,
    allowed_change,
    quality,
    rounding_errors,
)

NEAREST = {"float8_e4m3fn": 0.02, "float8_e5m2": 0.05}
STOCHASTIC = {"float8_e4m3fn": 0.03, "float8_e5m2": 0.07}
WITHOUT_INPUTS = RoundingErrors(NEAREST, STOCHASTIC)
WITH_INPUTS = RoundingErrors(NEAREST, STOCHASTIC, (0.04, 0.01))


def sensitivity(renders=2, power=4.0, how="2 seeds", **changes):
    layers = {f"{name}.weight": LayerEffect(change, WITH_INPUTS) for name, change in (changes or {"a": 0.5}).items()}
    return Sensitivity(layers, power, renders, how)


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width, rows=500):
    recorder = ActivationRecorder()
    mixing = weights(width, width, seed=3)
    recorder.observe("a.weight", weights(rows, width, seed=4) @ mixing)
    return recorder.result("inputs")


# Other roundings


@pytest.mark.parametrize(
    ("format", "rounding", "times"),
    [
        ("float8_e4m3fn", "nearest", 1),
        ("float8_e4m3fn", "stochastic", 1.5**2),
        ("float8_e4m3fn", "shift_perturb", 1.5**2),
        ("float8_e4m3fn", "calibrated", 0.25**2),
        ("float8_e5m2", "nearest", 2.5**2),
        ("float8_e5m2", "owlshift", 3.5**2),
        ("float8_e5m2", "calibrated", (2.5 * 0.25) ** 2),
    ],
)
def test_an_effect_grows_with_the_square_of_the_error(format, rounding, times):
    assert LayerEffect(0.1, WITH_INPUTS).with_rounding(format, rounding) == pytest.approx(0.1 * times)


def test_without_recorded_inputs_calibrated_counts_as_nearest():
    assert WITHOUT_INPUTS.ratio("float8_e4m3fn", "calibrated") == 1
    assert not Sensitivity({"a": LayerEffect(1.0, WITHOUT_INPUTS)}, 1.0, 1).predicts_calibrated
    assert sensitivity().predicts_calibrated


def test_a_weight_that_e4m3_holds_exactly_has_no_effect():
    errors = rounding_errors(torch.full((32, 32), 0.5))
    assert errors.nearest == errors.stochastic == {"float8_e4m3fn": 0, "float8_e5m2": 0}
    assert errors.ratio("float8_e5m2", "nearest") == 0


def relative_error(weight, dtype, largest):
    """RMS error of rounding to nearest with ml_dtypes, relative to the RMS."""
    values = weight.numpy().astype(np.float32)
    scale = np.float32(np.abs(values).max() / np.float32(largest))
    rounded = (values / scale).astype(dtype).astype(np.float32) * scale
    return float(np.sqrt(np.square(rounded - values).mean() / np.square(values).mean()))


def test_errors_of_weights_are_those_of_ml_dtypes():
    weight = weights(96, 64)
    errors = rounding_errors(weight)
    assert errors.nearest == {
        "float8_e4m3fn": pytest.approx(relative_error(weight, ml_dtypes.float8_e4m3fn, 448), rel=1e-4),
        "float8_e5m2": pytest.approx(relative_error(weight, ml_dtypes.float8_e5m2, 57344), rel=1e-4),
    }
    ratios = [errors.stochastic[name] / errors.nearest[name] for name in errors.nearest]
    assert ratios == [pytest.approx(math.sqrt(2), rel=0.05)] * 2
    assert errors.output is None


def test_errors_of_outputs_are_those_of_the_recorded_inputs():
    weight, layer = weights(48, 64), inputs(64).layers["a.weight"]
    nearest, calibrated = rounding_errors(weight, layer).output
    moment = layer.moment()[0].double()
    values = weight.numpy()
    scale = np.float32(np.abs(values).max() / np.float32(448))
    rounded = torch.from_numpy((values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale)
    energies = [((x @ moment) * x).sum() for x in ((rounded - weight).double(), weight.double())]
    assert nearest == pytest.approx(math.sqrt(energies[0] / energies[1]), rel=1e-3)
    assert 0 < calibrated < 0.7 * nearest


def test_errors_of_a_large_weight_are_sampled_with_its_largest_value(monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.calibration.sensitivity.SAMPLED_VALUES", 64 * 64)
    weight = weights(512, 64)
    whole = relative_error(weight, ml_dtypes.float8_e4m3fn, 448)
    assert rounding_errors(weight).nearest["float8_e4m3fn"] == pytest.approx(whole, rel=0.05)
    weight[77, 5] = 4e5  # next to it, all others become 0
    assert rounding_errors(weight).nearest["float8_e4m3fn"] < 0.01 * whole


def test_nan_is_an_error():
    with pytest.raises(NonFiniteError):
        rounding_errors(torch.full((16, 16), float("nan")))


# Quality


def test_quality_is_latent_power_over_change():
    assert quality(4.0, 0.004) == pytest.approx(30)
    assert quality(4.0, 0.0) == math.inf
    assert allowed_change(4.0, 30) == pytest.approx(0.004)


# Merging


def test_measurements_are_weighted_by_their_renders():
    total = sensitivity(renders=1, power=1.0, how="one", a=0.1) + sensitivity(renders=3, power=2.0, how="other", a=0.5)
    assert total.layers["a.weight"].change == pytest.approx((0.1 + 3 * 0.5) / 4)
    assert (total.power, total.renders, total.how) == (pytest.approx(7 / 4), 4, "one + other")


def test_layers_of_one_measurement_stay():
    total = sensitivity(a=0.1) + sensitivity(b=0.5)
    assert {key: layer.change for key, layer in total.layers.items()} == {"a.weight": 0.1, "b.weight": 0.5}


def test_output_errors_are_not_lost_in_a_sum():
    plain = Sensitivity({"a.weight": LayerEffect(0.5, WITHOUT_INPUTS, alone=False)}, 4.0, 2)
    for total in (plain + sensitivity(), sensitivity() + plain):
        assert total.layers["a.weight"].errors == WITH_INPUTS
        assert not total.layers["a.weight"].alone


def test_the_gains_of_a_sum_are_geometric_means():
    """Weighted by renders. What was not measured for calibrated counts as nearest."""
    one, other = replace(sensitivity(), gain=2.0, calibrated_gain=3.0), replace(sensitivity(), gain=8.0, renders=4)
    assert (one + other).gain == pytest.approx((2 * 8 * 8) ** (1 / 3))
    for total in (one + other, other + one):
        assert total.calibrated_gain == pytest.approx((3 * 8 * 8) ** (1 / 3))
    assert (other + other).calibrated_gain is None


def test_calibrated_rounding_has_a_gain_of_its_own():
    both = replace(sensitivity(), gain=2.0, calibrated_gain=4.0)
    assert [both.level(rounding) for rounding in ("nearest", "stochastic", "calibrated")] == [2.0, 2.0, 1.0]
    assert replace(both, calibrated_gain=None).level("calibrated") == 2.0


def test_calibrations_carry_their_sensitivities():
    recorded, effects = inputs(32), Calibration({}, "", sensitivity())
    assert (recorded + effects).sensitivity == (effects + recorded).sensitivity == sensitivity()
    assert (effects + effects).sensitivity.renders == 4
    assert (recorded + recorded).sensitivity is None
    assert (recorded + effects).layers.keys() == recorded.layers.keys()


# The file


@pytest.fixture
def saved(tmp_path):
    """The path of a calibration with one recorded layer and two measured ones."""
    both = Sensitivity(
        {"a.weight": LayerEffect(0.5, WITH_INPUTS), "b.weight": LayerEffect(1e-9, WITHOUT_INPUTS, alone=False)},
        4.0,
        2,
        "2 seeds",
        2.5,
        3.5,
    )
    save_calibration(inputs(32) + Calibration({}, "", both), tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors", both


def test_a_file_holds_them(saved):
    path, effects = saved
    loaded = load_calibration(path)
    assert loaded.sensitivity == effects
    assert torch.equal(loaded.layers["a.weight"].read_moment(), inputs(32).layers["a.weight"].read_moment())


def test_a_file_can_hold_nothing_else(tmp_path):
    save_calibration(Calibration({}, "SD3", sensitivity()), tmp_path / "c.safetensors")
    loaded = load_calibration(tmp_path / "c.safetensors")
    assert (loaded.source, loaded.layers, loaded.sensitivity) == ("SD3", {}, sensitivity())


def test_a_calibration_without_effects_has_no_entry(tmp_path):
    save_calibration(inputs(32), tmp_path / "c.safetensors")
    assert load_calibration(tmp_path / "c.safetensors").sensitivity is None
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata().keys() == {"stochastic_fp8_calibration"}


def rewritten(path, change, sign=True):
    """Change the JSON of the effects, and give it a digest that fits or not."""
    from stochastic_fp8_pack.kernels.calibration.file import _digest

    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    stated = json.loads(metadata["stochastic_fp8_sensitivity"])
    digest = stated.pop("digest")
    stated = change(stated) or stated
    metadata["stochastic_fp8_sensitivity"] = json.dumps(stated | {"digest": _digest(stated) if sign else digest})
    save_file(tensors, path, metadata)


def test_changed_effects_are_noticed(saved):
    path, _ = saved
    rewritten(path, lambda stated: stated["layers"]["a.weight"].update(change=0.25), sign=False)
    with pytest.raises(CheckpointError, match="sensitivities differ from their digest"):
        load_calibration(path)


def test_entries_of_later_versions_are_ignored(saved):
    path, effects = saved
    rewritten(path, lambda stated: stated["layers"]["a.weight"].update(later=[1, 2]))
    assert load_calibration(path).sensitivity == effects


@pytest.mark.parametrize(
    "change",
    [
        lambda stated: stated.update(version="1"),
        lambda stated: stated.update(power=-1.0),
        lambda stated: stated.update(power=math.nan),
        lambda stated: stated.update(renders=0),
        lambda stated: stated.update(gain=0.0),
        lambda stated: stated.update(calibrated_gain=0),
        lambda stated: stated.update(calibrated_gain="2"),
        lambda stated: stated.update(layers=[]),
        lambda stated: stated["layers"].update({"a.weight": 3}),
        lambda stated: stated["layers"]["a.weight"].update(change="0.5"),
        lambda stated: stated["layers"]["a.weight"].update(change=-0.5),
        lambda stated: stated["layers"]["a.weight"].update(change=True),
        lambda stated: stated["layers"]["a.weight"].update(nearest=0.1),
        lambda stated: stated["layers"]["a.weight"]["stochastic"].pop("float8_e5m2"),
        lambda stated: stated["layers"]["a.weight"].update(output=[0.1]),
        lambda stated: stated["layers"]["a.weight"].update(output=[0.1, None]),
    ],
)
def test_damaged_effects_are_an_error(saved, change):
    path, _ = saved
    rewritten(path, lambda stated: change(stated) and None)
    with pytest.raises(CheckpointError, match="is a damaged calibration: .*; calibrate again"):
        load_calibration(path)


def test_huge_metadata_is_refused(saved):
    path, _ = saved
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"stochastic_fp8_sensitivity": "[" * 2_000_000})
    with pytest.raises(CheckpointError, match="values"):
        load_calibration(path)
