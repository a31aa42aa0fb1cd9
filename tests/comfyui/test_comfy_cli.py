"""comfy-cli, with which packs are published and many people run workflows, accepts the pack and an example."""

import os
import shutil
import subprocess
import zipfile

import pytest
from comfyui.server import HOST, PACK_ROOT
from comfyui.workflows import WORKFLOWS

COMFY = PACK_ROOT / ".build" / "comfy-cli" / "bin" / "comfy"
PUBLISHED = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "__init__.py",
    "example_workflows",
    "js",
    "kernels",
    "locales",
    "nodes",
    "pyproject.toml",
    "requirements.txt",
}


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def comfy(*arguments, home, cwd=None):
    """Run comfy with a home folder of its own for its settings; all that it printed."""
    environment = {**os.environ, "HOME": str(home)}
    command = [COMFY, "--skip-prompt", "--no-enable-telemetry", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd or home, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with the files that git tracks here or would add."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=PACK_ROOT).split("\0")
    for name in filter(None, listed):
        if (PACK_ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACK_ROOT / name, folder / name)
    run("git", "init", "--quiet", cwd=folder)
    run("git", "add", "--all", cwd=folder)
    return folder


def test_the_pack_is_valid(checkout, tmp_path):
    assert "All validation checks passed" in comfy("node", "validate", home=tmp_path, cwd=checkout)


def test_only_what_users_need_is_published(checkout, tmp_path):
    comfy("node", "pack", home=tmp_path, cwd=checkout)
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == PUBLISHED
    assert not [name for name in names if name.endswith((".pyc", ".py.orig"))]


def test_an_example_runs(comfyui, tmp_path):
    workflow = WORKFLOWS / "1 Try it now.json"
    comfy("run", "--workflow", workflow, "--wait", "--host", HOST, "--port", comfyui.port, home=tmp_path)
    assert list((comfyui.output / "diffusion_models").glob("tiny_landscapes_fp8_*"))
