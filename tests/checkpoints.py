"""Small state dicts of each model family, with the key names of the published files, and raw safetensors files."""

import json
import struct

import torch


def weights(*names, shape=(32, 16), dtype=torch.bfloat16, seed=0):
    """Normal random tensors, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name in names}


def sd3(prefix="", blocks=2):
    """An SD3 MMDiT: per block four Linear weights to quantize and one modulation to keep."""
    parts = [
        f"joint_blocks.{i}.{part}.weight"
        for i in range(blocks)
        for part in (
            "context_block.attn.qkv",
            "x_block.attn.qkv",
            "x_block.mlp.fc1",
            "x_block.mlp.fc2",
            "x_block.adaLN_modulation.1",
        )
    ]
    tensors = weights(*parts, "context_embedder.weight", "final_layer.linear.weight")
    tensors |= weights("joint_blocks.0.x_block.attn.qkv.bias", shape=(32,))
    tensors |= weights("x_embedder.proj.weight", shape=(32, 16, 2, 2))
    return {prefix + name: tensor for name, tensor in tensors.items()}


def t5xxl(prefix="", rows=10240):
    """The tensors that identify a T5-XXL, and some of its layers."""
    tensors = weights("encoder.block.23.layer.1.DenseReluDense.wi_1.weight", shape=(rows, 16))
    tensors |= weights(
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.k.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    )
    tensors |= weights("encoder.final_layer_norm.weight", shape=(16,))
    return {prefix + name: tensor for name, tensor in tensors.items()}


def clip_l(prefix=""):
    return weights(prefix + "text_model.encoder.layers.0.mlp.fc1.weight", prefix + "text_model.final.weight")


def all_in_one():
    """SD3 with CLIP-L, T5-XXL and a VAE."""
    return {
        **sd3("model.diffusion_model."),
        **clip_l("text_encoders.clip_l.transformer."),
        **t5xxl("text_encoders.t5xxl.transformer."),
        **weights("first_stage_model.decoder.mid.attn.weight", "first_stage_model.decoder.conv_in.weight"),
    }


def entry(dtype, shape, start, end):
    """One tensor's header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw_file(path, header, data=b"", length=None):
    """Write a file with this header, valid or not: a dict, or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
