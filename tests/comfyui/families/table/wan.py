"""Wan 2.1 and 2.2 in all their kinds."""

import re

import torch
from comfyui.families.family import Family, config_entry, random, text, timestep

WAN = (
    {"image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "in_dim": 16, "out_dim": 16, "num_heads": 40}
    | {"ffn_dim": 13824, "num_layers": 40, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1)}
    | {"qk_norm": True, "cross_attn_norm": True, "eps": 1e-6}
)
SMALL = {"dim": 128, "num_heads": 1, "ffn_dim": 256, "num_layers": 2}
WAN_1_3B = {"dim": 1536, "num_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_5B = {"dim": 3072, "num_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_dim": 48, "out_dim": 48}


def wan_inputs(beside=0, channels=16, **more):
    """beside: channels that are joined to the latent."""

    def inputs(settings):
        keywords = {"c_crossattn": text(4096), **more}
        if beside:
            keywords["c_concat"] = random(1, beside, 2, 8, 8, seed=5)
        return random(1, channels, 2, 8, 8), timestep(), keywords

    return inputs


def image_features(images=1):
    return random(1, 257 * images, 1280, seed=7)


def music_encoder_joined(tensors):
    """WanDancer's file holds the query, key and value projections of its music encoder as one tensor."""
    found = {}
    for name, tensor in tensors.items():
        match = re.match(r"(.*music_encoder.*self_attn)\.q_proj\.(weight|bias)$", name)
        if match:
            owner, kind = match.groups()
            found[f"{owner}.in_proj_{kind}"] = torch.cat([tensors[f"{owner}.{part}_proj.{kind}"] for part in "qkv"])
        elif not re.match(r".*music_encoder.*self_attn\.[kv]_proj", name):
            found[name] = tensor
    return found


def wan(comfy_class, changes, inputs, small=SMALL, **more):
    return Family(comfy_class, WAN | changes, small, inputs, **more)


def chosen_by_metadata(comfy_class, settings, inputs, changes=()):
    return wan(comfy_class, settings | dict(changes), inputs, metadata=config_entry(**settings))


CLIP = {"clip_fea": image_features()}
CAMERA = {"camera_conditions": random(1, 24, 2, 64, 64, seed=8)}
SCAIL = CLIP | {
    "reference_latent": random(1, 20, 1, 8, 8, seed=4),
    "pose_latents": random(1, 20, 2, 4, 4, seed=6),
    "c_concat": random(1, 4, 2, 8, 8, seed=5),
}

FAMILIES = {
    "wan21_t2v_14b": wan("WAN21_T2V", {}, wan_inputs()),
    "wan21_t2v_1.3b": wan("WAN21_T2V", WAN_1_3B, wan_inputs()),
    "wan21_i2v_14b": wan("WAN21_I2V", {"in_dim": 36, "model_type": "i2v"}, wan_inputs(20, **CLIP)),
    "wan21_flf2v_14b": wan(
        "WAN21_I2V",
        {"in_dim": 36, "model_type": "i2v", "flf_pos_embed_token_number": 514},
        wan_inputs(20, clip_fea=image_features(2)),
    ),
    "wan22_i2v_14b": wan("WAN21_T2V", {"in_dim": 36}, wan_inputs(20)),
    "wan22_ti2v_5b": wan("WAN22_T2V", WAN_5B, wan_inputs(channels=48)),
    "wan21_fun_control": wan(
        "WAN21_FunControl2V",
        {"in_dim": 48, "model_type": "i2v", "in_dim_ref_conv": 16},
        wan_inputs(32, **CLIP),
    ),
    "wan21_vace_14b": wan(
        "WAN21_Vace",
        {"model_type": "vace", "vace_layers": 8, "vace_in_dim": 96},
        wan_inputs(vace_context=random(1, 1, 96, 2, 8, 8, seed=8), vace_strength=[1.0]),
        SMALL | {"vace_layers": 1},
    ),
    "wan21_camera": wan("WAN21_Camera", {"model_type": "camera", "in_dim": 32}, wan_inputs(16, **CLIP, **CAMERA)),
    "wan22_camera": wan("WAN22_Camera", {"model_type": "camera_2.2", "in_dim": 36}, wan_inputs(20, **CAMERA)),
    "wan22_s2v": wan("WAN22_S2V", {"model_type": "s2v"}, wan_inputs(audio_embed=random(1, 25, 1024, 5, seed=8))),
    "wan21_humo": wan(
        "WAN21_HuMo",
        {"model_type": "humo", "in_dim": 36},
        wan_inputs(20, audio_embed=random(1, 2, 8, 5, 1280, seed=8)),
        fixed={"comfy.ldm.wan.model.AudioProjModel": {"intermediate_dim": 64}},
    ),
    "wan22_animate": wan(
        "WAN22_Animate",
        {"model_type": "animate", "in_dim": 36},
        wan_inputs(20, **CLIP),  # the face encoder takes 512 x 512 pixels: its weights are compared, it does not run
        SMALL | {"num_layers": 5},
    ),
    "wan_animate2": chosen_by_metadata(
        "WAN_Animate2", {"model_type": "animate2"}, wan_inputs(20, **CLIP), changes={"in_dim": 36}
    ),
    "wan21_flow_rvs": chosen_by_metadata("WAN21_FlowRVS", {"model_type": "flow_rvs"}, wan_inputs()),
    "wan21_causal_ar": chosen_by_metadata("WAN21_CausalAR_T2V", {"causal_ar": True}, wan_inputs()),
    "wan21_scail": wan("WAN21_SCAIL", {"model_type": "scail", "in_dim": 20}, wan_inputs(**SCAIL)),
    "wan21_scail2": wan("WAN21_SCAIL2", {"model_type": "scail2", "in_dim": 20}, wan_inputs(**SCAIL)),
    "wan22_wandancer": wan(
        "WAN22_WanDancer",
        {"model_type": "wandancer", "in_dim": 36},
        wan_inputs(20, **CLIP, clip_fea_ref=image_features(), audio_embed=random(1, 20, 35, seed=8)),
        SMALL | {"audio_inject_layers": [0]},
        arrange=music_encoder_joined,
        cut=True,
    ),
}
