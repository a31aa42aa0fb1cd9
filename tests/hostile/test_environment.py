"""The same source and choices give the same bytes, whatever the environment of the process is."""

import ast
import hashlib
import os
import stat
import subprocess
import sys

import pytest
import torch
from checkpoints import sd3
from conftest import PACK_ROOT
from hostile.amounts import WHOLE
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from torch.utils._device import _device_constructors

DRIVER = """
import runpy, sys
{setup}
for arguments in " ".join(sys.argv[1:]).split(" ; "):
    sys.argv = ["kernels", *arguments.split(" ")]
    try:
        runpy.run_module("kernels", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""
"""Runs `python -m kernels` several times in one process, after what another pack might have done in it."""

VARIABLES = {
    **{f"LC_ALL={name}": {"LC_ALL": name} for name in ("C", "POSIX", "C.UTF-8", "de_DE.UTF-8", "tr_TR.UTF-8", "none")},
    **{f"TZ={name}": {"TZ": name} for name in ("UTC", "Asia/Kathmandu", "America/St_Johns", "none")},
    **{f"PYTHONHASHSEED={number}": {"PYTHONHASHSEED": number} for number in ("0", "1", "4294967295")},
    **{  # passive: more threads than cores would spin while they wait
        f"OMP_NUM_THREADS={number}": {"OMP_NUM_THREADS": number, "OMP_WAIT_POLICY": "passive"}
        for number in ("1", "2", "3", "8")
    },
    **{f"PYTHONUTF8={number}": {"PYTHONUTF8": number} for number in ("0", "1")},
    **{f"PYTHONIOENCODING={name}": {"PYTHONIOENCODING": name} for name in ("ascii", "latin-1", "utf-16")},
    "PYTHONOPTIMIZE": {"PYTHONOPTIMIZE": "2"},
    "PYTHONDEVMODE": {"PYTHONDEVMODE": "1"},
    "PYTHONWARNINGS": {"PYTHONWARNINGS": "error"},
    "COLUMNS": {"COLUMNS": "1", "LINES": "1", "TERM": "dumb"},
    "HOME": {"HOME": "/nowhere", "TMPDIR": "/nowhere", "XDG_CACHE_HOME": "/nowhere", "MPLCONFIGDIR": "/nowhere"},
}
"""Name -> environment variables."""

SETUPS = {
    **{
        f"default dtype {name}": f"torch.set_default_dtype(torch.{name})" for name in ("float64", "float16", "bfloat16")
    },
    "autocast": "torch.autocast('cpu', dtype=torch.bfloat16).__enter__()",
    "medium matmul precision": "torch.set_float32_matmul_precision('medium')",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True)",
    "inference mode": "torch.inference_mode().__enter__()",
    "anomaly detection": "torch.autograd.set_detect_anomaly(True)",
    "seeds": "import random; random.seed(7); torch.manual_seed(7)",
    "many threads": "torch.set_num_threads(5)",
    "denormals flushed": "torch.set_flush_denormal(True)",
    "print options": "torch.set_printoptions(precision=1)",
    "default device": "torch.set_default_device('meta')",
    "recursion limit": "sys.setrecursionlimit(150)",
    "trace": "sys.settrace(lambda *arguments: None)",
}
"""Name -> what another pack might have done in the process; torch and sys are imported."""

LAUNCHES = {
    "umask 077": {"preexec_fn": lambda: os.umask(0o077)},
    "umask 000": {"preexec_fn": lambda: os.umask(0)},
    "lowest priority": {"preexec_fn": lambda: os.nice(19)},
    "no standard input": {"preexec_fn": lambda: os.close(0)},
    "no standard output": {"preexec_fn": lambda: os.close(1)},
    "no standard error": {"preexec_fn": lambda: os.close(2)},
    "no standard streams": {"preexec_fn": lambda: os.closerange(0, 3)},
    "another folder": {"cwd": "/"},
}
"""Name -> options of subprocess.Popen."""

VARIATIONS = {
    **{name: {"variables": variables} for name, variables in VARIABLES.items()},
    **{name: {"setup": f"import torch; {setup}"} for name, setup in SETUPS.items()},
    **{name: {"launch": launch} for name, launch in LAUNCHES.items()},
    "everything": {
        "variables": {
            name: value
            for group in ("LC_ALL=tr_TR.UTF-8", "TZ=Asia/Kathmandu", "PYTHONHASHSEED=1", "OMP_NUM_THREADS=3", "HOME")
            for name, value in VARIABLES[group].items()
        },
        "setup": f"import torch; {SETUPS['default dtype float64']}; {SETUPS['seeds']}",
        "launch": {"cwd": "/", "preexec_fn": lambda: os.umask(0o077)},
    },
}
SHORT = ("everything", "autocast", "default dtype bfloat16", "default device", "no standard error")


class Bytes:
    """A model with a calibration, and the digests of the files that are made of them."""

    def __init__(self, folder):
        self.folder = folder
        self.source, self.calibration = folder / "in.safetensors", folder / "calibration.safetensors"
        generator = torch.Generator().manual_seed(0)
        model = {name: torch.randn(64, 256, generator=generator).bfloat16() for name in sd3()}
        save_file(model, self.source)
        recorder = ActivationRecorder()
        for name, tensor in load_file(self.source).items():
            recorder.observe(name, torch.randn(512, tensor.shape[1], generator=generator))
        save_calibration(recorder.result("a model"), self.calibration)
        self.expected = self.made(folder / "reference")

    def made(self, folder, variables=None, setup="", launch=None):
        """The digests of three files that are made in a new folder, by name."""
        folder.mkdir()
        choices = {
            "stochastic": ["--stochastic", "--seed", "5"],
            "calibrated": ["--calibrated", "--calibration", str(self.calibration), "--matmul", "fp8"],
            "legacy": ["--fp8_type", "e5m2", "--layout", "legacy", "--nearest"],
        }
        commands = []
        for name, options in choices.items():
            commands += [self.source, folder / f"{name}.safetensors", *options, ";"]
        with (folder / "log").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-c", DRIVER.format(setup=setup), *map(str, commands[:-1])],
                env={**os.environ, "PYTHONPATH": str(PACK_ROOT), **(variables or {})},
                stdout=log,
                stderr=log,
                timeout=300,
                check=False,
                **(launch or {}),
            )
        self.log = (folder / "log").read_text(errors="replace")
        files = {name: folder / f"{name}.safetensors" for name in choices}
        self.modes = {stat.S_IMODE(path.stat().st_mode) for path in files.values() if path.exists()}
        assert done.returncode == 0, self.log[-3000:]
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Bytes(tmp_path_factory.mktemp("environment"))


@pytest.mark.parametrize("name", VARIATIONS if WHOLE else SHORT)
def test_the_bytes_do_not_depend_on(files, tmp_path, name):
    assert files.made(tmp_path / "out", **VARIATIONS[name]) == files.expected
    umask = {"umask 077": 0o077, "everything": 0o077, "umask 000": 0}.get(name)
    assert umask is None or files.modes == {0o666 & ~umask}


def test_every_new_tensor_names_its_device():
    """Without a device, it would be made on the default one, which another pack can set."""
    makers = {maker.__name__ for maker in _device_constructors()}
    missing = []
    for path in [*(PACK_ROOT / "kernels").rglob("*.py"), *(PACK_ROOT / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
                continue
            if node.func.attr in makers and "device" not in {keyword.arg for keyword in node.keywords}:
                missing.append(f"{path.relative_to(PACK_ROOT)}:{node.lineno}")
    assert missing == []


def test_a_folder_with_an_odd_name(files, tmp_path):
    folder = tmp_path / "重み-ümläut-\x1b[31m'\"$HOME%s"
    assert files.made(folder, variables={"LC_ALL": "C", "PYTHONUTF8": "0"}) == files.expected
