"""Test-only nodes that write model files in the diffusers layout by ComfyUI's maps, and what ComfyUI makes of them."""

from pathlib import Path
from unittest.mock import patch

import comfy.model_detection
import comfy.utils
import folder_paths
import torch
from safetensors.torch import load_file, save_file

from .fake_gpu import Pack

UNETS = {
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
    "sd15": {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
}

MAPS = {
    "auraflow": lambda: comfy.utils.auraflow_to_diffusers({"n_double_layers": 1, "n_layers": 3}),
    "pixart": lambda: comfy.utils.pixart_to_diffusers({"depth": 1}),
    "z_image": lambda: comfy.utils.z_image_to_diffusers({"n_layers": 2, "dim": 3840}),
    "sdxl": lambda: _unet_map("sdxl", "class_embedding."),
    "sd15": lambda: _unet_map("sd15", "class_embedding.", "add_embedding."),
}
"""Layout -> ComfyUI's map for a model that is small where its sizes can be chosen."""

NOT_CONVERTED = "not converted"
"""Shown in place of a name for a layout that this version of ComfyUI does not load."""

SHAPES = {
    "pos_embed.pos_embed": (1, 64, 32),
    "context_embedder.weight": (16, 2048),
    "conv_in.weight": (320, 4, 3, 3),
    "conv_out.weight": (4, 320, 3, 3),
    "conv_out.bias": (4,),
    "add_embedding.linear_1.weight": (16, 2816),
}
"""What the detection reads a model's size off, or has another number of dimensions. More in `_shape`."""


class ConvertedNames:
    """How many tensors the pack gives ComfyUI's names, where ComfyUI makes layers as it does with dynamic VRAM: without
    weights. 0 for a file that it does not convert."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "convert"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING",)}}

    def convert(self, name):
        import comfy.memory_management  # absent in older versions

        path = Path(folder_paths.get_full_path("diffusion_models", name))
        with (
            patch.object(comfy.memory_management, "aimdo_enabled", True),
            Pack().module("nodes.diffusers_names").open_native(path) as source,
        ):
            names = load_file(path).keys() ^ source.tensors.keys()
            return {"ui": {"text": [str(len(names & source.tensors.keys()))]}}


class WriteDiffusers:
    """A model of the folder diffusion_models in the diffusers layout: the inverse of one of ComfyUI's maps."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "write"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("STRING", {}), "function": ("STRING", {}), "name": ("STRING", {})}}

    def write(self, source, function, name):
        tensors = load_file(_path(source))
        config = comfy.model_detection.model_config_from_unet(tensors, "").unet_config
        result, used = {}, set()
        for key, target in getattr(comfy.utils, function)(config).items():
            native, offset, change = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            if native not in tensors:  # newer maps name the norms of Flux as in its module
                native = native.removesuffix("weight") + "scale"
            place = native, offset and offset[1]
            if (
                native not in tensors
                or place in used
                or (native, None) in used
                or offset is None
                and (native, 0) in used
            ):
                continue
            used.add(place)
            tensor = tensors[native] if offset is None else tensors[native].narrow(*offset)
            result[key] = (change(tensor) if change else tensor).contiguous()  # swapping halves is its own inverse
        assert {native for native, _ in used} == tensors.keys(), tensors.keys() - {native for native, _ in used}
        assert sum(map(torch.numel, result.values())) == sum(map(torch.numel, tensors.values()))
        save_file(result, _path(name))
        return {"ui": {"text": [name]}}


class MakeDiffusers:
    """Random weights for every name in one of ComfyUI's maps."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "write"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"layout": (list(MAPS), {}), "name": ("STRING", {})}}

    def write(self, layout, name):
        generator = torch.Generator().manual_seed(7)
        tensors = {
            key: torch.randn(_shape(layout, key, target), generator=generator).bfloat16()
            for key, target in MAPS[layout]().items()
        }
        save_file(tensors, _path(name))
        return {"ui": {"text": [name]}}


class ConvertDiffusers:
    """A file in ComfyUI's layout: what ComfyUI's loader makes of the tensors of one in the diffusers layout."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "write"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("STRING", {}), "name": ("STRING", {})}}

    def write(self, source, name):
        tensors = load_file(_path(source))
        converted = comfy.model_detection.convert_diffusers_mmdit(tensors, "")
        if converted is None:
            config = comfy.model_detection.model_config_from_diffusers_unet(tensors)
            if config is None:
                return {"ui": {"text": [NOT_CONVERTED]}}
            keys = comfy.utils.unet_to_diffusers(config.unet_config)
            converted = {keys[key]: tensors.pop(key) for key in list(tensors) if key in keys}
        assert not tensors, tensors.keys()
        save_file({key: tensor.contiguous() for key, tensor in converted.items()}, _path(name))
        return {"ui": {"text": [name]}}


def _path(name):
    return Path(folder_paths.models_dir, "diffusion_models", name)


def _unet_map(layout, *left_out):
    """ComfyUI's map without embeddings that the model lacks, and two layers that no model has."""
    last = len(UNETS[layout]["channel_mult"]) - 1
    left_out += (f"down_blocks.{last}.downsamplers.", f"up_blocks.{last}.upsamplers.")
    names = comfy.utils.unet_to_diffusers(UNETS[layout]).items()
    return {key: native for key, native in names if not key.startswith(left_out)}


def _shape(layout, key, target):
    if key in SHAPES:
        return SHAPES[key]
    rows = 16
    if not isinstance(target, str) and target[1] is not None:
        rows = target[1][2]
    elif key.startswith("cap_embedder.1."):
        rows = 3840
    elif ".resnets." in key and ".conv2." in key:
        rows = 320 * UNETS[layout]["channel_mult"][int(key.split(".")[1])] if key.startswith("down") else 1280
    if not key.endswith("weight") or "norm" in key.split(".")[-2]:
        return (rows,)
    if ".conv" in key or layout == "sd15" and ".proj_" in key:
        return (rows, 16, 1, 1)
    context = {"sdxl": 2048, "sd15": 768}.get(layout) if key.endswith("attn2.to_k.weight") else None
    return (rows, context or 16)


NODES = (ConvertedNames, WriteDiffusers, MakeDiffusers, ConvertDiffusers)
