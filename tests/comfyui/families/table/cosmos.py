"""NVIDIA Cosmos 1 and Predict 2, and Anima, which is built like the latter."""

from comfyui.families.family import Family, random, text, timestep

COSMOS = (
    {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16}
    | {"patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "num_blocks": 28}
    | {"pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 256}
)
COSMOS1 = COSMOS | (
    {"image_model": "cosmos", "model_channels": 4096, "num_heads": 32, "pos_emb_learnable": False}
    | {"block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True}
    | {"extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"}
    | {"rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 2.0}
)
PREDICT2 = COSMOS | (
    {"image_model": "cosmos_predict2", "model_channels": 2048, "num_heads": 16, "crossattn_emb_channels": 1024}
    | {"pos_emb_learnable": True, "extra_per_block_abs_pos_emb": False, "min_fps": 1, "max_fps": 30}
    | {"rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0}
    | {"extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0}
    | {"rope_enable_fps_modulation": False}
)
PREDICT2_14B = {"model_channels": 5120, "num_heads": 40, "num_blocks": 36}
ANIMA = PREDICT2 | {"image_model": "anima"}
SMALL = {"model_channels": 128, "num_heads": 1, "num_blocks": 2, "adaln_lora_dim": 32}


def inputs(frames=1, **more):
    def inputs(settings):
        keywords = {"c_crossattn": text(1024), **more}
        if settings["in_channels"] > 16:
            keywords["c_concat"] = random(1, settings["in_channels"] - 16, frames, 8, 8, seed=5)
        return random(1, 16, frames, 8, 8), timestep(), keywords

    return inputs


FAMILIES = {
    "cosmos1_7b": Family("CosmosT2V", COSMOS1, SMALL, inputs(2, fps=24)),
    "cosmos1_7b_i2v": Family("CosmosI2V", COSMOS1 | {"in_channels": 17}, SMALL, inputs(2, fps=24)),
    "cosmos_predict2_2b": Family("CosmosT2IPredict2", PREDICT2, SMALL, inputs()),
    "cosmos_predict2_2b_net": Family("CosmosT2IPredict2", PREDICT2, SMALL, inputs(), prefix="net."),
    "cosmos_predict2_14b": Family("CosmosT2IPredict2", PREDICT2 | PREDICT2_14B, SMALL, inputs()),
    "cosmos_predict2_i2v": Family("CosmosI2VPredict2", PREDICT2 | {"in_channels": 17}, SMALL, inputs(2)),
    "anima": Family("Anima", ANIMA, SMALL, inputs()),
    "anima_net": Family("Anima", ANIMA, SMALL, inputs(), prefix="net."),
}
