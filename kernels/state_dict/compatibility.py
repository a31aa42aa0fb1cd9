"""What each ComfyUI version makes of a scaled FP8 file: one table of rules, from loading and sampling in both versions.

The table in CHECKPOINTS.md is `markdown_table()`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from ..numerics.formats import FORMATS
from ..selection.components import Component, Components
from ..selection.presets import DIFFUSION, TEXT_ENCODER

EXACT, DEGRADED, CANNOT_TELL, WRONG = "exact", "degraded", "cannot tell", "wrong image"
FAILS_LATER, FAILS, NOT_RECOGNISED = "fails in the sampler", "fails to load", "not recognised"
OUTCOMES = (EXACT, DEGRADED, CANNOT_TELL, WRONG, FAILS_LATER, FAILS, NOT_RECOGNISED)
"""From the best to the worst. "exact" is said only of what was loaded and sampled."""

LEGACY, HEADER, INLINE = "legacy", "header", "inline"
"""The ways to mark a layer as scaled FP8."""
ENTRIES = "entries"
"""Header or inline entries, or both."""
E4M3, E5M2, T5XXL, LLM = "float8_e4m3fn", "float8_e5m2", "t5xxl", "llm"
ALL_IN_ONE = "all in one"
UNKNOWN = "unknown"
"""The family, where the keys match none that the pack knows."""
UNDETECTED, RENAMED = "undetected prefix", "renamed layers"
"""Components.undetected_prefix and Components.renamed."""
NEWER, MISTAKEN, HEADER_ENCODER = "newer model", "mistaken model", "encoder read by its header"
"""Models of NEWER_MODELS, MISTAKEN_MODELS and HEADER_ENCODERS."""
ALL_RENAMED = "all layers renamed"
"""Models of ALL_RENAMED_MODELS."""
NO_BIASES = "no biases"
"""Not Components.has_biases."""

_NORM = "model.layers.0.post_attention_layernorm.weight"
_ALL: tuple[dict[str, int | None], ...] = ({},)

NEWER_MODELS: dict[str, tuple[dict[str, int | None], ...]] = {
    **dict.fromkeys(
        (
            "ace_step_15",
            "cogvideox",
            "ernie_image",
            "hidream_o1",
            "ideogram4",
            "joyimage",
            "kandinsky5",
            "krea2",
            "lens",
            "minimax_h3",
            "minimax_music3",
            "pixeldit",
            "seedvr2",
            "triposplat",
        ),
        _ALL,
    ),
    "chroma": ({"distilled_guidance_layer.norms.0.weight": None}, {"distilled_guidance_layer.0.norms.0.weight": None}),
    "flux": ({"double_blocks.0.img_attn.norm.key_norm.weight": None},),
    "wan": ({"patch_embedding_pose.weight": None},),
    "llm": (
        {"model.language_model.layers.0.input_layernorm.weight": None},
        *({"model.layers.0.self_attn.q_norm.weight": None, _NORM: width} for width in (1024, 2048, 4096, 5120)),
        {"model.layers.47.self_attn.q_norm.weight": None},
        {_NORM: 3072},
    ),
}
"""Family -> keys by which ComfyUI 0.3.75 does not recognise a model, as alternatives; no keys: any model."""

MISTAKEN_MODELS: dict[str, tuple[dict[str, int | None], ...]] = {
    "anima": ({"llm_adapter.blocks.0.cross_attn.q_proj.weight": None},),
    "ltxv": ({"audio_adaln_single.linear.weight": None},),
    "lumina2": ({"dec_net.cond_embed.weight": None},),
    "omnigen2": ({"double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight": None},),
    "qwen_image": ({"txt_norm.weight": 2560},),
    "wan": ({"music_projection.weight": None},),
}
"""Family -> keys of models that ComfyUI 0.3.75 takes for others of the family."""

HEADER_ENCODERS: dict[str, tuple[dict[str, int | None], ...]] = {
    "llm": (
        {"model.layers.35.self_attn.q_norm.weight": None},
        {"model.layers.39.post_attention_layernorm.weight": None},
        {_NORM: 5120},
    ),
}
"""Family -> keys of text encoders whose header entries ComfyUI 0.3.75 reads: those of Z-Image and Flux.2."""


ALL_RENAMED_MODELS: dict[str, tuple[dict[str, int | None], ...]] = {
    "hunyuan_video": ({"double_blocks.0.img_attn_qkv.weight": None, "vision_in.proj.0.weight": None},),
}
"""Family -> keys of models under names that ComfyUI 0.3.75 renames in every layer, so that it reads no header entry:
HunyuanVideo 1.5 of Tencent."""


@dataclass(frozen=True)
class Verdict:
    """What one ComfyUI version makes of a file."""

    generation: str
    """The ComfyUI version."""
    outcome: str
    """One of OUTCOMES."""
    text: str
    """Why, or on what condition; "" if there is nothing to add."""

    @property
    def usable(self) -> bool:
        return self.outcome in (EXACT, DEGRADED, CANNOT_TELL)

    def __str__(self) -> str:
        return f"{self.generation}: {self.outcome}" + (f"; {self.text}" if self.text else "")


@dataclass(frozen=True)
class Rule:
    """Applies to a file with all of these traits: ways, formats, family and kind of network, ALL_IN_ONE, UNDETECTED,
    RENAMED, ALL_RENAMED, NEWER, MISTAKEN, HEADER_ENCODER, NO_BIASES."""

    traits: frozenset[str]
    outcome: str
    text: str = ""


def _rule(traits: Collection[str], outcome: str, text: str = "") -> Rule:
    return Rule(frozenset(traits), outcome, text)


OLD, NEW = "ComfyUI 0.3.75", "ComfyUI 0.33"

_NOT_DETECTED = _rule(
    [UNDETECTED], NOT_RECOGNISED, "the names carry a prefix under which ComfyUI detects no model: rename the tensors"
)
_FAMILY_UNKNOWN = "the pack does not know the model family, nor what ComfyUI makes of its names"
_ENTRIES_NOT_RENAMED = (
    "HunyuanVideo under Tencent's names: the loader renames the weights, but not the header entries; layout "
    "legacy is read"
)

VERSIONS: dict[str, tuple[Rule, ...]] = {
    OLD: (
        _NOT_DETECTED,
        _rule([NEWER], NOT_RECOGNISED, "this version does not know the model"),
        _rule([MISTAKEN], WRONG, "this version takes the model for another one of its family"),
        _rule([LEGACY, UNKNOWN], CANNOT_TELL, _FAMILY_UNKNOWN),
        _rule(
            [LEGACY, "hunyuan3d_21"],
            FAILS_LATER,
            "every Linear weight is cast to FP8, and Hunyuan3D 2.1 computes in the dtype of some",
        ),
        _rule(
            [LEGACY, TEXT_ENCODER, NO_BIASES],
            EXACT,
            "if every Linear weight of the encoder is quantized: others are cast to FP8 without a scale",
        ),
        _rule([LEGACY], DEGRADED, "every unquantized Linear weight and every bias is cast to FP8 without a scale"),
        _rule([HEADER, T5XXL], WRONG, "T5 is read in the legacy layout only"),
        _rule([HEADER, ALL_IN_ONE], WRONG, "all-in-one checkpoints are read in the legacy layout only (noise)"),
        _rule([HEADER, E5M2, ALL_RENAMED], WRONG, _ENTRIES_NOT_RENAMED),
        _rule([HEADER, E5M2], FAILS, "float8_e5m2 entries are unknown (KeyError)"),
        _rule([HEADER, UNKNOWN], CANNOT_TELL, _FAMILY_UNKNOWN),
        _rule([HEADER, RENAMED], WRONG, _ENTRIES_NOT_RENAMED),
        _rule([HEADER, HEADER_ENCODER], EXACT),
        _rule(
            [HEADER, TEXT_ENCODER],
            FAILS,
            "of language models, only the text encoders of Z-Image and Flux.2 are read in layout native (TypeError)",
        ),
        _rule(
            [HEADER],
            EXACT,
            "on an FP8 GPU or with little memory, everything outside Linear layers is cast to FP8 without a scale; "
            "activations stay in 16 bits, whatever matmul is",
        ),
        _rule([INLINE], WRONG, "inline entries are not read: the codes are used as weights, without their scales"),
        _rule([], WRONG, "not all layers are marked as scaled: codes are used as weights, without their scales"),
    ),
    NEW: (
        _NOT_DETECTED,
        _rule([ENTRIES, UNKNOWN], CANNOT_TELL, _FAMILY_UNKNOWN),
        _rule([ENTRIES, E5M2], EXACT, "if its comfy.quant_ops.QUANT_ALGOS lists float8_e5m2"),
        _rule([ENTRIES], EXACT),
        _rule([LEGACY, E5M2], WRONG, "legacy E5M2 is read as E4M3, without an error: the image is garbage"),
        _rule([LEGACY, UNKNOWN], CANNOT_TELL, _FAMILY_UNKNOWN),
        _rule([LEGACY], EXACT),
        _rule([], WRONG, "not all layers are marked as scaled: codes are used as weights, without their scales"),
    ),
}
"""ComfyUI version -> its rules. The first rule that applies decides."""


def verdicts(
    ways: Collection[str],
    formats: Collection[str],
    family: str,
    kind: str,
    all_in_one: bool,
    names: Collection[str] = (),
) -> tuple[Verdict, ...]:
    """The Verdict of each version.

    ways: those of LEGACY, HEADER and INLINE that cover every scaled layer. formats: those of the layers. family, kind:
    of the main network. all_in_one: whether its layers carry a prefix. names: which of UNDETECTED, RENAMED,
    ALL_RENAMED, NEWER, MISTAKEN, HEADER_ENCODER and NO_BIASES apply.
    """
    traits = {*ways, *formats, family, kind, *names}
    if {HEADER, INLINE} & traits:
        traits.add(ENTRIES)
    if all_in_one:
        traits.add(ALL_IN_ONE)
    applying = {version: next(rule for rule in rules if rule.traits <= traits) for version, rules in VERSIONS.items()}
    return tuple(Verdict(version, rule.outcome, rule.text) for version, rule in applying.items())


WAYS = {"native": (HEADER, INLINE), "legacy": (LEGACY,)}
"""Layout -> the ways in which it marks a layer."""

FIRST_NEW = (0, 4)
"""The first version that loads files as 0.33 does."""


def layout_verdicts(layout: str, formats: Collection[str], components: Components) -> tuple[Verdict, ...]:
    """The Verdict of each version on a file that the pack writes. layout: a key of LAYOUTS. formats: of its layers."""
    return file_verdicts(WAYS[layout], formats, components)


def file_verdicts(ways: Collection[str], formats: Collection[str], components: Components) -> tuple[Verdict, ...]:
    """verdicts() for a file that holds these networks: of each version the worst, that of the main network first."""
    of_main = [UNDETECTED] * bool(components.undetected_prefix) + [RENAMED] * bool(components.renamed)
    found = _network_verdicts(ways, formats, components, components.main, of_main)
    for encoder in components.others:
        if encoder.preset.kind == TEXT_ENCODER:
            others = _network_verdicts(ways, formats, components, encoder)
            found = tuple(worst(one, [_in(encoder, other)]) for one, other in zip(found, others, strict=True))
    return found


def _network_verdicts(
    ways: Collection[str],
    formats: Collection[str],
    components: Components,
    network: Component,
    names: Collection[str] = (),
) -> tuple[Verdict, ...]:
    """names: traits of this network that do not follow from its keys."""
    traits = [*names]
    for trait, models in _MODELS.items():
        if any(components.holds(network, keys) for keys in models.get(network.family, ())):
            traits.append(trait)
    traits += [NO_BIASES] * (not components.has_biases(network))
    return verdicts(ways, formats, network.family, network.preset.kind, components.all_in_one, traits)


def _in(network: Component, verdict: Verdict) -> Verdict:
    """A verdict on one network among others."""
    return replace(verdict, text=f"{network.prefix.rstrip('.')}: {verdict.text}") if verdict.text else verdict


_MODELS = {
    NEWER: NEWER_MODELS,
    MISTAKEN: MISTAKEN_MODELS,
    HEADER_ENCODER: HEADER_ENCODERS,
    ALL_RENAMED: ALL_RENAMED_MODELS,
}


def worst(verdict: Verdict, others: Iterable[Verdict]) -> Verdict:
    """The verdict with the worst outcome; of equal ones the first."""
    return max([verdict, *others], key=lambda each: OUTCOMES.index(each.outcome))


def is_new(version: str) -> bool:
    """Whether a version such as "0.8.0" loads files as 0.33 does. Older ones load them as 0.3.75 does."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= FIRST_NEW


