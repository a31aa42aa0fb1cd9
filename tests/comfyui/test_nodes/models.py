"""Test-only nodes that look into a MODEL, or make one that the pack must refuse or carry over."""

import functools
import hashlib
import json
import types

import comfy.model_patcher
import torch
from comfy.model_management import unload_all_models

from .fake_gpu import Pack


class ModelDigest:
    """One hash over the names and the bytes of all weights, codes and scales of a MODEL."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "digest"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}, "optional": {"after": ("*", {"forceInput": True})}}

    def digest(self, model, after=None):
        digest = hashlib.sha256()
        for name, tensor in sorted(model.model.diffusion_model.state_dict().items()):
            plain = getattr(tensor, "_qdata", tensor).detach().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + plain.cpu().numpy().tobytes())
        return {"ui": {"text": [json.dumps(digest.hexdigest())]}}


class ModelToModel:
    """What is common to the nodes that take a MODEL and make one."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}


class ForeignModel(ModelToModel):
    """A copy of a MODEL whose Linear weights are of a tensor class of their own, as GGUF loaders make them."""

    def make(self, model):
        for module in model.model.diffusion_model.modules():
            if hasattr(module, "in_features"):
                weight = module.weight.detach().clone().as_subclass(GGMLTensor)
                del module._parameters["weight"]
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return (model,)


class UnloadedModel(ModelToModel):
    """A MODEL as "Unload Models" leaves it on a GPU: weights made in inference mode and moved outside of it."""

    def make(self, model):
        with torch.inference_mode(False):
            model.model.diffusion_model._apply(torch.clone)
        assert_views_are_refused(model.model.diffusion_model)
        return (model,)


def assert_views_are_refused(module):
    try:
        next(parameter for parameter in module.parameters() if parameter.ndim == 2).view(-1)
    except RuntimeError:
        return
    raise AssertionError("views of these parameters are allowed: the test does not make the state that it is for")


class BoundModel:
    """A MODEL that carries something which holds on to its network, in one of the ways that other nodes do it.

    method: every MLP's forward is a bound method of that MLP. wrapper: a function around the whole network, closing
    over the patcher. partial: the same as functools.partial over the network. object: an instance that keeps the
    network in an attribute.
    """

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "way": (("method", "wrapper", "partial", "object"),)}}

    def make(self, model, way):
        model = model.clone()
        network = model.get_model_object("diffusion_model")
        if way == "method":
            for i, block in enumerate(network.joint_blocks):
                mlp = block.x_block.mlp
                forward = types.MethodType(lambda self, x: type(self).forward(self, x), mlp)
                model.add_object_patch(f"diffusion_model.joint_blocks.{i}.x_block.mlp.forward", forward)
        elif way == "wrapper":

            def run(apply, options):
                assert model.model.diffusion_model is not None
                return model.model.apply_model(options["input"], options["timestep"], **options["c"])

            model.set_model_unet_function_wrapper(run)
        elif way == "partial":
            model.add_object_patch("diffusion_model.forward", functools.partial(type(network).forward, network))
        else:
            model.set_model_unet_function_wrapper(Holder(network))
        return (model,)


class Holder:
    def __init__(self, network):
        self.network = network

    def __call__(self, apply, options):
        return apply(options["input"], options["timestep"], **options["c"])


class UnfamiliarModel:
    """A MODEL that ComfyUI's loader would not make from its weights: of another class, with another configuration, or
    with a parameter too many, which may be called like the scale of a layer that has none."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "how": (("class", "config", "parameter", "marking"),)}}

    def make(self, model, how):
        if how == "class":
            model.model.__class__ = type("AnotherModel", (type(model.model),), {})
        elif how == "config":
            config = model.model.model_config
            config.__class__ = type("AnotherConfig", (type(config),), {})
        elif how == "marking":
            scale = torch.nn.Parameter(torch.ones(()))
            model.model.diffusion_model.x_embedder.register_parameter("input_scale", scale)
        else:
            model.model.diffusion_model.register_parameter("added", torch.nn.Parameter(torch.ones(3)))
        return (model,)


class GGMLTensor(torch.Tensor):
    """Stands for the class of the same name in GGUF packs."""


class UnlinearModel(ModelToModel):
    """A MODEL without a single Linear layer that FP8 could take: every one is another class now."""

    def make(self, model):
        for module in model.model.diffusion_model.modules():
            if hasattr(module, "in_features"):
                del module.in_features
        return (model,)


class IdleLayers(ModelToModel):
    """A MODEL with two more Linear layers, which its network does not use."""

    def make(self, model):
        network = model.model.diffusion_model
        linear = type(network.context_embedder)
        layers = [linear(64, 64, dtype=model.model.get_dtype()) for _ in range(2)]
        network.idle_blocks = torch.nn.ModuleList(torch.nn.Sequential(layer) for layer in layers)
        for tensor in network.idle_blocks.parameters():
            torch.nn.init.constant_(tensor, 0.5)  # ComfyUI's layers begin with whatever the memory holds
        return (model,)


class ScaledClipL:
    """A CLIP whose CLIP-L is in scaled FP8, which no loader of ComfyUI makes."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}}

    def make(self, clip):
        pack = Pack()
        models, states = pack.module("nodes.models"), pack.module("kernels.state_dict.scaled_state_dict")
        network = models.text_networks(clip)["clip_l"]
        state = network.saved_state_dict()
        for linear in network.linear_names:
            weight = network.tensor(f"{linear}.weight")
            layer = pack.module("kernels.state_dict.layouts").ScaledLayer(linear, "float8_e4m3fn")
            codes = states.TensorEntry.of(weight.to(torch.float8_e4m3fn))
            scaled = states.ScaledWeight(layer, tuple(weight.shape), codes, torch.tensor(1.0))
            state.add_weight(f"{linear}.weight", scaled)
        return (models.load_quantized_clip(clip, {network: state}, {}),)


