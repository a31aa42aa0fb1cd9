"""Inspect FP8 Checkpoint: how each ComfyUI version reads a file, and the findings about it, worst first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .. import display
from ..selection.presets import PRESETS
from ..state_dict.compatibility import CANNOT_TELL, DEGRADED, EXACT
from ..state_dict.findings import ERROR, NOTE, WARNING, Inspection
from .style import (
    BLUE,
    GREEN,
    INK,
    MARGIN,
    ORANGE,
    VERMILION,
    WIDTH_INCHES,
    house_style,
    new_figure,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {ERROR: VERMILION, WARNING: ORANGE, NOTE: BLUE}
MOST = 24
"""Kinds of findings shown. The text output has all of them."""
LINE_CHARACTERS = 114
LINE_INCHES, ENTRY_INCHES, TOP_INCHES = 0.185, 0.13, 1.0
LEFT_INCHES = 1.65

Entry = tuple[str, str, list[str]]
"""Label, colour, and lines of text."""


@house_style()
def inspection_sheet(inspection: Inspection, *, width: int = 1024) -> Figure:
    """One entry per ComfyUI version, then one per kind of finding. The height follows from the text."""
    entries = [*_verdict_entries(inspection), *_finding_entries(inspection)]
    lines = sum(len(text) for _, _, text in entries)
    inches = TOP_INCHES + lines * LINE_INCHES + (len(entries) + 1) * ENTRY_INCHES
    figure = new_figure(width, max(256, min(4096, round(width * inches / WIDTH_INCHES))), 0)
    formats = ", ".join(inspection.formats) or "no FP8"
    title = f"{inspection.source}: {'ok' if inspection.ok else 'problems found'}"
    layers = display.count(inspection.scaled, "scaled layer")
    write_titles(figure, title, f"{PRESETS[inspection.family].title}, {layers}, {formats}")
    height = figure.get_figheight()
    y = height - TOP_INCHES
    for label, colour, text in entries:
        figure.text(MARGIN / WIDTH_INCHES, y / height, label, color=colour, weight="bold")
        for line in text:
            figure.text(LEFT_INCHES / WIDTH_INCHES, y / height, line, color=INK)
            y -= LINE_INCHES
        y -= ENTRY_INCHES
    return figure


def _verdict_entries(inspection: Inspection) -> Iterator[Entry]:
    for verdict in inspection.verdicts:
        colour = {EXACT: GREEN, DEGRADED: ORANGE, CANNOT_TELL: ORANGE}.get(verdict.outcome, VERMILION)
        text = f"result: {verdict.outcome}{'; ' + verdict.text if verdict.text else ''}"
        yield verdict.generation, colour, textwrap.wrap(display.printable(text), LINE_CHARACTERS)


def _finding_entries(inspection: Inspection) -> Iterator[Entry]:
    for finding, count in inspection.kinds[:MOST]:
        where = f"{finding.where}: " if finding.where else ""
        more = f" ({count - 1:,} more like this)" if count > 1 else ""
        text = display.printable(f"{where}{finding.what}. {finding.repair}.{more}")
        yield finding.severity, COLOURS[finding.severity], textwrap.wrap(text, LINE_CHARACTERS)
    rest = len(inspection.kinds) - MOST
    if rest > 0:
        yield "", INK, [f"{rest:,} more kinds of findings: see the text output"]
    if not inspection.findings:
        yield "no problems", GREEN, ["Every scaled layer has its scale and its entries."]
