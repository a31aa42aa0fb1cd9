"""Short ways to write graphs with the pack's nodes, and to read their results."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui.graph import Graph
from safetensors import safe_open
from safetensors.torch import load_file, save_file

RECIPE = {
    "format": "float8_e4m3fn",
    "rounding": "stochastic",
    "scaling": "absmax",
    "seed": 0,
    "layers": "auto",
}
FILE_OPTIONS = {"layout": "native", "overwrite": False, "requantize": False}
NEW = (0, 4)
"""The first version that reads inline entries and E5M2."""

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_numbers = itertools.count(1)


def write_landscapes(path):
    """The landscape model with values that bfloat16 and float16 both hold: on a GPU, ComfyUI may load it in either."""
    save_file({key: tensor.half().to(tensor.dtype) for key, tensor in load_file(tiny_models.LANDSCAPES).items()}, path)


@dataclass(frozen=True)
class Family:
    """A tiny model: its file, and how to sample with it. ``sample`` adds the nodes that it needs."""

    name: str
    write: object
    width: int
    pooled: int
    latent: tuple

    def sample(self, graph, model, **sampler):
        conditioning = graph.add("TestRandomConditioning", seed=1, tokens=8, width=self.width, pooled_width=self.pooled)
        node, sizes = self.latent
        return graph.sample(model, conditioning, conditioning, graph.add(node, batch_size=1, **sizes), **sampler)


FAMILIES = {
    "sd3": Family(
        "sd3.safetensors",
        write_landscapes,
        64,
        64,
        ("EmptySD3LatentImage", {"width": 128, "height": 128}),
    ),
    "wan": Family(
        "wan.safetensors",
        tiny_models.write_wan,
        4096,
        0,
        ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 5}),
    ),
    "hunyuan_video": Family(
        "hunyuan_video.safetensors",
        tiny_models.write_hunyuan_video,
        4096,
        768,
        ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 5}),
    ),
}


class Bench:
    """A server with the tiny models, and the graphs that many tests write."""

    def __init__(self, server):
        self.server = server
        self.new = server.version >= NEW
        self.exact = server.on_cpu
        """Whether ComfyUI loads models as stored and computes in fp32. On a GPU it uses half precision."""
        self.dynamic_vram = self.new and not server.on_cpu and "--disable-dynamic-vram" not in server.arguments
        """Whether ComfyUI fetches every weight from its file for each call."""

    def close(self, one, other):
        """Whether latents differ by no more than rounding during the computation explains."""
        tolerance = 1e-4 if self.exact else 0.01 * one.abs().max()
        return (one - other).abs().max() <= tolerance

    def same_values(self, one, other):
        """Whether tensors that were not quantized are equal; on a GPU, up to a cast to 16 bits."""
        relative, absolute = (0, 0) if self.exact else (2**-8, 1e-7)
        return torch.allclose(one.double(), other.double(), relative, absolute, equal_nan=True)

    def model_file(self, family):
        path = self.server.models("diffusion_models") / FAMILIES[family].name
        if not path.exists():
            FAMILIES[family].write(path)
        return path

    def load(self, graph, name, weight_dtype="default"):
        """UNETLoader of a file name, or of a family's file."""
        if name in FAMILIES:
            name = self.model_file(name).name
        return graph.add("UNETLoader", unet_name=str(name), weight_dtype=weight_dtype)

    def load_dynamic(self, graph, name):
        """`load`, with ComfyUI's patcher for dynamic VRAM. Skips the test where ComfyUI has none."""
        if "TestDynamicModel" not in self.server.object_info() or not (self.exact or self.dynamic_vram):
            pytest.skip("this ComfyUI has no dynamic VRAM")
        return graph.add("TestDynamicModel", model=self.load(graph, name))

    def keep(self, graph, value, **kind):
        """Add a node that saves a latent exactly, for ``run``. conditioning=True, as_="image": another type."""
        name = f"kept_{next(_numbers)}.safetensors"  # unique: ComfyUI may reuse a result instead of saving it
        if "conditioning" in kind:
            return graph.add("TestSaveConditioning", name=name, conditioning=value)
        return graph.add("TestSaveTensor", name=name, **{kind.get("as_", "latent"): value})

    def run(self, graph, *kept):
        """Run a graph. Returns the tensors of its ``keep`` nodes, or the only one."""
        entry = self.server.queue(graph.prompt)
        tensors = [load_file(self.server.files(entry, node.id, "tensors")[0])["samples"] for node in kept]
        return tensors[0] if len(tensors) == 1 else tensors

    def texts(self, graph, *nodes):
        """Run a graph. Returns the texts that these nodes show."""
        outputs = self.server.queue(graph.prompt)["outputs"]
        return [outputs[node.id]["text"][0] for node in nodes]

    def sampled(self, family, name, **sampler):
        """The latents that a model file samples."""
        graph = Graph()
        latent = FAMILIES[family].sample(graph, self.load(graph, name), **sampler)
        return self.run(graph, self.keep(graph, latent))

    def saved(self, name, folder="diffusion_models"):
        """The path of a file that the save node named."""
        return self.server.output / folder / name

    def place(self, name, tensors, folder="diffusion_models", metadata=None):
        """Write a model file where the loaders find it. Returns its name."""
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, self.server.models(folder) / name, metadata
        )
        return name


