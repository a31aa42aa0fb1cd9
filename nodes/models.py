"""MODEL and CLIP <-> scaled FP8 state dicts, through ComfyUI's own loaders.

This module, networks.py and published_names.py are the only ones that touch ComfyUI's model internals. They hold for
0.3.75 to 0.33.0; where versions differ, the function says how.
"""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import Mapping
from types import SimpleNamespace

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sd
import torch
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels.state_dict.layouts import HEADER_ENTRY, LAYOUTS
from ..kernels.state_dict.load import native_tensors
from ..kernels.state_dict.scaled_state_dict import ScaledStateDict
from .carried import Rebinder, StillBound
from .networks import (
    FLOAT8,
    ModelError,
    Network,
    beside_tensors,
    bypass_managers,
    bypass_patches,
    plain_settings,
    same_kind,
    samples_equal,
    without_object_patches,
)
from .running import source_name

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
"""What a patcher holds beside weights, weight patches and object patches."""


def diffusion_network(model, input: str = "model") -> Network:
    """Of a MODEL. It is named by its file, if a loader behind this input of the running node names one."""
    return Network(model, "diffusion_model.", source_name(input, "MODEL") or _class(model))


def text_networks(clip) -> dict[str, Network]:
    """The encoders of a CLIP by name, such as clip_l and t5xxl."""
    return {
        name: Network(clip.patcher, f"{name}.transformer.", name)
        for name, encoder in clip.cond_stage_model.named_children()
        if isinstance(getattr(encoder, "transformer", None), torch.nn.Module)
    }


def check_runs(format: str) -> None:
    """Raises ModelError where the running ComfyUI cannot compute with a format: E5M2 in 0.3.75."""
    if format not in comfy.quant_ops.QUANT_ALGOS:
        raise ModelError(
            f"ComfyUI {COMFYUI_VERSION} cannot run {format} layers: choose float8_e4m3fn, update ComfyUI, or make a "
            "file with Convert File to FP8 and layout legacy"
        )


def load_quantized_model(source, state: ScaledStateDict, attachment: dict):
    """A new MODEL with the weights of a state dict, made by ComfyUI's loader, that otherwise does what `source` does.

    attachment: what ATTACHMENT holds. Raises ModelError where ComfyUI does not recognise the model.
    """
    beside = beside_tensors(source)
    tensors = native_tensors(state) | sampling_keys(source) | beside
    metadata = state.metadata | LAYOUTS["native"].metadata(state.layers)
    try:
        result = _load_diffusion_model(tensors, {"dtype": _compute_dtype(source)}, metadata)
    except (RuntimeError, KeyError) as error:  # models that need weights beside their diffusion model
        raise _not_loaded(f"cannot load the quantized {_class(source)} ({str(error).splitlines()[0]})") from error
    if result is None:
        raise _not_loaded(f"does not recognise the quantized weights of this {_class(source)}")
    _carry_over(source, result, attachment)
    _check_same_model(source, result, state, tensors, beside)
    if getattr(result, "is_dynamic", bool)():
        result.cached_patcher_init = (_load_diffusion_model, (tensors, {"dtype": _compute_dtype(source)}, metadata))
    return result


def check_recognised(source, network: Network) -> None:
    """Raises ModelError where ComfyUI's loader would make another model of the quantized weights, before any work."""
    config, detected = source.model.model_config, network.detected_config(network.metadata)
    if detected is None:
        raise _not_loaded(f"does not recognise the quantized weights of this {_class(source)}")
    if not same_kind(detected, config):
        other = f"as another model, {type(detected).__name__}"
        fault = "with other settings" if type(detected) is type(config) else other
        raise _not_loaded(f"would load the quantized {_class(source)} {fault}")


def _class(source) -> str:
    return type(source.model).__name__


def _not_loaded(what: str) -> ModelError:
    return ModelError(f"ComfyUI {COMFYUI_VERSION} {what}: quantize its file with Convert File to FP8 instead")


def _check_same_model(
    source,
    result,
    state: ScaledStateDict,
    tensors: Mapping[str, torch.Tensor],
    beside: Mapping[str, torch.Tensor],
) -> None:
    """Raises ModelError unless the loader made the same kind of model, with every weight that it was given.

    beside: those beside the network.
    """
    model = result.model
    if type(model) is not type(source.model):
        fault = f"as another model, {type(model).__name__}"
    elif plain_settings(model.model_config) != plain_settings(source.model.model_config):
        fault = "with other settings"
    elif model.model_type != source.model.model_type and "model_sampling" not in result.object_patches:
        fault = f"with another kind of sampling, {model.model_type.name}"
    else:
        loaded = beside_tensors(result)
        wrong = diffusion_network(result).differing(state, tensors)
        wrong += [name for name in beside if name not in loaded or not samples_equal(loaded[name], beside[name])]
        if not wrong:
            return
        fault = f"without {len(wrong)} of its tensors, e.g. '{wrong[0]}'"
    raise _not_loaded(f"would load the quantized {_class(source)} {fault}")


