"""Jobs that are measured in their own process. The last line of output is the result as JSON.

python child.py quantize IN OUT | several IN... | start COMFYUI | text_encoder COMFYUI |
    layer_memory ROUNDING OUT WIDTH
"""

import asyncio
import json
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))


def quantize(source, target):
    """Quantize one file with the default choices."""
    import conftest  # noqa: F401  (loads the pack)
    from stochastic_fp8_pack.kernels.engine.file_job import quantize_file

    start = time.perf_counter()
    quantize_file(source, target, overwrite=True)
    return {"seconds": time.perf_counter() - start}


def several(*sources):
    """The best of three interleaved runs for each file; of two if a file is larger than 4 GB."""
    import conftest  # noqa: F401
    from stochastic_fp8_pack.kernels.engine.file_job import quantize_file

    best = {}
    with tempfile.TemporaryDirectory(dir=Path(sources[0]).parent) as folder:
        target = Path(folder) / "out.safetensors"
        quantize_file(sources[0], target)
        for _ in range(2 if any(Path(source).stat().st_size > 4e9 for source in sources) else 3):
            for source in sources:
                start = time.perf_counter()
                quantize_file(source, target, overwrite=True)
                seconds = time.perf_counter() - start
                best[source] = min(seconds, best.get(source, seconds))
    return {"seconds": best}


def text_encoder(comfyui):
    """The sentence model as a text encoder, calibrated and rounded."""
    import_comfyui(comfyui)
    sys.path.append(str(Path(__file__).parent))
    import conftest  # noqa: F401
    import text_encoder

    return text_encoder.measure()


def start(comfyui):
    """Import the pack and its nodes after ComfyUI's own modules."""
    loop = import_comfyui(comfyui)
    known = set(sys.modules)
    begin = time.perf_counter()
    import importlib.util

    root = TESTS.parent
    name = "stochastic_fp8_pack"
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules[name] = pack
    spec.loader.exec_module(pack)
    loop.run_until_complete(pack.comfy_entrypoint())
    seconds = time.perf_counter() - begin
    heavy = {"matplotlib", "triton", "tqdm"} & (set(sys.modules) - known)
    return {"seconds": seconds, "heavy": sorted(heavy)}


def layer_memory(rounding, out, width):
    """Round one random bf16 layer with recorded inputs. `anonymous`: the peak of memory that no file backs."""
    import conftest  # noqa: F401
    import torch
    from measure import anonymous_peak
    from stochastic_fp8_pack.kernels import Recipe
    from stochastic_fp8_pack.kernels.calibration.mapped import mapped_memory
    from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
    from stochastic_fp8_pack.kernels.engine.quantize_weight import quantize_weight

    with tempfile.TemporaryDirectory() as folder:
        recorder = ActivationRecorder(store=partial(mapped_memory, Path(folder)))
        recorder.observe("weight", torch.randn(4096, int(width)))
        weight, calibration = torch.randn(int(out), int(width)).bfloat16(), recorder.result()
        with anonymous_peak(os.getpid()) as peak:
            quantize_weight(weight, "weight", Recipe(rounding=rounding), calibration)
    return {"anonymous": peak.bytes}


def import_comfyui(comfyui):
    """ComfyUI's modules, on the CPU, with a server to which nodes can add their routes. Returns its event loop."""
    sys.path[:] = [comfyui, *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent)]
    import comfy.cli_args
    import utils.extra_config  # noqa: F401  (first, as main.py does: comfy/utils.py would hide it later)

    comfy.cli_args.args.cpu = True
    import comfy_api.latest  # noqa: F401
    import server

    loop = asyncio.new_event_loop()
    server.PromptServer(loop)
    return loop


JOBS = {each.__name__: each for each in (quantize, several, start, text_encoder, layer_memory)}


def main():
    job, *arguments = sys.argv[1:]
    result = JOBS[job](*arguments)
    print(json.dumps(result | {"peak": peak_resident()}))


def peak_resident():
    """Peak resident bytes. (getrusage would include what the parent held when it started this process.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


if __name__ == "__main__":
    main()
