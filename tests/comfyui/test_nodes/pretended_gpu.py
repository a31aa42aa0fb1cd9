"""A test-only node that quantizes on a GPU which is in truth the CPU, and tells what moved when."""

import json
import sys
from unittest.mock import patch

import comfy.model_management
import torch

import nodes

GPU = torch.device("mps")
"""No machine that runs these tests has one, so that nothing can be computed there unseen."""


class PretendedGPU:
    """What moved to and from the GPU while a MODEL was quantized, and whether its codes are the CPU's.

    `moved`: [what happened, layer, layer...], in order; `fetch` and `fetched` know no layer. `room`: bytes that ComfyUI
    was asked for. `largest`: bytes of the largest weight.
    """

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "quantize"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def quantize(self, model):
        quantize_module = sys.modules[nodes.NODE_CLASS_MAPPINGS["StochasticFP8Quantize"].__module__]
        in_graph, models = quantize_module.in_graph, quantize_module.models
        network, recipe = models.diffusion_network(model), in_graph.Recipe(layers="auto")
        selection = in_graph.select(network, recipe)
        weights = {name: network.tensor(name).detach().bfloat16() for name in network.names}  # fp32 on a CPU
        names = {weights[name].data_ptr(): name for name in selection.quantize}
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
            patch.object(network, "tensor", weights.get),
            patch.object(in_graph, "begin_transfer", begin_transfer),
            patch.object(transfers, "begin_transfer", begin_transfer),
            patch.object(transfers, "is_staged", lambda x, device: device == GPU),
            patch.object(
                comfy.model_management, "free_memory", lambda nbytes, device, *rest: room.append([nbytes, device.type])
            ),
        ):
            there, _ = in_graph.quantize_network(network, selection, recipe, GPU, "the model")
        here, _ = in_graph.quantize_network(network, selection, recipe, torch.device("cpu"), "the model")
        same = there.weights.keys() == here.weights.keys() and all(
            torch.equal(there.weights[name].codes.view(torch.uint8), here.weights[name].codes.view(torch.uint8))
            for name in here.weights
        )
        largest = max(weights[name].nbytes for name in selection.quantize)
        seen = {"moved": moved, "layers": list(selection.quantize), "same": same, "room": room, "largest": largest}
        return {"ui": {"text": [json.dumps(seen)]}}
