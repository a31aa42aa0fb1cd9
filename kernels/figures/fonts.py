"""Names in any script: DejaVu Sans, which comes with matplotlib, and for other characters what is installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry

FAMILY = "DejaVu Sans"

NO_GLYPH = "?"
"""Stands for a character that no installed font has."""

_ONLY_BOXES = ("Last Resort", "Adobe Blank", "Unicode BMP Fallback")
"""What the names of fonts begin with that draw every character as a box, or as nothing."""


@contextmanager
def legible(figure: Figure) -> Iterator[None]:
    """A context in which a figure is drawn: texts that FAMILY cannot show have further fonts.

    Characters that no font shows become NO_GLYPH. matplotlib does not log that these fonts lack a bold weight.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        foreign = frozenset(text.get_text()) - _shown_by_family() if not text.get_text().isascii() else None
        if foreign:
            families, unknown = find_fonts(foreign)
            text.set_fontfamily([FAMILY, *families])
            text.set_text(text.get_text().translate(dict.fromkeys(map(ord, unknown), NO_GLYPH)))
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@lru_cache(maxsize=64)
def find_fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Installed families that show these characters together, as few as possible, and the characters left over."""
    found: dict[str, frozenset[str]] = {}
    for entry in _upright_fonts():
        found[entry.name] = _shown(entry.fname, characters)
        if len(found[entry.name]) == len(characters):
            return (entry.name,), frozenset()
    families: list[str] = []
    left = characters
    while found and (best := max(found, key=lambda name: len(found[name] & left))) and found[best] & left:
        families.append(best)
        left -= found[best]
    return tuple(families), left


def _upright_fonts() -> Iterator[FontEntry]:
    """One font of each family, of a weight near regular, sorted by name."""
    from matplotlib.font_manager import fontManager

    fonts: dict[str, FontEntry] = {}
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, abs(_weight(entry) - 400), entry.fname)):
        if entry.style == "normal" and not entry.name.startswith(_ONLY_BOXES):
            fonts.setdefault(entry.name, entry)
    return iter(fonts.values())


def _weight(entry: FontEntry) -> int:
    return entry.weight if isinstance(entry.weight, int) else 400


def _shown(path: str, characters: frozenset[str]) -> frozenset[str]:
    """Which of these characters the font in a file has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(character for character in characters if font.get_char_index(ord(character)))


@lru_cache(maxsize=1)
def _shown_by_family() -> frozenset[str]:
    """The characters of FAMILY in both weights, and the line break."""
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    regular, bold = (FT2Font(findfont(FontProperties(family=FAMILY, weight=weight))) for weight in ("normal", "bold"))
    return frozenset(map(chr, regular.get_charmap().keys() & bold.get_charmap().keys())) | {"\n"}
