"""Runs inside ComfyUI's process: `python worker.py BASE_FOLDER`, with ComfyUI's folder as the working directory.

Reads one JSON object per line, {"call": name, "arguments": {…}}, and answers each with one line, {"result": …} or
{"error": …}.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parents[2]


def import_comfyui(base):
    """Import ComfyUI as its main.py does, for the CPU, without starting its server; and the pack."""
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    sys.path[0] = os.getcwd()
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch
    import utils.extra_config  # noqa: F401 - before nodes.py puts ComfyUI's comfy/utils.py in its way

    torch.set_num_threads(1)
    import server
    from aiohttp import web

    server.PromptServer.instance = SimpleNamespace(
        routes=web.RouteTableDef(), client_id=None, send_sync=lambda *message: None
    )
    sys.path.append(str(TESTS))
    from conftest import load_pack

    load_pack()


def classes():
    """The model classes of the running ComfyUI."""
    from comfyui.families import building

    return building.class_names()


def absent(family):
    """Why the running ComfyUI cannot load a family, or ""."""
    from comfyui.families import building
    from comfyui.families.table import FAMILIES

    return building.absent(FAMILIES[family])


def model(family, format, short):
    """What is wrong with a row. short: in layout native only."""
    from comfyui.families import building, examples, models

    with building.made_small(family):
        return examples.examine(models.Model(family, short), format)


def plan(family):
    """The plan of a file of real size."""
    from comfyui.families import plans

    return plans.plan(family)


def encoders():
    """The kinds of text encoders that the running ComfyUI detects."""
    import comfy.sd

    return [*comfy.sd.TEModel.__members__]


def absent_encoder(encoder):
    """Why the running ComfyUI cannot load an encoder, or ""."""
    from comfyui.families import clips
    from comfyui.families.encoders import ENCODERS

    return clips.absent(ENCODERS[encoder])


def clip(encoder, format):
    """What is wrong with a row of the text encoders."""
    from comfyui.families import clips, examples

    with clips.made_small(encoder) as example:
        return examples.examine(example, format)


CALLS = {call.__name__: call for call in (classes, absent, model, plan, encoders, absent_encoder, clip)}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log
    import_comfyui(sys.argv[1])
    gc.freeze()  # or every collection below goes through ComfyUI's 400,000 objects, in 0.2 s
    import comfy.model_management
    import torch

    for line in sys.stdin:
        request, start = json.loads(line), time.process_time()
        try:
            with torch.inference_mode():  # as ComfyUI runs its nodes; 0.3.75 casts scaled weights only there
                answer = {"result": CALLS[request["call"]](**request["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(request, f"{time.process_time() - start:.2f} s")
        comfy.model_management.unload_all_models()
        gc.collect()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
