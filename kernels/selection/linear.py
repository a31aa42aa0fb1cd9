"""Which tensors of a file are the weights of Linear layers, judged by name and shape, since a file holds no modules."""

from __future__ import annotations

from ..files.header import TensorInfo
from .patterns import Pattern, PatternSet
from .presets import Preset

NOT_LINEAR_PATTERNS = (
    "shared",
    "embed_tokens*",
    "*token_embedding",
    "*token_embeddings",
    "*position_embedding",
    "*position_embeddings",
    "token_type_embeddings",
    "word_embeddings",
    "wte",
    "wpe",
    "pos_embed",
    "pos_embedding",
    "relative_attention_bias",
    "embedding_table",
    "addition_t_embedding",
    "cond_type_embedding",
    "embed_image_indicator",
    "controlnet_mode_embedder",
    "style_embedder",
    "lyric_embs",
    "trainable_cond_mask",
    "motion_encoder",
    "llm_adapter.embed",
    "ff_i.gate",
    "moe.gate",
    "timestep_features",
    "cc_projection",
    "conditioner",
)
"""2-D `.weight` tensors that are not Linear weights: embeddings, raw parameters, and what ComfyUI keeps beside the
network (`cc_projection`, `conditioner`)."""

_NOT_LINEAR = PatternSet(map(Pattern.parse, NOT_LINEAR_PATTERNS))


def is_linear(name: str, info: TensorInfo, preset: Preset | None = None) -> bool:
    """Whether a tensor of a file is the weight of a Linear layer. preset: the row of its network, if it is known."""
    if len(info.shape) != 2 or not name.endswith(".weight"):
        return False
    return not _NOT_LINEAR.matching(name) or (preset is not None and bool(preset.linear_patterns.matching(name)))
