"""Loads the pack as ComfyUI does, as a package with a made-up name, and offers a running ComfyUI."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

PACK_ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "stochastic_fp8_pack"

_servers = []


def hide_pack_root():
    """Remove the pack's root from sys.path, where ``python -m pytest`` puts it. Its ``nodes`` would hide ComfyUI's."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK_ROOT]


def load_pack():
    """Import the pack's root as the package ``stochastic_fp8_pack``."""
    spec = importlib.util.spec_from_file_location(
        PACK_NAME, PACK_ROOT / "__init__.py", submodule_search_locations=[str(PACK_ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK_NAME] = module
    spec.loader.exec_module(module)
    return module


hide_pack_root()
if PACK_NAME not in sys.modules:
    load_pack()


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    """A running ComfyUI with the pack and the test-only nodes. Each test process starts its own on first use."""
    from comfyui.server import ComfyUIServer

    with ComfyUIServer(tmp_path_factory.mktemp("comfyui")) as server:
        _servers.append(server)
        yield server
        _servers.remove(server)


def pytest_collection_modifyitems(items):
    """Mark tests by folder, keep those of one file in one process (for its server), and skip POSIX tests on Windows."""
    for item in items:
        if os.name == "nt" and item.get_closest_marker("posix"):
            item.add_marker(pytest.mark.skip(reason="needs signals, pipes or limits of POSIX"))
        folder = item.path.parent.name
        if folder in ("comfyui", "browser"):
            item.add_marker(getattr(pytest.mark, folder))
            item.add_marker(pytest.mark.xdist_group(f"{folder}-{item.path.stem}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add the end of ComfyUI's log to the report of a failed test."""
    report = yield
    if report.failed and "comfyui" in getattr(item, "fixturenames", ()):
        report.sections += [("ComfyUI log", server.log()[-6000:]) for server in _servers]
    return report
