"""Model families: the keys that identify each one, and the layers that its preset keeps in high precision.

Source of the key names: ComfyUI's own detection (comfy/model_detection.py and comfy/sd.py, 0.3.75 to 0.33.0).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..files.header import TensorInfo

DIFFUSION, TEXT_ENCODER, NEVER_QUANTIZED = "diffusion model", "text encoder", "never quantized"
"""Kinds of networks."""


@dataclass(frozen=True)
class Preset:
    """One family of models."""

    title: str
    kind: str
    """DIFFUSION, TEXT_ENCODER or NEVER_QUANTIZED."""
    keep: tuple[str, ...] = ()
    """Patterns of layers that stay in high precision; see patterns.py."""
    detect: tuple[Mapping[str, int | None], ...] = ()
    """Alternatives. Each is a set of keys that must all be present: key -> its first dimension, None for any."""
    reason: str = ""
    """Why the family is never quantized, for kind NEVER_QUANTIZED."""
    renamed: tuple[str, ...] = ()
    """Parts of Linear names that ComfyUI 0.3.75 renames while it loads weights, but not in the header entries."""


def _any_of(*alternatives: str) -> tuple[dict[str, None], ...]:
    """Alternatives, one string each: keys that must all be present, separated by spaces."""
    return tuple(dict.fromkeys(keys.split()) for keys in alternatives)


_CLIP = "ComfyUI has no FP8 detection for CLIP-L, CLIP-G and CLIP-H: quantized, they would give silently wrong images"
_NO_DETECTION = "ComfyUI has no FP8 detection for this text encoder"

PRESETS = {
    "flux": Preset(
        "Flux, Flux.2",
        DIFFUSION,
        ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer", "*stream_modulation*"),
        _any_of(
            "double_stream_modulation_img.lin.weight",
            "double_blocks.0.img_attn.norm.key_norm.scale img_in.weight time_in.in_layer.weight",
            "double_blocks.0.img_attn.norm.key_norm.weight img_in.weight time_in.in_layer.weight",
        ),
    ),
    "chroma": Preset(
        "Chroma",
        DIFFUSION,
        ("distilled_guidance_layer", "img_in", "txt_in", "final_layer"),
        _any_of(
            "distilled_guidance_layer.norms.0.scale",
            "distilled_guidance_layer.norms.0.weight",
            "distilled_guidance_layer.0.norms.0.scale",
            "distilled_guidance_layer.0.norms.0.weight",
        ),
    ),
    "qwen_image": Preset(
        "Qwen-Image",
        DIFFUSION,
        ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out", "transformer_blocks.0.img_mod.1"),
        _any_of("txt_norm.weight transformer_blocks.0.img_mod.1.weight"),
    ),
    "wan": Preset(
        "Wan 2.x",
        DIFFUSION,
        (
            "patch_embedding",
            "text_embedding",
            "time_embedding",
            "time_projection",
            "img_emb",
            "head",
            "face_adapter",
            "face_encoder",
            "motion_encoder",
            "audio_injector",
            "casual_audio_encoder",
            "audio_proj",
        ),
        _any_of("head.modulation"),
    ),
    "lumina2": Preset(
        "Z-Image, Lumina 2",
        DIFFUSION,
        (
            "x_embedder",
            "cap_embedder",
            "t_embedder",
            "adaLN_modulation",
            "final_layer",
            "context_refiner",
            "noise_refiner",
        ),
        _any_of("cap_embedder.1.weight noise_refiner.0.attention.k_norm.weight"),
    ),
    "ltxv": Preset(
        "LTX-Video",
        DIFFUSION,
        (
            "adaln_single",
            "patchify_proj",
            "proj_out",
            "caption_projection",
            "*connector*",
            "transformer_blocks.0",
            "transformer_blocks.1",
            "transformer_blocks.-2",
            "transformer_blocks.-1",
        ),
        _any_of("adaln_single.emb.timestep_embedder.linear_1.bias patchify_proj.weight"),
    ),
    "sd3": Preset(
        "SD3, SD3.5",
        DIFFUSION,
        ("x_embedder", "y_embedder", "t_embedder", "context_embedder", "adaLN_modulation", "final_layer"),
        _any_of("joint_blocks.0.context_block.attn.qkv.weight"),
    ),
    "hunyuan_video": Preset(
        "HunyuanVideo",
        DIFFUSION,
        (
            "img_in",
            "txt_in",
            "time_in",
            "vector_in",
            "guidance_in",
            "byt5_in",
            "vision_in",
            "time_r_in",
            "final_layer",
            "img_mod",
            "txt_mod",
            "modulation",
        ),
        _any_of("txt_in.individual_token_refiner.blocks.0.norm1.weight"),
        renamed=("_attn_qkv.", "_attn_proj.", "mlp.fc1.", "mlp.fc2.", ".modulation.linear.", "_mod.linear."),
    ),
    "hidream": Preset(
        "HiDream",
        DIFFUSION,
        ("x_embedder", "t_embedder", "p_embedder", "caption_projection", "final_layer", "ff_i.gate"),
        _any_of("caption_projection.0.linear.weight"),
    ),
    "sdxl": Preset("SDXL, SD 1.x", DIFFUSION, ("time_embed", "label_emb"), _any_of("input_blocks.0.0.weight")),
    "t5xxl": Preset(
        "T5-XXL, UMT5-XXL",
        TEXT_ENCODER,
        ("shared", "embed_tokens", "relative_attention_bias", "final_layer_norm", "lm_head"),
        (
            {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": 10240},
            {"encoder.block.23.layer.1.DenseReluDense.wi.weight": None},
        ),
    ),
    "llm": Preset(
        "LLM text encoders",
        TEXT_ENCODER,
        ("embed_tokens", "model.norm", "lm_head", "visual", "vision_model", "multi_modal_projector"),
        _any_of(
            "model.layers.0.self_attn.k_proj.weight model.layers.0.post_attention_layernorm.weight",
            "model.language_model.layers.0.input_layernorm.weight",
        ),
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
    "unknown": Preset("unknown", DIFFUSION, ("*embed*", "*norm*", "*head*", "*modulation*", "*_mod")),
}
"""family -> Preset."""

FAMILIES = tuple(family for family, preset in PRESETS.items() if preset.kind != NEVER_QUANTIZED)
"""Families that can be quantized."""

_DIFFUSION_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.", "")
_DETECTED_PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.", "")
"""Prefixes of diffusion models that ComfyUI removes while it detects the family."""
_WRAPPERS = ("diffusion_model.", "transformer.", "module.", "_orig_mod.", "unet.", "dit.")
"""Prefixes of other programs, under which no ComfyUI detects a diffusion model."""
_VAE_PREFIXES = ("first_stage_model.", "vae.", "pretransform.model.")
_TEXT_ENCODER_PREFIX = re.compile(
    r"text_encoders\.[^.]+\.transformer\.|text_encoders?\.|cond_stage_model\.|conditioner\.embedders\.\d+\."
)


@dataclass(frozen=True)
class Component:
    """One network in a file: the keys that start with `prefix`, and not with a longer prefix of another network."""

    prefix: str
    family: str

    @property
    def preset(self) -> Preset:
        return PRESETS[self.family]


class Components:
    """The networks that a set of tensors holds: one, or those of an all-in-one checkpoint."""

    def __init__(self, tensors: Mapping[str, TensorInfo], kind: str | None = None):
        """kind: DIFFUSION or TEXT_ENCODER for the bare names of one network of that kind; None for a whole file.

        undetected_prefix: the prefix under which no ComfyUI detects the main network, or "". renamed: a name of the
        main network that ComfyUI 0.3.75 renames in the weights only, or "".
        """
        if kind is None:
            self.main = _main_component(tensors)
            self.others = tuple(_other_components(tensors, self.main.prefix))
            self.undetected_prefix = _undetected_prefix(tensors, self.main)
        else:
            self.main, self.others = Component("", _SINGLE_FAMILY[kind](tensors)), ()
            self.undetected_prefix = ""
        self.renamed = _renamed(tensors, self.main)

    @cached_property
    def all(self) -> tuple[Component, ...]:
        return (self.main, *self.others)

    @property
    def all_in_one(self) -> bool:
        """Whether the names of the main network's layers carry a prefix."""
        return bool(self.main.prefix)

    def of(self, key: str) -> Component | None:
        """The component that a tensor belongs to. None: outside all networks, e.g. an optimizer's state."""
        for component in self.others:
            if key.startswith(component.prefix):
                return component
        return self.main if key.startswith(self.main.prefix) else None

    def prefix_of(self, key: str) -> str:
        """The prefix of a tensor's component, or ""."""
        component = self.of(key)
        return component.prefix if component else ""