def quantize(graph, model, **choices):
    return graph.add("StochasticFP8Quantize", model=model, **{**RECIPE, **choices})


def save(graph, prefix, layout="native", **what):
    return graph.add("StochasticFP8Save", filename_prefix=prefix, layout=layout, **what)


def quantize_and_save(bench, family, prefix, layout="native", **choices):
    """Quantize a family's model in the graph and save it. Returns the file's path."""
    graph = Graph()
    saver = save(graph, prefix, layout, model=quantize(graph, bench.load(graph, family), **choices))
    return bench.saved(bench.texts(graph, saver)[0])


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def recipe_of(path):
    return json.loads(metadata_of(path)["stochastic_fp8"])


def codes_and_scales(path):
    """Codes (as bytes) and scales of a native file, by tensor key."""
    tensors = load_file(path)
    codes = {key: value.view(torch.uint8) for key, value in tensors.items() if value.dtype in FLOAT8}
    scales = {key: value for key, value in tensors.items() if key.endswith(".weight_scale")}
    return codes, scales


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def multiplied_out(path):
    """The dequantized fp32 weights of a scaled FP8 file: the reference of every comparison."""
    tensors = load_file(path)
    plain = {}
    for key, tensor in tensors.items():
        layer = key.removesuffix(".weight")
        scale = tensors.get(f"{layer}.weight_scale", tensors.get(f"{layer}.scale_weight"))
        if key.endswith((".weight_scale", ".scale_weight", ".comfy_quant", "scaled_fp8")):
            continue
        plain[key] = tensor.float() * scale if scale is not None and key.endswith(".weight") else tensor
    return plain


def rest_cast_to_float8(path, dtype=torch.float8_e4m3fn):
    """The weights that ComfyUI 0.3.75 uses for a legacy file: unquantized Linear weights and biases become FP8."""
    plain, tensors = multiplied_out(path), load_file(path)
    for key, tensor in plain.items():
        weight = key.rpartition(".")[0] + ".weight"
        linear = weight in plain and plain[weight].dim() == 2
        if linear and tensors[key].dtype not in FLOAT8:
            plain[key] = tensor.float().to(dtype).float()
    return plain


def write_oracle(bench, name, tensors):
    """Place plain weights as a model file of their own."""
    return bench.place(name, tensors)


def lora_of(path, strength=1.0):
    """Weight name -> the change by a LoRA file in the generic format, computed from its definition."""
    tensors = load_file(path)
    deltas = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            layer = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{layer}.lora_up.weight"], tensors[f"{layer}.alpha"]
            factor = strength * alpha.item() / down.shape[0]
            name = layer.removeprefix("diffusion_model.") + ".weight"
            deltas[name] = factor * (up.float() @ down.float())
    return deltas


def log_since(server, mark):
    return server.log()[mark:]


def temporary_files(server):
    return list(Path(server.output).rglob(".stochastic_fp8-*.tmp"))
