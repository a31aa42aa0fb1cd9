"""MODEL and CLIP <-> scaled FP8 state dicts, through ComfyUI's own loaders.

This module and networks.py are the only ones that touch ComfyUI's model internals. They hold for 0.3.75 to 0.33.0;
where versions differ, the function says how.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sd
import torch
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels.state_dict.layouts import HEADER_ENTRY, LAYOUTS, ScaledLayer
from .networks import FLOAT8, ModelError, Network, ScaledWeight

log = logging.getLogger("stochastic_fp8")

ATTACHMENT = "stochastic_fp8"
"""Where a quantized MODEL or CLIP carries its recipe, for the file that may be saved from it."""

_CARRIED = (
    "model_options",
    "attachments",
    "additional_models",
    "callbacks",
    "wrappers",
    "injections",
    "hook_patches",
    "forced_hooks",
    "hook_mode",
    "weight_wrapper_patches",
    "force_cast_weights",
)
"""What a patcher holds beside weights and weight patches; object patches are looked at one by one."""


@dataclass(frozen=True)
class Part:
    """A network, and the weights of it that are to be scaled FP8."""

    network: Network
    weights: Mapping[str, ScaledWeight]

    def tensors(self, full_names: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
        """The state dict in layout native, and its header's layers; full_names: with the network's prefix.

        Tensors that are not quantized are the network's own, patched if need be, and not copies.
        """
        prefix = self.network.prefix if full_names else ""
        cpu = comfy.model_management.unet_offload_device()
        state, layers = {}, {}
        for name in self.network.names:
            scaled = self.weights.get(name)
            if scaled is None:
                state[prefix + name] = self.network.value(name, cpu)
                continue
            layer = ScaledLayer(prefix + name.removesuffix(".weight"), scaled.format, scaled.full_precision)
            layers[layer.name] = layer.entry
            state[prefix + name] = scaled.codes
            state[layer.name + LAYOUTS["native"].weight_scale] = scaled.scale
            if scaled.input_scale is not None:
                state[layer.name + LAYOUTS["native"].input_scale] = scaled.input_scale
        return state, layers


def diffusion_network(model) -> Network:
    return Network(model, "diffusion_model.")


def text_networks(clip) -> dict[str, Network]:
    """The encoders of a CLIP by name, such as clip_l and t5xxl."""
    encoders = clip.cond_stage_model.named_children()
    return {
        name: Network(clip.patcher, f"{name}.transformer.")
        for name, encoder in encoders
        if isinstance(getattr(encoder, "transformer", None), torch.nn.Module)
    }


def check_runs(format: str) -> None:
    """Raises ModelError where the running ComfyUI cannot compute with a format: E5M2 in 0.3.75."""
    if format not in comfy.quant_ops.QUANT_ALGOS:
        raise ModelError(
            f"ComfyUI {COMFYUI_VERSION} cannot run {format} layers: choose float8_e4m3fn, update ComfyUI, or make a "
            "file with Stochastic FP8 Quantize File and layout legacy"
        )


def load_quantized_model(source, part: Part, attachment: dict):
    """A new MODEL with `part`'s weights, made by ComfyUI's loader, that otherwise does what `source` does.

    attachment: what ATTACHMENT holds. Raises ModelError where ComfyUI does not recognise the model.
    """
    state, layers = part.tensors()
    state |= sampling_keys(source)
    metadata = model_metadata(source) | {HEADER_ENTRY: json.dumps({"format_version": "1.0", "layers": layers})}
    result = _load_diffusion_model(state, {"dtype": _compute_dtype(source)}, metadata)
    if result is None:
        raise ModelError(
            f"ComfyUI {COMFYUI_VERSION} does not recognise the weights of this {type(source.model).__name__}: "
            "quantize its file with Stochastic FP8 Quantize File instead"
        )
    _carry_over(source, result, attachment)
    if result.model.model_type != source.model.model_type and "model_sampling" not in result.object_patches:
        result.add_object_patch("model_sampling", source.model.model_sampling)
    if getattr(result, "is_dynamic", bool)():
        result.cached_patcher_init = (_load_diffusion_model, (state, {"dtype": _compute_dtype(source)}, metadata))
    return result


def load_quantized_clip(source, parts: Mapping[str, Part], attachment: dict):
    """A new CLIP of `source`'s class with the parts' weights, and everything else as in `source`."""
    state = dict(source.cond_stage_model.state_dict())
    layers = {}
    for part in parts.values():
        state = {name: tensor for name, tensor in state.items() if not name.startswith(part.network.prefix)}
        tensors, entries = part.tensors(full_names=True)
        state |= tensors
        layers |= entries
    target = SimpleNamespace(
        params={}, clip=type(source.cond_stage_model), tokenizer=lambda **keywords: source.tokenizer
    )
    result = _create_clip(target, state, layers)
    for name in ("layer_idx", "use_clip_schedule", "apply_hooks_to_conds"):
        setattr(result, name, getattr(source, name))
    result.tokenizer_options = dict(source.tokenizer_options)
    _carry_over(source.patcher, result.patcher, attachment)
    return result


def sampling_keys(model) -> dict[str, torch.Tensor]:
    """Empty tensors and numbers by which ComfyUI's loader tells what a checkpoint was trained to predict."""
    sampling = model.get_model_object("model_sampling")
    keys = {}
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        if isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
            for bound in ("sigma_max", "sigma_min"):
                keys[f"edm_vpred.{bound}"] = torch.as_tensor(getattr(sampling, bound)).float()
        elif model.model.model_type.name == "V_PREDICTION":
            keys["v_pred"] = torch.tensor([])
            if getattr(sampling, "zsnr", False):
                keys["ztsnr"] = torch.tensor([])
    return keys


