"""The networks that a set of tensors holds, and the family of each one, found by its keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..files.header import TensorInfo
from .linear import is_linear
from .presets import DIFFUSION, NEVER_QUANTIZED, PRESETS, TEXT_ENCODER, Preset

DIFFUSION_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.", "")
"""Prefixes of diffusion models in files, in the order in which they are tried."""
_DETECTED_PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.", "")
"""Prefixes of diffusion models that ComfyUI removes while it detects the family."""
WRAPPERS = ("diffusion_model.", "transformer.", "module.", "_orig_mod.", "unet.", "dit.")
"""Prefixes of other programs, under which no ComfyUI detects a diffusion model."""
_VAE_PREFIXES = ("first_stage_model.", "vae.", "pretransform.model.")
_TEXT_ENCODER_PREFIX = re.compile(
    r"text_encoders\.[^.]+\.transformer\.|text_encoders?\.|cond_stage_model\.|conditioner\.embedders\.\d+\."
)


@dataclass(frozen=True)
class Component:
    """One network in a file: the keys that start with `prefix`, and not with a longer prefix of another network."""

    prefix: str
    family: str

    @property
    def preset(self) -> Preset:
        return PRESETS[self.family]


class Components:
    """The networks that a set of tensors holds: one, or those of an all-in-one checkpoint."""

    def __init__(self, tensors: Mapping[str, TensorInfo], kind: str | None = None):
        """kind: DIFFUSION or TEXT_ENCODER for the bare names of one network of that kind; None for a whole file.

        undetected_prefix: the prefix under which no ComfyUI detects the main network, or "". renamed: a name of the
        main network that ComfyUI 0.3.75 renames in the weights only, or "".
        """
        self._tensors = tensors
        if kind is None:
            self.main = _main_component(tensors)
            self.others = tuple(_other_components(tensors, self.main.prefix))
            self.undetected_prefix = _undetected_prefix(tensors, self.main)
        else:
            self.main, self.others = Component("", _SINGLE_FAMILY[kind](tensors)), ()
            self.undetected_prefix = ""
        self.renamed = _renamed(tensors, self.main)

    @cached_property
    def all(self) -> tuple[Component, ...]:
        return (self.main, *self.others)

    @property
    def all_in_one(self) -> bool:
        """Whether the names of the main network's layers carry a prefix."""
        return bool(self.main.prefix)

    def holds(self, component: Component, keys: Mapping[str, int | None]) -> bool:
        """Whether a network has all these keys. keys: as in Preset.detect."""
        return _present(keys, self._tensors, component.prefix)

    def has_biases(self, component: Component) -> bool:
        """Whether a network has a tensor that is called `bias`."""
        return any(key.endswith(".bias") and key.startswith(component.prefix) for key in self._tensors)

    def of(self, key: str) -> Component | None:
        """The component that a tensor belongs to. None: outside all networks, e.g. an optimizer's state."""
        for component in self.others:
            if key.startswith(component.prefix):
                return component
        return self.main if key.startswith(self.main.prefix) else None

    def is_linear(self, key: str, info: TensorInfo) -> bool:
        """Whether a tensor is the weight of a Linear layer, judged by its network, name and shape."""
        component = self.of(key)
        return is_linear(key, info, component.preset if component else None)

    def prefix_of(self, key: str) -> str:
        """The prefix of a tensor's component, or ""."""
        component = self.of(key)
        return component.prefix if component else ""


def detect_family(tensors: Mapping[str, TensorInfo], prefix: str = "", kinds: tuple[str, ...] = ()) -> str:
    """The family of the network under `prefix`, or "unknown". kinds: consider these kinds only; (): all of them."""
    for family, preset in PRESETS.items():
        if (not kinds or preset.kind in kinds) and any(_present(keys, tensors, prefix) for keys in preset.detect):
            return family
    return "unknown"


def _text_encoder_family(tensors: Mapping[str, TensorInfo], prefix: str = "") -> str:
    family = detect_family(tensors, prefix, (TEXT_ENCODER, NEVER_QUANTIZED))
    return "other_text_encoder" if family == "unknown" else family


_SINGLE_FAMILY = {
    DIFFUSION: lambda tensors: detect_family(tensors, kinds=(DIFFUSION,)),
    TEXT_ENCODER: _text_encoder_family,
}


def _present(keys: Mapping[str, int | None], tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
    found = [(tensors.get(prefix + key), size) for key, size in keys.items()]
    return all(info is not None and size in (None, *info.shape[:1]) for info, size in found)


def _main_component(tensors: Mapping[str, TensorInfo]) -> Component:
    for prefix in DIFFUSION_PREFIXES:
        family = detect_family(tensors, prefix, (DIFFUSION,))
        if family != "unknown":
            return Component(prefix, family)
    family = detect_family(tensors)
    if family != "unknown":
        return Component("", family)
    return Component(_unknown_prefix(tensors), "unknown")


def _unknown_prefix(tensors: Mapping[str, TensorInfo]) -> str:
    """ComfyUI's rule: the prefix of more than five keys. `model.` counts only beside a VAE or a text encoder."""
    counts = {prefix: sum(key.startswith(prefix) for key in tensors) for prefix in DIFFUSION_PREFIXES[:4]}
    prefix = max(counts, key=counts.__getitem__)
    if counts[prefix] > 5:
        return prefix
    beside = any(key.startswith(_VAE_PREFIXES) or _TEXT_ENCODER_PREFIX.match(key) for key in tensors)
    return "model." if beside and any(key.startswith("model.") for key in tensors) else ""


def _undetected_prefix(tensors: Mapping[str, TensorInfo], main: Component) -> str:
    if main.family != "unknown":
        return "" if main.prefix in _DETECTED_PREFIXES else main.prefix
    counts = Counter(prefix for key in tensors for prefix in _prefixes(key))
    common = [prefix for prefix, count in counts.items() if 2 * count > len(tensors)]
    wrappers = [prefix for prefix in common if {f"{part}." for part in prefix[:-1].split(".")} <= {*WRAPPERS}]
    if wrappers:
        return max(wrappers, key=len)
    for prefix in sorted(common, key=len):
        if detect_family(tensors, prefix, (DIFFUSION, TEXT_ENCODER)) != "unknown":
            return "" if prefix in _DETECTED_PREFIXES else prefix
    return ""


def _prefixes(key: str) -> Iterable[str]:
    """The first one, two and three parts of a name: "a.b.c.d" has "a.", "a.b." and "a.b.c."."""
    parts = key.split(".", 3)[:-1]
    return (".".join(parts[:count]) + "." for count in range(1, len(parts) + 1))


def _renamed(tensors: Mapping[str, TensorInfo], main: Component) -> str:
    parts = main.preset.renamed
    names = (key for key in tensors if parts and key.startswith(main.prefix) and key.endswith(".weight"))
    return next((name for name in names if any(part in name for part in parts)), "")


def _other_components(tensors: Mapping[str, TensorInfo], main_prefix: str) -> Iterator[Component]:
    prefixes = {match.group() for key in tensors if (match := _TEXT_ENCODER_PREFIX.match(key))}
    for prefix in sorted(prefixes, key=len, reverse=True):
        yield Component(prefix, _text_encoder_family(tensors, prefix))
    for prefix in _VAE_PREFIXES:
        if prefix != main_prefix and any(key.startswith(prefix) for key in tensors):
            yield Component(prefix, "vae")
