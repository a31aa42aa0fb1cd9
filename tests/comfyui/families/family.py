"""What a row of the family matrix says, and the parts that its inputs are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Family:
    """One kind of model file: the class of ComfyUI that loads it, how that is built small, what its files look like."""

    comfy_class: str
    """The class in comfy.supported_models that ComfyUI's detection chooses."""
    real: Mapping
    """The `unet_config` of a published model: what the detection reads off its tensors."""
    small: Mapping
    """The settings that make it small."""
    inputs: Callable
    """settings -> (latent, timestep, keywords) of one forward pass."""
    publish: Callable = str
    """Name of a tensor in ComfyUI's network -> its name in published files."""
    arrange: Callable = dict
    """Published tensors -> those of the file, where the loader cuts tensors or removes a part of every name."""
    beside: Mapping = field(default_factory=dict)
    """Further tensors of the file, outside the network: name -> shape."""
    metadata: Mapping = field(default_factory=dict)
    """Of the file. The loader chooses by its `config`."""
    prefix: str = ""
    """Of every name in the file."""
    real_device: str = "meta"
    """Where the network of real size is built; its memory is never touched."""
    bare: bool = False
    """Run the network itself, not ComfyUI's BaseModel around it, which takes another form of inputs."""
    fixed: Mapping = field(default_factory=dict)
    """Class of a part whose sizes the settings do not give -> the arguments that make it small."""
    deeper: str = ""
    """Part of the names of blocks that the small network leaves out, though ComfyUI's detection counts them."""
    since: tuple = (0,)
    """The first version, of those tested, that loads this kind of file."""
    cut: bool = False
    """Whether the loader renames or cuts tensors beyond recognition: saved names then differ from published ones."""
    dropped: tuple = ()
    """Tensors that the loader drops: a file saved from the graph lacks them."""


_NETWORKS = ("image_model", "audio_model", "stable_cascade_stage", "use_temporal_resblock")
"""Settings of which each network has one; the last is that of the UNets."""


def variants(families):
    """Names of rows with the network and the prefix of an earlier row. They differ in what ComfyUI detects them by."""

    def kind(family):
        network = tuple(family.real.get(key) for key in _NETWORKS)
        known = network.count(None) < len(network) and not family.cut
        return network if known else family.comfy_class, family.prefix

    return repeated({name: kind(family) for name, family in families.items()})


def repeated(kinds):
    """kinds: name -> kind. The names whose kind an earlier name has."""
    first = {}
    return {name for name, kind in kinds.items() if first.setdefault(kind, name) != name}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 17))


def text(width, tokens=8, seed=1):
    """Random embeddings of a prompt."""
    return random(1, tokens, width, seed=seed)


def timestep(value=0.5, batch=1):
    return torch.full((batch,), value)


def config_entry(**settings):
    """The metadata by which a file tells ComfyUI the settings of its network."""
    return {"config": json.dumps({"transformer": settings})}
