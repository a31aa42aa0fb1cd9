"""Which tensors are quantized: Linear weights, less those that a preset or the user keeps in high precision.

The rules, in order: the network it belongs to, its shape and dtype, the user's patterns, the preset's patterns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..choices import choose
from ..errors import UnknownPatternError
from ..files.header import TensorInfo
from .patterns import compile_pattern, no_match
from .presets import FAMILIES, PRESETS, UNTOUCHED, Component, Components
from .reasons import (
    DTYPE,
    EMPTY,
    KEEP_PATTERN,
    NETWORK_END,
    NO_NETWORK,
    NOT_LINEAR,
    NOT_NAMED,
    ODD_SIDE,
    PRESET_PATTERN,
    SUFFIX,
    UNTOUCHED_NETWORK,
    Reason,
)

LAYERS = {
    "auto": "the preset of the model's family, found by its keys",
    "all_linear": "every Linear layer that FP8 can hold",
    **{family: f"the preset of {PRESETS[family].title}" for family in FAMILIES},
}

QUANTIZABLE_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")

SIDE_MULTIPLE = 16
"""FP8 matrix multiplications take only sides divisible by this."""

NO_LINEAR = (
    "shared",
    "embed_tokens*",
    "*token_embedding",
    "*token_embeddings",
    "*position_embedding",
    "*position_embeddings",
    "token_type_embeddings",
    "word_embeddings",
    "wte",
    "wpe",
    "pos_embed",
    "pos_embedding",
    "relative_attention_bias",
    "embedding_table",
    "addition_t_embedding",
    "cond_type_embedding",
    "embed_image_indicator",
    "controlnet_mode_embedder",
    "style_embedder",
    "lyric_embs",
    "trainable_cond_mask",
    "motion_encoder",
)
"""Names of 2-D `.weight` tensors that belong to no Linear: embeddings, and Wan-Animate's raw parameters."""

COSTLY = 0.05
"""A pattern that keeps more than this share of the parameters is mentioned in the notes."""


@dataclass(frozen=True)
class Selection:
    """Which tensors are quantized, and why the others are not."""

    quantize: tuple[str, ...]
    """Names as in the file, in its order."""
    kept: tuple[tuple[str, Reason], ...]
    """(name, reason) of every other tensor."""
    family: str
    components: Components
    pattern_hits: tuple[tuple[str, int], ...] = ()
    """Each pattern and how many weights it kept (`keep`, presets) or chose (`only`)."""
    notes: tuple[str, ...] = ()

    def tensor_key(self, name: str) -> str:
        """The bare key of a tensor, which its random words depend on: the same in every file and in the graph."""
        return name.removeprefix(self.components.prefix_of(name))


def select_layers(
    tensors: Mapping[str, TensorInfo],
    *,
    layers: str = "auto",
    keep: Collection[str] = (),
    only: Collection[str] = (),
    suffixes: Collection[str] = (".weight",),
    linear_names: Collection[str] | None = None,
) -> Selection:
    """Choose the tensors to quantize.

    tensors: every tensor of a file or a model, by name. layers: one of LAYERS. keep, only: the user's patterns; what
    `keep` matches stays as it is, and so does, if `only` is given, what `only` does not match; a preset's patterns
    apply beside them. suffixes: name endings of which one must match. linear_names: the names of the Linear
    modules, where the module types are known; with a file alone, names and shapes decide.
    Raises ValueError: unknown `layers`; UnknownPatternError: a pattern that matches no name, with near matches.
    """
    choose(LAYERS, layers, "layers")
    components = Components(tensors)
    rules = _Rules(tensors, components, layers, keep, only, suffixes, linear_names)
    quantize, kept = [], []
    for name, info in tensors.items():
        reason = rules.reason_to_keep(name, info)
        if reason:
            kept.append((name, reason))
        else:
            quantize.append(name)
    return Selection(
        tuple(quantize),
        tuple(kept),
        components.main.family,
        components,
        tuple(rules.hits.items()),
        tuple(rules.notes()),
    )


_NO_LINEAR = re.compile("|".join(compile_pattern(pattern).pattern for pattern in NO_LINEAR))


def is_linear(name: str, info: TensorInfo) -> bool:
    """Whether a file's tensor is the weight of a Linear, by its name and shape: all that a file tells."""
    return len(info.shape) == 2 and name.endswith(".weight") and not _NO_LINEAR.search(name)


