"""Save Scaled FP8 Model: writes what is sampled, byte for byte, where ComfyUI's loaders find it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from comfy_api.latest import io, ui

from ..kernels.engine.file_job import RECIPE_ENTRY
from ..kernels.files.header import TensorInfo
from ..kernels.state_dict.assemble import write_scaled
from ..kernels.state_dict.compatibility import EXACT
from ..kernels.state_dict.layouts import ScaledLayer
from . import models
from .files import loader_name, target_path, workflow_metadata
from .networks import ModelError, Network, narrow
from .options import layout_input
from .progress import Progress
from .schema import CATEGORY, fit

log = logging.getLogger("stochastic_fp8")


@dataclass
class Contents:
    """What goes into a file, by its names there. Tensors are read when their turn comes."""

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    readers: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    layers: dict[str, ScaledLayer] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def add_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.infos[name] = TensorInfo.of(tensor)
            self.readers[name] = tensor.cpu

    def add_network(self, network: Network, prefix: str = "") -> None:
        """A network's tensors under `prefix`."""
        for name in network.names:
            self.infos[prefix + name] = network.info(name)
            self.readers[prefix + name] = lambda name=name: network.stored(name).cpu()
        for name, scaled in network.scaled.items():
            layer = ScaledLayer(prefix + name.removesuffix(".weight"), scaled.format, scaled.full_precision, prefix)
            self.layers[prefix + name] = layer
            self.scales[prefix + name] = scaled.scale
            if scaled.input_scale is not None:
                self.input_scales[layer.name] = scaled.input_scale.detach().float().reshape(())


def model_contents(model) -> Contents:
    """A diffusion model alone, under its bare names."""
    network = models.diffusion_network(model)
    _check_quantized([network], "MODEL", "Stochastic FP8 Quantize")
    contents = Contents()
    contents.add_network(network)
    contents.add_tensors(models.sampling_keys(model))
    return contents


def text_contents(clip) -> dict[str, Contents]:
    """Each quantized text encoder by its name, under the names that CLIPLoader reads."""
    networks = models.text_networks(clip)
    _check_quantized(networks.values(), "CLIP", "Stochastic FP8 Quantize Text Encoder")
    found = {}
    for name, network in networks.items():
        if network.scaled:
            found[name] = Contents()
            found[name].add_network(network)
            found[name].add_tensors(models.tokenizer_tensors(clip))
        else:
            log.info("%s is not quantized and is not saved: use the file it came from", name)
    return found


def checkpoint_contents(model, clip, vae) -> Contents:
    """An all-in-one checkpoint, under the names of the model's family."""
    network = models.diffusion_network(model)
    _check_quantized([network], "MODEL", "Stochastic FP8 Quantize")
    contents = Contents()
    contents.add_network(network, models.diffusion_prefix(model))
    contents.add_tensors(models.sampling_keys(model))
    if clip is not None:
        scaled = {}
        for name, encoder in models.text_networks(clip).items():
            _check_patches(encoder, "CLIP")
            if encoder.scaled:
                scaled[name] = encoder
                contents.add_network(encoder, models.text_encoder_prefix(model, encoder))
        contents.add_tensors(models.plain_text_tensors(model, clip, without=scaled.values()))
    if vae is not None:
        contents.add_tensors({name: narrow(tensor) for name, tensor in models.vae_tensors(model, vae).items()})
    return contents


class StochasticFP8Save(io.ComfyNode):
    """A quantized MODEL, CLIP or both -> a file under output/."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8Save",
            display_name="Save Scaled FP8 Model",
            category=CATEGORY,
            search_aliases=["save fp8", "export fp8", "checkpoint"],
            description=(
                "Saves a quantized model without rounding again: loaded back, it gives the same image to the bit. "
                "Model alone: output/diffusion_models. With CLIP or VAE: one checkpoint in output/checkpoints. CLIP "
                "alone: output/clip. ComfyUI's loaders list all three."
            ),
            inputs=[
                fit(io.String.Input, "filename_prefix", default="stochastic_fp8", tooltip=_PREFIX_TOOLTIP),
                layout_input(),
                fit(io.Model.Input, "model", optional=True, tooltip="A model from Stochastic FP8 Quantize."),
                fit(io.Clip.Input, "clip", optional=True, tooltip="A text encoder to save, alone or with the model."),
                fit(io.Vae.Input, "vae", optional=True, tooltip="A VAE for an all-in-one checkpoint, as it is."),
            ],
            outputs=[
                io.String.Output(
                    id="filename", display_name="filename", tooltip="The file's name as ComfyUI's loader lists it."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, filename_prefix, layout, model=None, clip=None, vae=None):
        if model is None and clip is None:
            raise ModelError("nothing to save: connect a model, a text encoder (clip), or both")
        metadata = workflow_metadata(cls.hidden)
        if model is None:
            owner, kind = clip.patcher, "text_encoders"
            files = text_contents(clip)
        else:
            owner, kind = model, "diffusion_models" if clip is None and vae is None else "checkpoints"
            metadata |= models.model_metadata(model)
            files = {"": model_contents(model) if kind == "diffusion_models" else checkpoint_contents(model, clip, vae)}
        recipe = owner.attachments.get(models.ATTACHMENT)
        if recipe:
            metadata[RECIPE_ENTRY] = json.dumps(recipe | {"layout": layout}, sort_keys=True)
        names = []
        for encoder, contents in files.items():
            path = target_path(kind, f"{filename_prefix}_{encoder}" if len(files) > 1 else filename_prefix)
            _write(path, contents, layout, metadata)
            names.append(loader_name(kind, path))
        return io.NodeOutput("\n".join(names), ui=ui.PreviewText("\n".join(names)))


_PREFIX_TOOLTIP = "The file's name; a number is counted up, so that no file is overwritten."


def _write(path, contents: Contents, layout: str, metadata: dict[str, str]) -> None:
    inspection = write_scaled(
        path,
        contents.infos,
        lambda name: contents.readers[name](),
        contents.layers,
        contents.scales,
        input_scales=contents.input_scales,
        layout=layout,
        metadata=metadata,
        progress=Progress(),
    )
    log.info("saved %s: %d scaled FP8 layers, %.3f GB", path, inspection.scaled, path.stat().st_size / 1e9)
    for verdict in inspection.verdicts:
        if verdict.outcome != EXACT:
            log.warning("%s: %s; %s", verdict.generation, verdict.outcome, verdict.text)


def _check_quantized(networks, what: str, node: str) -> None:
    for network in networks:
        _check_patches(network, what)
    if not any(network.scaled for network in networks):
        raise ModelError(f"this {what} is not quantized: put {node} before Save Scaled FP8 Model")


def _check_patches(network: Network, what: str) -> None:
    patched = network.patched_names
    if patched:
        raise ModelError(
            f"a LoRA or another patch changes {len(patched)} weights of this {what} (e.g. '{patched[0]}') after it was "
            "quantized, and saving would round them a second time: move it before Quantize"
        )