def model_metadata(model) -> dict[str, str]:
    """The `config` entry, off which the loader reads what the shapes of LTX-Video's weights do not tell."""
    config = model.model.model_config.unet_config
    if config.get("image_model") not in ("ltxv", "ltxav"):
        return {}
    plain = {name: value for name, value in config.items() if isinstance(value, (str, int, float, bool, list))}
    return {"config": json.dumps({"transformer": plain}, sort_keys=True)}


def _load_diffusion_model(state: dict, options: dict, metadata: dict, **keywords):
    """The loader takes its arguments apart: it gets copies."""
    return comfy.sd.load_diffusion_model_state_dict(
        dict(state), model_options=dict(options), metadata=dict(metadata), **keywords
    )


def _compute_dtype(model) -> torch.dtype:
    """The type of what is not quantized. Left to itself, 0.3.75 on an FP8 GPU would take FP8, without a scale."""
    dtype = model.model.get_dtype()
    if dtype not in FLOAT8:
        return dtype
    supported = model.model.model_config.supported_inference_dtypes
    return comfy.model_management.unet_dtype(model_params=model.model_size(), supported_dtypes=supported)


def _create_clip(target, state: dict, layers: dict):
    """Newer versions find quantized layers by inline entries in the state dict, 0.3.75 by a JSON string."""
    options: dict = {}
    in_constructor = "state_dict" in inspect.signature(comfy.sd.CLIP).parameters
    if not layers:
        pass
    elif in_constructor:
        options["quantization_metadata"] = {"mixed_ops": True}
        state = state | {
            f"{name}.comfy_quant": torch.frombuffer(bytearray(json.dumps(entry).encode()), dtype=torch.uint8)
            for name, entry in layers.items()
        }
    else:
        options["quantization_metadata"] = json.dumps({"layers": layers})
        if comfy.model_management.text_encoder_device().type == "cpu":
            options["dtype"] = torch.float32
    parameters = sum(tensor.numel() for tensor in state.values())
    if in_constructor:
        return comfy.sd.CLIP(target, parameters=parameters, state_dict=state, model_options=options)
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options=options)
    missing, _ = clip.load_sd(state, full_model=True)
    if missing:
        log.warning("text encoder tensors missing: %s", ", ".join(missing))
    return clip


def _carry_over(source, result, attachment: dict) -> None:
    """Give `result` all that a clone of `source` would have, but the weights and their patches."""
    clone = source.clone()
    for name in _CARRIED:
        if hasattr(clone, name):
            setattr(result, name, getattr(clone, name))
    for name, patch in clone.object_patches.items():
        if isinstance(patch, torch.nn.Module) and any(True for _ in patch.parameters()):
            log.warning("the patch of %s holds weights of the original model and is left out: apply it after", name)
        else:
            result.object_patches[name] = patch
    result.set_attachments(ATTACHMENT, attachment)


def diffusion_prefix(model) -> str:
    """What the names of a diffusion model begin with in an all-in-one checkpoint of its family."""
    (name,) = model.model.model_config.process_unet_state_dict_for_saving({"": None})
    return name


def text_encoder_prefix(model, network: Network) -> str:
    """The same for an encoder; those that can be quantized keep their names behind it."""
    (name,) = model.model.model_config.process_clip_state_dict_for_saving({network.prefix: None})
    return name


def plain_text_tensors(model, clip, without) -> dict[str, torch.Tensor]:
    """A CLIP's tensors as an all-in-one checkpoint names them, less the networks in `without`."""
    skipped = tuple(network.prefix for network in without)
    state = {name: tensor for name, tensor in clip.get_sd().items() if torch.is_tensor(tensor)}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(skipped)} if skipped else state
    return model.model.model_config.process_clip_state_dict_for_saving(rest)


def vae_tensors(model, vae) -> dict[str, torch.Tensor]:
    return model.model.model_config.process_vae_state_dict_for_saving(vae.get_sd())


def tokenizer_tensors(clip) -> dict[str, torch.Tensor]:
    """Vocabularies that a text encoder's file carries along."""
    return {name: tensor for name, tensor in clip.tokenizer.state_dict().items() if torch.is_tensor(tensor)}
