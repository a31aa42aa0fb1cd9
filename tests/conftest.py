"""Loads the pack as ComfyUI does, as a package with a made-up name, and offers a running ComfyUI."""

import gc
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
    yield from serve(tmp_path_factory.mktemp("comfyui"))


def serve(base, **options):
    """A running ComfyUI for a fixture. The end of its log is added to the reports of failed tests."""
    from comfyui.server import ComfyUIServer

    with ComfyUIServer(base, **options) as server:
        _servers.append(server)
        yield server
        _servers.remove(server)


def pytest_collection_modifyitems(items):
    """Mark tests by folder, and skip POSIX tests on Windows."""
    for item in items:
        if os.name == "nt" and item.get_closest_marker("posix"):
            item.add_marker(pytest.mark.skip(reason="needs signals, pipes or limits of POSIX"))
        folder = item.path.parent.name
        if folder in ("comfyui", "browser"):
            item.add_marker(getattr(pytest.mark, folder))


def pytest_collection_finish():
    """Spare the garbage collector the modules and the tests, which stay to the end."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep tests that share a browser, or the fixtures of a file, in one process.

    xdist 3.8 does not see its own groups with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = Path(nodeid.split("::")[0])
            if file.parent.name == "browser":
                return file.parent.name
            return str(file) if file.parent.name == "comfyui" else nodeid

    return Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add the end of ComfyUI's log to the report of a failed test."""
    report = yield
    if report.failed and item.path.parent.name in ("comfyui", "browser"):
        report.sections += [("ComfyUI log", server.log()[-6000:]) for server in _servers]
    return report