def verdict_of(version: str, every: Iterable[Verdict]) -> Verdict:
    """The one among the verdicts of all versions that holds for a running ComfyUI."""
    return next(verdict for verdict in every if verdict.generation == _generation(version))


def is_elsewhere(version: str, note: str) -> bool:
    """Whether a note of a report is a verdict of another version than a running ComfyUI."""
    return any(note.startswith(f"{column}: ") for column in VERSIONS if column != _generation(version))


def _generation(version: str) -> str:
    """The column of VERSIONS for a running ComfyUI."""
    old, new = VERSIONS
    return new if is_new(version) else old


def check_usable(
    version: str, layout: str, formats: Collection[str], components: Components, *, kept: Collection[str] = ()
) -> Verdict:
    """The Verdict of a running ComfyUI on a file that the pack would write.

    formats: those of the layers that another choice of format changes. kept: those of layers that it does not change.
    Raises ValueError where it would show a wrong image or not load: one line with what happens and the way out.
    """

    def verdict(layout: str, formats: Collection[str]) -> Verdict:
        return verdict_of(version, layout_verdicts(layout, {*formats, *kept}, components))

    found = verdict(layout, formats)
    if found.usable:
        return found
    others = [f"layout {other}" for other in WAYS if other != layout and verdict(other, formats).usable]
    others += [other for other in FORMATS if {other} != {*formats} and verdict(layout, [other]).usable]
    choose = f"Choose {' or '.join(others)}, or turn" if others else "Turn"
    raise ValueError(
        f"ComfyUI {version} {_WOULD[found.outcome]}: {found.text}. {choose} on for_another_comfyui to write it for "
        "another installation"
    )


