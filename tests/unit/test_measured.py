"""Layers `measured`: the choice against brute force, the size of real files, the limits, and what is said about it."""

import json
import math
from itertools import combinations

import checkpoints
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import CalibrationError, ChoiceError, Recipe, plan_file, quantize_file
from stochastic_fp8_pack.kernels.calibration.file import load_calibration, save_calibration
from stochastic_fp8_pack.kernels.calibration.moments import Calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.calibration.sensitivity import LayerEffect, RoundingErrors, Sensitivity
from stochastic_fp8_pack.kernels.command.main import main
from stochastic_fp8_pack.kernels.engine.file_weights import FileWeights
from stochastic_fp8_pack.kernels.engine.quantization import Quantization
from stochastic_fp8_pack.kernels.files.reader import open_source
from stochastic_fp8_pack.kernels.selection.measured import Candidate, keep_until, keep_within
from stochastic_fp8_pack.kernels.state_dict.size import METADATA_BYTES, state_dict_bytes
from stochastic_fp8_pack.kernels.state_dict.write import write_state_dict
from tiny_models import LANDSCAPES

ERRORS = RoundingErrors(
    nearest={"float8_e4m3fn": 0.02, "float8_e5m2": 0.04},
    stochastic={"float8_e4m3fn": 0.03, "float8_e5m2": 0.06},
    output=(0.03, 0.01),
)
FC1, FC2 = (f"joint_blocks.1.x_block.mlp.{name}.weight" for name in ("fc1", "fc2"))


def landscape_layers():
    """Tensor key -> weight of the 34 Linear layers."""
    return {key: w for key, w in load_file(LANDSCAPES).items() if w.ndim == 2 and key.endswith(".weight")}


def measured(effects=None, power=1.0):
    """A calibration with one effect per layer; without any, every layer has another one."""
    keys = sorted(landscape_layers())
    effects = effects or {key: 1e-4 * (1 + 7 * i % 34) for i, key in enumerate(keys)}
    layers = {key: LayerEffect(change, ERRORS) for key, change in effects.items()}
    return Calibration({}, "made up", Sensitivity(layers, power, 2))


def candidates(seed, sizes=None):
    """Eight candidates with effects over three decades."""
    generator = torch.Generator().manual_seed(seed)
    effects = (10 ** (3 * torch.rand(8, generator=generator))).tolist()
    sizes = sizes or torch.randint(1, 60, (8,), generator=generator).tolist()
    return [Candidate(f"layer {i}", effects[i], sizes[i]) for i in range(8)]


def subsets(layers):
    return (set(chosen) for n in range(len(layers) + 1) for chosen in combinations(layers, n))


def total(layers, of):
    return sum(getattr(layer, of) for layer in layers)


def split(layers, names):
    return [x for x in layers if x.name in names], [x for x in layers if x.name not in names]


# The choice


