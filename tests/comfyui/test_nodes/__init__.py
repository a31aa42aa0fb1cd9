"""Nodes that exist for the tests only: made-up inputs, and exact copies of what flows through a graph."""

import gc
import json
import time
from pathlib import Path

import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from safetensors.torch import load_file, save_file

from .diffusers_layout import NODES as DIFFUSERS_NODES
from .fake_gpu import FakeGPU
from .models import NODES as MODEL_NODES
from .text_encoders import recognise_tiny_t5xxl, shrink_text_encoders

shrink_text_encoders()
recognise_tiny_t5xxl()
gc.freeze()  # or every collection, of which each prompt has several, would go through all modules of ComfyUI


class RandomConditioning:
    """Standard normal conditioning of any width, from a seed."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "tokens": ("INT", {"default": 8}),
                "width": ("INT", {"default": 64, "max": 1 << 16}),
                "pooled_width": ("INT", {"default": 64, "min": 0, "max": 1 << 16, "tooltip": "0: no pooled output"}),
            }
        }

    def make(self, seed, tokens, width, pooled_width):
        generator = torch.Generator().manual_seed(seed)
        options = {"pooled_output": torch.randn(1, pooled_width, generator=generator)} if pooled_width else {}
        return ([[torch.randn(1, tokens, width, generator=generator), options]],)


class FileConditioning:
    """``<word>.cond`` and ``<word>.pooled_output`` of a safetensors file in input/."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {}), "word": ("STRING", {})}}

    def load(self, file, word):
        tensors = load_file(Path(folder_paths.get_input_directory(), file))
        return ([[tensors[f"{word}.cond"], {"pooled_output": tensors[f"{word}.pooled_output"]}]],)


class SaveTensor:
    """Writes a LATENT or an IMAGE to output/ as the one tensor ``samples`` of a safetensors file, bit for bit."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}, "optional": {"latent": ("LATENT",), "image": ("IMAGE",)}}

    def save(self, name, latent=None, image=None):
        tensor = image if latent is None else latent["samples"]
        save_file({"samples": tensor.contiguous()}, Path(folder_paths.get_output_directory(), name))
        return {"ui": {"tensors": [{"filename": name, "subfolder": "", "type": "output"}]}}


class SaveConditioning:
    """Writes the first tensor of a CONDITIONING to output/ as ``samples``, bit for bit."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {}), "conditioning": ("CONDITIONING",)}}

    def save(self, name, conditioning):
        return SaveTensor().save(name, image=conditioning[0][0])


class LoadLatentTensor:
    """Reads a LATENT from the tensor ``samples`` of a safetensors file in input/."""

    CATEGORY = "tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {})}}

    def load(self, file):
        return (load_file(Path(folder_paths.get_input_directory(), file)),)


class ShowText:
    """Puts a STRING, number or BOOLEAN into the run's results, as JSON under ``text``."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "show"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def show(self, value):
        return {"ui": {"text": [json.dumps(value, default=str)]}}


class ModelInfo:
    """Describes the weights of a MODEL: for each key its dtype, shape, class and whether a patch waits on it."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "describe"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def describe(self, model):
        weights = {
            key: {
                "dtype": str(weight.dtype),
                "shape": list(weight.shape),
                "class": type(weight).__name__,
                "patched": key in model.patches,
            }
            for key, weight in model.model.named_parameters()
        }
        info = {"class": type(model.model).__name__, "patches": len(model.patches), "weights": weights}
        return {"ui": {"text": [json.dumps(info)]}}


class Hooks:
    """Counts the forward hooks on a MODEL's modules."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "count"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def count(self, model):
        modules = list(model.model.modules())
        hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules)
        return {"ui": {"text": [json.dumps(hooks)]}}


class CalibrationInfo:
    """Shows what a calibration holds: its source, and per layer the inputs, the recorded rows and the amax."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "show"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"calibration": ("FP8_CALIBRATION",)}}

    def show(self, calibration):
        layers = {key: (layer.width, layer.rows, layer.amax) for key, layer in calibration.layers.items()}
        return {"ui": {"text": [json.dumps({"source": calibration.source, "layers": layers})]}}


class Wait:
    """Passes a LATENT on after some seconds, with progress, and can be cancelled."""

    CATEGORY = "tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "wait"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "seconds": ("FLOAT", {"default": 1.0})}}

    def wait(self, latent, seconds):
        steps = max(1, round(seconds / 0.05))
        progress = ProgressBar(steps)
        for _ in range(steps):
            throw_exception_if_processing_interrupted()
            time.sleep(0.05)
            progress.update(1)
        return (latent,)


class Fail:
    """Raises a ValueError with the given message."""

    CATEGORY = "tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "fail"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"message": ("STRING", {})}}

    def fail(self, message):
        raise ValueError(message)


class Anything:
    """Sends a JSON value to any input."""

    CATEGORY = "tests"
    RETURN_TYPES = ("*",)
    FUNCTION = "send"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def send(self, text):
        return (json.loads(text),)


class Choices(list):
    """A type of output that fits every list of choices: custom nodes that choose a file declare one like it."""

    def __ne__(self, other):
        return False


class Chooser:
    """The name of a file, for a loader's list."""

    CATEGORY = "tests"
    RETURN_TYPES = (Choices(),)
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def choose(self, name):
        return (name,)


_NODES = (
    RandomConditioning,
    FileConditioning,
    SaveTensor,
    SaveConditioning,
    LoadLatentTensor,
    ShowText,
    ModelInfo,
    Hooks,
    CalibrationInfo,
    Wait,
    Fail,
    Anything,
    Chooser,
    *MODEL_NODES,
    *DIFFUSERS_NODES,
    FakeGPU,
)
NODE_CLASS_MAPPINGS = {f"Test{node.__name__}": node for node in _NODES}