_WOULD = {
    WRONG: "would show a wrong image from this file",
    FAILS_LATER: "would load this file and then fail in the sampler",
    FAILS: "would not load this file",
    NOT_RECOGNISED: "would not recognise this file",
}

_MARKINGS = {
    "header, with or without inline (`native` writes both)": [HEADER],
    "inline only": [INLINE],
    "`legacy`": [LEGACY],
    "none, or not all layers": [],
}
_FORMATS = {"E4M3": E4M3, "E5M2": E5M2}
_NETWORKS: dict[str, tuple[str, str, bool, tuple[str, ...]]] = {
    "diffusion model": ("sd3", DIFFUSION, False, ()),
    "HunyuanVideo under Tencent's names": ("hunyuan_video", DIFFUSION, False, (RENAMED,)),
    "all-in-one checkpoint": ("sd3", DIFFUSION, True, ()),
    "T5-XXL": (T5XXL, TEXT_ENCODER, False, (NO_BIASES,)),
    "text encoder of Z-Image or Flux.2": (LLM, TEXT_ENCODER, False, (HEADER_ENCODER, NO_BIASES)),
    "other LLM text encoder": (LLM, TEXT_ENCODER, False, ()),
    "other LLM text encoder without biases": (LLM, TEXT_ENCODER, False, (NO_BIASES,)),
    "unknown family": (UNKNOWN, DIFFUSION, False, ()),
}


def markdown_table() -> str:
    """The rules as a Markdown table, then a numbered list of the texts. Networks with equal cells share a row."""
    notes: dict[str, int] = {}

    def cell(verdict: Verdict) -> str:
        if not verdict.text:
            return verdict.outcome
        return f"{verdict.outcome} ({notes.setdefault(verdict.text, len(notes) + 1)})"

    rows = [["layers marked by", "format", "file", *VERSIONS], ["---"] * (3 + len(VERSIONS))]
    for marking, ways in _MARKINGS.items():
        for name, format in _FORMATS.items():
            for networks, row in _rows(ways, format):
                rows.append([marking, name, networks, *map(cell, row)])
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*table, "", *(f"{number}. {text}" for text, number in notes.items())])


def _rows(ways: Iterable[str], format: str) -> Iterator[tuple[str, tuple[Verdict, ...]]]:
    """(names of the networks, their verdicts) for each group of networks with equal verdicts."""
    groups: dict[tuple[Verdict, ...], list[str]] = {}
    for name, network in _NETWORKS.items():
        groups.setdefault(verdicts([*ways], [format], *network), []).append(name)
    for row, names in groups.items():
        yield "any" if len(names) == len(_NETWORKS) else ", ".join(names), row
