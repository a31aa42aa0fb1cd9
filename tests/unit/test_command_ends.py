"""How the command ends: what it says is true, and a file is written whatever becomes of stdout and stderr."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from checkpoints import sd3
from conftest import PACK_ROOT
from safetensors.torch import save_file
from stochastic_fp8_pack.kernels import inspect_file, quantize_file
from stochastic_fp8_pack.kernels.command import main as command

UNCHANGED = "error: cancelled; no file was changed"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.safetensors"
    save_file(sd3(), path)
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def press_ctrl_c(*arguments, **options):
    raise KeyboardInterrupt


def last_line(capsys):
    return capsys.readouterr().err.rsplit("\r", 1)[-1].rstrip("\n")


@pytest.mark.parametrize("exists", [False, True])
def test_ctrl_c_before_the_file_appears_changes_nothing(source, target, exists, capsys, monkeypatch):
    if exists:
        target.write_bytes(b"mine")
    monkeypatch.setattr(command, "quantize_file", press_ctrl_c)
    assert run(source, target, "--overwrite") == 130
    assert last_line(capsys) == UNCHANGED


STARTING = """
import builtins, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
load = builtins.__import__
def load_and_press(name, *arguments):
    if name == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *arguments)
builtins.__import__ = load_and_press
sys.path.insert(0, {root!r})
sys.argv = ["-m", *{arguments!r}]
runpy.run_module("kernels", run_name="__main__", alter_sys=True)
"""


@pytest.mark.posix
@pytest.mark.parametrize("module", ["torch", "numpy", "argparse"])
def test_ctrl_c_while_the_command_starts_is_one_line(source, target, tmp_path, module):
    """Whatever is being imported. Before Python hands over to this package, the traceback is its own."""
    target.write_bytes(b"mine")
    code = STARTING.format(module=module, root=str(PACK_ROOT), arguments=[str(source), str(target), "--overwrite"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", UNCHANGED + "\n")
    assert target.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {source.name, target.name}


def test_importing_the_library_leaves_ctrl_c_alone():
    code = (
        f"import signal, sys; sys.path.insert(0, {str(PACK_ROOT)!r}); before = signal.getsignal(signal.SIGINT)\n"
        "import builtins; seen = set(); load = builtins.__import__\n"
        "def look(name, *rest): seen.add(signal.getsignal(signal.SIGINT)); return load(name, *rest)\n"
        "builtins.__import__ = look; import kernels, kernels.__main__; assert seen == {before}, seen"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("exists", [False, True])
def test_ctrl_c_after_the_file_appeared_says_so(source, target, exists, capsys, monkeypatch):
    if exists:
        target.write_bytes(b"mine")

    def quantize_and_press(*arguments, **options):
        quantize_file(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "quantize_file", quantize_and_press)
    assert run(source, target, "--overwrite") == 130
    assert last_line(capsys) == f"error: cancelled; {target} was written before that and is complete"
    assert inspect_file(target).ok


def test_ctrl_c_while_the_folder_is_synced_says_that_the_file_was_written(source, target, capsys, monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.atomic_file._sync_folder", press_ctrl_c)
    assert run(source, target) == 130
    assert last_line(capsys) == f"error: cancelled; {target} was written before that and is complete"
    assert {path.name for path in target.parent.iterdir()} == {"in.safetensors", "out.safetensors"}


def test_figures_that_fail_do_not_hide_that_the_file_was_written(source, target, capsys, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device", "a.png")

    monkeypatch.setattr(command, "_plot", fail)
    assert run(source, target, "--plot") == 1
    assert last_line(capsys) == (
        f"error: a.png: No space left on device; {target} was written before that and is complete"
    )
    monkeypatch.setattr(command, "_plot", press_ctrl_c)
    assert run(source, target, "--plot", "--overwrite") == 130
    assert last_line(capsys).endswith("was written before that and is complete")


def test_a_repaired_file_is_named_too(source, target, capsys, monkeypatch):
    fp8 = target.with_name("fp8.safetensors")
    quantize_file(source, fp8)
    monkeypatch.setattr(command, "_print_result", press_ctrl_c)
    assert run("inspect", fp8, "--repair", target) == 130
    assert last_line(capsys) == f"error: cancelled; {target} was written before that and is complete"
    assert run("inspect", fp8) == 130
    assert last_line(capsys) == UNCHANGED


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_null_where_a_number_is_not_finite(source, target, value, capsys, monkeypatch):
    def quantize(*arguments, **options):
        report = quantize_file(*arguments, **options)
        layer = report.layers[0]
        return replace(report, layers=(replace(layer, error=replace(layer.error, sum_error=value)), *report.layers[1:]))

    monkeypatch.setattr(command, "quantize_file", quantize)
    assert run(source, target, "--json") == 0
    data = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["error"]["bias"] is None
    assert data["layers"][0]["error"]["sum_error"] is None
    assert data["layers"][1]["error"]["sum_error"] is not None


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("option", ["--json", "--plot", "--debug"])
def test_a_program_without_a_terminal_writes_its_file(source, target, stream, option, monkeypatch):
    """Under pythonw, sys.stdout and sys.stderr are None."""
    monkeypatch.setattr(sys, stream, None)
    assert run(source, target, option) == 0
    assert inspect_file(target).ok
    assert run(source, target) == 1  # it exists


def start(source, target, redirection):
    command = f'exec "{sys.executable}" -m kernels "{source}" "{target}" {redirection}'
    return subprocess.run(
        ["bash", "-c", command], cwd=PACK_ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.posix
def test_closed_descriptors_do_not_lose_the_file(source, target):
    done = start(source, target, "<&- >&- 2>&-")
    assert (done.returncode, inspect_file(target).ok) == (0, True)


@pytest.mark.posix
def test_a_broken_stderr_does_not_lose_the_file(source, target):
    """/dev/full refuses every write."""
    done = start(source, target, "2>/dev/full")
    assert (done.returncode, inspect_file(target).ok) == (0, True)


@pytest.mark.posix
def test_a_broken_stdout_is_one_line_which_says_that_the_file_was_written(source, target):
    done = start(source, target, ">/dev/full")
    assert inspect_file(target).ok
    assert done.returncode == 1
    assert done.stderr.endswith(
        "error: the result cannot be printed: [Errno 28] No space left on device; "
        f"{target} was written before that and is complete\n"
    )
