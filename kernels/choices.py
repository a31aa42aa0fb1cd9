"""Looking up a user's choice in a table of choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from .errors import UnknownChoiceError

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """table[name]. Raises UnknownChoiceError naming `what` and the valid choices."""
    try:
        return table[name]
    except (KeyError, TypeError):  # TypeError: an unhashable value, such as a list in a workflow file
        raise UnknownChoiceError(f"unknown {what} {name!r}: choose one of {', '.join(table)}") from None
