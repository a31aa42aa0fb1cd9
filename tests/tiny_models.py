"""Writes small models that ComfyUI's own loaders accept, with random weights that look like trained ones.

Every weight depends only on the seed and its key: heavy tails, and in each matrix a few outliers far beyond them, as
trained networks have. ``*_shapes`` say what a family's files hold (ComfyUI reads all sizes off the shapes);
``state_dict`` fills them; the ``write_*`` functions save a file and return its path.
"""

import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OUTLIERS = 1 / 2000  # of a matrix's elements
OUTLIER_GAIN = 12.0

SHIPPED_MODELS = Path(__file__).resolve().parent.parent / "example_workflows" / "models"
LANDSCAPES = SHIPPED_MODELS / "tiny_sd3_landscapes.safetensors"
LANDSCAPES_VAE = SHIPPED_MODELS / "tiny_taesd3_landscapes.safetensors"
LANDSCAPES_CONDITIONING = SHIPPED_MODELS / "tiny_conditioning.safetensors"

# What the test-only nodes make ComfyUI believe of its two text encoders, so that they go tiny (see text_encoders.py).
T5_WIDTH, T5_LAYERS, T5_INNER, T5_FEED_FORWARD = 4096, 24, 64, 64
CLIP_WIDTH, CLIP_LAYERS = 64, 3
CLIP_G_WIDTH = 1280  # ComfyUI puts zeros where SD3's other pooled output belongs


# --- weights


def heavy_tailed(shape, generator):
    """Values of about unit RMS whose spread varies from element to element, with rare large outliers."""
    values = torch.randn(shape, generator=generator) * torch.exp(0.4 * torch.randn(shape, generator=generator) - 0.16)
    if len(shape) == 2:
        count = max(1, round(values.numel() * OUTLIERS))
        where = torch.randint(values.numel(), (count,), generator=generator)
        values.view(-1)[where] *= OUTLIER_GAIN
    return values


