"""Image and video transformers with a design of their own, from SD3 to those of 2026."""

import torch
from comfyui.families.family import Family, config_entry, random, text, timestep


def linear(inputs, outputs):
    return {"target": "torch.nn.Linear", "params": {"in_features": inputs, "out_features": outputs}}


SD3 = (
    {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 24, "input_size": None}
    | {"adm_in_channels": 2048, "context_embedder_config": linear(4096, 1536), "x_block_self_attn_layers": []}
    | {"num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None}
)
SD35_LARGE = SD3 | {"depth": 38, "qk_norm": "rms", "context_embedder_config": linear(4096, 2432)}
SD35_MEDIUM = SD3 | (
    {"qk_norm": "rms", "num_patches": 147456, "pos_embed_max_size": 384, "x_block_self_attn_layers": list(range(13))}
)
SMALL_SD3 = {"depth": 2, "adm_in_channels": 64, "context_embedder_config": linear(64, 128)} | {
    "num_patches": 64,
    "pos_embed_max_size": 8,
}

PIXART = ({"num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 28, "input_size": 128}) | {
    "pe_interpolation": 2
}
SMALL_PIXART = {
    "num_heads": 2,
    "depth": 2,
    "caption_channels": 64,
    "input_size": 8,
    "pe_interpolation": 1,
    "hidden_size": 144,
}
AURAFLOW = {"max_seq": 4096, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36}
SMALL_AURAFLOW = {"dim": 256, "n_heads": 2, "global_conddim": 256, "cond_seq_dim": 64, "max_seq": 64} | {
    "n_double_layers": 1,
    "n_layers": 3,
}
MOCHI = (
    {"image_model": "mochi_preview", "depth": 48, "patch_size": 2, "num_heads": 24, "in_channels": 12}
    | {"hidden_size_x": 3072, "hidden_size_y": 1536, "mlp_ratio_x": 4.0, "mlp_ratio_y": 4.0, "learn_sigma": False}
    | {"qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True}
    | {"posenc_preserve_area": True, "timestep_mlp_bias": True, "timestep_scale": 1000.0, "rope_theta": 10000.0}
    | {"use_t5": True, "t5_feat_dim": 4096, "t5_token_length": 256, "attend_to_padding": False}
)
SMALL_MOCHI = {"depth": 2, "num_heads": 1, "hidden_size_x": 128, "hidden_size_y": 64, "t5_feat_dim": 64} | {
    "mlp_ratio_x": 96.0,
    "mlp_ratio_y": 96.0,
}
"""The heights of its MLPs are fixed in the code."""
COGVIDEOX = (
    {"image_model": "cogvideox", "num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42}
    | {"in_channels": 16, "patch_size": 2, "time_embed_dim": 512, "text_embed_dim": 4096}
    | {"use_learned_positional_embeddings": False, "use_rotary_positional_embeddings": True}
)
SMALL_COGVIDEOX = {"num_attention_heads": 2, "num_layers": 2, "time_embed_dim": 64, "text_embed_dim": 64}
HIDREAM = (
    {"image_model": "hidream", "in_channels": 16, "out_channels": 16, "patch_size": 2, "attention_head_dim": 128}
    | {"num_attention_heads": 20, "num_layers": 16, "num_single_layers": 32, "axes_dims_rope": [64, 32, 32]}
    | {"num_routed_experts": 4, "num_activated_experts": 2, "max_resolution": [128, 128], "text_emb_dim": 2048}
    | {"caption_channels": [4096, 4096], "llama_layers": [*range(32), *[31] * 16]}
)
SMALL_HIDREAM = {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "caption_channels": [64, 64]} | {
    "text_emb_dim": 64,
    "llama_layers": [0, 1, 1, 1],
}
SMALL_HIDREAM_O1 = {
    "text_config_overrides": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1024},
    "vision_config_overrides": {"depth": 1, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2},
}
KANDINSKY = {"image_model": "kandinsky5", "time_dim": 512, "num_text_blocks": 2}
KANDINSKY_IMAGE = {"model_dim": 2560, "ff_dim": 10240, "visual_embed_dim": 64, "num_visual_blocks": 50} | {
    "axes_dims": (32, 48, 48),
    "rope_scale_factor": (1.0, 1.0, 1.0),
}
KANDINSKY_VIDEO = {
    "model_dim": 1792,
    "ff_dim": 7168,
    "visual_embed_dim": 132,
    "num_visual_blocks": 32,
    "axes_dims": (16, 24, 24),
}
SMALL_KANDINSKY = {"time_dim": 64, "num_visual_blocks": 2, "num_text_blocks": 1, "in_text_dim": 64}
KREA2 = (
    {"image_model": "krea2", "features": 6144, "channels": 16, "patch": 2, "layers": 28, "heads": 48, "kvheads": 12}
) | {"txtlayers": 12, "txtdim": 2560}
SMALL_KREA2 = {"features": 256, "layers": 2, "heads": 2, "kvheads": 1} | {
    "txtlayers": 2,
    "txtdim": 64,
    "txtheads": 2,
    "txtkvheads": 2,
}
SMALL_IDEOGRAM4 = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 128, "intermediate_size": 512} | {
    "adaln_dim": 64,
    "llm_features_dim": 128,
}
SMALL_ERNIE = {"hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 512, "text_in_dim": 64}
SMALL_PIXELDIT = {"hidden_size": 192, "num_groups": 3, "pixel_attn_hidden_size": 128, "pixel_num_groups": 2} | {
    "patch_depth": 2,
    "pixel_depth": 1,
    "txt_embed_dim": 64,
}
PID = ({"image_model": "pid", "lq_hidden_dim": 512, "lq_interval": 2, "lq_latent_channels": 16}) | {
    "latent_spatial_down_factor": 8
}
MINIMAX_H3 = (
    {"image_model": "minimax_h3", "num_layers": 50, "token_refiner_num_layers": 2, "hidden_size": 5376}
    | {"latents_dim": 24, "audio_latents_dim": 32, "attention_head_dim": 128, "num_attention_heads": 56}
    | {"ffn_hidden_size": 14336, "text_dim": 5120, "timestep_input_dim": 256, "time_embed_hidden_size": 5376}
    | {"time_embed_dim": 2688, "rope_inv_freq_len": 16}
)
SMALL_MINIMAX_H3 = {"num_layers": 2, "token_refiner_num_layers": 1, "hidden_size": 256, "num_attention_heads": 2} | {
    "ffn_hidden_size": 512,
    "text_dim": 64,
    "time_embed_hidden_size": 256,
    "time_embed_dim": 128,
}
SEEDVR2 = ({"image_model": "seedvr2", "vid_dim": 2560, "heads": 20, "num_layers": 32, "norm_eps": 1e-5}) | {
    "mlp_type": "swiglu",
    "vid_out_norm": True,
}

PIXEL_WIDTH = 16
"""Of PixelDiT's pixel blocks."""


def modulation_joined(tensors):
    """PixelDiT's file holds the modulation of attention and MLP as one tensor, which the loader cuts."""
    found = {}
    for name, tensor in tensors.items():
        if ".adaLN_modulation_mlp." in name:
            continue
        if ".adaLN_modulation_msa." in name:
            both = tensor, tensors[name.replace("_msa.", "_mlp.")]
            name = name.replace(".adaLN_modulation_msa.", ".adaLN_modulation.0.")
            rest = tensor.shape[1:]
            parts = [part.reshape(-1, 3, PIXEL_WIDTH, *rest) for part in both]
            tensor = torch.cat(parts, 1).reshape(-1, *rest)
        found[name] = tensor
    return found


def under_core(tensors):
    return {f"core.{name}": tensor for name, tensor in modulation_joined(tensors).items()}


def pid_arranged(tensors):
    return {name.removeprefix("core."): tensor for name, tensor in modulation_joined(tensors).items()}


def image_inputs(channels, size, width, **more):
    keywords = {"c_crossattn": text(width), **more}
    return lambda settings: (random(1, channels, size, size), timestep(), dict(keywords))


def video_inputs(frames, width=64, **more):
    keywords = {"c_crossattn": text(width), **more}
    return lambda settings: (random(1, 16, frames, 8, 8), timestep(), dict(keywords))


def cogvideox_inputs(settings):
    keywords = {"c_crossattn": text(64)}
    if settings["in_channels"] > 16:
        keywords["c_concat"] = random(1, settings["in_channels"] - 16, 2, 8, 8, seed=5)
    return random(1, 16, 2, 8, 8), timestep(), keywords


def mochi_inputs(settings):
    keywords = {"c_crossattn": text(64, 256), "attention_mask": torch.ones(1, 256), "num_tokens": 256}
    return random(1, 12, 2, 8, 8), timestep(), keywords


def hidream_o1_inputs(settings):
    keywords = {"input_ids": torch.arange(8)[None], "position_ids": torch.arange(12).expand(1, 3, 12).contiguous()}
    mask = torch.tensor([[False] * 8 + [True] * 4])
    return random(1, 3, 64, 64), timestep(), keywords | {"ar_len": 8, "vinput_mask": mask}


def minimax_h3_inputs(settings):
    return [random(1, 24, 2, 4, 4), random(1, 32, 2, 8, seed=2)], timestep(500.0), {"context": text(64)}


def seedvr2_inputs(settings):
    keywords = {"c_crossattn": text(64), "condition": random(1, 17, 1, 8, 8, seed=3)}
    return random(1, 16, 1, 8, 8), timestep(), keywords | {"transformer_options": {"cond_or_uncond": [0]}}


def sd3(real, **small):
    return Family("SD3", real, SMALL_SD3 | small, image_inputs(16, 8, 64, y=random(1, 64, seed=2)))


def auraflow(**more):
    return Family("AuraFlow", AURAFLOW, SMALL_AURAFLOW, image_inputs(4, 8, 64), **more)


def hidream_o1(**more):
    return Family("HiDreamO1", {"image_model": "hidream_o1"}, SMALL_HIDREAM_O1, hidream_o1_inputs, **more)


def minimax_h3(**more):
    return Family("MiniMaxH3", MINIMAX_H3, SMALL_MINIMAX_H3, minimax_h3_inputs, bare=True, **more)


def cogvideox(comfy_class, **changes):
    return Family(comfy_class, COGVIDEOX | changes, SMALL_COGVIDEOX, cogvideox_inputs)


FAMILIES = {
    "sd3_medium": sd3(SD3),
    "sd35_large": sd3(SD35_LARGE),
    "sd35_medium": sd3(SD35_MEDIUM, x_block_self_attn_layers=[0]),
    "pixart_alpha": Family(
        "PixArtAlpha",
        PIXART | {"image_model": "pixart_alpha", "model_max_length": 120, "micro_condition": True},
        SMALL_PIXART,
        image_inputs(4, 64, 64, c_size=torch.tensor([[512.0, 512.0]]), c_ar=torch.tensor([[1.0]])),
    ),
    "pixart_sigma": Family(
        "PixArtSigma",
        PIXART | {"image_model": "pixart_sigma", "model_max_length": 300, "micro_condition": False},
        SMALL_PIXART | {"hidden_size": 128},
        image_inputs(4, 64, 64),
    ),
    "auraflow": auraflow(),
    "auraflow_model": auraflow(prefix="model."),
    "mochi": Family("GenmoMochi", MOCHI, SMALL_MOCHI, mochi_inputs),
    "cogvideox_5b": cogvideox("CogVideoX_T2V"),
    "cogvideox_5b_i2v": cogvideox("CogVideoX_I2V", in_channels=32),
    "cogvideox_5b_inpaint": cogvideox("CogVideoX_Inpaint", in_channels=48),
    "hidream_i1": Family(
        "HiDream",
        HIDREAM,
        SMALL_HIDREAM,
        image_inputs(16, 16, 64, y=random(1, 64, seed=2), encoder_hidden_states_llama3=random(1, 2, 8, 64, seed=3)),
    ),
    "hidream_o1": hidream_o1(),
    "hidream_o1_model": hidream_o1(prefix="model."),
    "kandinsky5_image": Family(
        "Kandinsky5Image",
        KANDINSKY | KANDINSKY_IMAGE,
        SMALL_KANDINSKY | {"model_dim": 256, "ff_dim": 512},
        video_inputs(1, y=random(1, 768, seed=3)),
    ),
    "kandinsky5_video": Family(
        "Kandinsky5",
        KANDINSKY | KANDINSKY_VIDEO,
        SMALL_KANDINSKY | {"model_dim": 128, "ff_dim": 256},
        video_inputs(2, y=random(1, 768, seed=3), c_concat=random(1, 17, 2, 8, 8, seed=4)),
    ),
    "krea2": Family("Krea2", KREA2, SMALL_KREA2, image_inputs(16, 8, 2 * 64)),
    "ideogram4": Family(
        "Ideogram4",
        {"image_model": "ideogram4", "in_channels": 128, "num_layers": 34},
        SMALL_IDEOGRAM4,
        image_inputs(128, 4, 128),
    ),
    "ernie_image": Family("ErnieImage", {"image_model": "ernie"}, SMALL_ERNIE, image_inputs(128, 4, 64)),
    "pixeldit": Family(
        "PixelDiTT2I",
        {"image_model": "pixeldit_t2i"},
        SMALL_PIXELDIT,
        image_inputs(3, 32, 64),
        arrange=under_core,
        cut=True,
    ),
    "pid": Family(
        "PiD",
        PID,
        SMALL_PIXELDIT | {"lq_hidden_dim": 64, "lq_num_res_blocks": 1},
        image_inputs(3, 64, 64, lq_latent=random(1, 16, 2, 2, seed=4), degrade_sigma=timestep(0.1)),
        arrange=pid_arranged,
        cut=True,
    ),
    "minimax_h3": minimax_h3(),
    "minimax_h3_settings": minimax_h3(metadata=config_entry(sigma_shift_video=7.0, norm_eps=1e-2, final_norm_eps=1e-2)),
    "seedvr2_3b": Family("SeedVR2", SEEDVR2, {"vid_dim": 128, "heads": 1, "txt_in_dim": 64}, seedvr2_inputs),
}
