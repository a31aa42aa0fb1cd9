"""Compare FP8 Roundings: error beside bias for every rounding and format, as boxes over layers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ..numerics.formats import FORMATS
from ..studies.comparison import Comparison, Trial, describe_sample, describe_unseen, recommendations
from .style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    RULE,
    check_size,
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

FORMAT_COLOURS = dict(zip(FORMATS, (BLUE, ORANGE), strict=True))
BOX_WIDTH, FORMAT_GAP = 0.26, 0.36
CHANCE = 2
"""Standard errors within which a mean error is no bias but chance, 95 times of 100."""


@house_style()
def comparison_figure(comparison: Comparison, *, width: int = 1024, height: int = 832) -> Figure:
    """Three panels over the roundings: error, mean error against chance, and the error that draws have in common.

    With a calibration a fourth above them: the error of the layers' outputs.
    """
    calibrated = comparison.calibration is not None
    figure = new_figure(width, height, _lowest(calibrated))
    area = grid_area(figure, left=0.85, right=0.35, top=1.15, bottom=2.0 if calibrated else 1.35)
    panels = figure.add_gridspec(3 + calibrated, 1, hspace=0.5 if calibrated else 0.42, **area).subplots(sharex=True)
    rmse, bias, repeating = panels[-3:]
    if calibrated:
        draw_output_errors(panels[0], comparison)
    draw_boxes(rmse, comparison, lambda trial: 100 * np.array(trial.relative_rmse))
    rmse.set(ylabel="RMSE (% of RMS)")
    rmse.set_title("Error of a weight, against a typical weight")
    draw_boxes(bias, comparison, lambda trial: np.array(trial.bias_over_chance))
    draw_chance(bias)
    draw_boxes(repeating, comparison, lambda trial: 100 * np.array(trial.repeating))
    repeating.set(ylabel="RMSE (% of RMS)", xlim=(-0.5, len(comparison.roundings) - 0.5))
    repeating.set_title("Error that every draw repeats: what no averaging removes")
    repeating.set_xticks(range(len(comparison.roundings)), comparison.roundings, size=9.5)
    for axes in (rmse, repeating):
        axes.set_ylim(0, 1.3 * axes.dataLim.y1 or 1)
    _write_legend(figure)
    write_titles(
        figure,
        f"{comparison.source}: every rounding, both formats",
        f"{describe_sample(comparison)} · scaling {comparison.scaling} · seed {comparison.seed} · "
        "a box spans half of the layers, its whiskers all of them; numbers are medians",
    )
    write_caption(figure, *recommendations(comparison), describe_unseen(comparison))
    return figure


def check_comparison_size(width: int, height: int, *, calibrated: bool) -> None:
    """Raises ValueError for pixels that comparison_figure would refuse, sooner than there is anything to draw."""
    check_size(width, height, _lowest(calibrated))


def _lowest(calibrated: bool) -> float:
    return 0.8 if calibrated else 0.7


def draw_output_errors(axes: Axes, comparison: Comparison) -> None:
    """Boxes over the layers that the calibration saw."""
    axes.set(ylabel="RMSE (% of RMS)")
    axes.set_title("Error of a layer's output, on what the calibration saw")
    if len(comparison.unseen) == len(comparison.keys):
        write_inside(axes, "the calibration knows none of these layers")
        axes.set_yticks(())
        return
    draw_boxes(axes, comparison, lambda trial: 100 * np.array(trial.output_errors))
    axes.set_ylim(0, 1.3 * axes.dataLim.y1 or 1)


def draw_boxes(axes: Axes, comparison: Comparison, values: Callable[[Trial], np.ndarray]) -> None:
    """A box a trial, at its rounding, in its format's colour, with its median written above."""
    formats = list(FORMATS)
    for trial in comparison.trials:
        place = comparison.roundings.index(trial.rounding) + FORMAT_GAP * (formats.index(trial.format) - 0.5)
        colour = FORMAT_COLOURS[trial.format]
        data = values(trial)
        axes.boxplot(
            [data],
            positions=[place],
            widths=BOX_WIDTH,
            whis=(0, 100),
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": colour, "alpha": 0.55, "edgecolor": colour},
            medianprops={"color": INK, "linewidth": 1.4},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
        label = f"{round(median(data), 2) + 0.0:g}".replace("-", "−")
        axes.annotate(label, (place, data.max()), (0, 3), textcoords="offset points", ha="center", size=8.5)
    axes.grid(axis="x", visible=False)
    for boundary in range(1, len(comparison.roundings)):
        axes.axvline(boundary - 0.5, color=RULE, linewidth=0.8)
    axes.tick_params(axis="x", length=0)


def draw_chance(axes: Axes) -> None:
    """The band in which a mean error is chance."""
    axes.axhspan(-CHANCE, CHANCE, color=GREEN, alpha=0.13, linewidth=0)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    reach = max(abs(low), abs(high), CHANCE)
    axes.set(ylim=(-1.2 * reach, 1.45 * reach), ylabel="bias / (RMSE / √n)")
    axes.set_title(f"Bias of a layer: its mean error, in units of what chance gives (band: ±{CHANCE}, no bias)")


def _write_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, alpha=0.7, label=format) for format, colour in FORMAT_COLOURS.items()]
    height = figure.get_figheight()
    figure.legend(handles=patches, loc="upper right", bbox_to_anchor=(0.97, 1 - 0.72 / height), ncols=2, borderpad=0)
