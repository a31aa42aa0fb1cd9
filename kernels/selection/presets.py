"""The table of model families: the keys that identify each one, and the layers that its preset keeps in high precision.

PRESETS.md states the principle, and what each preset costs. Families that share a network share a row.

Source of the key names: ComfyUI's own detection (comfy/model_detection.py and comfy/sd.py, 0.3.75 to 0.33.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .patterns import Pattern, PatternSet

DIFFUSION, TEXT_ENCODER, NEVER_QUANTIZED = "diffusion model", "text encoder", "never quantized"
"""Kinds of networks."""


@dataclass(frozen=True)
class Preset:
    """One row: a network, and the families of models that are built from it."""

    title: str
    kind: str
    """DIFFUSION, TEXT_ENCODER or NEVER_QUANTIZED."""
    keep: tuple[str, ...] = ()
    """Patterns of layers that stay in high precision; see patterns.py."""
    detect: tuple[Mapping[str, int | None], ...] = ()
    """Alternatives. Each is a set of keys that must all be present: key -> its first dimension, None for any."""
    reason: str = ""
    """Why these layers are kept and others are not; for kind NEVER_QUANTIZED, why nothing is quantized."""
    linear: tuple[str, ...] = ()
    """Patterns of Linear layers whose names are those of embeddings elsewhere; see linear.py."""
    unusable: tuple[str, ...] = ()
    """Patterns of Linear layers that a ComfyUI version cannot load or run in FP8. They are kept whatever is chosen."""
    unusable_reason: str = ""
    """Why it cannot."""
    renamed: tuple[str, ...] = ()
    """Parts of Linear names that ComfyUI 0.3.75 renames while it loads weights, but not in the header entries."""

    @cached_property
    def linear_patterns(self) -> PatternSet:
        return PatternSet(map(Pattern.parse, self.linear))

    @cached_property
    def unusable_patterns(self) -> PatternSet:
        return PatternSet(map(Pattern.parse, self.unusable))


def _any_of(*alternatives: str) -> tuple[dict[str, None], ...]:
    """Alternatives, one string each: keys that must all be present, separated by spaces."""
    return tuple(dict.fromkeys(keys.split()) for keys in alternatives)


def _diffusion(
    title: str,
    keep: str,
    *detect: str,
    reason: str,
    linear: str = "",
    unusable: tuple[str, str] = ("", ""),
    renamed: tuple[str, ...] = (),
) -> Preset:
    """A row of kind DIFFUSION. Patterns and keys are separated by spaces; see Preset. unusable: the patterns, why."""
    patterns, why = unusable
    return Preset(
        title,
        DIFFUSION,
        tuple(keep.split()),
        _any_of(*detect),
        reason,
        tuple(linear.split()),
        tuple(patterns.split()),
        why,
        renamed,
    )


_CLIP = "ComfyUI has no FP8 detection for CLIP-L, CLIP-G and CLIP-H: quantized, they would give silently wrong images"
_NO_DETECTION = "ComfyUI has no FP8 detection for this text encoder"
_CUT = "ComfyUI cuts this layer and its scale into pieces while it loads the file"
_READ = "ComfyUI 0.3.75 converts the inputs of this layer to the type of its weight"

PRESETS = {
    "flux": _diffusion(
        "Flux, Flux.2",
        "img_in txt_in time_in vector_in guidance_in final_layer *stream_modulation*",
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale img_in.weight time_in.in_layer.weight",
        "double_blocks.0.img_attn.norm.key_norm.weight img_in.weight time_in.in_layer.weight",
        reason="Flux.2 computes its modulation once for all blocks, which is small and kept. Flux.1 computes it in "
        "every block, which is 27 % of the model and quantized.",
    ),
    "chroma": _diffusion(
        "Chroma, Chroma Radiance",
        "distilled_guidance_layer img_in txt_in final_layer nerf_*",
        "distilled_guidance_layer.norms.0.scale",
        "distilled_guidance_layer.norms.0.weight",
        "distilled_guidance_layer.0.norms.0.scale",
        "distilled_guidance_layer.0.norms.0.weight",
        reason="One small network makes the modulation of all blocks. The NeRF blocks of Radiance produce the pixels.",
    ),
    "qwen_image": _diffusion(
        "Qwen-Image, Mage-Flow",
        "img_in txt_in time_text_embed norm_out proj_out transformer_blocks.0.img_mod.1",
        "txt_norm.weight transformer_blocks.0.img_mod.1.weight transformer_blocks.0.attn.add_q_proj.weight",
        reason="The modulation of every block is a third of the model and quantized, except that of the first block.",
    ),
    "wan": _diffusion(
        "Wan 2.x",
        "patch_embedding text_embedding time_embedding time_projection img_emb img_emb_refimage head head_global "
        "face_adapter face_encoder audio_injector casual_audio_encoder audio_proj music_injector "
        "music_encoder music_projection",
        "head.modulation",
        reason="One layer makes the modulation of all blocks. What brings faces, sound and music into a variant is "
        "kept as well; the cross-attention to sound of HuMo is not.",
        unusable=(
            "music_encoder.*.self_attn.q_proj music_encoder.*.self_attn.k_proj music_encoder.*.self_attn.v_proj",
            _CUT,
        ),
    ),
    "lumina2": _diffusion(
        "Z-Image, Lumina 2",
        "x_embedder cap_embedder t_embedder adaLN_modulation final_layer context_refiner noise_refiner "
        "siglip_embedder siglip_refiner clip_text_pooled_proj time_text_embed dec_net",
        "cap_embedder.1.weight noise_refiner.0.attention.k_norm.weight",
        reason="The refiners prepare text, image and reference for the other blocks. The modulation of every block is "
        "2 % of Z-Image and 10 % of Lumina 2. An early choice, which stays until a measurement says otherwise.",
    ),
    "ltxv": _diffusion(
        "LTX-Video",
        "*adaln_single* *patchify_proj *proj_out *caption_projection *connector* to_gate_logits "
        "transformer_blocks.0 transformer_blocks.1 transformer_blocks.-2 transformer_blocks.-1",
        "adaln_single.emb.timestep_embedder.linear_1.bias patchify_proj.weight",
        reason="One layer each for video, sound, prompt and their exchange makes the modulation of all blocks. Keeping "
        "the first two and the last two blocks is an early choice, which stays until a measurement says otherwise.",
    ),
    "sd3": _diffusion(
        "SD3, SD3.5",
        "x_embedder y_embedder t_embedder context_embedder adaLN_modulation final_layer",
        "joint_blocks.0.context_block.attn.qkv.weight",
        reason="Keeping the modulation of every block, a third of the model, is an early choice, which stays until a "
        "measurement says otherwise.",
    ),
    "hunyuan_video": _diffusion(
        "HunyuanVideo",
        "img_in txt_in time_in vector_in guidance_in byt5_in vision_in time_r_in final_layer img_mod txt_mod "
        "modulation",
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        reason="Keeping the modulation of every block, a third of the model, is an early choice, which stays until a "
        "measurement says otherwise.",
        renamed=("_attn_qkv.", "_attn_proj.", "mlp.fc1.", "mlp.fc2.", ".modulation.linear.", "_mod.linear."),
    ),
    "hidream": _diffusion(
        "HiDream",
        "x_embedder t_embedder p_embedder caption_projection final_layer",
        "caption_projection.0.linear.weight",
        reason="Each block has its own projection of the text. The modulation of every block is 15 % of the model and "
        "quantized.",
    ),
    "sdxl": _diffusion(
        "SDXL, SD 1.x",
        "time_embed label_emb",
        "input_blocks.0.0.weight",
        reason="What enters and leaves a UNet are convolutions, which are never quantized.",
    ),
    "t5xxl": Preset(
        "T5-XXL, UMT5-XXL",
        TEXT_ENCODER,
        ("shared", "embed_tokens", "relative_attention_bias", "final_layer_norm", "lm_head"),
        (
            {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": 10240},
            {"encoder.block.23.layer.1.DenseReluDense.wi.weight": None},
        ),
        "The embeddings are never quantized; the loader reads the dtype off the last norm.",
    ),
    "llm": Preset(
        "LLM text encoders",
        TEXT_ENCODER,
        ("embed_tokens", "model.norm", "lm_head", "visual", "vision_model", "multi_modal_projector"),
        _any_of(
            "model.layers.0.self_attn.k_proj.weight model.layers.0.post_attention_layernorm.weight",
            "model.language_model.layers.0.input_layernorm.weight",
        ),
        "Keeps what reads images.",
    ),
    "clip": Preset(
        "CLIP-L, CLIP-G, CLIP-H",
        NEVER_QUANTIZED,
        detect=_any_of(
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            "transformer.resblocks.0.ln_1.weight",
            "model.transformer.resblocks.0.ln_1.weight",
            "vision_model.encoder.layers.0.mlp.fc1.weight",
        ),
        reason=_CLIP,
    ),
    "other_text_encoder": Preset(
        "T5-base, T5-XL, ByT5 and other text encoders",
        NEVER_QUANTIZED,
        detect=_any_of(
            "encoder.block.0.layer.0.SelfAttention.k.weight",
            "model.encoder.layers.0.mixer.Wqkv.weight",
            "model.encoder.layers.0.pre_self_attn_layernorm.weight",
            "layers.0.self_attn.sinks",
        ),
        reason=_NO_DETECTION,
    ),
    "vae": Preset(
        "VAE",
        NEVER_QUANTIZED,
        detect=_any_of("decoder.conv_in.weight", "decoder.conv1.weight", "taesd_decoder.1.weight"),
        reason="a VAE is never quantized",
    ),
    "unknown": _diffusion(
        "unknown",
        "*embed* *head* *modulation* *adaln* *adaLN* *_mod mod mod_* modC modX modCX modF",
        reason="A guess by names: the first and the last modules, and everything that embeds or modulates.",
    ),
    "anima": _diffusion(
        "Anima, Cosmos Predict 2",
        "t_embedder x_embedder final_layer llm_adapter",
        "blocks.0.mlp.layer1.weight x_embedder.proj.1.weight",
        reason="The adapter of Anima prepares the text. The modulation of every block is 8 to 9 % of a small model and "
        "quantized.",
    ),
    "cosmos": _diffusion(
        "Cosmos 1",
        "t_embedder x_embedder final_layer",
        "blocks.block0.blocks.0.block.attn.to_q.0.weight",
        reason="The modulation of every block is 5 % of the model and quantized.",
    ),
    "lens": _diffusion(
        "Lens",
        "img_in txt_in time_text_embed norm_out proj_out",
        "transformer_blocks.0.attn.norm_added_q.weight transformer_blocks.0.img_mlp.w1.weight",
        reason="The modulation of every block is a third of the model and quantized.",
    ),
    "krea2": _diffusion(
        "Krea 2",
        "first last tmlp tproj txtmlp txtfusion",
        "txtfusion.projector.weight",
        reason="`txtfusion` makes one text from twelve layers of the text encoder. One layer makes the modulation of "
        "all blocks.",
    ),
    "ideogram4": _diffusion(
        "Ideogram 4",
        "input_proj llm_cond_proj t_embedding adaln_proj final_layer adaln_modulation",
        "embed_image_indicator.weight llm_cond_proj.weight",
        reason="Modulation is narrow: 3 % of the model.",
    ),
    "ernie_image": _diffusion(
        "Ernie-Image",
        "x_embedder text_proj time_embedding adaLN_modulation final_norm final_linear",
        "layers.0.mlp.linear_fc2.weight text_proj.weight final_linear.weight",
        reason="One layer makes the modulation of all blocks.",
    ),
    "omnigen2": _diffusion(
        "OmniGen2, Boogu",
        "x_embedder ref_image_patch_embedder time_caption_embed context_refiner norm_out",
        "time_caption_embed.timestep_embedder.linear_1.bias",
        reason="The context refiner prepares the text; those of the images are blocks like all others. The modulation "
        "of every block is 10 % of the model and quantized.",
    ),
    "joyimage": _diffusion(
        "JoyImage",
        "condition_embedder proj_out",
        "double_blocks.0.attn.img_attn_qkv.weight condition_embedder.time_embedder.linear_1.weight",
        reason="One layer makes the modulation of all blocks.",
    ),
    "hidream_o1": _diffusion(
        "HiDream-O1",
        "t_embedder1 x_embedder final_layer2 visual",
        "t_embedder1.mlp.0.weight x_embedder.proj1.weight",
        reason="An LLM that makes pixels. Its vision tower embeds the reference images, as in LLM text encoders.",
    ),
    "kandinsky5": _diffusion(
        "Kandinsky 5",
        "time_embeddings text_embeddings pooled_text_embeddings visual_embeddings text_transformer_blocks "
        "out_layer.modulation out_layer.out_layer",
        "visual_transformer_blocks.0.cross_attention.key_norm.weight",
        reason="Two blocks prepare the text. The modulation of every block is 10 to 13 % of the model and quantized.",
    ),
    "pixeldit": _diffusion(
        "PixelDiT, PiD",
        "pixel_embedder s_embedder t_embedder y_embedder lq_proj final_layer",
        "core.pixel_embedder.proj.weight",
        "lq_proj.latent_proj.0.weight pixel_embedder.proj.weight",
        "pixel_embedder.proj.weight patch_blocks.0.attn.qkv_x.weight",
        reason="`lq_proj` brings the picture to enlarge into PiD. The modulation of the patch blocks is 30 % of the "
        "model and quantized; that of the pixel blocks cannot be.",
        unusable=(
            "pixel_blocks.*.adaLN_modulation.0 pixel_blocks.*.adaLN_modulation_msa pixel_blocks.*.adaLN_modulation_mlp",
            _CUT,
        ),
    ),
    "minimax_h3": _diffusion(
        "MiniMax H3",
        "video_patch_proj audio_patch_proj condition_proj time_embedder token_refiner final_layer",
        "video_patch_proj.weight audio_patch_proj.weight",
        reason="The token refiner prepares the text. The modulation of every block is 39 % of the model and quantized.",
    ),
    "seedvr2": _diffusion(
        "SeedVR2",
        "vid_in txt_in emb_in vid_out",
        "vid_in.proj.weight emb_in.proj_hid.weight",
        reason="One layer makes the modulation of all blocks.",
    ),
    "auraflow": _diffusion(
        "AuraFlow",
        "init_x_linear cond_seq_linear t_embedder modF final_linear",
        "double_layers.0.attn.w1q.weight",
        reason="The modulation of every block is a third of the model and quantized.",
    ),
    "pixart": _diffusion(
        "PixArt",
        "x_embedder y_embedder t_embedder csize_embedder ar_embedder t_block final_layer",
        "t_block.1.weight y_embedder.y_proj.fc1.weight",
        reason="One layer makes the modulation of all blocks.",
    ),
    "hunyuan_dit": _diffusion(
        "HunyuanDiT",
        "x_embedder t_embedder mlp_t5 pooler extra_embedder final_layer",
        "mlp_t5.0.weight",
        reason="The modulation of every block is 5 % of the model and quantized.",
    ),
    "mochi": _diffusion(
        "Mochi",
        "x_embedder t_embedder t5_y_embedder t5_yproj final_layer",
        "t5_yproj.weight",
        reason="The modulation of every block is 27 % of the model and quantized.",
    ),
    "cogvideox": _diffusion(
        "CogVideoX",
        "patch_embed time_embedding_linear_* ofs_embedding_linear_* norm_out proj_out",
        "blocks.0.norm1.linear.weight patch_embed.text_proj.weight",
        reason="The modulation of every block is 14 % of the model and quantized.",
    ),
    "hunyuan3d": _diffusion(
        "Hunyuan3D 2",
        "latent_in cond_in time_in guidance_in final_layer",
        "latent_in.weight cond_in.weight",
        reason="The modulation of every block is 27 % of the model and quantized, as in Flux.",
    ),
    "hunyuan3d_21": _diffusion(
        "Hunyuan3D 2.1",
        "t_embedder final_layer",
        "x_embedder.weight t_embedder.mlp.2.weight blocks.0.attn1.k_norm.weight",
        reason="It has no modulation.",
        unusable=("x_embedder t_embedder.mlp.0 attn2.to_k", _READ),
    ),
    "triposplat": _diffusion(
        "TripoSplat",
        "t_embedder adaLN_modulation input_layer cond_embedder cond_embedder2 cam_refiner *repo_layers out_layer "
        "cam_out_layer",
        "cam_out_layer.weight repo_layers.0.final_map.weight",
        reason="The repo layers compute positions. One layer makes the modulation of all blocks.",
    ),
    "stable_cascade": _diffusion(
        "Stable Cascade",
        "clip_mapper clip_txt_mapper clip_txt_pooled_mapper clip_img_mapper mapper mapper_sca mapper_crp",
        "clf.1.weight clip_txt_mapper.weight",
        "clf.1.weight clip_mapper.weight",
        reason="The mappers embed text, images and time.",
    ),
    "stable_audio": _diffusion(
        "Stable Audio",
        "to_timestep_embed to_cond_embed to_global_embed to_prepend_embed global_cond_embedder project_in project_out",
        "transformer.project_in.weight to_timestep_embed.0.weight to_cond_embed.0.weight",
        reason="Stable Audio 3 computes its modulation once for all blocks.",
    ),
    "ace_step": _diffusion(
        "ACE-Step 1",
        "timestep_embedder t_block speaker_embedder genre_embedder lyric_encoder lyric_proj final_layer",
        "genre_embedder.weight speaker_embedder.weight",
        reason="One layer makes the modulation of all blocks. The lyric encoder prepares the text.",
    ),
    "ace_step_15": _diffusion(
        "ACE-Step 1.5",
        "time_embed time_embed_r condition_embedder text_projector embed_tokens audio_acoustic_proj quantizer "
        "detokenizer.proj_out",
        "encoder.lyric_encoder.layers.0.input_layernorm.weight decoder.layers.0.self_attn_norm.weight",
        reason="The encoders of lyrics and timbre are a quarter of the model, so only what enters them is kept.",
        linear="embed_tokens",
    ),
    "minimax_music3": _diffusion(
        "MiniMax Music 3",
        "to_timestep_embed project_in project_out",
        "latent_conditioners.0.weight diffusion_transformer.transformer.layers.0.self_attn.to_qkv.weight",
        reason="It has no modulation.",
    ),
}
"""family -> Preset."""

FAMILIES = tuple(family for family, preset in PRESETS.items() if preset.kind != NEVER_QUANTIZED)
"""Families that can be quantized."""