def load_quantized_clip(source, encoders: Mapping[Network, ScaledStateDict], attachment: dict):
    """A new CLIP of `source`'s class with the state dicts of some encoders, and everything else as in `source`.

    encoders: those of `source` that change -> their state dicts.
    """
    joined = ScaledStateDict()
    for encoder, state in encoders.items():
        joined.add(encoder.under_module_names(state), encoder.prefix)
    backup, prefixes = source.patcher.backup, tuple(encoder.prefix for encoder in encoders)
    kept = {
        name: backup[name].weight if name in backup else tensor
        for name, tensor in source.cond_stage_model.state_dict().items()
        if not name.startswith(prefixes)
    }
    target = SimpleNamespace(
        params={}, clip=type(source.cond_stage_model), tokenizer=lambda **keywords: source.tokenizer
    )
    tensors = kept | native_tensors(joined)
    result = _create_clip(target, dict(tensors), joined)
    for name in ("layer_idx", "use_clip_schedule", "apply_hooks_to_conds"):
        setattr(result, name, getattr(source, name))
    result.tokenizer_options = dict(source.tokenizer_options)
    _carry_over(source.patcher, result.patcher, attachment)
    _carry_patches(source.patcher, result.patcher, prefixes)
    loaded = {network.prefix: network for network in text_networks(result).values()}
    for encoder, state in encoders.items():
        given = {name: tensors[encoder.key(name)] for name in (*state.tensors, *state.weights)}
        wrong = loaded[encoder.prefix].differing(state, given)
        if wrong:
            raise _not_loaded(
                f"would load the quantized {encoder.name} without {len(wrong)} of its tensors, e.g. '{wrong[0]}'"
            )
    return result


def _carry_patches(source, result, without: tuple[str, ...]) -> None:
    """Give `result` the weight patches of encoders that are not quantized, LoRAs in bypass mode included."""
    patches = {key: list(each) for key, each in source.patches.items() if not key.startswith(without)}
    for key, each in bypass_patches(source).items():
        if not key.startswith(without):
            patches.setdefault(key, []).extend(each)
    result.patches = patches
    result.patches_uuid = uuid.uuid4()


def sampling_keys(model) -> dict[str, torch.Tensor]:
    """Empty tensors and numbers by which ComfyUI's loader tells what a checkpoint of SDXL was trained to predict.

    {} for families whose loader does not look for them.
    """
    sampling = model.get_model_object("model_sampling")
    keys = {}
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        if isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
            for bound in ("sigma_max", "sigma_min"):
                keys[f"edm_vpred.{bound}"] = torch.as_tensor(getattr(sampling, bound), device="cpu").float()
        elif model.model.model_type.name == "V_PREDICTION":
            keys["v_pred"] = torch.tensor([], dtype=torch.float32, device="cpu")
            if getattr(sampling, "zsnr", False):
                keys["ztsnr"] = torch.tensor([], dtype=torch.float32, device="cpu")
    config = model.model.model_config
    reader = type(config)(config.unet_config)  # reading changes it
    return keys if keys and reader.model_type({}) != reader.model_type(keys) else {}


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


def _create_clip(target, tensors: dict, state: ScaledStateDict):
    """Newer versions find quantized layers by inline entries in the state dict, 0.3.75 by a JSON string."""
    options: dict = {}
    native = LAYOUTS["native"]
    in_constructor = "state_dict" in inspect.signature(comfy.sd.CLIP).parameters
    if not state.layers:
        pass
    elif in_constructor:
        options["quantization_metadata"] = {"mixed_ops": True}
        tensors = tensors | native.markers(state.layers)
    else:
        options["quantization_metadata"] = native.metadata(state.layers)[HEADER_ENTRY]
        if comfy.model_management.text_encoder_device().type == "cpu":
            options["dtype"] = torch.float32
    parameters = sum(tensor.numel() for tensor in tensors.values())
    if in_constructor:
        return comfy.sd.CLIP(target, parameters=parameters, state_dict=tensors, model_options=options)
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options=options)
    missing, _ = clip.load_sd(tensors, full_model=True)
    if missing:
        log.warning("text encoder tensors missing: %s", ", ".join(missing))
    return clip


def _carry_over(source, result, attachment: dict) -> None:
    """Give `result` all that a clone of `source` would have, but the weights and their patches.

    Whatever holds on to the network of `source` is rebound to that of `result`. LoRAs in bypass mode are baked into
    the weights and left out. Raises ModelError for what cannot be rebound.
    """
    with without_object_patches(source):
        clone, rebinder = source.clone(), Rebinder(source, result)
    clone.model_options = _copied(source.model_options)  # 0.3.75 copies the objects in it too, and what they hold
    clone.injections = {
        key: [_without_class(injection) for injection in injections]
        for key, injections in clone.injections.items()
        if not any(bypass_managers(injections))
    }
    for name in (*_CARRIED, "object_patches"):
        if not hasattr(clone, name):
            continue
        value = getattr(clone, name)
        if isinstance(value, dict):
            value = {key: _rebound(rebinder, item, f"{name} '{key}'") for key, item in value.items()}
        else:
            value = _rebound(rebinder, value, name)
        setattr(result, name, value)
    result.injections = {
        key: [comfy.patcher_extension.PatcherInjection(inject, eject) for inject, eject in injections]
        for key, injections in result.injections.items()
    }
    result.set_attachments(ATTACHMENT, attachment)


def _copied(value):
    """The same things in containers of their own."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if type(value) is list else value


def _without_class(injection) -> tuple:
    """An injection as a tuple, which can be rebound."""
    return injection.inject, injection.eject


def _rebound(rebinder: Rebinder, value, what: str):
    try:
        return rebinder.rebind(value)
    except StillBound:
        raise ModelError(
            f"another node left something in this model that uses its unquantized weights ({what}): put that node "
            "after Stochastic FP8"
        ) from None


def diffusion_prefix(model) -> str:
    """What the names of a diffusion model begin with in an all-in-one checkpoint of its family."""
    (name,) = model.model.model_config.process_unet_state_dict_for_saving({"": None})
    return name


def text_encoder_prefix(model, network: Network) -> str:
    """The same for an encoder, whose tensors have the names in the module behind it."""
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
