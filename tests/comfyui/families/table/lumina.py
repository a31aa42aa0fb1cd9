"""Lumina 2 and the models built like it: Z-Image, NewBie."""

from comfyui.families.family import Family, random, text, timestep

LUMINA = (
    {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 2304, "cap_feat_dim": 2304, "n_layers": 26}
    | {"n_heads": 24, "n_kv_heads": 8, "qk_norm": True, "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0}
    | {"axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512]}
)
Z_IMAGE = LUMINA | (
    {"dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "rope_theta": 256.0}
    | {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8.0 / 3.0}
    | {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
)
PIXEL = {"image_model": "zimage_pixel", "patch_size": 32, "in_channels": 3, "decoder_in_channels": 3072} | {
    "decoder_hidden_size": 3840,
    "decoder_num_res_blocks": 4,
    "decoder_max_freqs": 8,
}
SMALL_LUMINA = {"dim": 192, "cap_feat_dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
SMALL_Z_IMAGE = {"dim": 256, "cap_feat_dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2}
SMALL_PIXEL = {"decoder_hidden_size": 128, "patch_size": 8, "decoder_in_channels": 192}


def lumina_inputs(channels=16, size=8, **more):
    keywords = {"c_crossattn": text(64), "num_tokens": 8, **more}
    return lambda settings: (random(1, channels, size, size), timestep(), dict(keywords))


FAMILIES = {
    "z_image": Family("ZImage", Z_IMAGE, SMALL_Z_IMAGE, lumina_inputs()),
    "z_image_omni": Family(
        "ZImage",
        Z_IMAGE | {"siglip_feat_dim": 1152},
        SMALL_Z_IMAGE | {"siglip_feat_dim": 64},
        lumina_inputs(),
        since=(0, 8),
    ),
    "z_image_pixel": Family("ZImagePixelSpace", Z_IMAGE | PIXEL, SMALL_Z_IMAGE | SMALL_PIXEL, lumina_inputs(3, 32)),
    "lumina2": Family(
        "Lumina2",
        LUMINA,
        SMALL_LUMINA,
        lumina_inputs(),
        beside={"norm_final.weight": (192,)},
        dropped=("norm_final.weight",),
    ),
    "newbie": Family(
        "Lumina2",
        LUMINA | {"n_layers": 36, "cap_feat_dim": 2560, "clip_text_dim": 1024},
        SMALL_LUMINA | {"clip_text_dim": 64},
        lumina_inputs(clip_text_pooled=random(1, 64, seed=3)),
        since=(0, 8),
    ),
}
