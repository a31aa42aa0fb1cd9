"""The names that files give to the tensors of a network.

ComfyUI's loader renames some tensors, and the running version decides which. What it renames on loading is renamed back
on saving, under names that every version reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import comfy.model_detection
import comfy.sd
import torch

from ..kernels.files.header import TensorInfo

_STARTS = ("", "core.")
"""What the names of a diffusion model begin with in files, and not in the module: PixelDiT's with `core.`."""

_VISION_LANGUAGE = {"model.lm_head.": "lm_head.", "model.": "model.language_model.", "visual.": "model.visual."}
"""What the names of Qwen3-VL and Qwen3.5 begin with in the module -> in their files."""

_WANTS_MORE = (StopIteration, LookupError, AttributeError, TypeError, ValueError, RuntimeError)
"""What ComfyUI raises for the tensors of a network that it does not know."""

Names = dict[str, str]
"""Name in the module -> name in a file."""


def detect_config(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None):
    """The configuration that ComfyUI's loader makes for a diffusion model with these names; None: not recognised."""
    try:
        return _detect(tensors, metadata)
    except _WANTS_MORE:
        return None


def is_detected(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bool:
    """Whether ComfyUI's loader recognises the diffusion model in a file, or needs the values to tell.

    infos: the file's tensors by name; a prefix of the diffusion model is removed as the loader removes it.
    """
    prefix = comfy.model_detection.unet_prefix_from_state_dict(infos)
    within = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
    try:
        return _detect(_on_meta(within or infos), metadata) is not None
    except _WANTS_MORE:
        return True


def _detect(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None):
    return comfy.model_detection.model_config_from_unet(dict(tensors), "", metadata=dict(metadata or {}))


def diffusion_names(config, tensors: Mapping[str, torch.Tensor], norms: Collection[str]) -> Names:
    """The names of a diffusion model.

    config: its configuration. tensors: by name in the module. norms: names of the weights of RMSNorms, which are called
    `scale` in the files of some families. Of the names that the loader turns into those in the module, the first are
    taken under which it recognises the model. A file of some models needs metadata for that: then any model will do.
    """
    scales = {name: f"{name.removesuffix('weight')}scale" if name in norms else name for name in tensors}
    loaded = _loaded_as_in_module(config, scales, tensors)
    scales = {name: scales[name] if name in loaded else name for name in tensors}
    recognised = []
    for start in _STARTS:
        for names in (scales, {name: name for name in tensors}):
            started = {name: start + published for name, published in names.items()}
            if start and _loaded_as_in_module(config, started, tensors) != tensors.keys():
                continue
            detected = detect_config({published: tensors[name] for name, published in started.items()})
            if type(detected) is type(config):
                return started
            if detected is not None:
                recognised.append(started)
    return recognised[0] if recognised else scales


def encoder_names(tensors: Mapping[str, torch.Tensor]) -> Names:
    """The names of a text encoder. tensors: by name in the module.

    The loader renames those of some vision-language encoders. Under the names in the module, it takes them for an
    encoder of text alone.
    """
    infos = _on_meta(tensors)
    renamed = {name: _with_other_start(name) for name in infos}
    detect = comfy.sd.detect_te_model
    of_text = detect({name: info for name, info in infos.items() if not name.startswith("visual.")})
    if detect(infos) == of_text and detect({renamed[name]: info for name, info in infos.items()}):
        return renamed
    return {name: name for name in tensors}


def _with_other_start(name: str) -> str:
    for start, other in _VISION_LANGUAGE.items():
        if name.startswith(start):
            return other + name.removeprefix(start)
    return name


def _loaded_as_in_module(config, names: Names, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The names in the module that the loader makes of the names in a file."""
    infos = _on_meta(tensors)
    of_info = {id(info): name for name, info in infos.items()}
    try:
        loaded = config.process_unet_state_dict({names[name]: info for name, info in infos.items()})
    except _WANTS_MORE:
        return set()
    return {name for name, info in loaded.items() if of_info.get(id(info)) == name}


def _on_meta(tensors: Mapping[str, torch.Tensor | TensorInfo]) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes without values."""
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
