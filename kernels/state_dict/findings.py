"""Findings about a scaled FP8 file, and what they make of the verdicts on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import display
from ..selection.presets import PRESETS
from .compatibility import NEW, OLD, Verdict, worst

ERROR, WARNING, NOTE = "error", "warning", "note"

REPAIR = "Repair rewrites it"
NOTHING = "Nothing needs to be done"
STAYS = "Nothing needs to be done: repairing and quantizing leave it as it is"
QUANTIZE_AGAIN = "Quantize the 16-bit model again"
READ_AGAIN = "Quantize this file again: its scales are read, and the error of its first rounding stays"
QUANTIZE_WHOLE = "Download the model again, or quantize its complete 16-bit file"
DELETE_ONE = "Delete the wrong one, or quantize the 16-bit model again"
LEGACY = "For ComfyUI 0.3.75, write the file in layout legacy"
DEQUANTIZE = "Repair dequantizes it; quantizing the 16-bit model again gives a better image"
"""Ways out."""


@dataclass(frozen=True)
class Finding:
    """One problem of a file, or a remark about it."""

    severity: str
    """ERROR (a wrong image, or none), WARNING (loses quality, or fails in some versions) or NOTE."""
    code: str
    """The kind of finding, for programs."""
    where: str
    """Tensor, layer or prefix; "" for the whole file."""
    what: str
    """What is wrong, and what becomes of the image."""
    repair: str
    """How to repair it."""
    repairable: bool = False
    """Whether `repair_file` can repair it."""
    outcomes: Mapping[str, str] = field(default_factory=dict, hash=False)
    """ComfyUI version -> what it makes of the file at best because of this."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.where + ': ' if self.where else ''}{self.what}. {self.repair}."


@dataclass(frozen=True)
class Inspection:
    """What was found in one file. Plain data, JSON-able."""

    source: str
    """File name, no path."""
    family: str
    scaled: int
    """Number of scaled FP8 layers."""
    formats: tuple[str, ...]
    ways: tuple[str, ...]
    """Those of "legacy", "header" and "inline" that cover every scaled layer."""
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == ERROR for finding in self.findings)

    @property
    def repairable(self) -> bool:
        return any(finding.repairable for finding in self.findings)

    @property
    def kinds(self) -> list[tuple[Finding, int]]:
        """The first finding of each kind, and how many of that kind there are."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.severity, finding.code, finding.repair), []).append(finding)
        return [(findings[0], len(findings)) for findings in groups.values()]

    @property
    def summary(self) -> str:
        """A line about the file, one per ComfyUI version, then one per kind of finding."""
        title = f"{PRESETS[self.family].title}, {display.count(self.scaled, 'scaled FP8 layer')}"
        kinds = Counter(finding.severity for finding in self.findings)
        counts = ", ".join(display.count(kinds[kind], kind) for kind in (ERROR, WARNING) if kinds[kind])
        lines = [
            f"{self.source}: {title} ({', '.join(self.formats) or 'no FP8'}; "
            f"marked: {', '.join(self.ways) or 'not at all'}): {counts or 'no problems'}",
            *(f"{v.generation}: {v.outcome}{' (' + v.text + ')' if v.text else ''}" for v in self.verdicts),
            *(f"{finding}{f' ({count - 1:,} more like this)' if count > 1 else ''}" for finding, count in self.kinds),
        ]
        return "\n".join(map(display.printable, lines))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def verdicts_with(of_layers: Collection[Verdict], findings: Iterable[Finding]) -> tuple[Verdict, ...]:
    """The verdicts on the scaled layers, or what the findings make of them where that is worse."""
    base = {verdict.generation: verdict for verdict in of_layers}
    for finding in findings:
        for version, outcome in finding.outcomes.items():
            where = f"{finding.where}: " if finding.where else ""
            verdict = Verdict(version, outcome, where + finding.what)
            known = base.get(version, verdict)
            base[version] = verdict if known == Verdict(version, outcome, "") else worst(known, [verdict])
    return tuple(base[version] for version in (OLD, NEW) if version in base)


def both(outcome: str) -> dict[str, str]:
    """The same outcome in every version."""
    return {OLD: outcome, NEW: outcome}


def sentence(text: str) -> str:
    """A way out, as in errors, as a sentence of its own, without its full stop."""
    return text[:1].upper() + text[1:]
