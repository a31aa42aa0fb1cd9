"""The text encoders of the matrix: how ComfyUI's own classes are built small. The table needs no ComfyUI to be read."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

import torch


@dataclass(frozen=True)
class Encoder:
    """One kind of text-encoder file."""

    detected: str
    """The member of comfy.sd.TEModel that ComfyUI's detection gives."""
    clip_type: str
    """The member of comfy.sd.CLIPType to load it as, which decides what model it is used for."""
    create: Callable
    """() -> the class of ComfyUI that holds this encoder, at its real size."""
    small: Mapping
    """The settings that make it small."""
    name: str = ""
    """Of the encoder in that class; "": the first."""
    publish: Callable = str
    """Name of a tensor in ComfyUI's encoder -> its name in published files."""
    tokenizer: Mapping = field(default_factory=dict)
    """Name -> function that makes the tensor: tokenizers that travel in the file."""
    companions: tuple = ()
    """Functions of the whole small model: tensors of further files that are loaded with this one."""
    refused: str = ""
    """Why no file of this kind is quantized, in the words of the error; "" if it can be."""


def module(name):
    return import_module(f"comfy.text_encoders.{name}")


LLM = ({"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}) | {
    "vocab_size": 512
}
T5 = {"d_model": 16, "d_ff": 10240, "d_kv": 16, "num_heads": 1, "vocab_size": 512}
"""Its height is what T5-XXL is known by."""
SMALL_QWEN35_VISION = {"hidden_size": 128, "intermediate_size": 128, "num_heads": 2}
SMALL_VISION = {"num_layers": 1, "hidden_size": 320, "intermediate_size": 256, "num_heads": 4}


def vision_language_names(name):
    """How Qwen3-VL and Qwen3.5 are published; ComfyUI renames them on loading."""
    renamed = {"model.lm_head.": "lm_head.", "model.": "model.language_model.", "visual.": "model.visual."}
    for ours, theirs in renamed.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def sentencepiece_model():
    import sentencepiece

    choice, written = random.Random(0), io.BytesIO()
    words = ("".join(choice.choice("abcdefghij") for _ in range(choice.randint(2, 6))) for _ in range(3200))
    sentences = (" ".join(next(words) for _ in range(8)) for _ in range(400))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=written, vocab_size=120, minloglevel=2
    )
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)


def tekken_model():
    """Mistral's tokenizer: a token for each byte, and a thousand special ones."""
    tokens = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    special = [
        {"rank": i, "token_str": named[i] if i < len(named) else f"<s{i}>", "is_control": True} for i in range(1000)
    ]
    config = {"pattern": r"[^\r\n\p{L}\p{N}]?[\p{L}]+|\s+|.", "default_num_special_tokens": 1000, "version": "v3"}
    config |= {"default_vocab_size": 1256, "num_vocab_tokens": 1256}
    text = json.dumps({"config": config, "vocab": tokens, "special_tokens": special})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def projection(model):
    """LTX-2's projection of the text embeddings, which is a file of its own."""
    weight = model.text_embedding_projection.weight
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(weight.shape, generator=generator).to(torch.bfloat16) / weight.shape[1] ** 0.5
    return {"text_embedding_projection.aggregate_embed.weight": values}


def clip_l(model):
    """The CLIP-L that HunyuanVideo is used with."""
    generator = torch.Generator().manual_seed(6)
    tensors = model.clip_l.transformer.state_dict()
    return {name: torch.randn(tensor.shape, generator=generator).half() / 16 for name, tensor in tensors.items()}


PIECES = {"spiece_model": sentencepiece_model}
TEKKEN = {"tekken_model": tekken_model}
SMALL_CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
NEVER_CLIP = "ComfyUI has no FP8 detection for CLIP-L"
NEVER_OTHER = "ComfyUI has no FP8 detection for this text encoder"


def qwen3(detected, clip_type, create, **more):
    return Encoder(detected, clip_type, create, LLM, **more)


