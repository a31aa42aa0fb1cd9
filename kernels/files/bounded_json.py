"""JSON of untrusted files, in bounded memory: decoded, 32 MB of brackets would take a gigabyte."""

from __future__ import annotations

import json
from collections.abc import Callable

MAX_JSON = 32 << 20
"""Bytes, or characters, of one JSON text: an index, or an entry in a file's metadata."""
MAX_VALUES = 800_000
"""Values in one JSON text. 200,000 layers with three numbers each have as many."""


class TooLargeError(ValueError):
    """JSON, or a header, beyond the limits of this library. Other programs may read it."""


def parse_json(
    text: str | bytes | bytearray,
    most: int = MAX_VALUES,
    hook: Callable[[list[tuple[str, object]]], object] | None = None,
) -> object:
    """The value of a JSON text. hook: makes an object from its pairs, see json.loads.

    Raises TooLargeError: longer than MAX_JSON, or more than `most` values; ValueError: not JSON; RecursionError: nested
    too deep.
    """
    if len(text) > MAX_JSON:
        raise TooLargeError(f"it has {len(text):,} bytes; at most {MAX_JSON:,} are read")
    if count_values(text) > most:
        raise TooLargeError(f"it has more than {most:,} values")
    value: object = json.loads(text, object_pairs_hook=hook)
    return value


def count_values(text: str | bytes | bytearray) -> int:
    """At least as many as the values of a JSON text: one, one per comma, one per bracket, be they in strings or not."""
    if isinstance(text, str):
        return 1 + sum(map(text.count, ",[{"))
    return 1 + sum(map(text.count, (b",", b"[", b"{")))
