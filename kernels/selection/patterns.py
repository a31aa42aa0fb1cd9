"""Patterns that name layers: one or more whole dotted parts of a tensor's name, anywhere in it.

`img_in` and `blocks.0.attn` are patterns. `*` matches any characters within one part. A negative number counts a list
of blocks from its end: `blocks.-1` is the last block.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def compile_pattern(pattern: str, names: Iterable[str] = ()) -> re.Pattern:
    """A regular expression to `search` in a dotted name. `names` resolve a pattern's negative numbers.

    Raises ValueError for an empty pattern or one with an empty part.
    """
    parts = pattern.strip().strip(".").split(".")
    if not all(parts):
        raise ValueError(f"{pattern!r} is no pattern: give whole dotted parts of a layer's name, e.g. blocks.0.attn")
    expression = r"(?:^|\.)"
    for index, part in enumerate(parts):
        if re.fullmatch(r"-\d+", part):
            part = str(_count_children(expression, names) + int(part))
        expression += re.escape(part).replace(r"\*", "[^.]*") + (r"\." if index < len(parts) - 1 else r"(?:\.|$)")
    return re.compile(expression)


def _count_children(parent: str, names: Iterable[str]) -> int:
    """One more than the largest number that follows `parent` in a name."""
    child = re.compile(parent + r"(\d+)(?:\.|$)")
    return max((int(number) for name in names for number in child.findall(name)), default=-1) + 1


def no_match(pattern: str, names: Iterable[str]) -> str:
    """The message for a pattern that hits nothing, with the names nearest to it."""
    length = len(pattern.strip(".").split("."))
    candidates: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        candidates.update(dict.fromkeys(".".join(parts[i : i + length]) for i in range(len(parts) - length + 1)))
    near = difflib.get_close_matches(pattern, candidates, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "a pattern is whole dotted parts of a name"
    return f"pattern '{pattern}' matches no tensor; {hint}"
