"""What the registry and ComfyUI ask of a pack, beyond what it does."""

import asyncio
import subprocess
import sys

import stochastic_fp8_pack
import tomllib
from conftest import PACK_ROOT

REGISTRY_RULES = "S102,S307,E702"


def pyproject():
    return tomllib.loads((PACK_ROOT / "pyproject.toml").read_text())


def test_registry_rules_are_clean():
    """No exec, no eval, no two statements on a line; ``noqa`` does not count."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--select", REGISTRY_RULES]
    done = subprocess.run([*command, PACK_ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_root_module_holds_only_what_comfyui_reads():
    public = {name for name in vars(stochastic_fp8_pack) if not name.startswith("_")}
    assert public - {"kernels", "nodes"} == {"WEB_DIRECTORY", "comfy_entrypoint"}
    assert stochastic_fp8_pack.WEB_DIRECTORY == "./js"
    assert asyncio.iscoroutinefunction(stochastic_fp8_pack.comfy_entrypoint)


def test_the_library_imports_without_comfyui():
    """``kernels`` must work in a Python that has no ComfyUI, so neither comfy nor the nodes may come in with it."""
    from stochastic_fp8_pack import kernels

    assert kernels.quantize_tensor
    assert not {"comfy", "folder_paths", "stochastic_fp8_pack.nodes"} & set(sys.modules)


def test_the_pack_root_is_not_on_the_path():
    """Where it would, the pack's ``nodes`` would hide ComfyUI's."""
    assert str(PACK_ROOT) not in sys.path


def test_project_metadata():
    project = pyproject()
    assert project["project"]["name"] == "stochastic-fp8"
    assert project["tool"]["comfy"]["DisplayName"] == "Stochastic FP8"
    requirements = (PACK_ROOT / "requirements.txt").read_text().split()
    assert requirements == project["project"]["dependencies"] == ["matplotlib"]
