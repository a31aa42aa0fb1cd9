"""Sound, Stable Cascade and 3D."""

import torch
from comfyui.families.family import Family, random, text, timestep

ACE1 = (
    {"audio_model": "ace", "in_channels": 8, "out_channels": 8, "inner_dim": 2560, "num_layers": 24}
    | {"attention_head_dim": 128, "num_attention_heads": 20, "mlp_ratio": 2.5, "patch_size": [16, 1]}
    | {"max_height": 16, "max_width": 32768, "max_position": 32768, "rope_theta": 1e6}
    | {"text_embedding_dim": 768, "speaker_embedding_dim": 512, "ssl_names": ["mert", "m-hubert"]}
    | {"ssl_encoder_depths": [8, 8], "ssl_latent_dims": [1024, 768]}
    | {"lyric_encoder_vocab_size": 6693, "lyric_hidden_size": 1024}
)
SMALL_ACE1 = {"inner_dim": 256, "num_attention_heads": 2, "num_layers": 2, "text_embedding_dim": 64} | {
    "lyric_encoder_vocab_size": 64
}
ACE15 = {
    "audio_model": "ace1.5",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_heads": 16,
    "num_dit_layers": 24,
} | {"encoder_hidden_size": 2048, "encoder_intermediate_size": 6144, "encoder_num_heads": 16}
SMALL_ACE15 = (
    {"hidden_size": 256, "intermediate_size": 512, "num_heads": 2, "num_kv_heads": 1, "num_dit_layers": 2}
    | {"encoder_hidden_size": 256, "encoder_intermediate_size": 512, "encoder_num_heads": 2, "fsq_dim": 256}
    | {"text_hidden_dim": 64, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1}
)
STABLE_AUDIO = {"audio_model": "dit1.0", "io_channels": 64, "embed_dim": 1536, "depth": 24, "global_cond_dim": 1536} | {
    "project_cond_tokens": False,
    "timestep_features_type": "learned",
    "input_concat_dim": 0,
}
SMALL_STABLE_AUDIO = {"global_cond_dim": 64, "embed_dim": 256, "depth": 2, "num_heads": 4, "cond_token_dim": 64}
SECONDS = {
    f"conditioner.conditioners.seconds_{end}.embedder.embedding.{name}": shape
    for end in ("start", "total")
    for name, shape in {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}.items()
}
"""Beside the network of Stable Audio: the embedders of start and length."""

CASCADE_C = {"stable_cascade_stage": "c", "c_cond": 2048}
SMALL_CASCADE_C = {"c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]]} | {
    "c_clip_text": 64,
    "c_clip_text_pooled": 64,
    "c_clip_img": 64,
}
CASCADE_B = {"stable_cascade_stage": "b", "c_hidden": [320, 640, 1280, 1280], "nhead": [-1, -1, 20, 20]} | {
    "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]],
    "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
}
SMALL_CASCADE_B = {"c_hidden": [32, 64, 64, 64], "nhead": [-1, -1, 2, 2], "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]]} | {
    "c_cond": 64,
    "c_clip": 64,
}
SMALL_TRIPOSPLAT = {
    "model_channels": 128,
    "cond_channels": 64,
    "num_blocks": 1,
    "num_refiner_blocks": 1,
    "q_token_length": 16,
}


def inputs(*shape, **keywords):
    return lambda settings: (random(1, *shape), timestep(), dict(keywords))


FAMILIES = {
    "ace_step_1": Family(
        "ACEStep",
        ACE1,
        SMALL_ACE1,
        inputs(
            8,
            16,
            16,
            c_crossattn=text(64),
            lyric_token_idx=torch.ones(1, 6, dtype=torch.long),
            speaker_embeds=random(1, 512),
            lyrics_strength=1.0,
        ),
        fixed={"comfy.ldm.ace.model.LyricEncoder": {"num_blocks": 1, "linear_units": 128}},
    ),
    "ace_step_15": Family(
        "ACEStep15",
        ACE15,
        SMALL_ACE15,
        inputs(64, 16, c_crossattn=text(64), lyric_embed=text(64, 6, 5), refer_audio=random(1, 64, 16, seed=6)),
        real_device="cpu",  # its constructor reads values
    ),
    "stable_audio_1": Family(
        "StableAudio",
        STABLE_AUDIO,
        SMALL_STABLE_AUDIO,
        inputs(64, 16, c_crossattn=text(64), global_embed=random(1, 64, seed=3)),
        beside=SECONDS,
    ),
    "cascade_c": Family(
        "Stable_Cascade_C",
        CASCADE_C,
        SMALL_CASCADE_C,
        inputs(
            16,
            8,
            8,
            clip_text=text(64),
            clip_text_pooled=random(1, 1, 64, seed=2),
            clip_img=random(1, 1, 64, seed=3),
        ),
    ),
    "cascade_b": Family(
        "Stable_Cascade_B",
        CASCADE_B,
        SMALL_CASCADE_B,
        inputs(4, 16, 16, effnet=random(1, 16, 8, 8, seed=2), clip=random(1, 1, 64, seed=3)),
    ),
    "triposplat": Family(
        "TripoSplat",
        {"image_model": "triposplat"},
        SMALL_TRIPOSPLAT,
        lambda settings: ([random(1, 16, 16), random(1, 1, 5, seed=2)], timestep(), {"context": text(64)}),
        bare=True,
    ),
}