@dataclass
class _Rules:
    """The rules in the order in which a reason is given."""

    tensors: Mapping[str, TensorInfo]
    components: Components
    layers: str
    keep: Collection[str]
    only: Collection[str]
    suffixes: Collection[str]
    linear_names: Collection[str] | None
    hits: Counter = field(default_factory=Counter)
    kept_elements: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.user_keep = self._compile_users(self.keep)
        self.user_only = self._compile_users(self.only)
        self.presets = {component: self._compile_preset(component) for component in self.components.all}
        main = self.components.main
        self.ends = _ends(self.tensors, main.prefix) if self._family(main) == "unknown" else set()

    def reason_to_keep(self, name: str, info: TensorInfo) -> Reason | None:
        component = self.components.of(name)
        return (
            self._component_reason(component)
            or self._shape_reason(name, info)
            or self._user_reason(name, info)
            or self._preset_reason(name, info, component)
        )

    def notes(self) -> Iterable[str]:
        main = self.components.main
        if self.layers in FAMILIES and main.family not in (self.layers, "unknown"):
            yield f"the keys look like {main.preset.title}, the preset asked for is that of {self.layers}"
        for component in self.components.others:
            if component.preset.kind == UNTOUCHED:
                yield f"{component.prefix}* stays as it is: {component.preset.reason}"
            else:
                yield f"{component.prefix}* is quantized with the preset of {component.preset.title}"
        total = sum(info.elements for info in self.tensors.values())
        for pattern, elements in self.kept_elements.items():
            if elements > COSTLY * total:
                yield f"'{pattern}' keeps {elements / total:.0%} of the parameters in high precision"

    def _family(self, component: Component) -> str:
        """The family whose preset applies: the one asked for, if it is of the same kind."""
        asked = PRESETS.get(self.layers)
        return self.layers if asked and asked.kind == component.preset.kind else component.family

    def _component_reason(self, component: Component | None) -> Reason | None:
        if component is None:
            return Reason(NO_NETWORK)
        if component.preset.kind == UNTOUCHED:
            return Reason(UNTOUCHED_NETWORK, detail=component.preset.reason)
        return None

    def _shape_reason(self, name: str, info: TensorInfo) -> Reason | None:
        if self.linear_names is None:
            linear = is_linear(name, info)
        else:
            linear = name.endswith(".weight") and name.removesuffix(".weight") in self.linear_names
        if not linear or len(info.shape) != 2:
            return Reason(NOT_LINEAR)
        if info.dtype not in QUANTIZABLE_DTYPES:
            return Reason(DTYPE, detail=info.dtype)
        if not info.elements:
            return Reason(EMPTY)
        if any(side % SIDE_MULTIPLE for side in info.shape):
            return Reason(ODD_SIDE, detail=str(SIDE_MULTIPLE))
        return None

    def _user_reason(self, name: str, info: TensorInfo) -> Reason | None:
        if not name.endswith(tuple(self.suffixes)):
            return Reason(SUFFIX, detail=" or ".join(self.suffixes))
        chosen = self._hits(name, self.user_only)
        if self.user_only and not chosen:
            return Reason(NOT_NAMED)
        kept = self._hits(name, self.user_keep)
        if kept:
            self.kept_elements[kept] += info.elements
            return Reason(KEEP_PATTERN, pattern=kept)
        return None

    def _preset_reason(self, name: str, info: TensorInfo, component: Component) -> Reason | None:
        if self.layers == "all_linear":
            return None
        family = self._family(component)
        kept = self._hits(name.removeprefix(component.prefix), self.presets[component])
        if kept:
            self.kept_elements[kept] += info.elements
            return Reason(PRESET_PATTERN, pattern=kept, preset=family)
        return Reason(NETWORK_END) if name in self.ends else None

    def _hits(self, name: str, patterns: Mapping[str, re.Pattern]) -> str:
        """The first pattern that matches, or ""; counts every one that does."""
        matches = [pattern for pattern, expression in patterns.items() if expression.search(name)]
        for pattern in matches:
            self.hits[pattern] += 1
        return matches[0] if matches else ""

    def _compile_preset(self, component: Component) -> dict[str, re.Pattern]:
        if self.layers == "all_linear" or component.preset.kind == UNTOUCHED:
            return {}
        bare = [name.removeprefix(component.prefix) for name in self.tensors if name.startswith(component.prefix)]
        patterns = PRESETS[self._family(component)].keep
        self.hits.update(dict.fromkeys(patterns, 0))
        return {pattern: compile_pattern(pattern, bare) for pattern in patterns}

    def _compile_users(self, patterns: Collection[str]) -> dict[str, re.Pattern]:
        compiled = {pattern: compile_pattern(pattern, self.tensors) for pattern in patterns}
        for pattern, expression in compiled.items():
            if not any(expression.search(name) for name in self.tensors):
                raise UnknownPatternError(no_match(pattern, self.tensors))
        self.hits.update(dict.fromkeys(compiled, 0))
        return compiled


def _ends(tensors: Mapping[str, TensorInfo], prefix: str) -> set[str]:
    """The weights at the beginning and the end of an unknown network.

    A file does not tell the order of its modules. What lies outside every list of blocks leads into or out of them;
    in a network without such lists it is the first and the last tensor.
    """
    weights = [name for name, info in tensors.items() if name.startswith(prefix) and len(info.shape) == 2]
    block = re.compile(r"\.\d+\.[^.]+\..")
    outside = [name for name in weights if not block.search("." + name.removeprefix(prefix))]
    if len(outside) == len(weights):
        outside = weights[:1] + weights[-1:]
    return set(outside)
