"""HunyuanVideo, HunyuanImage, Hunyuan-DiT and Hunyuan3D."""

import re

import torch
from comfyui.families.family import Family, random, text, timestep
from comfyui.families.table.flux import norms_as_scale

HUNYUAN = (
    {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2]}
    | {"hidden_size": 3072, "num_heads": 24, "depth": 20, "depth_single_blocks": 40, "mlp_ratio": 4.0}
    | {"axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "context_in_dim": 4096, "vec_in_dim": 768}
    | {"guidance_embed": True, "byt5": False, "meanflow": False, "meanflow_sum": False}
    | {"use_cond_type_embedding": False, "vision_in_dim": None}
)
HUNYUAN15 = HUNYUAN | (
    {"in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "hidden_size": 2048, "num_heads": 16}
    | {"depth": 54, "depth_single_blocks": 0, "context_in_dim": 3584, "vec_in_dim": None, "guidance_embed": False}
    | {"byt5": True, "meanflow_sum": True, "use_cond_type_embedding": True, "vision_in_dim": 1152}
)
IMAGE21 = HUNYUAN | (
    {"in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "hidden_size": 3584, "num_heads": 28}
    | {"axes_dim": [64, 64], "context_in_dim": 3584, "vec_in_dim": None, "byt5": True, "guidance_embed": False}
)
REFINER = HUNYUAN | (
    {"in_channels": 128, "out_channels": 64, "patch_size": [1, 1, 1], "hidden_size": 3328, "num_heads": 26}
    | {"depth": 10, "depth_single_blocks": 20, "context_in_dim": 3584, "vec_in_dim": None}
)
SMALL = {"hidden_size": 128, "num_heads": 1, "context_in_dim": 64, "depth": 2, "depth_single_blocks": 2}
SMALL15 = SMALL | {"depth_single_blocks": 0}

HUNYUAN3D = {
    "image_model": "hunyuan3d2",
    "in_channels": 64,
    "context_in_dim": 1536,
    "hidden_size": 1024,
    "num_heads": 16,
} | {"mlp_ratio": 4.0, "depth": 16, "depth_single_blocks": 32, "qkv_bias": True, "guidance_embed": False}
HUNYUAN3D_21 = {
    "image_model": "hunyuan3d2_1",
    "in_channels": 64,
    "context_dim": 1024,
    "hidden_size": 2048,
    "num_heads": 16,
} | {"mlp_ratio": 4.0, "depth": 21, "qkv_bias": False, "guidance_cond_proj_dim": None}
DIT = {"image_model": "hydit", "depth": 40, "hidden_size": 1408}
SMALL_DIT = {"depth": 4, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 4.0} | {
    "text_states_dim": 64,
    "text_states_dim_t5": 64,
}

BYT5 = {"txt_byt5": random(1, 6, 1472, seed=3)}
VISION = {"clip_fea": random(1, 9, 1152, seed=4)}


def video_inputs(channels=16, **more):
    """A latent of two frames; what the network takes beyond its channels is joined to it."""

    def inputs(settings):
        mask = None if settings["byt5"] else torch.ones(1, 8, dtype=torch.int64)
        keywords = {"c_crossattn": text(settings["context_in_dim"]), "guidance": timestep(6.0), "attention_mask": mask}
        if settings.get("vec_in_dim"):
            keywords["y"] = random(1, settings["vec_in_dim"], seed=2)
        if settings["in_channels"] > channels:
            keywords["c_concat"] = random(1, settings["in_channels"] - channels, 2, 8, 8, seed=5)
        return random(1, channels, 2, 8, 8), timestep(), keywords | more

    return inputs


def image_inputs(**more):
    keywords = {"c_crossattn": text(64), "guidance": timestep(6.0), "attention_mask": None, **BYT5, **more}
    return lambda settings: (random(1, 64, 8, 8), timestep(), dict(keywords))


def shape_inputs(width):
    return lambda settings: (random(1, 64, 16), timestep(), {"c_crossattn": text(width)})


def pair_inputs(settings):
    """Hunyuan3D 2.1 takes the prompt with and without its condition at once."""
    return random(2, 64, 16), timestep(batch=2), {"c_crossattn": random(2, 8, 1024, seed=1)}


def dit_inputs(settings):
    keywords = {"c_crossattn": text(64, 77), "text_embedding_mask": torch.ones(1, 77)}
    keywords |= {"encoder_hidden_states_t5": random(1, 256, 64, seed=3), "text_embedding_mask_t5": torch.ones(1, 256)}
    if settings.get("size_cond"):
        keywords |= {"image_meta_size": random(1, 6, seed=5), "style": torch.zeros(1, dtype=torch.long)}
    return random(1, 4, 8, 8), timestep(), keywords


_TENCENT = {
    r"": {
        "txt_in.t_embedder.in_layer.": "txt_in.t_embedder.mlp.0.",
        "txt_in.t_embedder.out_layer.": "txt_in.t_embedder.mlp.2.",
        "txt_in.c_embedder.in_layer.": "txt_in.c_embedder.linear_1.",
        "txt_in.c_embedder.out_layer.": "txt_in.c_embedder.linear_2.",
    },
    r"(time|guidance|time_r)_in\.": {"_in.in_layer.": "_in.mlp.0.", "_in.out_layer.": "_in.mlp.2."},
    r".*individual_token_refiner": {
        ".self_attn.qkv.": ".self_attn_qkv.",
        ".self_attn.proj.": ".self_attn_proj.",
        ".mlp.0.": ".mlp.fc1.",
        ".mlp.2.": ".mlp.fc2.",
    },
    r"double_blocks": {
        "_mod.lin.": "_mod.linear.",
        "_attn.qkv.": "_attn_qkv.",
        "_attn.proj.": "_attn_proj.",
        "_attn.norm.query_norm.scale": "_attn_q_norm.weight",
        "_attn.norm.key_norm.scale": "_attn_k_norm.weight",
        "_mlp.0.": "_mlp.fc1.",
        "_mlp.2.": "_mlp.fc2.",
    },
    r"single_blocks": {
        ".modulation.lin.": ".modulation.linear.",
        ".norm.query_norm.scale": ".q_norm.weight",
        ".norm.key_norm.scale": ".k_norm.weight",
    },
}
"""Start of a name -> parts of it in ComfyUI -> parts in Tencent's own files."""


def tencent_names(name):
    name = norms_as_scale(name)
    for start, parts in _TENCENT.items():
        if re.match(start, name):
            for ours, theirs in parts.items():
                name = name.replace(ours, theirs)
    return name


def hunyuan(comfy_class, real, inputs, small=SMALL, publish=norms_as_scale, **more):
    return Family(comfy_class, real, small, inputs, publish, **more)


SIGMAS = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}

FAMILIES = {
    "hunyuan_video": hunyuan("HunyuanVideo", HUNYUAN, video_inputs()),
    "hunyuan_video_all_in_one": hunyuan("HunyuanVideo", HUNYUAN, video_inputs(), prefix="model.model."),
    "hunyuan_video_i2v": hunyuan("HunyuanVideoI2V", HUNYUAN | {"in_channels": 33}, video_inputs()),
    "skyreels_i2v": hunyuan("HunyuanVideoSkyreelsI2V", HUNYUAN | {"in_channels": 32}, video_inputs()),
    "hunyuan_video_tencent": hunyuan("HunyuanVideo", HUNYUAN, video_inputs(), publish=tencent_names, cut=True),
    "hunyuan_video_15": hunyuan("HunyuanVideo15", HUNYUAN15, video_inputs(32, **BYT5, **VISION), SMALL15),
    "hunyuan_video_15_sr": hunyuan(
        "HunyuanVideo15_SR_Distilled",
        HUNYUAN15 | {"in_channels": 98},
        video_inputs(32, **BYT5, **VISION),
        SMALL15,
    ),
    "hunyuan_video_15_tencent": hunyuan(
        "HunyuanVideo15", HUNYUAN15, video_inputs(32, **BYT5, **VISION), SMALL15, tencent_names, cut=True
    ),
    "hunyuan_image_21": hunyuan("HunyuanImage21", IMAGE21, image_inputs()),
    "hunyuan_image_21_distilled": hunyuan(
        "HunyuanImage21",
        IMAGE21 | {"meanflow": True, "guidance_embed": True},
        image_inputs(transformer_options=SIGMAS),
    ),
    "hunyuan_image_21_refiner": hunyuan("HunyuanImage21Refiner", REFINER, video_inputs(64)),
    "hunyuan_dit_12": Family("HunyuanDiT", DIT | {"mlp_ratio": 4.3637}, SMALL_DIT, dit_inputs),
    "hunyuan_dit_1": Family(
        "HunyuanDiT1",
        DIT | {"mlp_ratio": 4.3637, "size_cond": True, "use_style_cond": True},
        SMALL_DIT,
        dit_inputs,
    ),
    "hunyuan3d_2": Family(
        "Hunyuan3Dv2",
        HUNYUAN3D,
        {"hidden_size": 128, "context_in_dim": 64, "depth": 2, "depth_single_blocks": 2},
        shape_inputs(64),
        norms_as_scale,
    ),
    "hunyuan3d_2_mini": Family(
        "Hunyuan3Dv2mini",
        HUNYUAN3D | {"depth": 8, "depth_single_blocks": 16},
        {"hidden_size": 128, "context_in_dim": 64, "depth_single_blocks": 2},
        shape_inputs(64),
        norms_as_scale,
    ),
    "hunyuan3d_21": Family("Hunyuan3Dv2_1", HUNYUAN3D_21, {"hidden_size": 128, "depth": 7}, pair_inputs),
}
