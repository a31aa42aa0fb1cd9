"""Loads the pack the way ComfyUI does: as a package under a made-up name, its folder never on sys.path."""

import importlib.util
import sys
from pathlib import Path

PACK_ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "stochastic_fp8_pack"


def hide_pack_root():
    """Take the pack's root off sys.path, where ``python -m pytest`` puts it: its ``nodes`` would hide ComfyUI's."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK_ROOT]


def load_pack():
    """Import the pack's root as ``stochastic_fp8_pack``, so that its modules import as parts of that package."""
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
