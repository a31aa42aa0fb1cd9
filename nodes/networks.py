"""The networks inside a MODEL or a CLIP: their tensors by published name, patched or as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import comfy.lora
import comfy.ops
import comfy.utils
import torch

from ..kernels import FORMATS, dequantize_tensor
from ..kernels.files.header import TensorInfo
from ..kernels.numerics.transfers import to_device

FLOAT8 = {format.dtype for format in FORMATS.values()}

_SCALES = ("weight_scale", "scale_weight", "input_scale", "scale_input", "scaled_fp8", "comfy_quant")
"""Last parts of names that belong to a quantized weight and are no parameters of their own."""

_RENAMED_NORMS = {"flux", "flux2", "chroma", "chroma_radiance", "hunyuan_video", "hunyuan3d2"}
"""Image models whose RMSNorm tensors are published as `scale`, which newer versions call `weight` in the module."""


_DTYPE_MARKERS = {"encoder.final_layer_norm.weight", "model.norm.weight"}
"""Tensors off which the loaders of text encoders read the type of all others: never narrowed."""


class ModelError(ValueError):
    """A MODEL or CLIP that cannot be used as it is; the message names the way out."""


@dataclass(frozen=True)
class ScaledWeight:
    """A weight that is scaled FP8 already: `codes` (float8) and `scale` (fp32, 0-dim)."""

    codes: torch.Tensor
    scale: torch.Tensor
    full_precision: bool = True
    input_scale: torch.Tensor | None = None

    @property
    def format(self) -> str:
        return str(self.codes.dtype).removeprefix("torch.")


class Network:
    """One network of a patcher: the module under `prefix`, such as `diffusion_model.`."""

    def __init__(self, patcher, prefix: str):
        self.patcher = patcher
        self.prefix = prefix
        self.module = comfy.utils.get_attr(patcher.model, prefix.rstrip("."))
        self._config = getattr(patcher.model, "model_config", None)
        with patcher.use_ejected():
            self._names = dict(self._published())
        self.scaled = {name: scaled for name in self._names if (scaled := self._scaled(name)) is not None}
        """The weights that are scaled FP8 already, by published name."""
        self._infos: dict[str, TensorInfo] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The published names of all tensors, without prefix."""
        return tuple(self._names)

    @property
    def is_text_encoder(self) -> bool:
        """Text encoders multiply in full precision whatever a file says, and 0.3.75 cannot load one that says so."""
        return self.patcher.is_clip

    @property
    def linear_names(self) -> set[str]:
        """The names of the Linear modules, whatever class a quantized one has."""
        return {
            name
            for name, module in self.module.named_modules()
            if isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
        }

    @property
    def patched_names(self) -> list[str]:
        """The tensors that a LoRA or another patch changes."""
        return [name for name in self._names if self._key(name) in self.patcher.patches]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor without patches, wherever and in whatever class ComfyUI keeps it."""
        key = self._key(name)
        if key in self.patcher.backup:
            return self.patcher.backup[key].weight
        if key in self.patcher.hook_backup:
            return self.patcher.hook_backup[key][0]
        return comfy.utils.get_attr(self.module, self._names[name])

    def value(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on `device` as numbers: scaled FP8 multiplied out, patches applied in fp32."""
        scaled = self.scaled.get(name)
        if scaled:
            x = dequantize_tensor(to_device(scaled.codes, device), scaled.scale)
        else:
            x = to_device(self.tensor(name).detach(), device)
        patches = self.patcher.patches.get(self._key(name))
        if not patches:
            return x
        return comfy.lora.calculate_weight(patches, x.to(torch.float32, copy=True), self._key(name))

    def is_plain(self, name: str) -> bool:
        """Whether the value is the tensor itself: neither scaled FP8 nor patched."""
        return name not in self.scaled and self._key(name) not in self.patcher.patches

    def stored(self, name: str) -> torch.Tensor:
        """The tensor as a file holds it: codes, or the narrowest float type that keeps every value."""
        if name in self.scaled:
            return self.scaled[name].codes
        tensor = self.tensor(name).detach()
        return tensor if name in _DTYPE_MARKERS else narrow(tensor)

    def info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            self._infos[name] = TensorInfo.of(self.stored(name))
        return self._infos[name]

    def check_source(self) -> None:
        """Raises ModelError for weights that cannot be quantized from here: foreign formats, FP8 without a scale."""
        weights = {f"{name}.weight" for name in self.linear_names} & set(self.names) - set(self.scaled)
        for name in sorted(weights):
            weight = self.tensor(name)
            if type(weight) not in (torch.Tensor, torch.nn.Parameter) or not weight.dtype.is_floating_point:
                raise ModelError(
                    f"the weights of this model are {type(weight).__name__} of {weight.dtype} (GGUF or another foreign "
                    f"format, e.g. '{name}'): load the 16-bit .safetensors file with Load Diffusion Model instead"
                )
            if weight.dtype in FLOAT8:
                raise ModelError(
                    f"the weights of this model are FP8 without a scale already (e.g. '{name}'), and what that lost "
                    "cannot be brought back: set weight_dtype to default in Load Diffusion Model, and start from the "
                    "16-bit file"
                )

    def _key(self, name: str) -> str:
        return self.prefix + self._names[name]

    def _published(self) -> Iterator[tuple[str, str]]:
        """(published name, name in the module) of every tensor that a file holds."""
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        tensors |= dict(self.module.named_buffers(remove_duplicate=False))
        saved = self.module.state_dict()
        for name in tensors:
            if name in saved and name.rpartition(".")[2] not in _SCALES:
                yield self._published_name(name), name

    def _published_name(self, name: str) -> str:
        owner, _, ending = name.rpartition(".")
        image_model = self._config.unet_config.get("image_model") if self._config else None
        if ending != "weight" or image_model not in _RENAMED_NORMS:
            return name
        is_norm = "RMSNorm" in type(comfy.utils.get_attr(self.module, owner)).__name__
        return f"{owner}.scale" if is_norm else name

    def _scaled(self, name: str) -> ScaledWeight | None:
        """The codes and the scale of a weight: a QuantizedTensor, or, in 0.3.75, a module with `scale_weight`."""
        weight = self.tensor(name)
        module = comfy.utils.get_attr(self.module, self._names[name].rpartition(".")[0]) if "." in name else self.module
        if hasattr(weight, "_qdata"):
            codes, scale = weight._qdata, _scale(weight)
        elif weight.dtype in FLOAT8 and hasattr(module, "scale_weight"):
            codes, scale = weight, module.scale_weight
        else:
            return None
        if codes.dtype not in FLOAT8 or scale is None or scale.numel() != 1:
            kind = getattr(module, "quant_format", None) or codes.dtype
            raise ModelError(f"'{name}' is quantized as {kind}, which is not scaled FP8: load the 16-bit model instead")
        input_scale = getattr(module, "input_scale", getattr(module, "scale_input", None))
        return ScaledWeight(
            codes.detach(), scale.detach().float().reshape(()), self._full_precision(name, module), input_scale
        )

    def _full_precision(self, name: str, module: torch.nn.Module) -> bool:
        """Newer versions keep the choice in the module, 0.3.75 in the model's configuration (for MODELs only)."""
        if self.is_text_encoder:
            return False
        if hasattr(module, "_full_precision_mm_config"):
            return bool(module._full_precision_mm_config)
        layers = getattr(self._config, "layer_quant_config", None)
        if layers:
            return bool(layers.get(name.removesuffix(".weight"), {}).get("full_precision_matrix_mult", False))
        return not (self._config and self._config.optimizations.get("fp8", False))


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in bf16, or else fp16, if that keeps every value, or else as it is; unscaled FP8 is widened to bf16.

    NaN keeps a tensor as it is.
    """
    if tensor.dtype in FLOAT8:
        return tensor.to(torch.bfloat16)
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        narrowed = tensor.to(dtype)
        if torch.equal(narrowed.to(tensor.dtype), tensor):
            return narrowed
    return tensor


def _scale(weight) -> torch.Tensor | None:
    """A QuantizedTensor's scale: in `_params` in newer versions, in a dict in 0.3.75."""
    if hasattr(weight, "_params"):
        return weight._params.scale
    return weight._layout_params.get("scale")
