"""Flux and the models built like it: LongCat-Image, Ovis-Image, Flux.2, Chroma."""

import re

import torch
from comfyui.families.family import Family, random, text, timestep

FLUX = (
    {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072}
    | {"num_heads": 24, "depth": 19, "depth_single_blocks": 38, "mlp_ratio": 4.0, "qkv_bias": True}
    | {"axes_dim": [16, 56, 56], "theta": 10000, "context_in_dim": 4096, "vec_in_dim": 768, "txt_ids_dims": []}
    | {"guidance_embed": True, "yak_mlp": False, "txt_norm": False}
)
SMALL = {"hidden_size": 128, "num_heads": 1, "context_in_dim": 64, "depth": 2, "depth_single_blocks": 2}
SMALL_FLUX = SMALL | {"vec_in_dim": 64}
WITHOUT_VECTOR = {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}

FLUX2 = FLUX | (
    {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None}
    | {"hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48, "mlp_ratio": 3.0}
    | {"axes_dim": [32, 32, 32, 32], "theta": 2000, "context_in_dim": 15360, "txt_ids_dims": [3], "qkv_bias": False}
    | {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False}
    | {"default_ref_method": "index", "ref_index_scale": 10.0}
)
KLEIN = FLUX2 | {"guidance_embed": False}
KLEIN_4B = {"hidden_size": 3072, "num_heads": 24, "context_in_dim": 7680, "depth": 5, "depth_single_blocks": 20}
KLEIN_9B = {"hidden_size": 4096, "num_heads": 32, "context_in_dim": 12288, "depth": 8, "depth_single_blocks": 24}

CHROMA = {key: FLUX[key] for key in FLUX if key not in ("guidance_embed", "yak_mlp", "txt_norm")} | (
    {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "vec_in_dim": None}
    | {"in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
)
RADIANCE = CHROMA | (
    {"image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16}
    | {"nerf_hidden_size": 64, "nerf_mlp_ratio": 4, "nerf_depth": 4, "nerf_max_freqs": 8, "nerf_tile_size": 512}
    | {"nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": False}
    | {"use_sequential_txt_ids": False}
)
SMALL_CHROMA = SMALL | {"out_dim": 128, "hidden_dim": 64, "n_layers": 2}
SMALL_RADIANCE = SMALL_CHROMA | {"nerf_hidden_size": 16}


def norms_as_scale(name):
    """The query and key norms are published as `scale`; newer ComfyUI calls them `weight`."""
    return re.sub(r"((?:query|key)_norm)\.weight$", r"\1.scale", name)


def ovis_names(name):
    return norms_as_scale(name).replace("txt_norm.weight", "txt_norm.scale")


def chroma_names(name):
    name = re.sub(r"(distilled_guidance_layer\.norms\.\d+)\.weight$", r"\1.scale", norms_as_scale(name))
    return re.sub(r"(nerf_(?:blocks\.\d+|final_layer|final_layer_conv)\.norm)\.weight$", r"\1.scale", name)


def flux_inputs(settings):
    latent = 16 if settings["patch_size"] == 2 else settings["in_channels"]
    keywords = {"c_crossattn": text(settings["context_in_dim"]), "guidance": timestep(3.5)}
    if settings.get("vec_in_dim"):
        keywords["y"] = random(1, settings["vec_in_dim"], seed=2)
    if settings["in_channels"] > latent:
        keywords["c_concat"] = random(1, settings["in_channels"] - latent, 8, 8, seed=5)
    return random(1, latent, 8, 8), timestep(), keywords


def chroma_inputs(settings):
    return random(1, 16, 8, 8), timestep(), {"c_crossattn": text(64), "guidance": timestep(0.0)}


def radiance_inputs(settings):
    return random(1, 3, 64, 64), timestep(), {"c_crossattn": text(64), "guidance": timestep(0.0)}


def flux(comfy_class, changes, small=SMALL_FLUX, publish=norms_as_scale, **more):
    return Family(comfy_class, FLUX | changes, small, flux_inputs, publish, **more)


FAMILIES = {
    "flux_dev": flux("Flux", {}),
    "flux_dev_all_in_one": flux("Flux", {}, prefix="model.diffusion_model."),
    "flux_schnell": flux("FluxSchnell", {"guidance_embed": False}),
    "flux_fill": flux("FluxInpaint", {"in_channels": 96}),
    "ovis_image": flux(
        "FluxSchnell",
        WITHOUT_VECTOR
        | {"yak_mlp": True, "txt_norm": True, "depth": 6, "depth_single_blocks": 27, "context_in_dim": 2048},
        SMALL | {"vec_in_dim": None},
        ovis_names,
        since=(0, 8),
    ),
    "longcat_image": flux(
        "LongCatImage",
        WITHOUT_VECTOR | {"depth": 10, "depth_single_blocks": 20, "context_in_dim": 3584},
        SMALL | {"vec_in_dim": None, "context_in_dim": 3584},
        str,
    ),
    "flux2_dev": Family("Flux2", FLUX2, SMALL, flux_inputs, norms_as_scale),
    "flux2_klein_4b": Family("Flux2", KLEIN | KLEIN_4B, SMALL, flux_inputs, norms_as_scale),
    "flux2_klein_9b": Family("Flux2", KLEIN | KLEIN_9B, SMALL, flux_inputs, norms_as_scale),
    "chroma": Family("Chroma", CHROMA, SMALL_CHROMA, chroma_inputs, chroma_names),
    "chroma_radiance": Family("ChromaRadiance", RADIANCE, SMALL_RADIANCE, radiance_inputs, chroma_names),
    "chroma_radiance_x0": Family(
        "ChromaRadiance", RADIANCE | {"use_x0": True}, SMALL_RADIANCE, radiance_inputs, chroma_names
    ),
}
