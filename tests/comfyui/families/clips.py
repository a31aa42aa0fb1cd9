"""Text encoders as examples for the matrix. Runs inside ComfyUI's process."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.qwen_vl
import tiny_models
import torch
from comfyui.families import building, loading
from comfyui.families.encoders import ENCODERS, SMALL_QWEN35_VISION, SMALL_VISION
from comfyui.families.examples import RECIPE, Example
from comfyui_version import __version__ as VERSION
from safetensors.torch import save_file
from stochastic_fp8_pack.nodes.quantize_model import StochasticFP8QuantizeTextEncoder

TOKENS = [[1, 5, 7, 9, 11, 2] + [3] * 71]


def absent(encoder):
    """Why the running ComfyUI cannot load this kind of file, or ""."""
    for enumeration, member in ((comfy.sd.TEModel, encoder.detected), (comfy.sd.CLIPType, encoder.clip_type)):
        if member not in enumeration.__members__:
            return f"ComfyUI {VERSION} has no {enumeration.__name__}.{member}"
    return ""


def transformers(model):
    """The encoders of a text-encoder class by name."""
    return {
        name: child.transformer
        for name, child in model.named_children()
        if isinstance(getattr(child, "transformer", None), torch.nn.Module)
    }


def exact_in_16_bits(weight):
    """A weight in bf16 that fp16 holds too, and whose scale is a power of two, as is 448 / 1.75 and 57344 / 1.75.

    ComfyUI takes either type, and multiplies codes and scales in it.
    """
    weight = weight.half().bfloat16()
    if weight.dim() == 2:
        largest = weight.abs().max()
        weight.view(-1)[weight.abs().argmax()] = 1.75 * 2.0 ** math.ceil(math.log2(largest / 1.75))
    return weight


class Clip(Example):
    """One encoder, in the hands of what CLIPLoader calls."""

    folder = "text_encoders"
    tolerance = 1e-5
    smallest = 2.0**-24
    """Of fp16."""

    def __init__(self, name):
        self.encoder = ENCODERS[name]
        self.refused = self.encoder.refused
        self._whole = model = self.encoder.create()(device="cpu", dtype=torch.float32)
        self.name = self.encoder.name or next(iter(transformers(model)))
        self._companions = [self._write_companion(i, make(model)) for i, make in enumerate(self.encoder.companions)]

    def _write_companion(self, i, tensors):
        path = self.path(f"companion_{i}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return path

    def tensors(self):
        module = transformers(self._whole)[self.name]
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        made = {}
        for name, tensor in module.state_dict().items():
            if name in parameters:
                tensor = exact_in_16_bits(tiny_models.weight(name, tuple(tensor.shape), 0))
            made[self.encoder.publish(name)] = tensor.clone()
        return made | {name: make() for name, make in self.encoder.tokenizer.items()}

    def kinds(self, clip):
        return building.kinds(self.encoder, self.network(clip))

    def load(self, path):
        paths = [str(each) for each in (path, *self._companions)]
        kind = comfy.sd.CLIPType[self.encoder.clip_type]
        return comfy.sd.load_clip(paths, clip_type=kind, model_options={})  # 0.3.75 writes into its default

    def network(self, clip):
        return transformers(clip.cond_stage_model)[self.name]

    def settings(self, clip):
        network = self.network(clip)
        return {"class": type(clip.cond_stage_model).__name__, "encoder": type(network).__name__}

    def misfit(self, clip):
        wanted = self._whole.__class__.__name__
        found = self.settings(clip)["class"]
        return "" if found == wanted else f"ComfyUI takes it for {found}, not {wanted}: the row is wrong"

    def forward(self, clip):
        comfy.model_management.load_models_gpu([clip.patcher])
        torch.manual_seed(0)
        return loading.as_one(getattr(clip.cond_stage_model, self.name)(TOKENS))

    def quantize(self, clip, format):
        return StochasticFP8QuantizeTextEncoder.execute(clip, format=format, keep="", only="", **RECIPE).result

    def to_save(self, clip):
        return {"clip": clip}


# --- small sizes

_create = comfy.sd1_clip.SDClipModel.__init__
_detect = comfy.sd.detect_te_model
_create_vision = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer.__init__
_small = {}
"""While a row lasts: the encoder's `settings`, and its tensors of `real` size on the meta device."""


def _create_small(self, *arguments, **keywords):
    if _small:
        config = keywords.get("textmodel_json_config")
        if config is None:
            config = Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json")
        if not isinstance(config, dict):
            config = json.loads(Path(config).read_text())
        keywords["textmodel_json_config"] = config | _small["settings"]
    _create(self, *arguments, **keywords)


def _create_small_vision(self, *arguments, **keywords):
    _create_vision(self, *arguments, **(keywords | SMALL_VISION if _small else keywords))


def _create_small_qwen35_vision(self, config, *arguments, **keywords):
    _create_qwen35_vision(self, config | SMALL_QWEN35_VISION if _small else config, *arguments, **keywords)


def _detect_small(state_dict):
    return _detect({name: _small.get("real", {}).get(name, tensor) for name, tensor in state_dict.items()})


comfy.sd1_clip.SDClipModel.__init__ = _create_small
comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer.__init__ = _create_small_vision
comfy.sd.detect_te_model = _detect_small
try:
    from comfy.text_encoders.qwen35 import Qwen35VisionModel  # Qwen3-VL's, too
except ImportError:  # older versions
    pass
else:
    _create_qwen35_vision = Qwen35VisionModel.__init__
    Qwen35VisionModel.__init__ = _create_small_qwen35_vision


@contextmanager
def made_small(name):
    """While this lasts, ComfyUI builds a row's encoder small, and takes small files for real ones."""
    encoder = ENCODERS[name]
    networks = transformers(encoder.create()(device="meta", dtype=torch.float32))
    network = networks[encoder.name or next(iter(networks))]
    real = {encoder.publish(key): tensor for key, tensor in network.state_dict().items()}
    _small.update(settings=dict(encoder.small), real=real)
    try:
        yield Clip(name)
    finally:
        _small.clear()
