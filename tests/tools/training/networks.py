"""The demo model's networks, with the keys and shapes that ComfyUI's own SD3 and TAESD loaders expect."""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

DEPTH = 3
HEAD = 64
HIDDEN = HEAD * DEPTH
LATENT_CHANNELS = 16
CONTEXT_WIDTH = POOLED_WIDTH = 64
TOKENS = 8
POSITIONS = 24
"""Patches per side that have a position. A 256 x 256 picture uses the middle 16."""


def word_tensors(word):
    """There is no text encoder: a word is these tensors, (1, TOKENS, CONTEXT_WIDTH) and (1, POOLED_WIDTH)."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, TOKENS, CONTEXT_WIDTH, generator=generator)
    return cond, torch.randn(1, POOLED_WIDTH, generator=generator)


# --- autoencoder: pictures (B, 3, H, W) in 0..1 <-> latents (B, 16, H/8, W/8)


def encoder():
    stages = [layer for _ in range(3) for layer in (_conv(64, 64, stride=2, bias=False), Block(), Block(), Block())]
    return nn.Sequential(_conv(3, 64), Block(), *stages, _conv(64, LATENT_CHANNELS))


def decoder():
    stages = [
        layer
        for _ in range(3)
        for layer in (Block(), Block(), Block(), nn.Upsample(scale_factor=2), _conv(64, 64, bias=False))
    ]
    return nn.Sequential(SoftClamp(), _conv(LATENT_CHANNELS, 64), nn.ReLU(), *stages, Block(), _conv(64, 3))


class Block(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(_conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _conv(64, 64))

    def forward(self, x):
        return F.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def _conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


# --- diffusion transformer: (latents, timesteps, context, pooled) -> velocity


class MMDiT(nn.Module):
    """Stable Diffusion 3's transformer, tiny."""

    def __init__(self):
        super().__init__()
        self.x_embedder = PatchEmbedder()
        self.t_embedder = Embedder(256)
        self.y_embedder = Embedder(POOLED_WIDTH)
        self.context_embedder = nn.Linear(CONTEXT_WIDTH, HIDDEN)
        self.joint_blocks = nn.ModuleList(JointBlock(last=index == DEPTH - 1) for index in range(DEPTH))
        self.final_layer = FinalLayer()
        self.register_buffer("pos_embed", position_embedding(HIDDEN, POSITIONS))
        self._initialise()

    def forward(self, x, timestep, context, pooled):
        """x: (B, 16, H, W). timestep: (B,) in 0..1000. context: (B, TOKENS, 64). pooled: (B, 64)."""
        batch, height, width = x.shape[0], x.shape[2] // 2, x.shape[3] // 2
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self._positions(height, width)
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angles = timestep.float()[:, None] * frequencies
        condition = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        condition = condition + self.y_embedder(pooled)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = block(context, x, condition)
        patches = self.final_layer(x, condition).view(batch, height, width, 2, 2, LATENT_CHANNELS)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, LATENT_CHANNELS, 2 * height, 2 * width)

    def _positions(self, height, width):
        top, left = (POSITIONS - height) // 2, (POSITIONS - width) // 2
        grid = self.pos_embed.view(1, POSITIONS, POSITIONS, HIDDEN)
        return grid[:, top : top + height, left : left + width].reshape(1, height * width, HIDDEN)

    def _initialise(self):
        """Modulations and the final layer start at zero, as in the paper."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
                nn.init.zeros_(module.weight)


class JointBlock(nn.Module):
    """Text and image attend to each other, each with its own weights."""

    def __init__(self, last):
        super().__init__()
        self.context_block = Stream(only_attends=last)
        self.x_block = Stream(only_attends=False)

    def forward(self, context, x, condition):
        context_heads, context_modulation = self.context_block.heads(context, condition)
        x_heads, x_modulation = self.x_block.heads(x, condition)
        query, key, value = torch.cat([context_heads, x_heads], dim=3)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = context.shape[1]
        x = self.x_block.finish(x, attended[:, tokens:], x_modulation)
        if self.context_block.only_attends:
            return None, x
        return self.context_block.finish(context, attended[:, :tokens], context_modulation), x


class Stream(nn.Module):
    """One stream of a joint block. The last block's context stream ends in its keys and values."""

    def __init__(self, only_attends):
        super().__init__()
        self.only_attends = only_attends
        self.parts = 2 if only_attends else 6
        self.attn = Attention(only_attends)
        self.mlp = None if only_attends else Mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, self.parts * HIDDEN))

    def heads(self, x, condition):
        """Queries, keys and values (3, B, heads, tokens, HEAD), and the modulation's parts."""
        modulation = self.adaLN_modulation(condition).chunk(self.parts, dim=1)
        qkv = self.attn.qkv(modulate(x, *modulation[:2]))
        return qkv.unflatten(2, (3, DEPTH, HEAD)).permute(2, 0, 3, 1, 4), modulation

    def finish(self, x, attended, modulation):
        _, _, attention_gate, shift, scale, mlp_gate = modulation
        x = x + attention_gate[:, None] * self.attn.proj(attended)
        return x + mlp_gate[:, None] * self.mlp(modulate(x, shift, scale))


class Attention(nn.Module):
    def __init__(self, only_attends):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.proj = None if only_attends else nn.Linear(HIDDEN, HIDDEN)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, 4 * LATENT_CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 2 * HIDDEN))

    def forward(self, x, condition):
        return self.linear(modulate(x, *self.adaLN_modulation(condition).chunk(2, dim=1)))


class Embedder(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x):
        return self.mlp(x)


class PatchEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(LATENT_CHANNELS, HIDDEN, 2, 2)


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def position_embedding(width, side):
    """Sines and cosines of both coordinates, (1, side², width)."""
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    coordinates = torch.arange(side, dtype=torch.float64)
    y, x = torch.meshgrid(coordinates, coordinates, indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)[None].float()
