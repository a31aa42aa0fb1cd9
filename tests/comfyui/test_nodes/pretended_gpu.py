"""A test-only node that quantizes on a GPU which is in truth the CPU, and tells what moved when."""

import json
import sys
from unittest.mock import patch

import comfy.model_management
import torch

import nodes

GPU = torch.device("mps")
"""A name only: what is sent there stays where it is, and is computed on the CPU."""


class PretendedGPU:
    """What moved to and from the GPU while a MODEL was quantized, and whether its codes are the CPU's.

    weights: in 16 bits; in 32, which every second layer has no need of; or with a NaN in every third layer.
    `moved`: [send, sent, fetch or fetched, layer], in order; None for what is no layer's own weight.
    `room`: [bytes, device] that ComfyUI was asked for. `largest`: bytes of the largest weight.
    """

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "quantize"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "weights": (("16 bits", "32 bits", "nan"),)}}

    def quantize(self, model, weights):
        quantize_module = sys.modules[nodes.NODE_CLASS_MAPPINGS["StochasticFP8Quantize"].__module__]
        in_graph, models = quantize_module.in_graph, quantize_module.models
        network, recipe = models.diffusion_network(model), in_graph.Recipe(layers="auto", nonfinite="keep")
        selection = in_graph.select(network, recipe)
        layers = list(selection.quantize)
        tensors = {name: network.tensor(name).detach().bfloat16() for name in network.names}
        if weights == "32 bits":
            tensors |= {name: 1.0001 * tensors[name].float() for name in layers}
            tensors |= {name: tensors[name].bfloat16().float() for name in layers[::2]}
        if weights == "nan":
            for name in layers[::3]:
                tensors[name].view(-1)[0] = float("nan")
        names = {tensors[name].data_ptr(): name for name in layers}
        moved, room = [], []

        def begin_transfer(x, device):
            sending = device == GPU
            if not sending and x.data_ptr() in names:
                return lambda: x  # a weight is on the CPU already
            moved.append(["send" if sending else "fetch", names.get(x.data_ptr())])

            def arrival():
                moved.append(["sent" if sending else "fetched", names.get(x.data_ptr())])
                return x

            return arrival

        transfers = sys.modules[in_graph.Ahead.__module__]
        with (
            patch.object(network, "tensor", tensors.get),
            patch.object(in_graph, "begin_transfer", begin_transfer),
            patch.object(transfers, "begin_transfer", begin_transfer),
            patch.object(transfers, "is_staged", lambda x, device: device == GPU),
            patch.object(
                comfy.model_management, "free_memory", lambda nbytes, device, *rest: room.append([nbytes, device.type])
            ),
        ):
            there, _ = in_graph.quantize_network(network, selection, recipe, GPU, "the model")
        with patch.object(network, "tensor", tensors.get):
            here, _ = in_graph.quantize_network(network, selection, recipe, torch.device("cpu"), "the model")
        same = there.weights.keys() == here.weights.keys() and all(
            torch.equal(there.weights[name].codes.view(torch.uint8), here.weights[name].codes.view(torch.uint8))
            for name in here.weights
        )
        seen = {
            "layers": layers,
            "patched": network.patched_names,
            "quantized": list(there.weights),
            "moved": moved,
            "same": same,
            "room": room,
            "largest": max(tensors[name].nbytes for name in layers),
        }
        return {"ui": {"text": [json.dumps(seen)]}}
