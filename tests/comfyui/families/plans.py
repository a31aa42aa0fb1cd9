"""Plans of files of real size, from their headers alone. Runs inside ComfyUI's process."""

import time
from pathlib import Path

import comfy.model_detection
import folder_paths
from comfyui.families import building
from comfyui.families.table import FAMILIES
from stochastic_fp8_pack.kernels import plan_file


def plan(name):
    """The family that the pack recognises, the class that ComfyUI does, the layers by kind, and the seconds it took."""
    family = FAMILIES[name]
    tensors, kinds = building.real_tensors(name)
    path = Path(folder_paths.models_dir) / f"{name}.safetensors"
    building.write_sparse(path, tensors, family.prefix, family.metadata)
    start = time.perf_counter()
    report = plan_file(path)
    seconds = time.perf_counter() - start
    path.unlink()
    config = comfy.model_detection.model_config_from_unet(dict(tensors), "", metadata=dict(family.metadata))
    sizes = {key: tensor.numel() for key, tensor in tensors.items()}
    return {
        "family": report.family,
        "comfy_class": type(config).__name__,
        "seconds": seconds,
        "layers": len(report.layers),
        "share": sum(sizes[layer.key] for layer in report.layers) / sum(sizes.values()),
        "not_linear": [each.key for each in report.layers if kinds.get(each.key, building.LINEAR) != building.LINEAR],
    }