ENCODERS = {
    "t5xxl_chroma": Encoder("T5_XXL", "CHROMA", lambda: module("pixart_t5").pixart_te(), T5),
    "t5xxl_sd3": Encoder(
        "T5_XXL", "SD3", lambda: module("sd3_clip").sd3_clip(clip_l=False, clip_g=False, t5=True), T5, name="t5xxl"
    ),
    "umt5xxl_wan": Encoder("T5_XXL", "WAN", lambda: module("wan").te(), T5, tokenizer=PIECES),
    "t5xxl_cosmos1": Encoder("T5_XXL_OLD", "COSMOS", lambda: module("cosmos").te(), T5),
    "t5xl_auraflow": Encoder(
        "T5_XL",
        "STABLE_DIFFUSION",
        lambda: module("aura_t5").AuraT5Model,
        T5 | {"d_ff": 5120},
        tokenizer=PIECES,
        refused=NEVER_OTHER,
    ),
    "qwen25_7b_qwen_image": Encoder("QWEN25_7B", "QWEN_IMAGE", lambda: module("qwen_image").te(), LLM),
    "qwen25_3b_omnigen2": Encoder("QWEN25_3B", "OMNIGEN2", lambda: module("omnigen2").te(), LLM),
    "qwen3_4b_z_image": qwen3("QWEN3_4B", "LUMINA2", lambda: module("z_image").te()),
    "qwen3_4b_klein": qwen3("QWEN3_4B", "FLUX2", lambda: module("flux").klein_te(model_type="qwen3_4b")),
    "qwen3_8b_klein": qwen3("QWEN3_8B", "FLUX2", lambda: module("flux").klein_te(model_type="qwen3_8b")),
    "qwen3_06b_anima": qwen3("QWEN3_06B", "STABLE_DIFFUSION", lambda: module("anima").te()),
    "ovis_2b": qwen3("QWEN3_2B", "OVIS", lambda: module("ovis").te()),
    "qwen3vl_4b_krea2": qwen3("QWEN3VL_4B", "KREA2", lambda: module("krea2").te(), publish=vision_language_names),
    "qwen3vl_8b_boogu": qwen3("QWEN3VL_8B", "BOOGU", lambda: module("boogu").te(), publish=vision_language_names),
    "qwen35_4b": qwen3(
        "QWEN35_4B",
        "STABLE_DIFFUSION",
        lambda: module("qwen35").te(model_type="qwen35_4b"),
        publish=vision_language_names,
    ),
    "mistral3_24b_flux2": Encoder("MISTRAL3_24B", "FLUX2", lambda: module("flux").flux2_te(), LLM, tokenizer=TEKKEN),
    "ministral3_3b_ernie": Encoder(
        "MINISTRAL_3_3B", "STABLE_DIFFUSION", lambda: module("ernie").te(), LLM, tokenizer=TEKKEN
    ),
    "gemma2_2b_lumina2": Encoder("GEMMA_2_2B", "LUMINA2", lambda: module("lumina2").te(), LLM, tokenizer=PIECES),
    "gemma3_4b_newbie": Encoder(
        "GEMMA_3_4B", "NEWBIE", lambda: module("lumina2").te(model_type="gemma3_4b"), LLM, tokenizer=PIECES
    ),
    "gemma3_12b_ltx2": Encoder(
        "GEMMA_3_12B",
        "LTXV",
        lambda: module("lt").ltxav_te(dtype_llama=torch.float32),
        LLM,
        tokenizer=PIECES,
        companions=(projection,),
    ),
    "llama3_8b_hunyuan_video": Encoder(
        "LLAMA3_8",
        "HUNYUAN_VIDEO",
        lambda: module("hunyuan_video").hunyuan_video_clip(dtype_llama=torch.float32),
        LLM,
        name="llama",
        companions=(clip_l,),
    ),
    "llama3_8b_hidream": Encoder(
        "LLAMA3_8",
        "HIDREAM",
        lambda: module("hidream").hidream_clip(
            clip_l=False, clip_g=False, t5=False, llama=True, dtype_t5=None, dtype_llama=torch.float32
        ),
        LLM,
        name="llama",
    ),
    "mistral3_24b_flux2_pruned": Encoder(
        "MISTRAL3_24B_PRUNED_FLUX2", "FLUX2", lambda: module("flux").flux2_te(pruned=True), LLM, tokenizer=TEKKEN
    ),
    "t5_base_stable_audio": Encoder(
        "T5_BASE",
        "STABLE_AUDIO",
        lambda: module("sa_t5").SAT5Model,
        T5 | {"d_ff": 64},
        refused=NEVER_OTHER,
    ),
    "clip_g": Encoder(
        "CLIP_G",
        "STABLE_DIFFUSION",
        lambda: import_module("comfy.sdxl_clip").SDXLRefinerClipModel,
        SMALL_CLIP,
        refused=NEVER_CLIP,
    ),
    "clip_h": Encoder(
        "CLIP_H", "STABLE_DIFFUSION", lambda: module("sd2_clip").SD2ClipModel, SMALL_CLIP, refused=NEVER_CLIP
    ),
    "clip_l": Encoder(
        "CLIP_L",
        "STABLE_DIFFUSION",
        lambda: import_module("comfy.sd1_clip").SD1ClipModel,
        SMALL_CLIP,
        refused=NEVER_CLIP,
    ),
}
"""One row per kind of file and use."""

NOT_BUILT = {"BYT5_SMALL_GLYPH": "ComfyUI loads it beside another encoder only; it is never quantized"}
"""Member of comfy.sd.TEModel -> why no row builds it."""
