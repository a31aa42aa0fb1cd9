"""A test-only node that quantizes on a fake GPU (really the CPU) and records the transfers."""

import contextlib
import json
import sys
from unittest.mock import patch

import comfy.model_management
import torch

import nodes

GPU = torch.device("mps")
"""Only a name: a tensor that is sent there stays where it is and is computed on the CPU."""


class FakeGPU:
    """The transfers while a MODEL is quantized on the fake GPU, and whether the codes are the CPU's.

    weights: in 16 bits; in 32, every second layer with values that 16 bits hold; or with a NaN in every third layer.
    Result, as JSON under `text`:
    `events`: [name, layer] in order. "send": a weight leaves for the GPU. "round": the GPU waits for a weight, to round
    it. "fetch": codes leave the GPU. "fetched": the CPU waits for codes. The layer is None for codes.
    `room`: bytes that ComfyUI was asked to free, once per request. `largest`: bytes of the largest weight.
    """

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "quantize"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "weights": (("16 bits", "32 bits", "nan"),)}}

    def quantize(self, model, weights):
        pack = Pack()
        network = pack.module("nodes.models").diffusion_network(model)
        recipe = pack.module("kernels.recipe").Recipe(layers="auto", nonfinite="keep")
        layers = pack.module("kernels.engine.quantization").select(network, recipe).quantize
        tensors = _weights(network, layers, weights)
        names = {tensors[name].data_ptr(): name for name in layers}
        events, room = [], []

        def begin_transfer(x, device):
            name = names.get(x.data_ptr())
            if name and device != GPU:
                return lambda: x  # a weight is on the CPU already
            leaves, arrives = ("send", "round") if device == GPU else ("fetch", "fetched")
            events.append([leaves, name])

            def arrival():
                events.append([arrives, name])
                return x

            return arrival

        def free_memory(nbytes, device, *rest):
            room.append(nbytes)

        job = pack.module("nodes.in_graph").NetworkJob
        with (
            patch.object(network, "tensor", tensors.get),
            pack.replaced("begin_transfer", begin_transfer),
            pack.replaced("is_staged", lambda x, device: device == GPU),
            patch.object(comfy.model_management, "free_memory", free_memory),
        ):
            on_gpu = job(network, recipe, GPU).run().weights
        with patch.object(network, "tensor", tensors.get):
            on_cpu = job(network, recipe, torch.device("cpu")).run().weights
        result = {
            "layers": list(layers),
            "patched": list(network.patched),
            "quantized": list(on_gpu),
            "events": events,
            "same": on_gpu.keys() == on_cpu.keys() and all(_same(on_gpu[name], on_cpu[name]) for name in on_cpu),
            "room": room,
            "largest": max(tensors[name].nbytes for name in layers),
        }
        return {"ui": {"text": [json.dumps(result)]}}


class Pack:
    """The modules of the pack under the name that ComfyUI gave it."""

    def __init__(self):
        module = nodes.NODE_CLASS_MAPPINGS["StochasticFP8Quantize"].__module__
        self._name = module[: module.rindex(".nodes.")]

    def module(self, name):
        return sys.modules[f"{self._name}.{name}"]

    @contextlib.contextmanager
    def replaced(self, name, replacement):
        """Replace a function of kernels.numerics.transfers in every module of the pack that imported it."""
        original = getattr(self.module("kernels.numerics.transfers"), name)
        users = [module for key, module in sys.modules.items() if key.startswith(f"{self._name}.")]
        with contextlib.ExitStack() as stack:
            for module in users:
                if vars(module).get(name) is original:
                    stack.enter_context(patch.object(module, name, replacement))
            yield


def _weights(network, layers, kind):
    tensors = {name: network.tensor(name).to("cpu", torch.bfloat16, copy=True) for name in network.tensors}
    if kind == "32 bits":
        tensors |= {name: 1.0001 * tensors[name].float() for name in layers}
        tensors |= {name: tensors[name].bfloat16().float() for name in layers[::2]}
    if kind == "nan":
        for name in layers[::3]:
            tensors[name].view(-1)[0] = float("nan")
    return tensors


def _same(one, other):
    codes = (weight.codes.read().view(torch.uint8) for weight in (one, other))
    return torch.equal(*codes) and torch.equal(one.scale, other.scale)
