"""Where and when two versions of a model differ: relative differences of the outputs of their blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import display

WORST = 5
"""Blocks that are named."""


@dataclass(frozen=True)
class Probe:
    """Two models of one class that rendered the same noise."""

    name: str
    """The class of the models."""
    how: str
    """How they rendered, for people."""
    blocks: tuple[str, ...]
    """Names in the order in which they run, between the model's INPUT and OUTPUT."""
    differences: tuple[tuple[float, ...], ...]
    """For each step, for each of `blocks`: RMS difference of the outputs over the RMS of the first model's."""

    @property
    def rises(self) -> tuple[float, ...]:
        """For each block, by how much the difference grows in it: √(mean over the steps of d² - before²).

        Steps in which it shrinks count as 0. The input grows from 0.
        """
        steps = [(0.0, *step) for step in self.differences]
        growths = ([max(step[i + 1] ** 2 - step[i] ** 2, 0.0) for step in steps] for i in self._places)
        return tuple(math.sqrt(math.fsum(growth) / len(steps)) for growth in growths)

    @property
    def means(self) -> tuple[float, ...]:
        """For each block, the RMS over the steps."""
        steps = self.differences
        return tuple(math.sqrt(math.fsum(step[i] ** 2 for step in steps) / len(steps)) for i in self._places)

    @property
    def worst(self) -> list[int]:
        """Places of the blocks in which the difference grows most, worst first: at most WORST, and a third of them.

        The input is not a block.
        """
        rises = self.rises
        inner = [i for i in self._places if self.blocks[i] not in (INPUT, OUTPUT)]
        most = max(1, min(WORST, len(inner) // 3))
        return sorted(filter(lambda i: rises[i], inner), key=lambda i: (-rises[i], i))[:most]

    @property
    def _places(self) -> range:
        return range(len(self.blocks))


INPUT, OUTPUT = "input", "output"
"""What the whole model receives and returns, as if they were its first and last block."""


def to_markdown(probe: Probe) -> str:
    """One row per block in the order in which they run."""
    rises, means = probe.rises, probe.means
    lines = [
        f"{display.markdown(probe.name)}: relative difference of the outputs of its blocks, {probe.how}",
        "",
        "| block | difference | growth in it | largest at step |",
        "|---|---:|---:|---:|",
    ]
    for i, block in enumerate(probe.blocks):
        largest = max(range(len(probe.differences)), key=lambda step: probe.differences[step][i])
        mean, rise = display.share(means[i]), display.share(rises[i])
        lines.append(f"| {display.markdown(block)} | {mean} | {rise} | {largest + 1} |")
    worst = ", ".join(display.markdown(probe.blocks[i]) for i in probe.worst)
    return "\n".join([*lines, "", f"Blocks in which the difference grows most: {worst}"]) + "\n"


def list_layers(blocks: Sequence[str], layers: Mapping[str, Sequence[int]]) -> str:
    """The blocks, each with its Linear layers, as names that patterns can be written from.

    layers: name of a Linear layer -> shape of its weight, (out, in).
    """
    lines: list[str] = []
    rest = dict(layers)
    for block in blocks:
        inside = [name for name in rest if name.startswith(f"{block}.") or name == block]
        lines += [block, *(f"  {name}  {'×'.join(map(str, rest.pop(name)))}" for name in inside)]
    lines += ["outside of the blocks", *(f"  {name}  {'×'.join(map(str, shape))}" for name, shape in rest.items())]
    return "\n".join(lines) + "\n"
