"""The names and shapes of real model files, without the files: tests/unit/key_lists.txt, one line per kind of tensor.

tests/tools/key_lists.py writes it, from ComfyUI's own classes. A line is a name, a shape, and `Linear` for the weight
of a Linear module. Numbers in a name stand for sets: `blocks.0-38,41.attn.weight` are 40 tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

PATH = Path(__file__).parent / "unit" / "key_lists.txt"


@dataclass(frozen=True)
class KeyList:
    """One published model."""

    name: str
    comfy_class: str
    """The class in comfy.supported_models that ComfyUI's detection chooses."""
    shapes: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    """Names of the weights of Linear modules."""

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def share(self, names: Iterable[str]) -> float:
        """The share of the parameters that these tensors hold."""
        return sum(prod(self.shapes[name]) for name in names) / self.parameters


def read() -> dict[str, KeyList]:
    """name -> KeyList"""
    found = {}
    for section in PATH.read_text().split("\n\n"):
        head, *lines = section.strip().splitlines()
        name, comfy_class = head.split()
        shapes, linear = {}, set()
        for line in lines:
            pattern, shape, *kind = line.split()
            for key in _expanded(pattern):
                shapes[key] = tuple(map(int, shape.split(","))) if shape != "-" else ()
                linear |= {key} if kind else set()
        found[name] = KeyList(name, comfy_class, shapes, frozenset(linear))
    return found


def write(lists: Iterable[KeyList]) -> None:
    """Replace the file."""
    PATH.write_text("\n".join(map(_section, lists)))


def _section(keys: KeyList) -> str:
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for key, shape in keys.shapes.items():
        parts = key.split(".")
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        name = ".".join("*" if part.isdecimal() else part for part in parts)
        rest = " ".join([",".join(map(str, shape)) or "-", *(["Linear"] if key in keys.linear else [])])
        groups.setdefault((name, rest), []).append(numbers)
    lines = [f"{keys.name} {keys.comfy_class}"]
    for (name, rest), numbers in groups.items():
        for ranges in _ranges(numbers):
            waiting = iter(ranges)
            shown = ".".join(next(waiting) if part == "*" else part for part in name.split("."))
            lines.append(f"{shown} {rest}")
    return "\n".join(lines) + "\n"


def _ranges(numbers: list[tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """Tuples of numbers as tuples of sets, such as `0-2,5`: first numbers with the same continuations go together."""
    if numbers == [()]:
        yield ()
        return
    following: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in sorted(numbers):
        following.setdefault(first, []).append(tuple(rest))
    together: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rests in following.items():
        together.setdefault(tuple(rests), []).append(first)
    for rests, firsts in together.items():
        for rest in _ranges([*rests]):
            yield (_runs(firsts), *rest)


def _runs(numbers: list[int]) -> str:
    shown = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        first, *others = [number for _, number in run]
        shown.append(f"{first}-{others[-1]}" if others else str(first))
    return ",".join(shown)


def _expanded(pattern: str) -> Iterator[str]:
    return map(".".join, itertools.product(*map(_numbers, pattern.split("."))))


def _numbers(part: str) -> list[str]:
    """The numbers of a set; any other part of a name as it is."""
    if not part.replace("-", "").replace(",", "").isdecimal():
        return [part]
    runs = [run.partition("-") for run in part.split(",")]
    return [str(number) for first, _, last in runs for number in range(int(first), int(last or first) + 1)]
