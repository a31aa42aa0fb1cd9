"""The networks inside a MODEL or a CLIP: their tensors by published name, patched or as they are stored.

Network implements the engine's Weights.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import comfy.weight_adapter
import torch

from ..kernels import FORMATS, Recipe, StochasticFP8Error, dequantize_tensor
from ..kernels.display import count
from ..kernels.engine.notes import finely_scaled_note
from ..kernels.engine.weights import Read
from ..kernels.files.header import TensorInfo
from ..kernels.numerics.error_statistics import evenly_spaced
from ..kernels.numerics.nonfinite import FLOATS, count_nonfinite
from ..kernels.numerics.transfers import Prefetcher, to_device
from ..kernels.selection.components import Components
from ..kernels.selection.presets import DIFFUSION, NEVER_QUANTIZED, TEXT_ENCODER
from ..kernels.state_dict.layouts import FULL_PRECISION, LEGACY_MARKER, MARKING_NAMES, ScaledLayer
from ..kernels.state_dict.scaled_state_dict import ScaledStateDict, ScaledWeight, TensorEntry
from ..kernels.state_dict.source_scales import dequantize_blocks
from .devices import make_room
from .published_names import detect_config, diffusion_names, encoder_names

FLOAT8 = {float8.dtype for float8 in FORMATS.values()}

_DTYPE_MARKERS = {"encoder.final_layer_norm.weight", "model.norm.weight"}
"""The loaders of text encoders read the dtype of all other tensors off these: never narrowed."""

SAMPLES = 16
"""Values per tensor that are compared with what the loader was given."""


class ModelError(StochasticFP8Error, ValueError):
    """A MODEL or CLIP that cannot be used as it is; the message names the way out."""


class Network:
    """One network of a patcher: the module under `prefix`, such as `diffusion_model.`."""

    def __init__(self, patcher, prefix: str, name: str):
        """name: what reports and errors call it."""
        self.patcher = patcher
        self.prefix = prefix
        self.name = name
        self.nonfinite: dict[str, tuple[int, int]] = {}
        """Counted when a kept tensor is read for ComfyUI's loader: the report is complete after loading."""
        self.kind = TEXT_ENCODER if patcher.is_clip else DIFFUSION
        self.module = comfy.utils.get_attr(patcher.model, prefix.rstrip("."))
        self._config = getattr(patcher.model, "model_config", None)
        self._bypass = bypass_patches(patcher)
        with patcher.use_ejected(), without_object_patches(patcher):
            self._names = self._published()
            self.linear_names = self._find_linear_names()

    # What the engine asks (Weights)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by published name, without prefix, with the dtype that a file would hold."""
        return {name: TensorInfo.of(self.stored(name)) for name in self._names}

    @cached_property
    def components(self) -> Components:
        return Components(self.tensors, self.kind)

    @cached_property
    def scaled(self) -> dict[str, ScaledWeight]:
        """The weights that are scaled FP8 already."""
        return {name: scaled for name in self._names if (scaled := self._scaled(name)) is not None}

    @property
    def patched(self) -> list[str]:
        """The tensors that a LoRA or another patch changes, LoRAs in bypass mode included."""
        return [name for name in self._names if self._patches(name)]

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The `config` entry, where ComfyUI's loader would choose another class or other settings without it."""
        config = self._config
        if config is None or self.kind != DIFFUSION:
            return {}
        if same_kind(self.detected_config({}), config):
            return {}
        return {"config": json.dumps({"transformer": _loaded_settings(config)}, sort_keys=True)}

    def detected_config(self, metadata: Mapping[str, str]):
        """The configuration that ComfyUI's loader would make for a file of this model; None: not recognised."""
        tensors = {name: self.tensor(name) for name in self._names}
        return detect_config(tensors | beside_tensors(self.patcher), metadata)

    @property
    def notes(self) -> list[str]:
        """FP8 with other scales, or with none: ComfyUI 0.3.75 casts what a file in layout legacy does not scale."""
        others = [name for name in self._names if name not in self.scaled and name not in self._finely_scaled]
        cast = len(self._cast_by_loader) + sum(self.tensor(name).dtype in FLOAT8 for name in others)
        fine = len(self._finely_scaled)
        notes = [finely_scaled_note(fine)] if fine else []
        if cast:
            notes.append(f"{count(cast, 'tensor')} cast to FP8 without a scale by ComfyUI's loader: the loss stays")
        return notes

    def check(self, names: Collection[str], recipe: Recipe) -> None:
        """Raises ModelError for weights that cannot be quantized from here: foreign formats, FP8 without a scale."""
        self.check_readable()
        plain = set(self._names) - set(self.scaled) - self._finely_scaled
        for name in sorted(plain & {f"{linear}.weight" for linear in self.linear_names}):
            weight = self.tensor(name)
            if type(weight) not in (torch.Tensor, torch.nn.Parameter) or not weight.dtype.is_floating_point:
                raise ModelError(
                    f"the weights of {self.name} are {type(weight).__name__} of {weight.dtype} (GGUF or another format "
                    f"that this node cannot read, e.g. '{name}'): load the 16-bit .safetensors file with Load "
                    "Diffusion Model instead"
                )
            if weight.dtype in FLOAT8:
                flag = "--fp8_e4m3fn-text-enc" if self.kind == TEXT_ENCODER else "--fp8_e4m3fn-unet"
                raise ModelError(
                    f"the weights of {self.name} are already FP8 without a scale (e.g. '{name}'), and what that lost "
                    "cannot be recovered: set weight_dtype to default in Load Diffusion Model, start ComfyUI without "
                    f"{flag} and similar options, and start from the 16-bit file"
                )

    def check_readable(self) -> None:
        """Raises ModelError for a network in scaled FP8 that ComfyUI reads in 16 bits only, such as CLIP-L."""
        preset = self.components.main.preset
        if preset.kind == NEVER_QUANTIZED and self.scaled:
            raise self.error(f"is in scaled FP8, and {preset.reason}: load its 16-bit file instead")

    def entry(self, name: str) -> TensorEntry:
        """A tensor as numbers: scaled FP8 multiplied out, patches applied. Not a copy where neither is needed."""
        device = comfy.model_management.unet_offload_device()
        info = self.tensors[name]
        if name in self.scaled:  # and patched, or it would stay scaled
            info = TensorInfo("float32", info.shape)
        elif self._patches(name):  # applied in fp32, and then loaded like the model's other tensors
            info = TensorInfo.of(self.tensor(name))
        return TensorEntry(info, lambda: self._counted(name, self.value(name, device)))

    def input_scale(self, name: str) -> torch.Tensor | None:
        codes, _, module = self._codes(name)
        return _input_scale(module) if codes is not None else None

    @contextmanager
    def reading(self, names: Sequence[str], device: torch.device) -> Iterator[Iterator[Read]]:
        """Weights in the narrowest dtype that holds their values. The next one is sent to a GPU ahead of its turn."""
        has_room = make_room(device, [self.tensors[name].nbytes for name in names])
        with Prefetcher(device, has_room) as prefetcher:
            yield self._read_ahead(names, device, prefetcher)

    def error(self, text: str) -> ModelError:
        return ModelError(f"{self.name} {text}")

    # What saving and calibrating need beside it

    def saved_state_dict(self) -> ScaledStateDict:
        """The network as a file holds it: stored codes and scales, and everything else in its narrowest dtype."""
        state = ScaledStateDict(metadata=self.metadata)
        for name, info in self.tensors.items():
            if name in self.scaled:
                state.add_weight(name, self.scaled[name])
            else:
                state.tensors[name] = TensorEntry(info, partial(self.stored, name))
        return state

    def under_module_names(self, state: ScaledStateDict) -> ScaledStateDict:
        """A state dict of this network under the names in the module. All-in-one checkpoints hold encoders so."""
        return state.renamed({name: self._names.get(name, name) for name in (*state.tensors, *state.weights)})

    def _find_linear_names(self) -> set[str]:
        """The published names of the Linear modules, whatever class a quantized one has."""
        modules = {
            name
            for name, module in self.module.named_modules()
            if isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
        }
        return {
            published.removesuffix(".weight")
            for published, name in self._names.items()
            if name.endswith(".weight") and name.removesuffix(".weight") in modules
        }

    def differing(self, state: ScaledStateDict, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of tensors that this network lacks, has in addition, or holds with values other than it was given.

        tensors: what the loader was given, by name. Values are compared on a few samples per tensor.
        """
        names = {*state.tensors, *state.weights}
        wrong = sorted(names ^ set(self._names))
        for name in sorted(names & set(self._names)):
            if name in state.weights:
                same = name in self.scaled and self._holds(name, state.weights[name])
            else:
                same = name not in self.scaled and samples_equal(self.tensor(name), tensors[name])
            if not same:
                wrong.append(name)
        return wrong

    def _holds(self, name: str, given: ScaledWeight) -> bool:
        """Whether a scaled weight has the codes and the scale that the loader was given."""
        loaded = self.scaled[name]
        return bool(loaded.scale.cpu() == given.scale.cpu()) and samples_equal(loaded.codes.read(), given.codes.read())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor without patches, wherever and in whatever class ComfyUI keeps it."""
        key = self.key(name)
        if key in self.patcher.backup:
            return _data(self.patcher.backup[key].weight)
        if key in self.patcher.hook_backup:
            return _data(self.patcher.hook_backup[key][0])
        return _data(comfy.utils.get_attr(self.module, self._names[name]))

    def value(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on `device` as numbers: scaled FP8 multiplied out, patches applied in fp32."""
        scaled = self.scaled.get(name)
        if scaled:
            x = dequantize_tensor(to_device(scaled.codes.read(), device), scaled.scale)
        elif name in self._finely_scaled:
            x = self._dequantized(name).to(device)
        else:
            x = to_device(self.tensor(name).detach(), device)
        patches = self._patches(name)
        if not patches:
            return x
        return comfy.lora.calculate_weight(patches, x.to(torch.float32, copy=True), self.key(name))

    def is_plain(self, name: str) -> bool:
        """Whether the value is the tensor itself: neither scaled FP8 nor patched."""
        return name not in self.scaled and name not in self._finely_scaled and not self._patches(name)

    def stored(self, name: str) -> torch.Tensor:
        """The tensor without patches as a file holds it: codes, or the narrowest float dtype that keeps every value."""
        if name in self.scaled:
            return self.scaled[name].codes.read()
        if name in self._finely_scaled:
            return self._dequantized(name).bfloat16()
        tensor = self.tensor(name).detach()
        return tensor if name in _DTYPE_MARKERS else narrow(tensor)

    @cached_property
    def _cast_by_loader(self) -> set[str]:
        """Weights that a file in layout legacy does not scale: ComfyUI 0.3.75 casts them to FP8 and gives them scale 1.

        Where every scale is 1, they are those of the file.
        """
        ones = {
            name
            for name in self.scaled
            if self.scaled[name].scale == 1 and hasattr(self._codes(name)[2], "scale_weight")
        }
        return ones if len(ones) < len(self.scaled) else set()

    @cached_property
    def _finely_scaled(self) -> set[str]:
        """FP8 weights with a scale per row or block."""
        return {name for name in self._names if name not in self.scaled and self._codes(name)[0] is not None}

    def _dequantized(self, name: str) -> torch.Tensor:
        codes, scale, _ = self._codes(name)
        try:
            return dequantize_blocks(codes, scale)
        except ValueError as error:
            raise ModelError(
                f"the scale of '{name}' is not understood: {error}; load the 16-bit model instead"
            ) from error

    def _read_ahead(self, names: Sequence[str], device: torch.device, prefetcher: Prefetcher) -> Iterator[Read]:
        for i, name in enumerate(names):
            self._prefetch(prefetcher, names[i : i + 2])
            start = self.tensor(name).device if self.is_plain(name) else device
            yield partial(self._read, name, start, prefetcher)

    def _read(self, name: str, device: torch.device, prefetcher: Prefetcher):
        return narrow(self.value(name, device)), prefetcher

    def _prefetch(self, prefetcher: Prefetcher, names: Sequence[str]) -> None:
        """Send weights ahead, up to one that is patched or widened first: that needs the room on the GPU."""
        for name in names:
            tensor = self.tensor(name)
            if not self.is_plain(name) or tensor.itemsize != 2:
                return
            prefetcher.prefetch(tensor)

    def _counted(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The tensor. How many of its values are NaN or infinite is noted."""
        counts = count_nonfinite(x.contiguous()) if TensorInfo.of(x).dtype in FLOATS else (0, 0)
        if any(counts):
            self.nonfinite[name] = counts
        return x

    def _patches(self, name: str) -> list[tuple]:
        key = self.key(name)
        return [*self.patcher.patches.get(key, ()), *self._bypass.get(key, ())]

    def owner(self, name: str) -> torch.nn.Module:
        """The module that a tensor belongs to. name: its published name."""
        return self.module.get_submodule(self._names[name].rpartition(".")[0])

    def key(self, name: str) -> str:
        """The name of a tensor in the patcher's model."""
        return self.prefix + self._names[name]

    def _published(self) -> dict[str, str]:
        """Published name -> name in the module, of every tensor that a file holds."""
        every = dict(self.module.named_parameters(remove_duplicate=False))
        every |= dict(self.module.named_buffers(remove_duplicate=False))
        saved = self.module.state_dict()
        tensors = {name: tensor for name, tensor in every.items() if name in saved and not _is_marking(name, every)}
        if self.kind == TEXT_ENCODER:
            names = encoder_names(tensors)
        elif self._config is None:
            names = {name: name for name in tensors}
        else:
            names = diffusion_names(self._config, tensors, self._norms())
        return {published: name for name, published in names.items()}

    def _norms(self) -> set[str]:
        """The names in the module of the weights of RMSNorms."""
        modules = self.module.named_modules(remove_duplicate=False)
        return {f"{name}.weight" for name, module in modules if "RMSNorm" in type(module).__name__}

    def _scaled(self, name: str) -> ScaledWeight | None:
        """A weight in FP8 with one scale."""
        codes, scale, module = self._codes(name)
        if codes is None or scale.numel() != 1:
            return None
        layer = ScaledLayer(
            name.removesuffix(".weight"), str(codes.dtype).removeprefix("torch."), self._full_precision(name, module)
        )
        return ScaledWeight(
            layer,
            tuple(codes.shape),
            TensorEntry.of(codes),
            _scalar(scale),
            _input_scale(module),
            source_bytes=codes.nbytes,
        )

    def _codes(self, name: str) -> tuple:
        """(codes, scale, module) of an FP8 weight: a QuantizedTensor, or, in 0.3.75, a module with `scale_weight`.

        (None, None, module) for any other tensor. Raises ModelError for other quantizations.
        """
        weight, module = self.tensor(name), self.owner(name)
        if hasattr(weight, "_qdata"):
            codes, scale = weight._qdata, _scale(weight)
        elif name.endswith(".weight") and weight.dtype in FLOAT8 and hasattr(module, "scale_weight"):
            codes, scale = weight, module.get_parameter("scale_weight")
        else:
            return None, None, module
        if codes.dtype not in FLOAT8 or scale is None:
            kind = getattr(module, "quant_format", None) or codes.dtype
            raise ModelError(f"'{name}' is quantized as {kind}, which is not scaled FP8: load the 16-bit model instead")
        return _data(codes), scale, module

    def _full_precision(self, name: str, module: torch.nn.Module) -> bool:
        """Newer versions keep the choice in the module, 0.3.75 in the model's configuration (for MODELs only)."""
        if self.kind == TEXT_ENCODER:
            return False
        if hasattr(module, "_full_precision_mm_config"):
            return bool(module._full_precision_mm_config)
        layers = getattr(self._config, "layer_quant_config", None)
        if layers:
            return bool(layers.get(name.removesuffix(".weight"), {}).get(FULL_PRECISION, False))
        return not (self._config and self._config.optimizations.get("fp8", False))


@contextmanager
def without_object_patches(patcher) -> Iterator[None]:
    """The model as it was made: ComfyUI leaves object patches in it as long as it is loaded."""
    patched = {}
    for path, original in patcher.object_patches_backup.items():
        patched[path] = comfy.utils.set_attr(patcher.model, path, original)
    try:
        yield
    finally:
        for path, patch in patched.items():
            comfy.utils.set_attr(patcher.model, path, patch)


@contextmanager
def own_buffers(patcher) -> Iterator[None]:
    """Every object patch keeps its buffers, such as the noise levels of a sampling, when the block loads the model.

    With dynamic VRAM, ComfyUI 0.33.0 keeps a loaded model's buffers by name. At the next load it puts them into what
    has the name by then, which another object patch may have taken (its issue 16490). This puts them back before that
    load, with the small weights that ComfyUI had moved to the GPU. What it mixed up earlier stays so.
    """
    put_back = getattr(patcher, "restore_loaded_backups", lambda: None)
    put_back()
    try:
        yield
    finally:
        put_back()


def plain_settings(config) -> dict:
    """The settings in a model configuration's `unet_config` that JSON can hold: not the dtype."""
    return {key: value for key, value in config.unet_config.items() if isinstance(value, (str, int, float, bool, list))}


def same_kind(config, other) -> bool:
    """Whether two model configurations make the same kind of model."""
    return type(config) is type(other) and _loaded_settings(config) == _loaded_settings(other)


def _loaded_settings(config) -> dict:
    """The settings that a model is loaded with. Some models change those of their class afterwards (Wan FlowRVS)."""
    return plain_settings(config) | plain_settings(type(config))


def beside_tensors(patcher) -> dict[str, torch.Tensor]:
    """The weights of a diffusion model beside its network, by the names that its class gives them in files: Stable
    Audio's conditioners, Stable Zero123's projection. ComfyUI's loader wants them in the file of the network."""
    model = patcher.model
    parameters = {name: each for name, each in model.named_parameters() if not name.startswith("diffusion_model.")}
    if not parameters:
        return {}
    takes_network = "unet_state_dict" in inspect.signature(model.state_dict_for_saving).parameters
    saved = model.state_dict_for_saving({}) if takes_network else model.state_dict_for_saving()
    (prefix,) = model.model_config.process_unet_state_dict_for_saving({"": None})
    beside = {
        name: tensor
        for name, tensor in saved.items()
        if torch.is_tensor(tensor) and tensor.numel() and not name.startswith(prefix)
    }
    return {name: narrow(_data(tensor)) for name, tensor in (beside or parameters).items()}


def bypass_managers(injections: Iterable) -> Iterator:
    """The managers of LoRAs in bypass mode behind some injections; none in versions without that mode."""
    known = getattr(comfy.weight_adapter, "BypassInjectionManager", None)
    for injection in injections:
        for cell in getattr(injection.inject, "__closure__", None) or ():
            if known and isinstance(cell.cell_contents, known):
                yield cell.cell_contents


def bypass_patches(patcher) -> dict[str, list[tuple]]:
    """Weight patches that do what a patcher's LoRAs in bypass mode do during the forward pass."""
    patches: dict[str, list[tuple]] = {}
    for injections in patcher.injections.values():
        for manager in bypass_managers(injections):
            for key, (adapter, strength) in manager.adapters.items():
                patches.setdefault(f"{key}.weight", []).append((strength, adapter, 1.0, None, None))
    return patches


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


def _is_marking(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor of a module describes a scaled FP8 weight beside it. Others may have such names, too."""
    owner, dot, ending = name.rpartition(".")
    if ending == LEGACY_MARKER:
        return tensors[name].dtype in FLOAT8
    weight = tensors.get(f"{owner}{dot}weight")
    return ending in MARKING_NAMES and weight is not None and (hasattr(weight, "_qdata") or weight.dtype in FLOAT8)


def _data(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without autograd. After ComfyUI has unloaded a model, its weights can be inference tensors, of which
    PyTorch refuses views outside of inference mode; it does not refuse those of `.data`."""
    return tensor.data if type(tensor) in (torch.Tensor, torch.nn.Parameter) else tensor


def samples_equal(loaded: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether some evenly spaced values are equal, up to the rounding to the loaded dtype."""
    if loaded.numel() != given.numel():
        return False
    loaded, given = loaded.detach().reshape(-1), given.detach().reshape(-1)
    chosen = evenly_spaced(loaded.numel(), SAMPLES)
    loaded, given = loaded[chosen].cpu(), given[chosen].cpu().to(loaded.dtype)
    if loaded.dtype in FLOAT8:
        return torch.equal(loaded.view(torch.uint8), given.view(torch.uint8))
    return torch.allclose(loaded, given, rtol=0, atol=0, equal_nan=True)


def _scale(weight) -> torch.Tensor | None:
    """A QuantizedTensor's scale: in `_params` in newer versions, in a dict in 0.3.75."""
    if hasattr(weight, "_params"):
        return weight._params.scale
    return weight._layout_params.get("scale")


def _input_scale(module: torch.nn.Module) -> torch.Tensor | None:
    """The scale of a layer's inputs, fp32 0-dim: `input_scale`, or in 0.3.75 `scale_input`."""
    scale = getattr(module, "input_scale", getattr(module, "scale_input", None))
    return None if scale is None else _scalar(scale)


def _scalar(scale: torch.Tensor) -> torch.Tensor:
    return _data(scale).float().reshape(())
