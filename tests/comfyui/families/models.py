"""Diffusion models as examples for the matrix. Runs inside ComfyUI's process."""

import comfy.model_management
import torch
from comfyui.families import building, loading
from comfyui.families.examples import LAYOUTS, RECIPE, Example
from comfyui.families.table import FAMILIES
from stochastic_fp8_pack.nodes.quantize_model import StochasticFP8Quantize

import nodes


class Model(Example):
    """One family, in the hands of ComfyUI's UNETLoader."""

    folder = "diffusion_models"
    tolerance = 1e-5

    def __init__(self, name, short=False):
        """short: layout native only."""
        self.name = name
        self.family = FAMILIES[name]
        self.prefix, self.cut = self.family.prefix, self.family.cut
        self.dropped, self.metadata = self.family.dropped, self.family.metadata
        self.layouts = ("native",) if short else LAYOUTS

    def tensors(self):
        return building.small_tensors(self.family)

    def kinds(self, model):
        return building.kinds(self.family, self.network(model))

    def load(self, path):
        return nodes.UNETLoader().load_unet(path.name, "default")[0]

    def network(self, model):
        return model.model.diffusion_model

    def settings(self, model):
        """What the loader chose: the class, the settings and the kind of sampling."""
        config = model.model.model_config
        unet_config = {key: value for key, value in config.unet_config.items() if key != "dtype"}
        kinds = type(config).__name__, type(model.model).__name__, model.model.model_type.name
        return dict(zip(("class", "model", "sampling"), kinds, strict=True)) | unet_config

    def misfit(self, model):
        found = type(model.model.model_config).__name__
        return "" if found == self.family.comfy_class else f"ComfyUI takes it for {found}: the row is wrong"

    def forward(self, model):
        config = {**self.family.real, **self.family.small}
        latent, timestep, keywords = self.family.inputs(config)
        options = dict(keywords.pop("transformer_options", {}))
        comfy.model_management.load_models_gpu([model])
        run = model.model.diffusion_model if self.family.bare else model.model.apply_model
        torch.manual_seed(0)
        return loading.as_one(run(latent, timestep, transformer_options=options, **keywords))

    def quantize(self, model, format):
        return StochasticFP8Quantize.execute(model, format=format, keep="", only="", **RECIPE).result

    def to_save(self, model):
        return {"model": model}