def detect_family(tensors: Mapping[str, TensorInfo], prefix: str = "", kinds: tuple[str, ...] = ()) -> str:
    """The family of the network under `prefix`, or "unknown". kinds: consider these kinds only; (): all of them."""
    for family, preset in PRESETS.items():
        if (not kinds or preset.kind in kinds) and any(_present(keys, tensors, prefix) for keys in preset.detect):
            return family
    return "unknown"


def _text_encoder_family(tensors: Mapping[str, TensorInfo], prefix: str = "") -> str:
    family = detect_family(tensors, prefix, (TEXT_ENCODER, NEVER_QUANTIZED))
    return "other_text_encoder" if family == "unknown" else family


_SINGLE_FAMILY = {
    DIFFUSION: lambda tensors: detect_family(tensors, kinds=(DIFFUSION,)),
    TEXT_ENCODER: _text_encoder_family,
}


def _present(keys: Mapping[str, int | None], tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
    found = [(tensors.get(prefix + key), size) for key, size in keys.items()]
    return all(info is not None and size in (None, *info.shape[:1]) for info, size in found)


def _main_component(tensors: Mapping[str, TensorInfo]) -> Component:
    for prefix in _DIFFUSION_PREFIXES:
        family = detect_family(tensors, prefix, (DIFFUSION,))
        if family != "unknown":
            return Component(prefix, family)
    family = detect_family(tensors)
    if family != "unknown":
        return Component("", family)
    return Component(_unknown_prefix(tensors), "unknown")


def _unknown_prefix(tensors: Mapping[str, TensorInfo]) -> str:
    """ComfyUI's rule: the prefix of more than five keys. `model.` counts only beside a VAE or a text encoder."""
    counts = {prefix: sum(key.startswith(prefix) for key in tensors) for prefix in _DIFFUSION_PREFIXES[:4]}
    prefix = max(counts, key=counts.__getitem__)
    if counts[prefix] > 5:
        return prefix
    beside = any(key.startswith(_VAE_PREFIXES) or _TEXT_ENCODER_PREFIX.match(key) for key in tensors)
    return "model." if beside and any(key.startswith("model.") for key in tensors) else ""


def _undetected_prefix(tensors: Mapping[str, TensorInfo], main: Component) -> str:
    if main.family != "unknown":
        return "" if main.prefix in _DETECTED_PREFIXES else main.prefix
    counts = Counter(prefix for key in tensors for prefix in _prefixes(key))
    common = [prefix for prefix, count in counts.items() if 2 * count > len(tensors)]
    for prefix in sorted(common, key=len):
        if prefix in _WRAPPERS or detect_family(tensors, prefix, (DIFFUSION, TEXT_ENCODER)) != "unknown":
            return "" if prefix in _DETECTED_PREFIXES else prefix
    return ""


def _prefixes(key: str) -> Iterable[str]:
    """The first one, two and three parts of a name: "a.b.c.d" has "a.", "a.b." and "a.b.c."."""
    parts = key.split(".", 3)[:-1]
    return (".".join(parts[:count]) + "." for count in range(1, len(parts) + 1))


def _renamed(tensors: Mapping[str, TensorInfo], main: Component) -> str:
    parts = main.preset.renamed
    names = (key for key in tensors if parts and key.startswith(main.prefix) and key.endswith(".weight"))
    return next((name for name in names if any(part in name for part in parts)), "")


def _other_components(tensors: Mapping[str, TensorInfo], main_prefix: str) -> Iterator[Component]:
    prefixes = {match.group() for key in tensors if (match := _TEXT_ENCODER_PREFIX.match(key))}
    for prefix in sorted(prefixes, key=len, reverse=True):
        yield Component(prefix, _text_encoder_family(tensors, prefix))
    for prefix in _VAE_PREFIXES:
        if prefix != main_prefix and any(key.startswith(prefix) for key in tensors):
            yield Component(prefix, "vae")


_DIFFUSERS = {
    "Flux or another double-stream model": "single_transformer_blocks.0.",
    "AuraFlow": "joint_transformer_blocks.0.",
    "Z-Image or Lumina 2": "noise_refiner.0.attention.norm_k.",
    "SD3": "pos_embed.proj.weight transformer_blocks.0.attn.add_q_proj.",
    "PixArt": "pos_embed.proj.weight transformer_blocks.0.attn1.to_q.",
    "Wan": "condition_embedder.time_embedder.linear_1. blocks.0.attn1.to_q.",
    "LTX-Video": "time_embed.emb.timestep_embedder. transformer_blocks.0.attn1.to_q.",
    "SD 1.x or SDXL": "conv_in.weight down_blocks.0.resnets.0.conv1.",
}
"""Model in the diffusers layout -> the starts of keys that all occur in it, separated by spaces."""


def diffusers_model(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The model whose diffusers layout the keys follow, or None. ComfyUI's loader drops the scales of that layout."""
    for model, starts in _DIFFUSERS.items():
        if all(any(key.startswith(start) for key in tensors) for start in starts.split()):
            return model
    return None


@dataclass(frozen=True)
class ForeignFile:
    """A kind of file that holds Linear-shaped weights, but no whole model."""

    title: str
    way_out: str
    words: tuple[str, ...]
    """A name that matches holds one of these. A quick test, since hostile files have many and long names."""
    pattern: re.Pattern[str]
    """Of its tensor names."""
    share: float = 0.0
    """More than this share of the names match."""

    def holds(self, tensors: Collection[str]) -> bool:
        """Whether these are names of such a file."""
        found = sum(bool(self.pattern.search(key)) for key in tensors if any(word in key for word in self.words))
        return found > self.share * len(tensors)


_FOREIGN = (
    ForeignFile(
        "a LoRA",
        "quantize the model that it belongs to (Stochastic FP8 Quantize applies LoRAs that are loaded before it)",
        ("lora", "lokr", "loha", "hada", "lycoris", "oft", "dora", ".diff", ".set_weight"),
        re.compile(
            r"(?:^|[._])(?:lora|lokr|loha|hada|lycoris|oft|boft|glora|dora)\d*[._]|\.(?:diff|diff_b|set_weight)$"
        ),
        0.5,
    ),
    ForeignFile(
        "a ControlNet or T2I-Adapter",
        "use it as it is, beside a quantized model",
        ("control", "input_hint_block", "zero_", "lllite", "body."),
        re.compile(
            r"^(?:\w+\.)?(?:control_model\.|input_hint_block\.|controlnet_|control_img_in\.|control_blocks\.|zero_convs\.|"
            r"zero_res|control_layers\.|control_all_x_embedder\.|lllite_|lora_controlnet|body\.\d+\.(?:block|resnets)\w*\.)"
        ),
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
)

_SHARD = re.compile(r"(?<!\d)0*(\d{1,6})[-_. ]of[-_. ]0*(\d{1,6})(?!\d)", re.IGNORECASE)


def foreign_kind(tensors: Collection[str], file_name: str = "") -> tuple[str, str] | None:
    """What a file is that holds no whole model, and the way out: a LoRA, an adapter, a ControlNet, an embedding, or by
    its file name one shard of a set. None for all others."""
    checkpoint = any(key.startswith("model.diffusion_model.") for key in tensors)  # it may hold a ControlNet as well
    for kind in _FOREIGN:
        if kind.holds(tensors) and (kind.share or not checkpoint):
            return kind.title, kind.way_out
    shard = _SHARD.search(file_name)
    if shard and int(shard[2]) > 1 and file_name.endswith(".safetensors"):
        return f"file {shard[1]} of the {shard[2]} that hold one model", "give the .safetensors.index.json of the set"
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
