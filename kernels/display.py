"""Numbers and names as people read them: figures, tables, the command and the log. js/numbers.js has the numbers.

Meant to be called with the module's name: `display.bytes(n)`, `display.share(x)`.
"""

from __future__ import annotations

import math
import re
import unicodedata


def bytes(n: float) -> str:
    """A size in decimal units with three digits: "516 B", "7.80 MB"."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while n >= 999.5 and power < len(units) - 1:
        n /= 1000
        power += 1
    digits = 0 if power == 0 or n >= 99.95 else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f} {units[power]}"


def sizes(before: float, after: float) -> str:
    """Two sizes in bytes and the change: "16.2 GB → 8.40 GB (−48 %)"."""
    text = f"{bytes(before)} → {bytes(after)}"
    if not before:
        return text
    percent = round(100 * (after / before - 1))
    sign = "+" if percent > 0 else "−" if percent < 0 else "±"
    return f"{text} ({sign}{abs(percent)} %)"


def share(x: float) -> str:
    """A share of 1 in percent, with up to three significant digits: "8.21 %", "50 %". Only 0 is "0 %"."""
    if 0 < x < 1e-5:
        return "<0.001 %"
    return f"{float(f'{100 * x:.3g}'):g} %"


def decibels(level: float | None) -> str:
    """A level with one decimal: "28.6 dB". Infinite, or None, is "∞ dB": nothing was lost."""
    if level is None or math.isinf(level):
        return "∞ dB"
    return f"{fixed(level, 1)} dB"


def seconds(duration: float) -> str:
    """A duration in whole seconds, rounded up: "8 s", "2 min 05 s", "1 h 03 min"."""
    whole = max(0, math.ceil(duration))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min {whole % 60:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def small(x: float) -> str:
    """A number near 0, such as a bias, with two digits and a power of ten: "−3.1e−7". 0 is "0"."""
    return _scientific(x, 1) if x else "0"


def number(x: float) -> str:
    """A number of any size with three significant digits: "0.0128", "448", "1,500", "2.79e−5"."""
    x += 0.0  # -0.0 becomes 0.0
    magnitude = abs(x)
    if magnitude and not 1e-4 <= magnitude < 1e6:
        return _scientific(x, 2)
    return _with_minus(f"{x:,.0f}" if magnitude >= 999.5 else f"{x:.3g}")


def fixed(x: float, digits: int) -> str:
    """A number with this many digits after the point, for columns of numbers: "−0.28", "2.60"."""
    return _with_minus(f"{round(x, digits) + 0.0:.{digits}f}")


def count(n: int, noun: str) -> str:
    """A number of things: "1 layer", "12,000 layers". noun: singular, with a regular plural."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def shorten_middle(text: str, length: int) -> str:
    """The text with an ellipsis in place of its middle if it has more than `length` characters; wide ones count twice.

    Two thirds of what remains are the end, by which layer names differ most.
    """
    if _columns(text) <= length:
        return text
    tail = (length - 1) * 2 // 3
    return f"{_fitting(text, length - 1 - tail)}…{_fitting(text[::-1], tail)[::-1]}"


def printable(text: str) -> str:
    """The text on one line, safe for a terminal or a figure: control, bidi and other invisible characters as escapes.

    Names of tensors and files come from other people. The escape character becomes the four characters \\x1b.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def printable_lines(text: str) -> str:
    """printable for a text of several lines, which stay apart."""
    return "\n".join(map(printable, text.split("\n")))


def markdown(text: str) -> str:
    """A name as plain text in Markdown, also in a table: no HTML, image, link or emphasis."""
    escaped = printable(text).replace("://", ":\0//")
    marked = "".join(_MARKDOWN.get(character, character) for character in escaped)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", marked)  # inside a word it has no meaning


_MARKDOWN = {
    **{character: f"\\{character}" for character in "\\`*[]|~"},
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "\0": "&#8203;",  # a zero-width space, so that an address does not become a link
}

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories: control, format (bidi, zero-width), surrogate, private use, line and paragraph separators."""


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _columns(text: str) -> int:
    """The width of a text in characters of a fixed width: Chinese, Japanese and Korean ones take two."""
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _fitting(text: str, columns: int) -> str:
    """As much of the beginning as fits."""
    fitting = text[:columns]
    while _columns(fitting) > columns:
        fitting = fitting[:-1]
    return fitting


def _scientific(x: float, digits: int) -> str:
    mantissa, exponent = f"{x:.{digits}e}".split("e")
    return _with_minus(f"{mantissa}e{int(exponent)}")


def _with_minus(text: str) -> str:
    """The text of a number with minus signs in place of hyphens."""
    return text.replace("-", "−")
