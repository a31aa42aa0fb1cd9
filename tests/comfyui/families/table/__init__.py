"""All families, and the classes of ComfyUI that no row builds.

A row runs where the running ComfyUI has its class.
"""

from comfyui.families.table import cosmos, flux, hunyuan, ltx, lumina, others, qwen, transformers, unet, wan

_MODULES = (flux, qwen, wan, lumina, ltx, hunyuan, cosmos, transformers, unet, others)

FAMILIES = {name: family for module in _MODULES for name, family in module.FAMILIES.items()}

NOT_BUILT = {
    "MiniMaxMusic3": "all its sizes are fixed in the code: 2.4e9 parameters",
    "RT_DETR_v4": "a detector, not a diffusion model",
    "SAM3": "segments images, not a diffusion model",
    "SAM31": "segments images, not a diffusion model",
    "DepthAnything3": "estimates depth, not a diffusion model",
}
"""Class in comfy.supported_models -> why no row builds it."""
