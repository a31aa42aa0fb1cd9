"""Stochastic FP8: quantize ComfyUI models to scaled FP8."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """Hand ComfyUI the extension; the nodes are imported only when it asks."""
    from .nodes import StochasticFP8Extension

    return StochasticFP8Extension()
