"""Blocks of a network that are missing, or lack tensors that all others have: a download or a merge that went wrong.

A network is mostly a list of equal blocks, `joint_blocks.0.…` to `joint_blocks.23.…`. ComfyUI counts them by their
names, and gives no error for one that is not there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from .. import display
from .components import Components
from .presets import NEVER_QUANTIZED

_FEWEST = 3
"""Blocks that a list has besides the one at fault. Shorter lists, such as an MLP with its activations, have gaps."""

_NUMBER = re.compile(r"(?<![^.])[0-9]{1,4}(?=\.)")
"""The first part of a name that is a number. No model has 10,000 blocks."""

_Blocks = dict[int, set[str]]
"""Number of a block -> the rest of the names of its tensors."""


def incomplete_blocks(components: Components, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(block, what is wrong with it) for the networks of known families that can be quantized. names: all tensors."""
    for path, blocks in _lists(components, names).items():
        missing = _missing(blocks)
        yield from ((f"{path}{number}", f"is missing from the blocks 0 to {max(blocks)}") for number in missing)
        for number, lacking in _lacking(blocks).items():
            example, *others = sorted(lacking)
            more = f" and {display.count(len(others), 'other tensor')}" if others else ""
            yield f"{path}{number}", f"lacks {example}{more}, which the other blocks have"


def _lists(components: Components, names: Iterable[str]) -> dict[str, _Blocks]:
    """What precedes the first number in the names of tensors -> the blocks with these names."""
    known = {each for each in components.all if each.preset.kind != NEVER_QUANTIZED and each.family != "unknown"}
    lists: dict[str, _Blocks] = {}
    for name in names if known else ():
        component = components.of(name)
        number = _NUMBER.search(name, len(component.prefix)) if component in known else None
        if number:
            blocks = lists.setdefault(name[: number.start()], {})
            blocks.setdefault(int(number[0]), set()).add(name[number.end() + 1 :])
    return {path: blocks for path, blocks in lists.items() if sum(map(_is_block, blocks.values())) >= _FEWEST}


def _is_block(rest: Iterable[str]) -> bool:
    """Whether these are the tensors of several layers, and not of a single one."""
    return len({name.rpartition(".")[0] for name in rest if "." in name}) > 1


def _missing(blocks: Mapping[int, set[str]]) -> list[int]:
    """Numbers that the list leaves out after a block, if they are few. After a single layer may be an activation."""
    if _FEWEST * (max(blocks) + 1 - len(blocks)) > len(blocks):
        return []
    gaps = pairwise([-1, *sorted(blocks)])
    return [n for before, after in gaps if before < 0 or _is_block(blocks[before]) for n in range(before + 1, after)]


def _lacking(blocks: Mapping[int, set[str]]) -> dict[int, set[str]]:
    """Block -> names of tensors that it lacks, and the blocks around it have.

    The first and the last block are often of another kind: nothing is said of them, and the last may lack the same.
    So are blocks that are lists, as in a U-Net, which are compared by their first part alone: pruned models have fewer
    of the others.
    """
    counts = Counter(name for rest in blocks.values() for name in rest)
    last = max(blocks)
    lacking: dict[int, set[str]] = {}
    for name, count in counts.items():
        holders = count - (name in blocks[last])
        if holders != len(blocks) - 2 or count < _FEWEST or name not in blocks[min(blocks)]:
            continue
        (number,) = (number for number, rest in blocks.items() if number != last and name not in rest)
        part = name.partition(".")[0]
        further = part.isdecimal() and part != "0"
        if name in blocks.get(number + 1, ()) and not further and not _is_of_a_weight(name, blocks[number]):
            lacking.setdefault(number, set()).add(name)
    return lacking


def _is_of_a_weight(name: str, rest: set[str]) -> bool:
    """Whether a tensor, such as a scale of an unknown kind, comes with a weight that these names hold without it."""
    layer = name.rpartition(".weight" if ".weight" in name else ".")[0]
    return f"{layer}.weight" in rest and not name.endswith(".bias")