def weight(key, shape, seed):
    """One tensor in fp32: norms near 1, biases near 0, matrices scaled to keep the magnitude of activations."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode(), seed))  # torch uses the low 32 bits only
    if "norm" in key and len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.02 * torch.randn(shape, generator=generator)
    return heavy_tailed(shape, generator) / math.sqrt(math.prod(shape[1:]))


def state_dict(shapes, *, seed=0, dtype=torch.bfloat16):
    """Random weights for a dict of key -> shape."""
    return {key: weight(key, shape, seed).to(dtype).contiguous() for key, shape in shapes.items()}


def linear_shapes(key, inputs, outputs, bias=True):
    shapes = {f"{key}.weight": (outputs, inputs)}
    return shapes | {f"{key}.bias": (outputs,)} if bias else shapes


def save(tensors, path, metadata=None):
    """Write a safetensors file, and its folder if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def write_set(path, parts, tensors):
    """Write the files of a set and its index, such as ``model.safetensors.index.json``. Returns the index's path.

    path: what the file would be called in one piece. parts: the names of each file's tensors.
    """
    weight_map = {}
    for number, names in enumerate(parts, 1):
        name = f"{path.stem}-{number:05}-of-{len(parts):05}{path.suffix}"
        save({key: tensors[key] for key in names}, path.with_name(name))
        weight_map |= dict.fromkeys(names, name)
    index = path.with_name(f"{path.stem}.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# --- diffusion models


def sd3_shapes(depth=2, context=64, pooled=64):
    """Stable Diffusion 3: hidden size and heads follow from the depth. 16 latent channels."""
    hidden = 64 * depth
    shapes = {
        "x_embedder.proj.weight": (hidden, 16, 2, 2),
        "x_embedder.proj.bias": (hidden,),
        "pos_embed": (1, 36 * 36, hidden),
        **linear_shapes("t_embedder.mlp.0", 256, hidden),
        **linear_shapes("t_embedder.mlp.2", hidden, hidden),
        **linear_shapes("y_embedder.mlp.0", pooled, hidden),
        **linear_shapes("y_embedder.mlp.2", hidden, hidden),
        **linear_shapes("context_embedder", context, hidden),
        **linear_shapes("final_layer.linear", hidden, 64),
        **linear_shapes("final_layer.adaLN_modulation.1", hidden, 2 * hidden),
    }
    for block in range(depth):
        for stream in ("context_block", "x_block"):
            last_context = stream == "context_block" and block == depth - 1
            shapes |= _sd3_stream_shapes(f"joint_blocks.{block}.{stream}", hidden, only_attends=last_context)
    return shapes


def _sd3_stream_shapes(prefix, hidden, only_attends):
    """One stream of a joint block; the context stream of the last block ends in its keys and values."""
    shapes = linear_shapes(f"{prefix}.attn.qkv", hidden, 3 * hidden)
    shapes |= linear_shapes(f"{prefix}.adaLN_modulation.1", hidden, (2 if only_attends else 6) * hidden)
    if only_attends:
        return shapes
    shapes |= linear_shapes(f"{prefix}.attn.proj", hidden, hidden)
    shapes |= linear_shapes(f"{prefix}.mlp.fc1", hidden, 4 * hidden)
    return shapes | linear_shapes(f"{prefix}.mlp.fc2", 4 * hidden, hidden)


def flux_shapes(depth=1, hidden=128, context=64, pooled=64):
    """Flux 1: heads of 128, 16 latent channels. ComfyUI 0.3.75 takes 24 heads for granted, and only detects it."""
    shapes = {
        **linear_shapes("img_in", 64, hidden),
        **linear_shapes("txt_in", context, hidden),
        **linear_shapes("final_layer.linear", hidden, 64),
        **linear_shapes("final_layer.adaLN_modulation.1", hidden, 2 * hidden),
    }
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", pooled)):
        shapes |= linear_shapes(f"{name}.in_layer", width, hidden) | linear_shapes(f"{name}.out_layer", hidden, hidden)
    for block in range(depth):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}"
            shapes |= linear_shapes(f"{prefix}_mod.lin", hidden, 6 * hidden)
            shapes |= linear_shapes(f"{prefix}_attn.qkv", hidden, 3 * hidden)
            shapes |= linear_shapes(f"{prefix}_attn.proj", hidden, hidden)
            shapes |= linear_shapes(f"{prefix}_mlp.0", hidden, 4 * hidden)
            shapes |= linear_shapes(f"{prefix}_mlp.2", 4 * hidden, hidden)
            shapes |= {f"{prefix}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
        prefix = f"single_blocks.{block}"
        shapes |= linear_shapes(f"{prefix}.linear1", hidden, 7 * hidden)
        shapes |= linear_shapes(f"{prefix}.linear2", 5 * hidden, hidden)
        shapes |= linear_shapes(f"{prefix}.modulation.lin", hidden, 3 * hidden)
        shapes |= {f"{prefix}.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    return shapes


def wan_shapes(layers=2, dim=128, feed_forward=256, text_width=4096):
    """Wan 2.1 text to video: heads of 128, 16 latent channels, patches of 1 x 2 x 2."""
    shapes = {
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        **linear_shapes("text_embedding.0", text_width, dim),
        **linear_shapes("text_embedding.2", dim, dim),
        **linear_shapes("time_embedding.0", 256, dim),
        **linear_shapes("time_embedding.2", dim, dim),
        **linear_shapes("time_projection.1", dim, 6 * dim),
        **linear_shapes("head.head", dim, 64),
        "head.modulation": (1, 2, dim),
    }
    for layer in range(layers):
        prefix = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= linear_shapes(f"{prefix}.{attention}.{part}", dim, dim)
            shapes |= {f"{prefix}.{attention}.norm_{part}.weight": (dim,) for part in "qk"}
        shapes |= linear_shapes(f"{prefix}.ffn.0", dim, feed_forward)
        shapes |= linear_shapes(f"{prefix}.ffn.2", feed_forward, dim)
        shapes |= {
            f"{prefix}.norm3.weight": (dim,),
            f"{prefix}.norm3.bias": (dim,),
            f"{prefix}.modulation": (1, 6, dim),
        }
    return shapes


def hunyuan_video_shapes(dim=128):
    """HunyuanVideo, one block of each kind: its query and key norms are published as ``scale``."""
    embedders = {
        "guidance_in": 256,
        "time_in": 256,
        "vector_in": 768,
        "txt_in.c_embedder": 4096,
        "txt_in.t_embedder": 256,
    }
    shapes = {
        "img_in.proj.weight": (dim, 16, 1, 2, 2),
        "img_in.proj.bias": (dim,),
        **linear_shapes("txt_in.input_embedder", 4096, dim),
        **linear_shapes("final_layer.linear", dim, 64),
        **linear_shapes("final_layer.adaLN_modulation.1", dim, 2 * dim),
        **linear_shapes("single_blocks.0.linear1", dim, 7 * dim),
        **linear_shapes("single_blocks.0.linear2", 5 * dim, dim),
        **linear_shapes("single_blocks.0.modulation.lin", dim, 3 * dim),
    }
    for name, width in embedders.items():
        shapes |= linear_shapes(f"{name}.in_layer", width, dim) | linear_shapes(f"{name}.out_layer", dim, dim)
    for norm in ("single_blocks.0.norm", "double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm"):
        shapes |= {f"{norm}.{part}_norm.scale": (dim,) for part in ("query", "key")}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes |= linear_shapes(f"{block}_mod.lin", dim, 6 * dim)
        shapes |= _attention_and_mlp_shapes(f"{block}_attn", f"{block}_mlp", dim)
    for index in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{index}"
        shapes |= {f"{block}.norm{i}.{part}": (dim,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= linear_shapes(f"{block}.adaLN_modulation.1", dim, 2 * dim)
        shapes |= _attention_and_mlp_shapes(f"{block}.self_attn", f"{block}.mlp", dim)
    return shapes


def _attention_and_mlp_shapes(attention, mlp, dim):
    shapes = linear_shapes(f"{attention}.qkv", dim, 3 * dim) | linear_shapes(f"{attention}.proj", dim, dim)
    return shapes | linear_shapes(f"{mlp}.0", dim, 4 * dim) | linear_shapes(f"{mlp}.2", 4 * dim, dim)


def write_sd3(path, *, depth=2, context=64, pooled=64, seed=0, dtype=torch.bfloat16, metadata=None):
    """A Stable Diffusion 3 diffusion model, for UNETLoader."""
    return save(state_dict(sd3_shapes(depth, context, pooled), seed=seed, dtype=dtype), path, metadata)


def write_flux(path, *, seed=0, dtype=torch.bfloat16):
    """A Flux model, for UNETLoader of newer versions."""
    return save(state_dict(flux_shapes(), seed=seed, dtype=dtype), path)


def write_wan(path, *, layers=2, dim=128, seed=0, dtype=torch.bfloat16, metadata=None):
    """A Wan 2.1 text-to-video diffusion model, for UNETLoader; conditioning 4096 wide, without a pooled output."""
    return save(state_dict(wan_shapes(layers, dim), seed=seed, dtype=dtype), path, metadata)


def write_hunyuan_video(path, *, seed=0, dtype=torch.bfloat16, metadata=None):
    """A HunyuanVideo diffusion model, for UNETLoader; conditioning 4096 wide, pooled output 768."""
    return save(state_dict(hunyuan_video_shapes(), seed=seed, dtype=dtype), path, metadata)


def write_sd3_lora(path, *, depth=2, rank=4, strength=0.5, seed=1, dtype=torch.bfloat16):
    """A LoRA for ``write_sd3`` over its attention and MLP weights, in the generic key format."""
    tensors = {}
    for key, shape in sd3_shapes(depth).items():
        if key.startswith("joint_blocks.") and key.endswith(".weight") and "adaLN" not in key:
            layer = "diffusion_model." + key.removesuffix(".weight")
            down, up = weight(f"{layer}.down", (rank, shape[1]), seed), weight(f"{layer}.up", (shape[0], rank), seed)
            tensors[f"{layer}.lora_down.weight"] = down.to(dtype)
            tensors[f"{layer}.lora_up.weight"] = (strength * up).to(dtype)
            tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    return save(tensors, path)


# --- text encoders


def t5xxl_shapes(vocabulary=32128):
    """T5-XXL with all its layers and its width, by which ComfyUI recognizes it, but small inside."""
    shapes = {
        "shared.weight": (vocabulary, T5_WIDTH),
        "encoder.final_layer_norm.weight": (T5_WIDTH,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, T5_INNER // 64),
    }
    for block in range(T5_LAYERS):
        attention, feed_forward = f"encoder.block.{block}.layer.0", f"encoder.block.{block}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{part}.weight": (T5_INNER, T5_WIDTH) for part in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (T5_WIDTH, T5_INNER)
        shapes |= {f"{feed_forward}.DenseReluDense.wi_{i}.weight": (T5_FEED_FORWARD, T5_WIDTH) for i in range(2)}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (T5_WIDTH, T5_FEED_FORWARD)
        shapes |= {f"{attention}.layer_norm.weight": (T5_WIDTH,), f"{feed_forward}.layer_norm.weight": (T5_WIDTH,)}
    return shapes


def clip_l_shapes(vocabulary=49408):
    """CLIP-L, narrow and with three layers."""
    embeddings = "text_model.embeddings"
    shapes = {
        f"{embeddings}.token_embedding.weight": (vocabulary, CLIP_WIDTH),
        f"{embeddings}.position_embedding.weight": (77, CLIP_WIDTH),
        "text_model.final_layer_norm.weight": (CLIP_WIDTH,),
        "text_model.final_layer_norm.bias": (CLIP_WIDTH,),
        "text_projection.weight": (CLIP_WIDTH, CLIP_WIDTH),
    }
    for layer in range(CLIP_LAYERS):
        prefix = f"text_model.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{prefix}.self_attn.{part}", CLIP_WIDTH, CLIP_WIDTH)
        shapes |= linear_shapes(f"{prefix}.mlp.fc1", CLIP_WIDTH, 4 * CLIP_WIDTH)
        shapes |= linear_shapes(f"{prefix}.mlp.fc2", 4 * CLIP_WIDTH, CLIP_WIDTH)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}.{norm}.weight": (CLIP_WIDTH,), f"{prefix}.{norm}.bias": (CLIP_WIDTH,)}
    return shapes


def t5xxl_state_dict(*, vocabulary=32128, seed=0, dtype=torch.bfloat16):
    """T5 weights. The embedding, which is most of the file, repeats 512 random rows to be fast."""
    shapes = t5xxl_shapes(vocabulary)
    rows = weight("shared.weight", (512, T5_WIDTH), seed).to(dtype)
    del shapes["shared.weight"]
    tensors = state_dict(shapes, seed=seed, dtype=dtype)
    return tensors | {"shared.weight": rows.repeat(math.ceil(vocabulary / 512), 1)[:vocabulary].contiguous()}


def write_t5xxl(path, *, vocabulary=32128, seed=0, dtype=torch.bfloat16):
    """A T5-XXL text encoder, for CLIPLoader (320 MB with the whole vocabulary, 60 MB with 512 words)."""
    return save(t5xxl_state_dict(vocabulary=vocabulary, seed=seed, dtype=dtype), path)


def write_clip_l(path, *, seed=0, dtype=torch.float16):
    """A CLIP-L text encoder, for CLIPLoader."""
    return save(state_dict(clip_l_shapes(), seed=seed, dtype=dtype), path)


# --- all in one


def write_sd3_checkpoint(path, *, depth=2, seed=0, dtype=torch.bfloat16, with_t5=False):
    """An all-in-one SD3 checkpoint, for CheckpointLoaderSimple: diffusion model, CLIP-L, VAE and optionally T5."""
    shapes = sd3_shapes(depth, context=4096, pooled=CLIP_WIDTH + CLIP_G_WIDTH)
    parts = {
        "model.diffusion_model.": state_dict(shapes, seed=seed, dtype=dtype),
        "text_encoders.clip_l.transformer.": state_dict(clip_l_shapes(), seed=seed, dtype=torch.float16),
        "first_stage_model.": load_file(LANDSCAPES_VAE),
    }
    if with_t5:
        parts["text_encoders.t5xxl.transformer."] = t5xxl_state_dict(seed=seed, dtype=dtype)
    return save({prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}, path)