@pytest.mark.parametrize("room", [0, 20, 60, 140, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_choice_is_within_one_layer_of_the_best(seed, room):
    """The oracle tries all 256 subsets."""
    layers = candidates(seed)
    kept, quantized = split(layers, keep_within(layers, room))
    best = min(total(set(layers) - subset, "effect") for subset in subsets(layers) if total(subset, "nbytes") <= room)
    assert total(kept, "nbytes") <= room
    assert all(total(kept, "nbytes") + layer.nbytes > room for layer in quantized)
    assert best <= total(quantized, "effect") <= best + max((layer.effect for layer in quantized), default=0)


@pytest.mark.parametrize("room", [0, 10, 35, 80])
def test_layers_of_one_size_are_chosen_best(room):
    layers = candidates(3, sizes=[10] * 8)
    _, quantized = split(layers, keep_within(layers, room))
    best = min(total(set(layers) - subset, "effect") for subset in subsets(layers) if total(subset, "nbytes") <= room)
    assert total(quantized, "effect") == pytest.approx(best)


@pytest.mark.parametrize("allowed", [0.0, 5.0, 60.0, 700.0, 1e6])
@pytest.mark.parametrize("seed", range(6))
def test_a_quality_is_reached_and_no_kept_layer_is_superfluous(seed, allowed):
    layers = candidates(seed)
    kept, quantized = split(layers, keep_until(layers, allowed))
    fits = [subset for subset in subsets(layers) if total(set(layers) - subset, "effect") <= allowed]
    smallest = min(total(subset, "nbytes") for subset in fits)
    assert total(quantized, "effect") <= allowed
    assert all(total(quantized, "effect") + layer.effect > allowed for layer in kept)
    assert total(kept, "nbytes") <= smallest + max(layer.nbytes for layer in layers)


def test_the_choice_does_not_depend_on_the_order():
    layers = [Candidate(name, 1.0, 10) for name in "dcba"]
    assert keep_within(layers, 20) == keep_within(layers[::-1], 20) == {"a", "b"}


# Files


def sizes():
    smallest = plan_file(LANDSCAPES, layers="all_linear").bytes_after
    return [(smallest + METADATA_BYTES + extra) / 1e9 for extra in (40_000, 300_000, 777_777, 1_500_000, 2_500_000)]


@pytest.mark.parametrize("layout", ["native", "legacy"])
@pytest.mark.parametrize("limit", sizes())
def test_a_file_is_below_its_limit_by_less_than_one_layer(tmp_path, limit, layout):
    target = tmp_path / "out.safetensors"
    report = quantize_file(
        LANDSCAPES,
        target,
        layers="measured",
        size_limit=limit,
        layout=layout,
        calibration=measured(),
        rounding="nearest",
    )
    size = target.stat().st_size
    smallest_quantized = min(layer.bytes_before - layer.bytes_after for layer in report.layers)
    tensors = len(load_file(target))
    counted_too_much = 100 * tensors + (400 * len(report.layers) if layout == "legacy" else 0)
    assert size <= 1e9 * limit
    assert 1e9 * limit - METADATA_BYTES - size < smallest_quantized + counted_too_much


@pytest.mark.parametrize("matmul", ["full", "fp8"])
@pytest.mark.parametrize("layout", ["native", "legacy"])
def test_sizes_are_counted_from_above(tmp_path, layout, matmul):
    """Without the megabyte for metadata, which would hide what is left out. Native, the larger layout, is counted."""
    recipe = Recipe(layers="all_linear", rounding="nearest", matmul=matmul)
    target = tmp_path / "out.safetensors"
    with open_source(LANDSCAPES) as source:
        calibration = recorded([FC1, FC2])
        state = Quantization(FileWeights(source), recipe, calibration).state_dict()
        counted = state_dict_bytes(state) - METADATA_BYTES
        write_state_dict(state, target, layout=layout)
    size = target.stat().st_size
    assert size <= counted <= size + (12_000 if layout == "native" else 22_000)


def test_a_limit_above_the_16_bit_size_keeps_everything(tmp_path):
    report = quantize_file(
        LANDSCAPES, tmp_path / "out.safetensors", layers="measured", size_limit=1, calibration=measured()
    )
    assert report.layers == ()
    assert {k: bytes(v.view(torch.uint8).numpy()) for k, v in load_file(tmp_path / "out.safetensors").items()} == {
        k: bytes(v.view(torch.uint8).numpy()) for k, v in load_file(LANDSCAPES).items()
    }


def test_a_limit_that_is_too_small_says_how_small_it_can_get():
    with pytest.raises(
        ChoiceError, match=r"0\.002 GB is too small.*takes 0\.\d{3} GB; set size_limit to at least"
    ) as e:
        plan_file(LANDSCAPES, layers="measured", size_limit=0.002, calibration=measured())
    least = float(str(e.value).split()[-1])
    assert plan_file(LANDSCAPES, layers="measured", size_limit=least, calibration=measured()).layers
    with pytest.raises(ChoiceError):
        plan_file(LANDSCAPES, layers="measured", size_limit=least - 0.001, calibration=measured())


def test_an_all_in_one_file_counts_whole_and_only_its_diffusion_model_is_chosen(tmp_path):
    model = {f"model.diffusion_model.{key}": value for key, value in load_file(LANDSCAPES).items()}
    encoder = checkpoints.t5xxl("text_encoders.t5xxl.transformer.")
    vae = {"first_stage_model.decoder.conv_in.weight": torch.ones(400, 1000)}
    save_file(model | encoder | vae, tmp_path / "in.safetensors")
    limit = 0.009
    report = quantize_file(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        layers="measured",
        size_limit=limit,
        calibration=measured(),
    )
    size = (tmp_path / "out.safetensors").stat().st_size
    assert limit * 1e9 - 1.3e6 < size <= limit * 1e9
    assert "encoder.block.0.layer.0.SelfAttention.k.weight" in {layer.key for layer in report.layers}
    assert [tensor.reason.text for tensor in report.kept if "changes the picture" in tensor.reason.text]


def test_layers_with_nan_are_kept_within_the_limit(tmp_path):
    tensors = load_file(LANDSCAPES)
    tensors[FC1][0, 0] = float("nan")
    save_file(tensors, tmp_path / "in.safetensors")
    effects = {key: 1e-9 if key == FC1 else 1e-3 for key in landscape_layers()}
    quantize_file(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        layers="measured",
        size_limit=0.0055,
        nonfinite="keep",
        calibration=measured(effects),
    )
    assert 0.0052e9 - METADATA_BYTES < (tmp_path / "out.safetensors").stat().st_size <= 0.0055e9
    assert load_file(tmp_path / "out.safetensors")[FC1].dtype == torch.bfloat16


# What is chosen


def kept_by_choice(report):
    return {tensor.key for tensor in report.kept if tensor.reason.kind == "effect"}


def plan(calibration=None, **choices):
    return plan_file(LANDSCAPES, layers="measured", calibration=calibration or measured(), **choices)


def test_the_layers_with_the_largest_effect_per_byte_are_kept():
    effects = dict.fromkeys(landscape_layers(), 1e-6)
    effects |= {FC1: 3e-3, FC2: 2e-3}
    report = plan(measured(effects), target_quality=40, rounding="nearest")
    assert kept_by_choice(report) == {FC1, FC2}
    (note,) = (note for note in report.notes if "stay as they are" in note)
    chosen = "2 of 34 layers stay as they are, chosen by measured effect per byte"
    quality = 10 * math.log10(1 / (32 * 1e-6))
    assert note.startswith(f"{chosen}: predicted latent quality {quality:.1f} dB.")


def test_users_patterns_still_hold():
    effects = dict.fromkeys(landscape_layers(), 1e-6) | {FC1: 1e-3}
    choices = {"target_quality": 40, "rounding": "nearest"}
    assert FC1 not in {layer.key for layer in plan(measured(effects), **choices).layers}
    kept = plan(measured(effects), keep=["fc2"], **choices)
    assert {t.key for t in kept.kept if "fc2" in t.key and t.reason.pattern == "fc2"} == {
        k for k in effects if "fc2" in k
    }
    only = plan(measured(effects), only=["joint_blocks.1.x_block.mlp"], **choices)
    assert {layer.key for layer in only.layers} == {FC2}


def test_other_roundings_scale_the_effects():
    """The effect of stochastic rounding is (0.03 / 0.02)² times that of nearest, of calibrated (1 / 3)² times."""
    effects = dict.fromkeys(landscape_layers(), 1e-6)
    found = {}
    for format, rounding in [
        ("float8_e4m3fn", "nearest"),
        ("float8_e4m3fn", "owlshift"),
        ("float8_e4m3fn", "calibrated"),
        ("float8_e5m2", "nearest"),
        ("float8_e5m2", "calibrated"),
    ]:
        report = plan(measured(effects), format=format, rounding=rounding, target_quality=1)
        found[format, rounding] = float("".join(report.notes).split("quality ")[1].split()[0])
    ratios = [1, 1.5, 1 / 3, 2, 2 / 3]
    assert list(found.values()) == [pytest.approx(-10 * math.log10(34e-6 * r**2), abs=0.06) for r in ratios]


def test_a_better_target_keeps_more():
    kept = [len(kept_by_choice(plan(target_quality=decibels))) for decibels in (1, 10, 20, 30, 60)]
    assert kept == sorted(kept) and kept[0] == 0 and len(set(kept)) > 3


def test_layers_without_a_known_effect_stay_as_they_are():
    effects = dict.fromkeys(landscape_layers(), 1e-6)
    del effects[FC1]
    report = plan(measured(effects), target_quality=10)
    assert [t.reason.text for t in report.kept if t.key == FC1] == ["its effect is not known"]
    assert any(note.startswith("1 layer without a known effect") for note in report.notes)


def test_a_plan_and_a_job_choose_the_same(tmp_path):
    recipe = Recipe(layers="measured", size_limit=0.0055)
    report = quantize_file(LANDSCAPES, tmp_path / "out.safetensors", recipe, calibration=measured())
    assert kept_by_choice(report) == kept_by_choice(plan(size_limit=0.0055)) != set()


def test_the_file_says_how_it_was_chosen(tmp_path):
    quantize_file(
        LANDSCAPES, tmp_path / "out.safetensors", layers="measured", size_limit=0.0055, calibration=measured()
    )
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["stochastic_fp8"])
    assert (recipe["layers"], recipe["size_limit"], recipe["target_quality"]) == ("measured", 0.0055, 0)


# Without measured effects


def recorded(keys):
    """A calibration of made-up inputs, whose size differs from layer to layer."""
    recorder = ActivationRecorder()
    generator = torch.Generator().manual_seed(0)
    for i, key in enumerate(keys):
        width = landscape_layers()[key].shape[1]
        recorder.observe(key, torch.randn(64, width, generator=generator) * (1 + i))
    return recorder.result("recorded")


def test_without_effects_the_predicted_output_error_counts():
    report = plan(recorded(sorted(landscape_layers())[::5]), size_limit=0.0083, rounding="nearest")
    assert any("chosen by predicted output error per byte" in note for note in report.notes)
    assert "the effects on the picture were not measured: Layer Sensitivity would choose better layers" in report.notes
    assert kept_by_choice(report)


def test_with_a_calibration_of_few_layers_the_others_stay():
    report = plan(recorded([FC1, FC2]), size_limit=0.1, rounding="nearest")
    assert {t.key for t in report.kept if t.reason.kind == "no_effect_known"} == landscape_layers().keys() - {FC1, FC2}


# Errors


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"layers": "measured", "size_limit": 1, "target_quality": 40}, "exclude each other"),
        ({"layers": "auto", "size_limit": 1}, "size_limit works with layers 'measured' only"),
        ({"layers": "all_linear", "target_quality": 1}, "target_quality works with layers 'measured' only"),
        ({"layers": "measured"}, "set size_limit or target_quality"),
        ({"layers": "measured", "size_limit": -1}, "size_limit is -1"),
        ({"layers": "measured", "size_limit": float("nan")}, "size_limit is nan"),
        ({"layers": "measured", "target_quality": "40"}, "target_quality is 40"),
    ],
)
def test_limits_that_make_no_sense(choices, text):
    with pytest.raises(ChoiceError, match=text):
        Recipe(**choices)


