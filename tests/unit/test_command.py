"""The command `python -m kernels`: every flag, its output, and its exit codes."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import entry, raw_file, sd3, weights
from conftest import PACK_ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import display, quantize_file
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.command import main as command
from stochastic_fp8_pack.kernels.command.plots import file_name, thin_samples
from tiny_models import LANDSCAPES, write_set

QKV = "joint_blocks.0.x_block.attn.qkv.weight"
QUANTIZED = 8  # layers of the made-up SD3: two blocks of four


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.safetensors"
    save_file(sd3(), path)
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.fixture
def run(capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = command.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def recipe_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["stochastic_fp8"])


def one_line(text):
    """The error line, after what the progress bar has drawn and cleared."""
    line = text.rsplit("\r", 1)[-1]
    assert line.startswith("error: "), text
    assert line.count("\n") == 1 and line.endswith("\n"), text
    assert "Traceback" not in text
    return line


# --- as a program


def python_m_kernels(folder, *arguments):
    command = [sys.executable, "-m", "kernels", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_the_pack_folder_runs_under_any_name(source, target, tmp_path):
    folder = tmp_path / "Some other-name"
    folder.symlink_to(PACK_ROOT)
    done = python_m_kernels(folder, source, target)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "8 tensors quantized, 6 kept" in done.stdout
    assert load_file(target)[QKV].dtype == torch.float8_e4m3fn


def test_it_ends_with_one_line_and_exit_code_1(target, tmp_path):
    done = python_m_kernels(PACK_ROOT, tmp_path / "missing.safetensors", target)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: missing.safetensors: cannot be opened: No such file or directory\n"


def test_it_ends_with_one_line_and_exit_code_2():
    done = python_m_kernels(PACK_ROOT, "--fp8_type", "e9m9", "in.safetensors", "out.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert "argument --fp8_type: invalid choice: 'e9m9'" in one_line(done.stderr)


# --- quantize: the flags


def test_defaults_are_stochastic_e4m3_absmax_native(run, source, target, tmp_path):
    assert run(source, target)[0] == 0
    defaults = tmp_path / "defaults.safetensors"
    quantize_file(source, defaults)
    assert target.read_bytes() == defaults.read_bytes()
    recipe = recipe_of(target)
    assert (recipe["format"], recipe["rounding"]) == ("float8_e4m3fn", "stochastic")
    assert (recipe["scaling"], recipe["layout"], recipe["seed"]) == ("absmax", "native", 0)


@pytest.mark.parametrize(
    ("flags", "entry", "value"),
    [
        (["--fp8_type", "e4m3"], "format", "float8_e4m3fn"),
        (["--fp8_type", "e5m2"], "format", "float8_e5m2"),
        (["--stochastic"], "rounding", "stochastic"),
        (["--owlshift"], "rounding", "owlshift"),
        (["--complex_rounding"], "rounding", "complex_neighbor"),
        (["--shifturb"], "rounding", "shift_perturb"),
        (["--nearest"], "rounding", "nearest"),
        (["--absmax"], "scaling", "absmax"),
        (["--owlscale"], "scaling", "owlscale"),
        (["--no-scale"], "scaling", "none"),
        (["--seed", "123456789012345678"], "seed", 123456789012345678),
        (["--preset", "all_linear"], "layers", "all_linear"),
        (["--keep", "joint_blocks.0", "mlp.fc2"], "keep", ["joint_blocks.0", "mlp.fc2"]),
        (["--only", "x_block"], "only", ["x_block"]),
        (["--keys_to_quantize_suffix", "qkv.weight", "fc1.weight"], "suffixes", ["qkv.weight", "fc1.weight"]),
        (["--layout", "legacy"], "layout", "legacy"),
        (["--matmul", "fp8"], "matmul", "fp8"),
        (["--nonfinite", "keep"], "nonfinite", "keep"),
    ],
)
def test_every_choice_reaches_the_file(run, source, target, flags, entry, value):
    code, _, errors = run(source, target, *flags)
    assert code == 0, errors
    assert recipe_of(target)[entry] == value


@pytest.mark.parametrize(
    ("flags", "quantized"),
    [
        (["--preset", "all_linear"], 12),
        (["--preset", "sd3"], 8),
        (["--keep", "joint_blocks.0"], 4),
        (["--only", "context_block"], 2),
        (["--keys_to_quantize_suffix", "fc1.weight"], 2),
    ],
)
def test_the_layers_asked_for_are_quantized(run, source, target, flags, quantized):
    run(source, target, *flags)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in load_file(target).values()) == quantized


def test_an_existing_file_is_replaced_only_on_request(run, source, target):
    target.write_bytes(b"precious")
    code, _, errors = run(source, target)
    assert (code, target.read_bytes()) == (1, b"precious")
    assert "out.safetensors: already exists" in one_line(errors)
    assert run(source, target, "--overwrite")[0] == 0
    assert QKV in load_file(target)


def test_the_same_format_again_only_on_request(run, source, target, tmp_path):
    run(source, target)
    again = tmp_path / "again.safetensors"
    code, _, errors = run(target, again)
    assert (code, again.exists()) == (1, False)
    assert "8 layers are already float8_e4m3fn" in one_line(errors)
    assert run(target, again, "--requantize")[0] == 0
    assert again.exists()


def test_weights_that_are_not_finite_stop_the_job_or_are_kept(run, tmp_path, target):
    tensors = sd3()
    tensors[QKV][3, 5], tensors[QKV][4, 6] = torch.nan, torch.inf
    save_file(tensors, tmp_path / "nan.safetensors")
    code, _, errors = run(tmp_path / "nan.safetensors", target)
    assert (code, target.exists()) == (1, False)
    assert f"{QKV} (1 NaN, 1 infinite)" in one_line(errors)
    assert run(tmp_path / "nan.safetensors", target, "--nonfinite", "keep")[0] == 0
    assert load_file(target)[QKV].dtype == torch.bfloat16


def test_the_device_is_taken(run, source, target, tmp_path):
    assert run(source, target, "--device", "cpu")[0] == 0
    run(source, tmp_path / "automatic.safetensors")
    assert target.read_bytes() == (tmp_path / "automatic.safetensors").read_bytes()


# --- quantize: its output


def test_the_summary(run, tmp_path, target):
    """One layer of values that FP8 represents exactly, so that every number is known."""
    exact = torch.tensor([1.0, -2.0, 3.5, 448.0]).repeat(16, 8)
    save_file({"joint_blocks.0.x_block.mlp.fc1.weight": exact}, tmp_path / "exact.safetensors")
    code, text, _ = run(tmp_path / "exact.safetensors", target, "--preset", "all_linear")
    assert code == 0
    for line in (
        "  recipe  float8_e4m3fn, stochastic, absmax, seed 0, layout native",
        "  layers  1 tensor quantized, 0 kept",
        "  size    2.05 kB → 516 B (−75 %)",
        "  error   SQNR ∞ dB  bias 0  saturated 0 %  flushed 0 %",
        "the layers with the lowest SQNR",
        "  joint_blocks.0.x_block.mlp.fc1.weight  SQNR ∞ dB  bias 0  saturated 0 %  flushed 0 %",
    ):
        assert line in text.splitlines(), text


def test_the_summary_lists_the_worst_five(run, tmp_path, target):
    tensors = weights(*(f"blocks.{i}.linear.weight" for i in range(7)), shape=(16, 16))
    tensors["blocks.3.linear.weight"] = torch.full((16, 16), 1000.0)
    tensors["blocks.5.linear.weight"] = torch.full((16, 16), 1e-5)
    save_file(tensors, tmp_path / "in.safetensors")
    _, text, _ = run(tmp_path / "in.safetensors", target, "--no-scale", "--nearest", "--preset", "all_linear")
    worst = text.split("lowest SQNR\n")[1].splitlines()[:5]
    assert worst[0].split() == [
        "blocks.5.linear.weight",
        *("SQNR", "0.0", "dB", "bias", "−1.0e−5", "saturated", "0", "%", "flushed", "100", "%"),
    ]
    assert worst[1].split() == [
        "blocks.3.linear.weight",
        *("SQNR", "5.2", "dB", "bias", "−5.5e2", "saturated", "100", "%", "flushed", "0", "%"),
    ]
    assert len([line for line in worst if line.startswith("  blocks.")]) == 5


def test_json_is_the_report_and_nothing_else(run, source, target):
    code, text, _ = run(source, target, "--json", "--nearest")
    data = json.loads(text, parse_constant=pytest.fail)
    assert code == 0
    assert (data["bytes_before"], data["bytes_after"]) == (
        sum(tensor.nbytes for tensor in load_file(source).values()),
        sum(tensor.nbytes for key, tensor in load_file(target).items() if not key.endswith(".comfy_quant")),
    )
    assert data["recipe"]["rounding"] == "nearest"
    assert len(data["layers"]) == QUANTIZED
    assert data["error"]["count"] == QUANTIZED * 512
    assert data["error"]["sqnr"] == pytest.approx(31.5, abs=0.5)


def test_json_has_no_infinity_where_nothing_is_lost(run, tmp_path, target):
    save_file({"blocks.0.linear.weight": torch.ones(16, 16)}, tmp_path / "in.safetensors")
    _, text, _ = run(tmp_path / "in.safetensors", target, "--preset", "all_linear", "--json")
    assert json.loads(text, parse_constant=pytest.fail)["error"]["sqnr"] is None


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, source, target, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, text, _ = run(source, target, "--dry-run", "--keep", "joint_blocks.1")
    assert code == 0
    assert "  layers  4 tensors quantized, 10 kept" in text.splitlines()
    assert "  5  kept by pattern 'joint_blocks.1'" in text.splitlines()
    assert "  1  adaLN_modulation" in text.splitlines()
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_as_json(run, source, target):
    code, text, _ = run(source, target, "--dry-run", "--json")
    data = json.loads(text)
    assert (code, data["error"], len(data["layers"])) == (0, None, QUANTIZED)
    assert data["bytes_before"] - data["bytes_after"] == QUANTIZED * (512 - 4)


def test_json_gives_the_reason_and_its_parts(run, source, target):
    _, text, _ = run(source, target, "--dry-run", "--json", "--keep", "joint_blocks.1")
    kept = {tensor["key"]: tensor for tensor in json.loads(text)["kept"]}
    by_user = kept["joint_blocks.1.x_block.attn.qkv.weight"]
    assert by_user["reason"] == "kept by pattern 'joint_blocks.1'"
    assert (by_user["kind"], by_user["pattern"], by_user["preset"]) == ("keep_pattern", "joint_blocks.1", "")
    by_preset = next(tensor for tensor in kept.values() if tensor["kind"] == "preset_pattern")
    assert by_preset["preset"] == "sd3" and by_preset["pattern"] in by_preset["key"]
    assert by_preset["reason"] == f"kept by pattern '{by_preset['pattern']}' of preset sd3"


def test_progress_shows_the_tensor_and_the_speed(run, source, target):
    _, _, errors = run(source, target)
    assert "B/s" in errors
    assert any(key in errors for key in sd3())


def test_notes_are_printed(run, source, target):
    _, text, _ = run(source, target, "--fp8_type", "e5m2")
    assert any(line.startswith("note: ComfyUI 0.3.75: fails to load; ") for line in text.splitlines())


# --- quantize: figures


def test_plots_show_all_layers_and_the_worst(run, source, target, tmp_path):
    folder = tmp_path / "made" / "figures"
    code, _, errors = run(source, target, "--plot", "--plot_dir", folder, "--plot_max_tensors", 2)
    assert code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["all_layers.png", "layer_by_layer.png"]
    assert [name[:21] for name in names[2:]] == ["worst_01_joint_blocks", "worst_02_joint_blocks"]
    assert all(f"figure: {folder / name}" in errors for name in names)
    for name in names:
        with Image.open(folder / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[1] == 1024
        assert (pixels[:8] == 255).all(), "the margin is white"
        assert 0.02 < (pixels != 255).any(axis=2).mean() < 0.95, "neither empty nor full"


def test_plots_lie_beside_the_file_by_default(run, source, target, tmp_path):
    assert run(source, target, "--plot", "--plot_max_tensors", 0)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out_plots").iterdir()) == ["all_layers.png", "layer_by_layer.png"]


@pytest.mark.parametrize("total", [0, 1, 5, 100, 10**6])
def test_the_sample_size_bounds_the_dots(source, target, total):
    report = quantize_file(source, target)
    thinned = thin_samples(report, report.layers, total)
    assert sum(len(layer.error.samples) for layer in thinned.layers) == min(total, QUANTIZED * 128)
    first = thinned.layers[-1].error.samples[:1]
    assert first == report.layers[-1].error.samples[: len(first)]


def test_figure_names_are_valid_on_every_file_system():
    assert file_name("blocks.0/attn:qkv*?.weight") == "blocks.0_attn_qkv__.weight"
    assert len(file_name("x" * 5000)) == 150


def test_without_matplotlib_the_job_does_not_start(run, source, target, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, errors = run(source, target, "--plot")
    assert (code, target.exists()) == (1, False)
    assert one_line(errors) == "error: the Python package matplotlib is missing: pip install matplotlib\n"


# --- quantize: the trace


def test_debug_traces_range_scale_bracket_and_decision(run, tmp_path, target):
    values = torch.zeros(16, 16)
    values.view(-1)[::64] = torch.tensor([1.1015625, -300.0, 1000.0, 2.0**-10])
    save_file({"blocks.0.linear.weight": values.bfloat16()}, tmp_path / "in.safetensors")
    arguments = ("--preset", "all_linear", "--no-scale", "--nearest", "--debug")
    code, _, errors = run(tmp_path / "in.safetensors", target, *arguments)
    assert code == 0
    assert errors.splitlines()[:-1] == [
        "blocks.0.linear.weight: bfloat16 (16, 16), -300 to 1000, amax 1000, scale 1",
        "  [0] 1.10156 / scale = 1.10156: between 1 and 1.125, 0.8125 of the way, nearest: "
        "away from zero -> 0x39 = 1.125",
        "  [64] -300 / scale = -300: between -288 and -320, 0.3750 of the way, nearest: towards zero -> 0xf9 = -288",
        "  [128] 1000 / scale = 1000: at or beyond the largest value -> 0x7e = 448",
        "  [192] 0.000976562 / scale = 0.000976562: between 0 and 0.00195312, 0.5000 of the way, nearest: "
        "towards zero -> 0x00 = 0",
    ]


@pytest.mark.parametrize("flag", ["--stochastic", "--owlshift", "--complex_rounding", "--shifturb"])
@pytest.mark.parametrize("fp8_type", ["e4m3", "e5m2"])
def test_the_traced_draw_explains_the_code(run, source, target, flag, fp8_type):
    _, _, errors = run(source, target, "--debug", flag, "--fp8_type", fp8_type)
    decisions = [line for line in errors.splitlines() if "with the draw" in line]
    assert len(decisions) > 20
    for line in decisions:
        assert ("at least 1" in line) == ("away from zero" in line), line
    assert {"at least 1" in line for line in decisions} == {True, False}


def test_debug_shows_where_an_error_comes_from(run, target, tmp_path):
    code, _, errors = run(tmp_path / "missing.safetensors", target, "--debug")
    assert code == 1
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1] == "error: missing.safetensors: cannot be opened: No such file or directory"


# --- exit codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: IN, OUT"),
        (["in.safetensors"], "required: OUT"),
        (["in", "out", "--owlshift", "--nearest"], "--nearest: not allowed with argument --owlshift"),
        (["in", "out", "--absmax", "--no-scale"], "--no-scale: not allowed with argument --absmax"),
        (["in", "out", "--seed", "-1"], "--seed: -1 is negative"),
        (["in", "out", "--seed", "many"], "--seed: invalid whole number value: 'many'"),
        (
            ["in", "out", "--preset", "flax"],
            "--preset: invalid choice: 'flax' (choose from 'auto', 'all_linear', 'flux'",
        ),
        (["in", "out", "--layout", "new"], "--layout: invalid choice: 'new' (choose from 'native', 'legacy')"),
        (["in", "out", "--device", "abacus"], "--device: device 'abacus' is not available"),
        (["in", "out", "--device", "cuda:77"], "--device: device 'cuda:77' is not available"),
        (["in", "out", "--dry-run", "--plot"], "--plot and --dry-run exclude each other"),
        (["in", "out", "--over"], "unrecognized arguments: --over"),
        (["inspect"], "required: FILE"),
        (["compare", "in", "--fp8_type", "e4m3"], "unrecognized arguments: --fp8_type"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(run, arguments, message):
    code, text, errors = run(*arguments)
    assert (code, text) == (2, "")
    assert message in one_line(errors)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "joint_blokcs"], "pattern 'joint_blokcs' matches no tensor; did you mean joint_blocks"),
        (["--only", "a..b"], "'a..b' is not a pattern"),
        (["--seed", str(2**64)], "seed 18446744073709551616 is out of range"),
    ],
)
def test_a_choice_that_does_not_fit_the_file_is_exit_code_2(run, source, target, flags, message):
    code, _, errors = run(source, target, *flags)
    assert (code, target.exists()) == (2, False)
    assert message in one_line(errors)


def _truncated(path):
    save_file(sd3(), path)
    path.write_bytes(path.read_bytes()[:-1])


def _same_name_twice(path):
    raw_file(
        path,
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
        b"x",
    )


def _huge_header(path):
    """Its length is 100 MB and a byte; the file is sparse."""
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 100_000_100)


BAD_FILES = {
    "missing": (lambda path: None, "cannot be opened: No such file or directory"),
    "a folder": (lambda path: path.mkdir(), "is not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), "is truncated"),
    "a text": (lambda path: path.write_bytes(b"hello, world, I am no model"), "is not a safetensors file"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is a Python pickle"),
    "a zipped pickle": (lambda path: torch.save({"a": torch.ones(2)}, path), "is a PyTorch pickle"),
    "truncated": (_truncated, "is truncated: 1 of "),
    "a header beyond the file": (lambda path: raw_file(path, {}, length=5000), "it ends inside its header"),
    "a header of 100 MB": (_huge_header, "has a header of 100,000,001 bytes"),
    "overlapping": (
        lambda path: raw_file(path, {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"123456"),
        "tensors 'a' and 'b' overlap",
    ),
    "out of range": (lambda path: raw_file(path, {"a": entry("U8", [9], 0, 9)}, b"1234"), "5 of "),
    "an unknown dtype": (lambda path: raw_file(path, {"a": entry("F7", [1], 0, 1)}, b"1"), "unknown dtype 'F7'"),
    "a name twice": (_same_name_twice, "'a' occurs twice"),
    "nothing to quantize": (lambda path: save_file({"a": torch.ones(3)}, path), "has nothing to quantize"),
    "only an empty tensor": (
        lambda path: save_file({"a.weight": torch.ones(0, 16)}, path),
        "has nothing to quantize: empty",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_line_and_exit_code_1(run, tmp_path, target, kind):
    make, message = BAD_FILES[kind]
    make(tmp_path / "bad.safetensors")
    target.write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    code, text, errors = run(tmp_path / "bad.safetensors", target, "--overwrite")
    assert (code, text) == (1, "")
    assert one_line(errors).startswith("error: bad.safetensors: ")
    assert message in errors
    assert target.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "kind", [kind for kind in BAD_FILES if kind not in ("nothing to quantize", "only an empty tensor")]
)
def test_inspect_and_compare_say_the_same_of_a_bad_file(run, tmp_path, kind):
    """Inspect reports the fault of a file as a finding; a folder is not a file."""
    make, message = BAD_FILES[kind]
    path = tmp_path / "bad.safetensors"
    make(path)
    code, text, errors = run("compare", path)
    assert (code, text) == (1, "")
    assert message in one_line(errors)
    code, text, errors = run("inspect", path)
    assert code == 1
    if not path.is_file():
        assert (text, message in one_line(errors)) == ("", True)
    else:
        assert message.partition(":")[0].partition(";")[0] in text
        assert (errors, text.count("error: "), text.count("fails to load")) == ("", 1, 2)


HOSTILE = "joint_blocks.0.a\x1b[2J\u202eb\nnote: c"


def test_hostile_names_are_escaped_in_everything_that_is_printed(run, tmp_path):
    tensors = sd3() | weights(f"{HOSTILE}.weight")
    save_file(tensors, tmp_path / "a.safetensors")
    bad = tensors | {f"{HOSTILE}.weight": torch.full((32, 16), float("nan"))}
    save_file(bad, tmp_path / "\x1b[31mbad\u202e.safetensors")
    commands = (
        ("a.safetensors", "o.safetensors", "--dry-run", "--keep", "nothing*", "a*"),
        ("a.safetensors", "o.safetensors", "--dry-run"),
        ("a.safetensors", "o.safetensors"),
        ("inspect", "o.safetensors"),
        ("compare", "a.safetensors"),
        ("\x1b[31mbad\u202e.safetensors", "p.safetensors"),
        ("\x1b[31mbad\u202e.safetensors", "p.safetensors", "--nonfinite", "keep"),
        ("inspect", "\x1b[31mbad\u202e.safetensors", "--deep"),
        ("inspect", "missing\x1b[31m.safetensors"),
    )
    for words in commands:
        files = [str(tmp_path / word) if word.endswith(".safetensors") else word for word in words]
        _, text, errors = run(*files)
        shown = (text + errors).replace("\r", "").replace("\x1b[A", "")
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert not any(line.startswith("note: c") for line in shown.splitlines())
        assert shown


def test_the_source_cannot_be_the_target(run, source):
    before = source.read_bytes()
    code, _, errors = run(source, source, "--overwrite")
    assert (code, source.read_bytes()) == (1, before)
    assert "is the source itself" in one_line(errors)


@pytest.mark.parametrize("where", ["no/such/folder/out.safetensors", "out.bin"])
def test_an_impossible_target_is_exit_code_1(run, source, tmp_path, where):
    code, _, errors = run(source, tmp_path / where)
    assert code == 1
    assert one_line(errors)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_target_without_permission_is_exit_code_1(run, source):
    """Not even root may write into /sys."""
    code, _, errors = run(source, "/sys/kernel/out.safetensors")
    assert code == 1
    assert "out.safetensors: cannot be written" in one_line(errors)


def test_an_empty_tensor_and_odd_names_go_through(run, tmp_path, target):
    tensors = sd3() | {"naïve 名前.\n\t🦉.weight": torch.ones(16, 16), "empty.weight": torch.ones(0, 16)}
    save_file(tensors, tmp_path / "odd.safetensors")
    assert run(tmp_path / "odd.safetensors", target)[0] == 0
    assert load_file(target)["naïve 名前.\n\t🦉.weight"].dtype == torch.float8_e4m3fn
    assert load_file(target)["empty.weight"].shape == (0, 16)


def test_ctrl_c_is_exit_code_130(run, source, target, tmp_path, monkeypatch):
    def press(*arguments, **choices):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "quantize_file", press)
    code, _, errors = run(source, target)
    assert (code, one_line(errors)) == (130, "error: cancelled; no file was changed\n")


def test_an_unexpected_error_is_one_line_too(run, source, target, monkeypatch):
    def fail(*arguments, **choices):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(command, "quantize_file", fail)
    code, _, errors = run(source, target)
    assert (code, one_line(errors)) == (1, "error: RuntimeError: out of memory (--debug shows the traceback)\n")


def test_a_folder_that_cannot_be_created_is_one_line(run, source, target):
    code, _, errors = run(source, target, "--plot", "--plot_dir", source / "figures")
    assert (code, target.exists()) == (1, False)
    assert one_line(errors) == f"error: {source / 'figures'}: Not a directory\n"


# --- inspect


@pytest.fixture
def quantized(source, target):
    quantize_file(source, target)
    return target


def test_a_file_without_problems_is_exit_code_0(run, quantized):
    code, text, _ = run("inspect", quantized)
    assert code == 0
    assert text.startswith("out.safetensors: SD3, SD3.5, 8 scaled FP8 layers (float8_e4m3fn; marked: header, inline)")
    assert "ComfyUI 0.33: exact" in text


@pytest.fixture
def faulty(quantized, tmp_path):
    """Scales in bf16, and no header entry."""
    tensors = load_file(quantized)
    scales = {key: tensor.bfloat16() for key, tensor in tensors.items() if key.endswith(".weight_scale")}
    path = tmp_path / "faulty.safetensors"
    save_file(tensors | scales, path)
    return path


def test_a_file_with_problems_is_exit_code_1_and_can_be_repaired(run, faulty, tmp_path):
    code, text, _ = run("inspect", faulty)
    assert code == 1
    assert f": {QUANTIZED} errors, {QUANTIZED} warnings" in text
    assert text.count("error: ") == text.count("warning: ") == 1
    repaired = tmp_path / "repaired.safetensors"
    code, text, _ = run("inspect", faulty, "--repair", repaired)
    assert code == 0
    assert "repaired: repaired.safetensors: SD3, SD3.5, 8 scaled FP8 layers" in text
    assert run("inspect", repaired)[0] == 0
    assert run("inspect", faulty, "--repair", repaired)[0] == 1
    assert run("inspect", faulty, "--repair", repaired, "--overwrite", "--layout", "legacy")[0] == 0
    assert "scaled_fp8" in load_file(repaired)


def test_inspect_as_json(run, quantized, faulty, tmp_path):
    _, text, _ = run("inspect", quantized, "--json")
    assert (json.loads(text)["ok"], json.loads(text)["scaled"]) == (True, QUANTIZED)
    _, text, _ = run("inspect", faulty, "--json", "--repair", tmp_path / "repaired.safetensors")
    data = json.loads(text)
    assert (data["before"]["ok"], data["after"]["ok"]) == (False, True)


def test_deep_finds_codes_that_are_nan(run, quantized, tmp_path):
    broken = tmp_path / "broken.safetensors"
    shutil.copy(quantized, broken)
    with safe_open(quantized, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(quantized)
    tensors[QKV].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, broken, metadata)
    assert run("inspect", broken)[0] == 0
    code, text, _ = run("inspect", broken, "--deep")
    assert (code, "holds 1 NaN or infinite codes" in text) == (1, True)


# --- compare


def test_compare_lists_every_rounding_in_both_formats(run, source):
    code, text, _ = run("compare", source)
    rows = [line.split() for line in text.splitlines() if line.startswith("  float8")]
    assert code == 0
    assert len(rows) == 10
    rmse = {(row[0], row[1]): float(row[2]) for row in rows}
    for format in ("float8_e4m3fn", "float8_e5m2"):
        for rounding in ("stochastic", "owlshift", "complex_neighbor", "shift_perturb"):
            ratio = rmse[format, rounding] / rmse[format, "nearest"]
            assert ratio == pytest.approx(2**0.5, rel=0.06), "twice the squared error"
    assert rmse["float8_e5m2", "nearest"] / rmse["float8_e4m3fn", "nearest"] == pytest.approx(2, rel=0.06)
    assert text.splitlines()[0] == "in.safetensors: 8 layers, scaling absmax, seed 0"


def test_compare_measures_what_quantizing_does(run, tmp_path, target):
    _, text, _ = run("compare", LANDSCAPES, "--json", "--seed", 5, "--keep", "joint_blocks.1")
    data = json.loads(text, parse_constant=pytest.fail)
    assert (data["total"], len(data["keys"]), len(data["trials"])) == (13, 13, 10)
    row = next(row for row in data["trials"] if (row["format"], row["rounding"]) == ("float8_e5m2", "owlshift"))
    choices = {"format": "float8_e5m2", "rounding": "owlshift", "seed": 5, "keep": ["joint_blocks.1"]}
    error = quantize_file(LANDSCAPES, target, **choices).error
    assert (row["count"], row["flushed"]) == (error.count, error.flushed)
    assert (row["rmse"], row["bias"], row["sqnr"]) == pytest.approx((error.rmse, error.bias, error.sqnr), rel=1e-9)


def test_compare_takes_fp8_files_too(run, quantized):
    code, text, _ = run("compare", quantized)
    assert code == 0
    assert "∞ dB" in next(line for line in text.splitlines() if line.split()[:2] == ["float8_e4m3fn", "nearest"])


@pytest.fixture
def calibration(source, tmp_path):
    """A calibration file of one layer of the source."""
    recorder = ActivationRecorder()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator) @ torch.randn(
        16, load_file(source)[QKV].shape[1], generator=generator
    )
    recorder.observe(QKV, x)
    save_calibration(recorder.result("prompts"), tmp_path / "calibration.safetensors")
    return tmp_path / "calibration.safetensors"


def test_compare_with_a_calibration_shows_output_errors(run, source, calibration):
    code, text, _ = run("compare", source, "--calibration", calibration)
    assert code == 0
    rows = [line for line in text.splitlines() if line.startswith("  float8")]
    assert len(rows) == 12
    assert "flushed" in text and "output error" in text
    assert "7 of these 8 layers are not in the calibration" in text
    _, text, _ = run("compare", source, "--calibration", calibration, "--json")
    data = json.loads(text, parse_constant=pytest.fail)
    errors = {(row["format"], row["rounding"]): row["output_error"] for row in data["trials"]}
    assert errors["float8_e4m3fn", "calibrated"] < 0.6 * errors["float8_e4m3fn", "nearest"]
    assert (data["calibration"], len(data["unseen"])) == ("prompts", 7)
    for row, line in zip(data["trials"], rows, strict=True):
        assert line.endswith(display.share(row["output_error"]))


def test_compare_without_a_calibration_shows_no_output_errors(run, source):
    _, text, _ = run("compare", source, "--json")
    data = json.loads(text)
    assert (data["calibration"], data["unseen"], {row["output_error"] for row in data["trials"]}) == (None, [], {None})


def test_compare_refuses_a_file_without_a_calibration(run, source):
    code, _, errors = run("compare", source, "--calibration", source)
    assert (code, "does not hold an FP8 calibration" in errors) == (1, True)


def test_calibrated_takes_a_calibration_file(run, source, target, calibration):
    code, out, _ = run(source, target, "--calibrated", "--calibration", calibration)
    assert code == 0
    assert "calibrated, absmax" in out
    assert "with nearest (predicted, 1 calibrated layer)" in out
    assert "7 of 8 layers were rounded to nearest" in out


def test_calibrated_without_a_file_says_what_is_missing(run, source, target):
    code, _, error = run(source, target, "--calibrated")
    assert code == 2
    assert "--calibration FILE" in error
    assert not target.exists()


@pytest.mark.parametrize("name", ["IN.SAFETENSORS", "in.sft", "in.SFT"])
def test_other_endings_of_safetensors_files(run, source, target, name):
    source.rename(source.with_name(name))
    assert run(source.with_name(name), target)[0] == 0
    assert len(recipe_of(target)["quantized"]) == QUANTIZED
    assert run("inspect", source.with_name(name))[0] == 0
    assert run("compare", source.with_name(name))[0] == 0


def test_every_command_takes_a_set(run, source, target, tmp_path):
    tensors = load_file(source)
    names = sorted(tensors)
    index = write_set(tmp_path / "set.safetensors", [names[::2], names[1::2]], tensors)
    assert run(index, target)[0] == run(source, tmp_path / "whole.safetensors")[0] == 0
    one, whole = load_file(target), load_file(tmp_path / "whole.safetensors")
    assert one.keys() == whole.keys()
    assert all(torch.equal(one[key].float(), whole[key].float()) for key in one)
    assert run(index, tmp_path / "planned.safetensors", "--dry-run")[0] == 0
    assert run("inspect", index)[0] == 0
    assert run("compare", index)[0] == 0


def test_the_diffusers_layout_is_refused(run, target, tmp_path):
    """The command has no key map."""
    names = ("x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight")
    save_file({name: torch.ones(16, 16) for name in names}, tmp_path / "flux.safetensors")
    code, _, errors = run(tmp_path / "flux.safetensors", target)
    assert code == 1
    assert errors.count("\n") == 1
    assert "in the diffusers layout, for which ComfyUI drops the scales; quantize the ComfyUI version" in errors
    assert not target.exists()
