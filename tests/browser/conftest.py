"""A page of the running ComfyUI, with models to work on. A page error from the pack's files fails the test."""

import shutil

import pytest
import tiny_models
import torch
from browser.chromium import NODE_MODULES, Browser
from browser.workspace import SCREENSHOTS, Workspace
from conftest import PACK_ROOT, serve

NEWEST = PACK_ROOT / ".build" / "frontend" / "comfyui_frontend_package" / "static"
"""The newest front end. The other is the one that the ComfyUI under test comes with."""

LONG = 6_000
"""Layers of long.safetensors: enough work for tests to see a running job and cancel it."""


@pytest.fixture(scope="package")
def browser():
    """One Chromium, which is closed before the tests of other folders."""
    if not (shutil.which("chromium") and NODE_MODULES.exists()):
        pytest.skip("needs a browser: tests/tools/environment.py --browser")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def models(comfyui):
    return add_models(comfyui)


@pytest.fixture(scope="session")
def newest(tmp_path_factory):
    """A server like that of `models`, with the newest front end."""
    if not NEWEST.exists():
        pytest.skip("needs the newest front end: tests/tools/environment.py --browser")
    for server in serve(tmp_path_factory.mktemp("newest"), arguments=("--front-end-root", NEWEST)):
        yield add_models(server)


def add_models(server):
    """Add tiny.safetensors, and long.safetensors, whose many layers take a while."""
    folder = server.models("diffusion_models")
    tiny_models.write_sd3(folder / "tiny.safetensors")
    layers = torch.randn(LONG, 16, 16).bfloat16().unbind()
    long = {f"blocks.{i}.proj.weight": layer.clone() for i, layer in enumerate(layers)}
    tiny_models.save(long, folder / "long.safetensors")
    return server


@pytest.fixture
def frontend():
    """Tests that @each_page or @each_renderer marks run with the newest front end as well."""
    return "bundled"


@pytest.fixture
def workspace(browser, request, frontend):
    server = request.getfixturevalue("models" if frontend == "bundled" else "newest")
    workspace = Workspace(browser, server)
    yield workspace
    workspace.close()
