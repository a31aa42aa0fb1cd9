"""The UNets: SD 1.x and 2.x, SDXL and its offspring, Stable Video Diffusion."""

import torch
from comfyui.families.family import Family, random, text, timestep

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
} | {"use_temporal_attention": False, "use_temporal_resblock": False, "use_checkpoint": False, "legacy": False}
SD15 = UNET | (
    {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]}
    | {"transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]}
    | {"use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8, "num_head_channels": -1}
    | {"adm_in_channels": None}
)
SD21 = SD15 | {"use_linear_in_transformer": True, "context_dim": 1024, "num_heads": -1, "num_head_channels": 64}
UPSCALER = SD21 | (
    {"model_channels": 256, "in_channels": 7, "channel_mult": [1, 2, 2, 4], "num_heads": 8, "num_head_channels": -1}
    | {"transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1]}
    | {"transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]}
    | {"disable_self_attentions": [True, True, True, False], "num_classes": 1000}
)
LABELLED = {"num_classes": "sequential"}
SDXL = (
    UNET
    | LABELLED
    | {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10]}
    | {"transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    | {"use_linear_in_transformer": True, "context_dim": 2048, "num_heads": -1, "num_head_channels": 64}
    | {"adm_in_channels": 2816}
)
REFINER = SDXL | (
    {"model_channels": 384, "context_dim": 1280, "adm_in_channels": 2560}
    | {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0]}
    | {"transformer_depth_middle": 4, "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0]}
)
KOALA = {"num_res_blocks": [1, 1, 1]}
SVD = (
    SD21
    | LABELLED
    | {"in_channels": 8, "adm_in_channels": 768, "use_temporal_attention": True, "use_temporal_resblock": True}
    | {"extra_ff_mix_layer": True, "use_spatial_context": True, "disable_temporal_crossattention": False}
    | {"merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1]}
)

SMALL = {"model_channels": 32, "context_dim": 64}
DEEPER = "transformer_blocks."
SMALL_SD15 = SMALL | {"num_heads": 4}
SMALL_SD21 = SMALL | {"num_head_channels": 32}
SMALL_SDXL = SMALL_SD21 | {"adm_in_channels": 128}

PROJECTION = {"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)}
"""Beside the network of Stable Zero123."""


def inputs(settings):
    """Channels beyond those of the latent are joined to it."""
    keywords = {"c_crossattn": text(settings["context_dim"])}
    if settings.get("adm_in_channels"):
        keywords["y"] = random(1, settings["adm_in_channels"], seed=2)
    if settings["in_channels"] > 4:
        keywords["c_concat"] = random(1, settings["in_channels"] - 4, 8, 8, seed=4)
    return random(1, 4, 8, 8), timestep(1.0), keywords


def upscaler_inputs(settings):
    latent, time, keywords = inputs(settings)
    return latent, time, keywords | {"y": torch.tensor([20])}


def video_inputs(settings):
    keywords = {"c_crossattn": random(2, 1, 64, seed=1), "y": random(2, settings["adm_in_channels"], seed=2)}
    keywords |= {"c_concat": random(2, 4, 8, 8, seed=4), "image_only_indicator": torch.zeros(1, 2)}
    return random(2, 4, 8, 8), timestep(1.0, 2), keywords | {"num_video_frames": 2}


def depths(encoder, middle, decoder):
    """Attention blocks after each residual block."""
    return {
        "transformer_depth": encoder,
        "transformer_depth_middle": middle,
        "transformer_depth_output": decoder,
    }


def sd15(comfy_class, changes=None, **more):
    return Family(comfy_class, SD15 | (changes or {}), SMALL_SD15, inputs, **more)


def sd21(comfy_class, changes=None, small=SMALL_SD21, **more):
    return Family(comfy_class, SD21 | (changes or {}), small, inputs, **more)


def shallow(real):
    """At most one attention block after each residual block."""
    encoder, decoder = ([min(1, depth) for depth in real[f"transformer_depth{end}"]] for end in ("", "_output"))
    return SMALL_SDXL | depths(encoder, min(1, real["transformer_depth_middle"]), decoder)


def sdxl(comfy_class, changes=None, real=SDXL):
    real = real | (changes or {})
    return Family(comfy_class, real, shallow(real), inputs, deeper=DEEPER)


def video(comfy_class, vector, **more):
    return Family(comfy_class, SVD | {"adm_in_channels": vector}, SMALL_SDXL, video_inputs, **more)


FAMILIES = {
    "sd15": sd15("SD15"),
    "sd15_all_in_one": sd15("SD15", prefix="model.diffusion_model."),
    "sd15_inpaint": sd15("SD15", {"in_channels": 9}),
    "sd15_instructpix2pix": sd15("SD15_instructpix2pix", {"in_channels": 8}),
    "stable_zero123": sd15("Stable_Zero123", {"in_channels": 8}, beside=PROJECTION),
    "sd21": sd21("SD20"),
    "sd21_unclip_l": sd21("SD21UnclipL", LABELLED | {"adm_in_channels": 1536}, SMALL_SDXL),
    "sd21_unclip_h": sd21("SD21UnclipH", LABELLED | {"adm_in_channels": 2048}, SMALL_SDXL),
    "lotus_d": sd21("LotusD", LABELLED | {"adm_in_channels": 4}),
    "sd_x4_upscaler": Family("SD_X4Upscaler", UPSCALER, SMALL_SD15, upscaler_inputs),
    "sdxl": sdxl("SDXL"),
    "sdxl_inpaint": sdxl("SDXL", {"in_channels": 9}),
    "sdxl_instructpix2pix": sdxl("SDXL_instructpix2pix", {"in_channels": 8}),
    "sdxl_refiner": sdxl("SDXLRefiner", real=REFINER),
    "ssd1b": sdxl("SSD1B", depths([0, 0, 2, 2, 4, 4], -1, [0, 0, 0, 1, 1, 2, 10, 4, 4])),
    "segmind_vega": sdxl("Segmind_Vega", depths([0, 0, 1, 1, 2, 2], -1, [0, 0, 0, 1, 1, 1, 2, 2, 2])),
    "koala_700m": sdxl("KOALA_700M", KOALA | depths([0, 2, 5], -2, [0, 0, 2, 2, 5, 5])),
    "koala_1b": sdxl("KOALA_1B", KOALA | depths([0, 2, 6], 6, [0, 0, 2, 2, 6, 6])),
    "svd": video("SVD_img2vid", 768),
    "sv3d_u": video("SV3D_u", 256),
    "sv3d_p": video("SV3D_p", 1280),
}
