"""The nodes. To add one, import its class and append it to NODES."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from .quantize import StochasticFP8Quantize, StochasticFP8QuantizeTextEncoder

NODES = [
    StochasticFP8Quantize,
    StochasticFP8QuantizeTextEncoder,
]


class StochasticFP8Extension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self):
        return NODES
