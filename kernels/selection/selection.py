"""Which tensors are quantized: Linear weights, except those that a preset or the user keeps in high precision.

The rules, in order: the network a tensor belongs to, its shape and dtype, the user's patterns, the preset's patterns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from .. import display
from ..choices import choose
from ..errors import UnknownPatternError
from ..files.header import TensorInfo
from ..numerics.formats import FORMATS
from .components import Component, Components
from .linear import is_linear
from .patterns import Pattern, PatternSet, check_length, no_match
from .presets import FAMILIES, NEVER_QUANTIZED, PRESETS, TEXT_ENCODER
from .reasons import (
    DTYPE,
    EMPTY,
    KEEP_PATTERN,
    NETWORK_END,
    NEVER_QUANTIZED_NETWORK,
    NO_NETWORK,
    NOT_LINEAR,
    NOT_NAMED,
    ODD_SIDE,
    PRESET_PATTERN,
    SUFFIX,
    UNUSABLE,
    Reason,
)

MEASURED = "measured"

PRESET_LAYERS = {
    "auto": "the preset of the model's family, found by its keys",
    "all_linear": "every Linear layer that FP8 can hold",
    **{family: f"the preset of {PRESETS[family].title}" for family in FAMILIES},
    "unknown": "a guess by the names of the layers",
}
"""The choices of layers that need only names and shapes."""

LAYERS = PRESET_LAYERS | {
    MEASURED: "the layers that change the picture least per byte, up to a size or a quality; needs a calibration"
}

QUANTIZABLE_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")

MOST_NAMED = 5
"""Patterns without a match that one error names."""

SIDE_MULTIPLE = 16
"""FP8 matrix multiplications take only sides divisible by this. They are used with matmul `fp8`, and in one text
encoder: ComfyUI 0.33 multiplies that of MiniMax Music 3 in FP8."""

COSTLY_SHARE = 0.05
"""What keeps more than this share of the parameters in high precision is mentioned in the notes."""


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
    """(pattern, weights that it matched): those kept by `keep` and presets, those chosen by `only`."""
    notes: tuple[str, ...] = ()

    def tensor_key(self, name: str) -> str:
        """The tensor's name without its network's prefix: the same in every file and in the graph. Random bits depend
        on it."""
        return name.removeprefix(self.components.prefix_of(name))


def select_layers(
    tensors: Mapping[str, TensorInfo],
    *,
    layers: str = "auto",
    keep: Collection[str] = (),
    only: Collection[str] = (),
    suffixes: Collection[str] = (".weight",),
    linear_names: Collection[str] | None = None,
    kind: str | None = None,
    fp8_matmul: bool = False,
) -> Selection:
    """Choose the tensors to quantize.

    tensors: all tensors of a file or a model, by name. layers: a key of LAYERS. keep, only: the user's patterns,
    applied beside those of the preset. `keep` keeps what it matches; `only` keeps what it does not match. suffixes: a
    name must end in one of them. linear_names: names of the Linear modules, where module types are known; None: names
    and shapes decide. kind: DIFFUSION or TEXT_ENCODER for the bare names of one network; None: a whole file.
    fp8_matmul: whether diffusion models multiply in FP8, which takes only sides divisible by SIDE_MULTIPLE. In text
    encoders the sides are always checked: ComfyUI decides how to multiply these, mostly in full precision.

    Raises UnknownChoiceError for `layers`, UnknownPatternError (with similar names) for a pattern that matches no name,
    PatternError for patterns that are empty or longer than LONGEST_PATTERNS together.
    """
    choose(LAYERS, layers, "layers")
    check_length([*keep, *only])
    components = Components(tensors, kind)
    rules = _Rules(tensors, components, layers, keep, only, suffixes, linear_names, fp8_matmul)
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


@dataclass
class _Rules:
    """The rules, with the patterns parsed, and a count of what each pattern matched."""

    tensors: Mapping[str, TensorInfo]
    components: Components
    layers: str
    keep: Collection[str]
    only: Collection[str]
    suffixes: Collection[str]
    linear_names: Collection[str] | None
    fp8_matmul: bool
    hits: Counter[str] = field(default_factory=Counter)
    """Pattern -> names that it matched."""
    kept_elements: Counter[str] = field(default_factory=Counter)
    """Pattern -> parameters that it kept in high precision."""
    odd_elements: Counter[str] = field(default_factory=Counter)
    """What needs sides divisible by SIDE_MULTIPLE -> parameters of Linear layers without them."""
    guessed_elements: int = 0
    """Parameters of the main network that the preset of unknown networks kept in high precision."""

    def __post_init__(self) -> None:
        self.user_keep = self._parse_users(self.keep)
        self.user_only = self._parse_users(self.only)
        self.presets = {component: self._parse_preset(component) for component in self.components.all}
        main = self.components.main
        self.guesses = self._family(main) == "unknown" and not self._takes_all(main)
        self.ends = _ends(self.tensors, main.prefix) if self.guesses else frozenset()

    def reason_to_keep(self, name: str, info: TensorInfo) -> Reason | None:
        component = self.components.of(name)
        if component is None:
            return Reason(NO_NETWORK)
        if component.preset.kind == NEVER_QUANTIZED:
            return Reason(NEVER_QUANTIZED_NETWORK, detail=component.preset.reason)
        return (
            self._shape_reason(name, info, component)
            or self._user_reason(name, info)
            or self._preset_reason(name, info, component)
        )

    def notes(self) -> Iterable[str]:
        main = self.components.main
        yield from self._requested_notes(main)
        if main.family == "unknown" and self._takes_all(main) and self.linear_names is None:
            yield "the model family is unknown: names and shapes decide which tensors are Linear layers"
        total = sum(info.elements for info in self.tensors.values())
        if self.guessed_elements:
            unknown = "the model family is unknown: " if main.family == "unknown" else ""
            yield (
                f"{unknown}the layers to keep are guessed from their names, and "
                f"{display.share(self.guessed_elements / total)} of the parameters stay in high precision. Compare "
                "images. If the guess is wrong, use 'keep' and 'only', or the preset of a family"
            )
        for component in self.components.others:
            if component.preset.kind == NEVER_QUANTIZED:
                yield f"{component.prefix}* stays as it is: {component.preset.reason}"
            elif self._takes_all(component):
                yield f"{component.prefix}* is quantized, every Linear layer that FP8 can hold"
            else:
                yield f"{component.prefix}* is quantized with the preset of {PRESETS[self._family(component)].title}"
        reasons = {f"'{pattern}' keeps": elements for pattern, elements in self.kept_elements.items()}
        for needing, elements in self.odd_elements.items():
            reasons[f"{needing} sides divisible by {SIDE_MULTIPLE}, which leaves"] = elements
        for reason, elements in reasons.items():
            if elements > COSTLY_SHARE * total:
                yield f"{reason} {display.share(elements / total)} of the parameters in high precision"

    def _requested_notes(self, main: Component) -> Iterable[str]:
        """Where the preset requested is not that of the main network."""
        requested = PRESETS.get(self.layers)
        if requested is None or main.preset.kind == NEVER_QUANTIZED or self.layers == main.family:
            return
        if self._family(main) == self.layers:
            if main.family != "unknown":
                yield f"the keys look like {main.preset.title}, the preset requested is that of {self.layers}"
        elif all(component.preset.kind != requested.kind for component in self.components.others):
            yield (
                f"layers {self.layers} is ignored: it is the preset of a {requested.kind}, and there is none here. "
                f"The preset of {main.preset.title} applies"
            )

    def _family(self, component: Component) -> str:
        """The family whose preset applies: the one requested, if its kind is that of the network."""
        requested = PRESETS.get(self.layers)
        return self.layers if requested and requested.kind == component.preset.kind else component.family

    def _takes_all(self, component: Component) -> bool:
        """Whether every Linear layer of a network is selected. With MEASURED, the engine then chooses among them."""
        return self.layers == "all_linear" or (self.layers == MEASURED and component == self.components.main)

    def _shape_reason(self, name: str, info: TensorInfo, component: Component) -> Reason | None:
        if self.linear_names is None:
            linear = is_linear(name, info, component.preset)
        else:
            linear = name.endswith(".weight") and name.removesuffix(".weight") in self.linear_names
        if not linear or len(info.shape) != 2:
            return Reason(NOT_LINEAR)
        if info.dtype not in QUANTIZABLE_DTYPES:
            return Reason(DTYPE, detail=info.dtype)
        if not info.elements:
            return Reason(EMPTY)
        if component.preset.unusable_patterns.matching(name):
            return Reason(UNUSABLE, detail=component.preset.unusable_reason)
        needing = self._needing_multiples(component)
        if needing and any(side % SIDE_MULTIPLE for side in info.shape):
            self.odd_elements[needing] += info.elements
            return Reason(ODD_SIDE, detail=f"{SIDE_MULTIPLE}, which {needing}")
        return None

    def _needing_multiples(self, component: Component) -> str:
        """What needs sides divisible by SIDE_MULTIPLE in a network, or ""."""
        if component.preset.kind == TEXT_ENCODER:
            return "text encoders need"
        return "FP8 matmul needs" if self.fp8_matmul else ""

    def _user_reason(self, name: str, info: TensorInfo) -> Reason | None:
        if not name.endswith(tuple(self.suffixes)):
            return Reason(SUFFIX, detail=" or ".join(self.suffixes))
        chosen = self._hits(name, self.user_only)
        if self.user_only and not chosen:
            return Reason(NOT_NAMED)
        kept = self._hits(name, self.user_keep)
        if kept:
            self._count_kept(kept, info)
            return Reason(KEEP_PATTERN, pattern=kept)
        return None

    def _preset_reason(self, name: str, info: TensorInfo, component: Component) -> Reason | None:
        if self._takes_all(component):
            return None
        family = self._family(component)
        kept = self._hits(self._bare(name, component), self.presets[component])
        if not kept and name not in self.ends:
            return None
        if self.guesses and component == self.components.main and info.dtype not in FORMATS:
            self.guessed_elements += info.elements
        if not kept:
            return Reason(NETWORK_END)
        self._count_kept(kept, info)
        return Reason(PRESET_PATTERN, pattern=kept, preset=family)

    def _count_kept(self, pattern: str, info: TensorInfo) -> None:
        """What was FP8 before and stays so is not in high precision."""
        if info.dtype not in FORMATS:
            self.kept_elements[pattern] += info.elements

    def _hits(self, name: str, patterns: PatternSet) -> str:
        """The text of the first pattern that matches, or "". Counts every pattern that does."""
        matching = patterns.matching(name)
        for pattern in matching:
            self.hits[pattern.text] += 1
        return matching[0].text if matching else ""

    def _parse_preset(self, component: Component) -> PatternSet:
        if self._takes_all(component) or component.preset.kind == NEVER_QUANTIZED:
            return PatternSet(())
        names = [self._bare(name, component) for name in self.tensors if name.startswith(component.prefix)]
        return self._count(Pattern.parse(text).resolve(names) for text in PRESETS[self._family(component)].keep)

    def _bare(self, name: str, component: Component) -> str:
        """A tensor's name as presets know it: without prefixes, of other programs too."""
        wrapper = self.components.undetected_prefix if component == self.components.main else ""
        return (
            name.removeprefix(wrapper) if wrapper and name.startswith(wrapper) else name.removeprefix(component.prefix)
        )

    def _parse_users(self, texts: Collection[str]) -> PatternSet:
        patterns = self._count(Pattern.parse(text).resolve(self.tensors) for text in dict.fromkeys(texts))
        unmatched = set(patterns.patterns)
        for name in self.tensors:
            if not unmatched:
                break
            unmatched.difference_update(patterns.matching(name))
        missing = [pattern.text for pattern in patterns.patterns if pattern in unmatched]
        if missing:
            texts = [no_match(text, self.tensors) for text in missing[:MOST_NAMED]]
            more = [f"and {len(missing) - MOST_NAMED} more patterns"] * (len(missing) > MOST_NAMED)
            raise UnknownPatternError("; ".join(texts + more))
        return patterns

    def _count(self, patterns: Iterable[Pattern]) -> PatternSet:
        """The patterns as a set; those that match nothing are listed with 0 hits."""
        result = PatternSet(patterns)
        self.hits.update({pattern.text: 0 for pattern in result.patterns})
        return result


def _ends(tensors: Mapping[str, TensorInfo], prefix: str) -> frozenset[str]:
    """The weights at the beginning and the end of an unknown network.

    A file does not say in which order its modules run. Weights outside all lists of blocks come before or after them.
    In a network without such lists, they are the first and the last weight.
    """
    weights = [name for name, info in tensors.items() if name.startswith(prefix) and len(info.shape) == 2]
    block = re.compile(r"\.\d+\.[^.]+\..")
    outside = [name for name in weights if not block.search("." + name.removeprefix(prefix))]
    if len(outside) == len(weights):
        outside = weights[:1] + weights[-1:]
    return frozenset(outside)
