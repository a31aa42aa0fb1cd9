"""Builds a family's network with ComfyUI's own class, and the tensors of its files. Runs inside ComfyUI's process."""

import json
import pkgutil
import re
import struct
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from math import prod
from unittest.mock import patch

import comfy.model_detection
import comfy.model_sampling
import comfy.ops
import comfy.supported_models
import tiny_models
import torch
from comfyui.families.table import FAMILIES
from comfyui_version import __version__ as VERSION

LINEAR = "Linear"


def absent(family):
    """Why the running ComfyUI cannot load a family, or ""."""
    if family.comfy_class not in class_names():
        return f"ComfyUI {VERSION} has no {family.comfy_class}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", VERSION))
    return "" if numbers >= family.since else f"ComfyUI {VERSION} does not know this kind of {family.comfy_class}"


def class_names():
    return [each.__name__ for each in comfy.supported_models.models]


def build(family, device, small):
    """The family's network. Settings that an older ComfyUI does not know are left out."""
    settings = dict(family.real)
    beside = {name: torch.zeros(shape) for name, shape in family.beside.items()}
    while True:
        config = getattr(comfy.supported_models, family.comfy_class)(dict(settings))
        if small:
            config.unet_config.update(family.small)
        config.set_inference_dtype(torch.float32, None)
        try:
            return config.get_model(dict(beside), "", device=device).diffusion_model
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in settings:
                raise
            del settings[unknown[1]]


def arranged(family, tensors):
    """Tensors by their names in the network -> those of a file, without its prefix."""
    return family.arrange({family.publish(name): tensor for name, tensor in tensors.items()})


def small_tensors(family):
    """The tensors of a small file, with random weights that look like trained ones."""
    network = build(family, "cpu", small=True)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    filled = {}
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and (name in parameters or name == "pos_embed"):
            tensor = tiny_models.weight(name, tuple(tensor.shape), 0).to(torch.bfloat16)
        elif tensor.is_floating_point():
            tensor = torch.nan_to_num(tensor).clamp(-1e4, 1e4)  # some networks leave buffers uninitialised
        filled[name] = tensor
    beside = {name: tiny_models.weight(name, shape, 0).to(torch.bfloat16) for name, shape in family.beside.items()}
    return {name: tensor.clone() for name, tensor in (arranged(family, filled) | beside).items()}


@lru_cache(maxsize=2)
def real_tensors(name):
    """(tensors of the published file on the meta device, kinds of their modules), by name without prefix."""
    family = FAMILIES[name]
    network = build(family, family.real_device, small=False)
    meta = {key: torch.empty(tensor.shape, device="meta") for key, tensor in network.state_dict().items()}
    beside = {key: torch.empty(shape, device="meta") for key, shape in family.beside.items()}
    return arranged(family, meta) | beside, kinds(family, network)


def kinds(family, network):
    """Published name -> LINEAR for the weights of Linear modules; else the tensor and the class of its module."""
    found = {}
    for name in network.state_dict():
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        linear = leaf == "weight" and hasattr(module, "in_features")
        linear = linear and isinstance(module, (comfy.ops.CastWeightBiasOp, torch.nn.Linear))
        found[family.publish(name)] = LINEAR if linear else f"{leaf} of {type(module).__name__}"
    return found


_detect = comfy.model_detection.model_config_from_unet
_small_family = []


def _detect_small(state_dict, unet_key_prefix, *arguments, **keywords):
    """Detects by the real shapes, since ComfyUI takes many sizes for granted; then makes the settings small."""
    if not _small_family:
        return _detect(state_dict, unet_key_prefix, *arguments, **keywords)
    family, real = _small_family[0]
    shown = {unet_key_prefix + key: real[key] for key in real if family.deeper and family.deeper in key}
    shown |= {key: real.get(key.removeprefix(unet_key_prefix), tensor) for key, tensor in state_dict.items()}
    config = _detect(shown, unet_key_prefix, *arguments, **keywords)
    if config is not None:
        config.unet_config.update(family.small)
    return config


comfy.model_detection.model_config_from_unet = _detect_small


_sigma = comfy.model_sampling.StableCascadeSampling.sigma
_sigmas = {}


def _known_sigma(self, timestep):
    """Each Stable Cascade makes a table of 10,000 noise levels one by one, the same in every model."""
    if torch.is_tensor(timestep):
        return _sigma(self, timestep)
    key = timestep, self.shift
    if key not in _sigmas:
        _sigmas[key] = _sigma(self, timestep)
    return _sigmas[key]


comfy.model_sampling.StableCascadeSampling.sigma = _known_sigma


@contextmanager
def made_small(name):
    """While this lasts, ComfyUI takes small files of a family for real ones."""
    family = FAMILIES[name]
    _small_family[:] = [(family, real_tensors(name)[0])]
    with ExitStack() as parts:
        for path, sizes in family.fixed.items():
            parts.enter_context(patch(path, _resized(pkgutil.resolve_name(path), sizes)))
        try:
            yield family
        finally:
            _small_family.clear()


def _resized(part, sizes):
    """Makes a part with other arguments than it is asked for."""
    return lambda *arguments, **keywords: part(*arguments, **(keywords | sizes))


def write_sparse(path, tensors, prefix="", metadata=None):
    """A file with the names, shapes and sizes of bf16 tensors, all zero, that takes no room on the disk."""
    header, size = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for key in sorted(tensors):
        end = size + 2 * prod(tensors[key].shape)
        header[prefix + key] = {"dtype": "BF16", "shape": [*tensors[key].shape], "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return path
