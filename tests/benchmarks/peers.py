"""The programs that this pack is compared with: pinned, and installed beside the test environment, not into it."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys

from measure import ROOT, WORKSPACE, Absent, environment

KITCHEN = "comfy-kitchen==0.2.40"
CONVERT_TO_QUANT = ("convert-to-quant==1.3.4", "prodigy-plus-schedule-free==2.0.1")
FOLDER = WORKSPACE / "peers"


def install(requirement):
    """Install one package without its dependencies, so that torch does not change. Raises Absent."""
    folder = FOLDER / requirement.replace("==", "-")
    if not folder.is_dir():
        partial = folder.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--no-deps", "--target", partial, requirement], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Absent(f"pip cannot install {requirement}: {done.stderr.strip().splitlines()[-1]}")
        partial.rename(folder)
    return folder


def comfyui():
    """The folder of the ComfyUI that the tests run with."""
    folder = os.environ.get("COMFYUI_DIR") or ROOT / ".build" / "comfyui"
    if not os.path.isdir(folder):
        raise Absent("there is no ComfyUI: run python3 tests/tools/environment.py")
    return str(folder)


def comfy_float():
    """ComfyUI's stochastic_rounding(value, dtype, seed), loaded without the rest of ComfyUI."""
    path = os.path.join(comfyui(), "comfy", "float.py")
    spec = importlib.util.spec_from_file_location("comfy_float", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.stochastic_rounding


def kitchen_eager():
    """comfy-kitchen's stochastic_rounding_fp8(x, rng, output_type) in plain PyTorch."""
    sys.path.append(str(install(KITCHEN)))
    try:
        return importlib.import_module("comfy_kitchen.backends.eager.quantization").stochastic_rounding_fp8
    except (ImportError, OSError) as error:
        raise Absent(f"it cannot be imported: {error}") from error
    finally:
        sys.path.pop()


def convert_to_quant(source, target):
    """Quantize a file to E4M3 on the CPU with convert-to-quant's fastest method."""
    path = os.pathsep.join(str(install(part)) for part in CONVERT_TO_QUANT)
    options = ["--simple", "--comfy_quant", "--device", "cpu", "--verbose", "MINIMAL"]
    command = [sys.executable, "-m", "convert_to_quant.convert_to_quant", "-i", source, "-o", target, *options]
    done = subprocess.run(command, env=environment(PYTHONPATH=path), capture_output=True, text=True, check=False)
    if done.returncode or not os.path.exists(target):
        raise Absent(f"it failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
