"""LTX-Video, and LTX-2 with sound."""

import torch
from comfyui.families.family import Family, config_entry, random, text, timestep

LTXV = {"image_model": "ltxv", "use_keyframes_abs_pos_embedding": False}
LTXV_2B = LTXV | {"num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048}
LTXV_13B = (
    {"num_layers": 48, "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096}
    | {"caption_channels": 4096, "causal_temporal_positioning": True, "timestep_scale_multiplier": 1000}
    | {"positional_embedding_max_pos": [20, 2048, 2048]}
)
LTX2 = LTXV | {"image_model": "ltxav", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
LTX23 = {"apply_gated_attention": True, "caption_proj_before_connector": True, "cross_attention_adaln": True}

SMALL_2B = {"num_layers": 6, "attention_head_dim": 8, "cross_attention_dim": 256}
SMALL_13B = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256} | {
    "caption_channels": 64,
    "causal_temporal_positioning": True,
}
SMALL_LTX2 = (
    {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256}
    | {"audio_num_attention_heads": 4, "audio_attention_head_dim": 32, "audio_cross_attention_dim": 128}
    | {"caption_channels": 64, "connector_num_attention_heads": 1, "connector_attention_head_dim": 64}
)


def video_inputs(width):
    keywords = {"c_crossattn": text(width), "attention_mask": torch.ones(1, 8, dtype=torch.int64), "frame_rate": 25}
    return lambda settings: (random(1, 128, 2, 4, 4), timestep(), dict(keywords))


def sound_inputs(width):
    keywords = {"context": text(width), "attention_mask": None, "frame_rate": 25}
    latents = [random(1, 128, 2, 4, 4), random(1, 8, 3, 16, seed=2)]
    return lambda settings: (list(latents), timestep(), dict(keywords))


FAMILIES = {
    "ltxv_2b": Family("LTXV", LTXV_2B, SMALL_2B, video_inputs(4096)),
    "ltxv_13b": Family("LTXV", LTXV | LTXV_13B, SMALL_13B, video_inputs(64), metadata=config_entry(**SMALL_13B)),
    "ltx2_19b": Family("LTXAV", LTX2, SMALL_LTX2, sound_inputs(2 * 64), metadata=config_entry(**SMALL_LTX2), bare=True),
    "ltx23_22b": Family(
        "LTXAV",
        LTX2 | LTX23,
        SMALL_LTX2,
        sound_inputs(256 + 128),
        metadata=config_entry(**SMALL_LTX2, **LTX23),
        bare=True,
        since=(0, 33),
    ),
}