def test_measured_needs_a_calibration():
    with pytest.raises(CalibrationError, match="connect Layer Sensitivity or Load Calibration"):
        plan_file(LANDSCAPES, layers="measured", size_limit=1)


def test_a_quality_needs_measured_effects():
    with pytest.raises(CalibrationError, match="target_quality needs measured effects"):
        plan(recorded([FC1]), target_quality=40)


def test_a_calibration_of_another_model():
    with pytest.raises(CalibrationError, match="made with another model"):
        plan(measured({"blocks.0.attn.weight": 1.0}), size_limit=1)


def test_a_text_encoder_is_refused(tmp_path):
    save_file(checkpoints.t5xxl(), tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="works for diffusion models only"):
        plan_file(tmp_path / "t5.safetensors", layers="measured", size_limit=1, calibration=measured())


def test_a_choice_survives_saving_and_loading_its_calibration(tmp_path):
    save_calibration(measured(), tmp_path / "c.safetensors")
    loaded = load_calibration(tmp_path / "c.safetensors")
    assert kept_by_choice(plan(loaded, size_limit=0.0055)) == kept_by_choice(plan(size_limit=0.0055))


# The command


def command(capsys, *arguments):
    """(exit code, output, error) of the command on the landscape model."""
    try:
        code = main([str(LANDSCAPES), *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "choices"),
    [(["--size-limit", 0.0055], {"size_limit": 0.0055}), (["--target-db", 20], {"target_quality": 20})],
)
def test_the_command_makes_the_planned_file(tmp_path, capsys, options, choices):
    save_calibration(measured(), tmp_path / "c.safetensors")
    target = tmp_path / "out.safetensors"
    arguments = [target, "--nearest", "--preset", "measured", "--calibration", tmp_path / "c.safetensors", *options]
    code, output, _ = command(capsys, *arguments)
    assert code == 0 and "stay as they are, chosen by measured effect per byte" in output
    expected = {layer.key for layer in plan(rounding="nearest", **choices).layers}
    assert {key for key, tensor in load_file(target).items() if tensor.dtype == torch.float8_e4m3fn} == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--preset", "measured", "--size-limit", 1], "needs to know what each layer does"),
        (["--preset", "measured", "--size-limit", 1, "--target-db", 1], "exclude each other"),
        (["--size-limit", 1], "works with layers 'measured' only"),
        (["--preset", "measured"], "set size_limit or target_quality"),
        (["--size-limit", "-1"], "is not a number from 0 up"),
        (["--size-limit", "nan"], "is not a number from 0 up"),
    ],
)
def test_the_command_refuses_limits_in_one_line(tmp_path, capsys, options, text):
    code, output, error = command(capsys, tmp_path / "out.safetensors", *options)
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert text in error
    assert not (tmp_path / "out.safetensors").exists()


def test_compare_does_not_offer_measured(capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(LANDSCAPES), "--preset", "measured"])
    assert "invalid choice: 'measured'" in capsys.readouterr().err
