"""Writes tests/unit/key_lists.txt: the names and shapes of published models, by ComfyUI's own classes, without weights.

    cd tests && COMFYUI_DIR=… COMFYUI_PYTHON=… python -m tools.key_lists

Needs a ComfyUI that knows all families, 0.33.0 or newer.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

LEFT_OUT = (
    *("sd21", "sd21_unclip_l", "sd21_unclip_h", "sd_x4_upscaler", "sdxl_refiner"),
    *("ssd1b", "segmind_vega", "koala_700m", "koala_1b"),
)
"""UNets that are like SD 1.5 and SDXL, with other numbers of blocks."""

FEW = 3
"""Models that differ from an earlier one in no more shapes than these are left out."""


def main():
    sys.path.append(str(TESTS))
    from comfyui.server import comfyui_dir, comfyui_python

    with tempfile.TemporaryDirectory() as base:
        command = [comfyui_python(), __file__, base]
        subprocess.run(command, cwd=comfyui_dir(), env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)


def write(base):
    """Runs inside ComfyUI's process."""
    sys.path.append(str(TESTS))
    from comfyui.families.worker import import_comfyui

    import_comfyui(base)
    import key_lists

    chosen = []
    for found in _lists():
        if not any(_alike(found, other) for other in chosen):
            chosen.append(found)
            print(f"{found.name}: {len(found.shapes):,} tensors, {found.parameters:,} parameters", flush=True)
    key_lists.write(chosen)


def _lists():
    import torch
    from comfyui.families import building
    from comfyui.families.family import Family
    from comfyui.families.table import FAMILIES
    from key_lists import KeyList

    FAMILIES["minimax_music3"] = Family("MiniMaxMusic3", {"audio_model": "minimax_music3"}, {}, inputs=None)
    for name, family in FAMILIES.items():
        if name in LEFT_OUT:
            continue
        network = _network(family)
        kinds = building.kinds(family, network)
        tensors = {key: torch.empty(tensor.shape, device="meta") for key, tensor in network.state_dict().items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in building.arranged(family, tensors).items()}
        shapes |= family.beside
        weights = {key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2}
        renamed = weights - kinds.keys() - family.beside.keys()  # and cut ones: they are Linear weights in the file
        linear = renamed | {key for key in weights & kinds.keys() if kinds[key] == building.LINEAR}
        yield KeyList(name, family.comfy_class, shapes, frozenset(linear))


def _network(family):
    from comfyui.families import building

    try:
        return building.build(family, "meta", small=False)
    except RuntimeError:  # a class that computes while it is made
        return building.build(family, "cpu", small=False)


def _alike(one, other):
    if one.shapes.keys() != other.shapes.keys():
        return False
    return sum(one.shapes[key] != other.shapes[key] for key in one.shapes) <= FEW


if __name__ == "__main__":
    write(sys.argv[1]) if len(sys.argv) > 1 else main()
