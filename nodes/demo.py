"""Tiny Landscape Model: a small trained model that ships with the pack, so that the first workflow runs at once."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io
from safetensors.torch import load_file

from ..kernels.choices import choose
from .schema import CATEGORY, newer

MODELS = Path(__file__).resolve().parents[1] / "example_workflows" / "models"
SCENES = ("dawn", "day", "dusk", "night")


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
                io.Vae.Output(id="VAE", display_name="vae", tooltip="The VAE of the landscape model."),
            ],
        )

    @classmethod
    def execute(cls, scene):
        choose(dict.fromkeys(SCENES), scene, "scene")
        model = comfy.sd.load_diffusion_model(str(MODELS / "tiny_sd3_landscapes.safetensors"))
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "tiny_taesd3_landscapes.safetensors")))
        scenes = load_file(MODELS / "tiny_conditioning.safetensors")
        cond, pooled = scenes[f"{scene}.cond"], scenes[f"{scene}.pooled_output"]
        positive = [[cond, {"pooled_output": pooled}]]
        negative = [[torch.zeros_like(cond), {"pooled_output": torch.zeros_like(pooled)}]]
        return io.NodeOutput(model, positive, negative, vae)
