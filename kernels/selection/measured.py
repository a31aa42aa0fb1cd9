"""The measured choice: which layers stay as they are, by their effect on the result per byte.

The effects of single layers add up as mean squared changes, so the choice is a knapsack problem. The greedy choice, by
effect per byte, is at most one layer away from the best one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A layer that may be quantized or kept."""

    name: str
    effect: float
    """What quantizing it costs: the mean squared change of the result, in any unit. At least 0."""
    nbytes: int
    """What keeping it costs: the bytes that quantizing it would save."""


def by_effect_per_byte(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates in the order in which they are kept. Those that cost nothing come first, equal ones by name."""

    def rank(candidate: Candidate) -> tuple[float, str]:
        return -(candidate.effect / candidate.nbytes if candidate.nbytes > 0 else math.inf), candidate.name

    return sorted(candidates, key=rank)


def keep_within(candidates: Iterable[Candidate], room: int) -> frozenset[str]:
    """Names of the candidates to keep, at most `room` bytes together. No other one would fit as well.

    A room below 0 keeps only what costs nothing.
    """
    kept = set()
    for candidate in by_effect_per_byte(candidates):
        if candidate.nbytes <= max(room, 0):
            kept.add(candidate.name)
            room -= max(candidate.nbytes, 0)
    return frozenset(kept)


def keep_until(candidates: Iterable[Candidate], allowed: float) -> frozenset[str]:
    """Names of the candidates to keep so that the effects of the others add up to at most `allowed`.

    None of them could be left out.
    """
    order = by_effect_per_byte(candidates)
    first = bisect_left(range(len(order)), True, key=lambda i: effect_of(order[i:]) <= allowed)
    kept, effect = [], effect_of(order[first:])
    for candidate in reversed(order[:first]):
        if effect + candidate.effect <= allowed:
            effect += candidate.effect
        else:
            kept.append(candidate.name)
    return frozenset(kept)


def effect_of(candidates: Sequence[Candidate]) -> float:
    """The effect of quantizing all of these. It does not depend on their order."""
    return math.fsum(candidate.effect for candidate in candidates)