class HalvingModel:
    """A MODEL that halves what its network predicts, through each of the ways a patcher offers beside weights."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    WAYS = ("model_options", "wrapper", "object_patch")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "way": (cls.WAYS,)}}

    def patch(self, model, way):
        patched = model.clone()
        if way == "model_options":
            patched.set_model_unet_function_wrapper(
                lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) / 2
            )
        elif way == "wrapper":
            patched.add_wrapper(
                "apply_model", lambda executor, *arguments, **options: executor(*arguments, **options) / 2
            )
        else:
            extra_conds = model.model.extra_conds
            patched.add_object_patch(
                "extra_conds", lambda **given: {**extra_conds(**given), **_half_context(extra_conds, given)}
            )
        return (patched,)


def _half_context(extra_conds, given):
    conds = extra_conds(**given)
    context = conds["c_crossattn"]
    context.cond = context.cond / 2
    return {"c_crossattn": context}


class LowVramModel:
    """A MODEL that ComfyUI loads as on a device with room for a share of it: the rest stays behind until it is used."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "limit"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "share": ("FLOAT", {"default": 0.5})}}

    def limit(self, model, share):
        unload_all_models()
        limited = model.clone()
        load = limited.load

        def load_a_share(device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
            room = share * model.model_size()
            load(device_to, lowvram_model_memory=room, force_patch_weights=force_patch_weights, full_load=False)

        limited.load = load_a_share
        return (limited,)


class DynamicModel(ModelToModel):
    """A MODEL with ComfyUI's patcher for dynamic VRAM. On the CPU, without the parts that load weights onto a GPU."""

    def make(self, model):
        if model.is_dynamic():
            return (model,)
        host_buffer = types.SimpleNamespace(HostBuffer=lambda *sizes: types.SimpleNamespace(size=0))
        comfy.model_patcher.comfy_aimdo = types.SimpleNamespace(host_buffer=host_buffer)
        base = comfy.model_patcher.ModelPatcherDynamic
        members = {
            "__new__": lambda cls, *arguments, **keywords: object.__new__(cls),
            "partially_unload": lambda self, *arguments, **keywords: self.restore_loaded_backups(),
        }
        patcher = type("DynamicOnCPU", (base,), members)
        return (patcher(model.model, model.load_device, model.offload_device),)


class LoadState:
    """How many of a MODEL's Linear layers ComfyUI left behind when loading, and how many it patches at each use."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "count"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}, "optional": {"after": ("*", {"forceInput": True})}}

    def count(self, model, after=None):
        linear = [module for module in model.model.diffusion_model.modules() if hasattr(module, "in_features")]
        state = {
            "linear": len(linear),
            "left_behind": sum(hasattr(module, "prev_comfy_cast_weights") for module in linear),
            "patched_at_each_use": sum(len(module.weight_function) > 0 for module in linear),
        }
        return {"ui": {"text": [json.dumps(state)]}}


NODES = (
    ModelDigest,
    ForeignModel,
    UnlinearModel,
    UnloadedModel,
    BoundModel,
    UnfamiliarModel,
    IdleLayers,
    ScaledClipL,
    HalvingModel,
    LowVramModel,
    *([DynamicModel] if hasattr(comfy.model_patcher, "ModelPatcherDynamic") else []),
    LoadState,
)
