"""Files that are not a model in ComfyUI's layout: diffusers models, adapters, shards, formats of other quantizers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..files.header import TensorInfo
from ..files.reader import shard
from .components import DIFFUSION_PREFIXES, WRAPPERS

_DIFFUSERS = {
    "AuraFlow": "joint_transformer_blocks.0.",
    "Flux or another double-stream model": "single_transformer_blocks.0.",
    "Z-Image or Lumina 2": "noise_refiner.0.attention.norm_k.",
    "SD3": "pos_embed.proj.weight transformer_blocks.0.attn.add_q_proj.",
    "PixArt": "pos_embed.proj.weight transformer_blocks.0.attn1.to_q.",
    "Wan": "condition_embedder.time_embedder.linear_1. blocks.0.attn1.to_q.",
    "LTX-Video": "time_embed.emb.timestep_embedder. transformer_blocks.0.attn1.to_q.",
    "Krea 2": "text_fusion. transformer_blocks.0.attn.to_gate.",
    "SD 1.x or SDXL": "conv_in.weight down_blocks.0.resnets.0.conv1.",
}
"""Model in the diffusers layout -> the starts of keys that all occur in it, separated by spaces."""


def diffusers_model(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The model whose diffusers layout the keys follow, or None. ComfyUI's loader drops the scales of that layout.

    The keys may carry a prefix of a diffusion model.
    """
    for prefix in dict.fromkeys(("", *DIFFUSION_PREFIXES, *WRAPPERS)):
        if not any(key.startswith(prefix) for key in tensors):
            continue
        starts = {model: [prefix + start for start in each.split()] for model, each in _DIFFUSERS.items()}
        every = tuple(start for each in starts.values() for start in each)
        keys = [key for key in tensors if key.startswith(every)]
        for model, each in starts.items():
            if all(any(key.startswith(start) for key in keys) for start in each):
                return model
    return None


@dataclass(frozen=True)
class ForeignFile:
    """A kind of file that holds Linear-shaped weights, and is not a whole model."""

    title: str
    way_out: str
    words: tuple[str, ...]
    """A name that matches holds one of these. A quick test, since hostile files have many and long names."""
    pattern: re.Pattern[str]
    """Of its tensor names."""
    share: float = 0.0
    """More than this share of the names match."""
    beside: bool = False
    """Whether an all-in-one checkpoint may hold such tensors beside its model."""

    def holds(self, tensors: Collection[str]) -> bool:
        """Whether these are names of such a file."""
        found = sum(bool(self.pattern.search(key)) for key in tensors if any(word in key for word in self.words))
        return found > self.share * len(tensors)


_FOREIGN = (
    ForeignFile(
        "a LoRA",
        "quantize the model that it belongs to (Stochastic FP8 applies LoRAs that are loaded before it)",
        ("lora", "lokr", "loha", "hada", "lycoris", "oft", "dora", ".diff", ".set_weight", ".down", ".up", ".alpha"),
        re.compile(
            r"(?:^|[._])(?:lora|lokr|loha|hada|lycoris|oft|boft|glora|dora)\d*[._]|\.(?:diff|diff_b|set_weight)$|"
            r"\.(?:down|up)(?:\.weight)?$|\.alpha$"
        ),
        0.5,
    ),
    ForeignFile(
        "a ControlNet or T2I-Adapter",
        "use it as it is, beside a quantized model",
        ("control", "input_hint_block", "zero_", "lllite", "body.", "after_proj_list"),
        re.compile(
            r"^(?:\w+\.)?(?:control_model\.|input_hint_block\.|controlnet_|control_img_in\.|control_blocks\.|zero_convs\.|"
            r"zero_res|control_layers\.|control_all_x_embedder\.|lllite_|lora_controlnet|body\.\d+\.(?:block|resnets)\w*\.|"
            r"after_proj_list\.)"
        ),
        beside=True,
    ),
    ForeignFile(
        "an IP-Adapter or a similar adapter",
        "use it as it is, beside a quantized model",
        ("ip_adapter", "image_proj", "pulid_", "id_adapter", "id_encoder", "redux_", "k_ip", "v_ip", "motion_modules"),
        re.compile(
            r"^(?:ip_adapter|image_proj|image_proj_model|ip_adapter_proj_model|pulid_\w+|id_adapter\w*|id_encoder|"
            r"redux_\w+)\.|[._]ip_adapter[._]|\.to_[kv]_ip\.|\.motion_modules\."
        ),
        0.5,
    ),
    ForeignFile(
        "a textual-inversion embedding",
        "use it as it is, from models/embeddings",
        ("emb_params", "string_to_", "clip_", "t5xxl", "<"),
        re.compile(r"^(?:emb_params|string_to_\w+(?:\..*)?|clip_[lgh]|t5xxl|umt5xxl|<.*>)$"),
        0.5,
    ),
    ForeignFile(
        "a model with LoRA layers that are not merged into its weights",
        "merge them and save the model first",
        ("base_layer", "lora"),
        re.compile(r"(?:^|\.)base_layer\.|[._]lora[._]?(?:A|B|up|down)(?:[._]|$)"),
    ),
    ForeignFile(
        "a training checkpoint with an optimizer's state or averaged weights",
        "save the model alone first",
        ("optimizer", "lr_scheduler", "ema"),
        re.compile(r"^(?:optimizers?|optimizer_states?|lr_schedulers?|(?:model_)?ema(?:_model)?)\."),
        beside=True,
    ),
)


def foreign_kind(tensors: Collection[str], file_name: str = "") -> tuple[str, str] | None:
    """What a file is that is not a whole model, and the way out: a LoRA, an adapter, a ControlNet, an embedding, a
    model before its LoRA layers are merged, or by its file name one shard of a set. None for all others."""
    checkpoint = any(key.startswith("model.diffusion_model.") for key in tensors)  # it may hold a ControlNet as well
    for kind in _FOREIGN:
        if kind.holds(tensors) and not (kind.beside and checkpoint):
            return kind.title, kind.way_out
    part = shard(file_name)
    if part and part.of > 1:
        title = f"file {part.number} of the {part.of} that hold one model"
        return title, "give the .safetensors.index.json of the set"
    return None


_OTHER_QUANTIZERS = {
    "bitsandbytes (NF4 or FP4)": re.compile(r"\.(?:absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)$"),
    "bitsandbytes (int8)": re.compile(r"\.SCB$"),
    "SVDQuant (Nunchaku)": re.compile(r"\.(?:wscales|wtscale|smooth_factor|smooth_factor_orig)$"),
    "quanto": re.compile(r"\._(?:data|scale|shift)$"),
    "GPTQ or AWQ": re.compile(r"\.(?:qweight|qzeros)$"),
    "HQQ": re.compile(r"\.W_q$"),
}
"""Program whose quantized weights ComfyUI reads with a custom node only -> its tensor names."""

_END = 64
"""Characters at the end of a name that these patterns look at."""


def other_quantizer(tensors: Iterable[str]) -> tuple[str, str] | None:
    """The program that quantized a file to a format that is not FP8, and one of its tensors. None for all others."""
    names = [key for key in tensors if not key.endswith((".weight", ".bias"))]
    for program, pattern in _OTHER_QUANTIZERS.items():
        for name in names:
            if pattern.search(name[-_END:]):
                return program, name
    return None
