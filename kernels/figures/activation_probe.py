"""Activation Probe: the relative difference of two models along their depth, one line per sampled step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import display
from ..studies.activation_probe import INPUT, OUTPUT, Probe
from .style import (
    FAINT,
    FAINT_BLUE,
    GREY,
    INK,
    ORANGE,
    STRONG_BLUE,
    add_panels,
    grid_area,
    house_style,
    new_figure,
    write_caption,
    write_inside,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 16
"""Names of blocks along the axis."""


@house_style()
def activation_probe_figure(probe: Probe, *, width: int = 1024, height: int = 768) -> Figure:
    """Two panels over the blocks: the difference at each step, and by how much it grows in each block."""
    figure = new_figure(width, height, lowest=0.6)
    area = grid_area(figure, left=0.85, right=1.0, top=1.05, bottom=2.0)
    lines, growth = add_panels(figure, 2, 1, area, sharex=True, hspace=0.26, height_ratios=(3, 1.5))
    draw_lines(figure, lines, probe)
    draw_growth(growth, probe)
    write_titles(figure, f"{probe.name}: where two models differ", probe.how)
    worst = ", ".join(probe.blocks[i] for i in probe.worst)
    write_caption(
        figure,
        *([f"The difference grows most in {worst}."] if worst else []),
        f"The outputs of the models differ by {display.share(probe.means[-1])} over all steps.",
    )
    return figure


def draw_lines(figure: Figure, axes: Axes, probe: Probe) -> None:
    """One line per step, from faint (first) to strong (last)."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    steps = len(probe.differences)
    colours = LinearSegmentedColormap.from_list("steps", (FAINT_BLUE, STRONG_BLUE))
    places = np.arange(len(probe.blocks))
    for step, differences in enumerate(probe.differences):
        values = np.where(np.array(differences) > 0, 100 * np.array(differences), np.nan)
        axes.plot(places, values, color=colours(step / max(steps - 1, 1)), linewidth=1.2, marker=".", markersize=4)
    axes.set(yscale="log", ylabel="difference (% of RMS)", xlim=(-0.5, len(places) - 0.5))
    if not any(map(any, probe.differences)):
        axes.set_ylim(0.1, 10)
        write_inside(axes, "all outputs are equal")
    axes.set_title("Relative difference of the outputs, one line per step")
    axes.tick_params(labelbottom=False, bottom=False)
    axes.yaxis.set_major_formatter(lambda value, _: display.number(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    if steps > 1:
        bar = axes.inset_axes((1.02, 0.0, 0.018, 1.0))
        mappable = ScalarMappable(Normalize(1, steps), colours)
        figure.colorbar(mappable, cax=bar, ticks=[1, steps]).set_label("step", labelpad=-6)
        bar.tick_params(length=0)


def draw_growth(axes: Axes, probe: Probe) -> None:
    """Bars of the growth in each block; the worst ones stand out."""
    worst = set(probe.worst)
    colours = [ORANGE if i in worst else GREY for i in range(len(probe.blocks))]
    axes.bar(np.arange(len(probe.blocks)), 100 * np.array(probe.rises), color=colours, width=0.7)
    axes.set(ylabel="growth (% of RMS)")
    axes.set_title("Growth of the difference in each block (root mean square over the steps; orange: largest)")
    axes.set_ylim(0, 1.05 * 100 * max(probe.rises) or 1)
    axes.grid(axis="x", visible=False)
    shown = _labelled(probe)
    axes.set_xticks(shown, [probe.blocks[i] for i in shown], rotation=40, ha="right", rotation_mode="anchor")
    for label, i in zip(axes.get_xticklabels(), shown, strict=True):
        label.set_color(INK if probe.blocks[i] not in (INPUT, OUTPUT) else FAINT)


def _labelled(probe: Probe) -> list[int]:
    """Places whose names fit below the axis: the worst ones, and evenly spaced others."""
    count = len(probe.blocks)
    step = -(-count // MOST_LABELS)
    chosen: list[int] = []
    for place in (*probe.worst[:3], count - 1, *range(0, count, step)):
        if all(abs(place - other) > step / 2 for other in chosen):
            chosen.append(place)
    return sorted(chosen)
