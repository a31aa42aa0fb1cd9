"""Tiny Landscape Model: a small trained model that ships with the pack, so that the first workflow runs at once."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import torch
from comfy_api.latest import io
from safetensors.torch import load_file

from ..kernels.choices import choose
from .networks import ModelError
from .schema import CATEGORY, newer

MODELS = Path(__file__).resolve().parents[1] / "example_workflows" / "models"
MODEL_FILE = "tiny_sd3_landscapes.safetensors"
DECODER_FILE = "tiny_taesd3_landscapes.safetensors"
SCENES = ("dawn", "day", "dusk", "night")


class NoEncoder(torch.nn.Module):
    """In place of the encoder of a VAE that has none."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        raise ModelError("the VAE of the Tiny Landscape Model decodes only: use Empty SD3 Latent Image")


def load_decoder(path: Path) -> comfy.sd.VAE:
    """A VAE from the decoder of a tiny autoencoder (TAESD). Encoding raises ModelError.

    ComfyUI builds both halves, and logs every weight of the encoder as missing: it gets random ones, then none.
    """
    decoder = comfy.utils.load_torch_file(str(path))
    channels = decoder["taesd_decoder.1.weight"].shape[1]
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict() | decoder)
    vae.first_stage_model.taesd_encoder = NoEncoder()
    return vae


class StochasticFP8DemoModel(io.ComfyNode):
    """A scene -> MODEL, conditioning and VAE."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8DemoModel",
            display_name="Tiny Landscape Model (demo)",
            category=CATEGORY,
            search_aliases=["demo", "example model", "tiny sd3"],
            description=(
                "A 7.8 MB diffusion model that paints 256 x 256 landscapes in seconds, even without a GPU. Use it to "
                "try out quantization, with Empty SD3 Latent Image (256 x 256) and KSampler (euler, simple, 20 steps, "
                "cfg 2.5)."
            ),
            inputs=[
                io.Combo.Input("scene", options=list(SCENES), tooltip="The time of day in the landscape."),
            ],
            outputs=[
                io.Model.Output(id="MODEL", display_name="model", tooltip="The landscape model."),
                io.Conditioning.Output(id="positive", display_name="positive", tooltip="The scene as conditioning."),
                io.Conditioning.Output(
                    id="negative", display_name="negative", tooltip="Empty conditioning for the guidance."
                ),
                io.Vae.Output(id="VAE", display_name="vae", tooltip="The VAE of the landscape model. It decodes only."),
            ],
        )

    @classmethod
    def execute(cls, scene):
        choose(dict.fromkeys(SCENES), scene, "scene")
        model = comfy.sd.load_diffusion_model(str(MODELS / MODEL_FILE))
        vae = load_decoder(MODELS / DECODER_FILE)
        scenes = load_file(MODELS / "tiny_conditioning.safetensors")
        cond, pooled = scenes[f"{scene}.cond"], scenes[f"{scene}.pooled_output"]
        positive = [[cond, {"pooled_output": pooled}]]
        negative = [[torch.zeros_like(cond), {"pooled_output": torch.zeros_like(pooled)}]]
        return io.NodeOutput(model, positive, negative, vae)
