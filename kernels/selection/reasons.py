"""Why a tensor is kept as it is. Reasons are data; `Reason.text` is what people read."""

from __future__ import annotations

from dataclasses import dataclass

NOT_LINEAR = "not_linear"
DTYPE = "dtype"
EMPTY = "empty"
ODD_SIDE = "odd_side"
UNUSABLE = "unusable"
SUFFIX = "suffix"
NOT_NAMED = "not_named"
KEEP_PATTERN = "keep_pattern"
PRESET_PATTERN = "preset_pattern"
NETWORK_END = "network_end"
NEVER_QUANTIZED_NETWORK = "never_quantized_network"
NO_NETWORK = "no_network"
NON_FINITE = "non_finite"
EFFECT = "effect"
NO_EFFECT_KNOWN = "no_effect_known"

_TEXTS = {
    NOT_LINEAR: "not a Linear layer",
    DTYPE: "{detail} is not a floating-point dtype",
    EMPTY: "empty",
    ODD_SIDE: "a side is not divisible by {detail}",
    UNUSABLE: "{detail}",
    SUFFIX: "the name does not end in {detail}",
    NOT_NAMED: "not named by 'only'",
    KEEP_PATTERN: "kept by pattern '{pattern}'",
    PRESET_PATTERN: "kept by pattern '{pattern}' of preset {preset}",
    NETWORK_END: "at the beginning or the end of an unknown network",
    NEVER_QUANTIZED_NETWORK: "{detail}",
    NO_NETWORK: "does not belong to any model in this file",
    NON_FINITE: "holds {detail}",
    EFFECT: "changes the picture most per byte",
    NO_EFFECT_KNOWN: "its effect is not known",
}
"""kind -> its text."""


@dataclass(frozen=True)
class Reason:
    """Why a tensor is kept. Plain data, JSON-able."""

    kind: str
    """One of the constants of this module."""
    pattern: str = ""
    """The user's or the preset's pattern that matched the name."""
    preset: str = ""
    """The preset of the pattern. "" for a user's pattern."""
    detail: str = ""
    """What differs between reasons of one kind, such as the dtype."""

    @property
    def text(self) -> str:
        """A short phrase."""
        return _TEXTS[self.kind].format(pattern=self.pattern, preset=self.preset, detail=self.detail)

    def to_dict(self) -> dict[str, str]:
        """The fields and the text."""
        return {"kind": self.kind, "pattern": self.pattern, "preset": self.preset, "text": self.text}
