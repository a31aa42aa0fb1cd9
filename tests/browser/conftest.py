"""A page of the running ComfyUI, with models to work on. A page error from the pack's files fails the test."""

import shutil

import pytest
import tiny_models
import torch
from browser.chromium import NODE_MODULES, Browser
from browser.workspace import SCREENSHOTS, Workspace

LONG = 20_000
"""Layers of long.safetensors: enough work for tests to see a running job and cancel it."""


@pytest.fixture(scope="session")
def browser():
    """One Chromium per test process."""
    if not (shutil.which("chromium") and NODE_MODULES.exists()):
        pytest.skip("needs a browser: tests/tools/environment.py --browser")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def models(comfyui):
    """The server with tiny.safetensors, and long.safetensors, whose many layers take a while."""
    folder = comfyui.models("diffusion_models")
    tiny_models.write_sd3(folder / "tiny.safetensors")
    layers = torch.randn(LONG, 16, 16).bfloat16().unbind()
    long = {f"blocks.{i}.proj.weight": layer.clone() for i, layer in enumerate(layers)}
    tiny_models.save(long, folder / "long.safetensors")
    return comfyui


@pytest.fixture
def workspace(browser, models):
    workspace = Workspace(browser, models)
    yield workspace
    workspace.close()
