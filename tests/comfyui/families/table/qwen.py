"""Qwen-Image and its relatives: Mage-Flow, Lens, JoyImage, Boogu, OmniGen2."""

import torch
from comfyui.families.family import Family, random, text, timestep

QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
SMALL_QWEN = {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64}

LENS = {"image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 48, "num_attention_heads": 24} | {
    "enc_hidden_dim": 2880,
    "multi_layer_encoder_feature": True,
    "selected_layer_index": (0, 1, 2, 3),
}
JOYIMAGE = (
    {"image_model": "joyimage", "in_channels": 16, "hidden_size": 4096, "patch_size": [1, 2, 2], "num_layers": 40}
) | {"num_attention_heads": 32, "text_dim": 4096}

OMNIGEN2 = (
    {"image_model": "omnigen2", "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664], "norm_eps": 1e-5}
    | {"hidden_size": 2520, "in_channels": 16, "out_channels": None, "multiple_of": 256, "ffn_dim_multiplier": None}
    | {"num_attention_heads": 21, "num_kv_heads": 7, "num_layers": 32, "num_refiner_layers": 2, "patch_size": 2}
    | {"text_feat_dim": 2048, "timestep_scale": 1000.0}
)
SMALL_OMNIGEN2 = {"hidden_size": 120, "num_attention_heads": 1, "num_kv_heads": 1, "num_layers": 2} | {
    "num_refiner_layers": 1,
    "text_feat_dim": 64,
}
BOOGU = {"image_model": "boogu", "hidden_size": 3360, "num_layers": 32, "num_double_stream_layers": 8} | {
    "num_refiner_layers": 2,
    "instruction_feat_dim": 4096,
}
SMALL_BOOGU = {"hidden_size": 120, "num_attention_heads": 1, "num_kv_heads": 1, "num_layers": 2} | {
    "num_double_stream_layers": 1,
    "num_refiner_layers": 1,
    "instruction_feat_dim": 64,
}


def qwen_inputs(frames=1, **more):
    return lambda settings: (random(1, 16, frames, 8, 8), timestep(), {"c_crossattn": text(64), **more})


def image_inputs(channels, size, width, **more):
    return lambda settings: (random(1, channels, size, size), timestep(), {"c_crossattn": text(width), **more})


FAMILIES = {
    "qwen_image": Family("QwenImage", QWEN, SMALL_QWEN, qwen_inputs()),
    "qwen_image_edit_2511": Family(
        "QwenImage",
        QWEN | {"default_ref_method": "index_timestep_zero"},
        SMALL_QWEN,
        qwen_inputs(ref_latents=[random(1, 16, 1, 8, 8, seed=9)]),
    ),
    "qwen_image_layered": Family(
        "QwenImage",
        QWEN | {"use_additional_t_cond": True, "default_ref_method": "negative_index"},
        SMALL_QWEN,
        qwen_inputs(frames=2, additional_t_cond=torch.zeros(1, dtype=torch.long)),
        since=(0, 8),
    ),
    "mage_flow": Family(
        "MageFlow",
        {"image_model": "mage_flow", "in_channels": 128, "num_layers": 12},
        SMALL_QWEN,
        image_inputs(128, 4, 64),
    ),
    "lens": Family(
        "Lens",
        LENS,
        {"num_layers": 2, "num_attention_heads": 1, "enc_hidden_dim": 64},
        image_inputs(128, 4, 4 * 64),
    ),
    "joyimage": Family(
        "JoyImage",
        JOYIMAGE,
        {"hidden_size": 128, "num_attention_heads": 1, "num_layers": 2},
        lambda settings: (random(1, 16, 1, 8, 8), timestep(), {"c_crossattn": text(4096)}),
    ),
    "omnigen2": Family("Omnigen2", OMNIGEN2, SMALL_OMNIGEN2, image_inputs(16, 8, 64, num_tokens=8)),
    "boogu": Family("Boogu", BOOGU, SMALL_BOOGU, image_inputs(16, 8, 64, num_tokens=8)),
}
