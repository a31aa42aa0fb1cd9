"""Compare FP8 Roundings: error and bias of every rounding in both formats, as boxes over layers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from .. import display
from ..numerics.formats import FORMATS
from ..studies.advice import describe_sample, describe_unseen, recommendations
from ..studies.comparison import Comparison, Trial
from .style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    RULE,
    add_panels,
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
"""Standard errors. The mean error of an unbiased rounding lies within them in 95 % of the layers."""


@house_style()
def comparison_figure(comparison: Comparison, *, width: int = 1024, height: int = 832) -> Figure:
    """Three panels over the roundings: weight error, bias, and systematic error.

    With a calibration, a fourth panel on top: the error of the layer outputs.
    """
    calibrated = comparison.calibration is not None
    figure = new_figure(width, height, _lowest(calibrated))
    area = grid_area(figure, left=0.85, right=0.35, top=1.15, bottom=2.0 if calibrated else 1.35)
    panels = add_panels(figure, 3 + calibrated, 1, area, sharex=True, hspace=0.5 if calibrated else 0.42)
    rmse, bias, systematic = panels[-3:]
    if calibrated:
        draw_output_errors(panels[0], comparison)
    draw_boxes(rmse, comparison, lambda trial: 100 * np.array(trial.relative_rmse))
    rmse.set(ylabel="RMSE (% of RMS)")
    rmse.set_title("Error of the weights")
    draw_boxes(bias, comparison, lambda trial: np.array(trial.bias_in_standard_errors))
    draw_chance(bias)
    draw_boxes(systematic, comparison, lambda trial: 100 * np.array(trial.systematic))
    systematic.set(ylabel="RMSE (% of RMS)", xlim=(-0.5, len(comparison.roundings) - 0.5))
    systematic.set_title("Systematic error (what averaging over many seeds cannot remove)")
    systematic.set_xticks(range(len(comparison.roundings)), comparison.roundings, size=9.5)
    for axes in (rmse, systematic):
        axes.set_ylim(0, 1.3 * axes.dataLim.y1 or 1)
    _write_legend(figure)
    write_titles(
        figure,
        f"{comparison.source}: every rounding in both formats",
        f"{describe_sample(comparison)} · scaling {comparison.scaling} · seed {comparison.seed} · "
        "box: middle half of the layers, whiskers: all layers, number: median",
    )
    write_caption(figure, *recommendations(comparison), describe_unseen(comparison))
    return figure


def check_comparison_size(width: int, height: int, *, calibrated: bool) -> None:
    """Raises ValueError for a size that comparison_figure does not take, before there is anything to draw."""
    check_size(width, height, _lowest(calibrated))


def _lowest(calibrated: bool) -> float:
    return 0.8 if calibrated else 0.7


def draw_output_errors(axes: Axes, comparison: Comparison) -> None:
    """Boxes over the layers that are in the calibration."""
    axes.set(ylabel="RMSE (% of RMS)")
    axes.set_title("Error of the layer outputs on recorded inputs")
    if not any(comparison.calibrated_layers):
        write_inside(axes, "none of these layers is in the calibration")
        axes.set_yticks(())
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False)
        return
    draw_boxes(axes, comparison, lambda trial: 100 * np.array(trial.output_errors))
    axes.set_ylim(0, 1.3 * axes.dataLim.y1 or 1)


def draw_boxes(axes: Axes, comparison: Comparison, values: Callable[[Trial], np.ndarray]) -> None:
    """One box per trial: grouped by rounding, coloured by format, with the median above."""
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
        label = display.number(round(median(data), 2))
        axes.annotate(label, (place, data.max()), (0, 3), textcoords="offset points", ha="center", size=8.5)
    axes.grid(axis="x", visible=False)
    for boundary in range(1, len(comparison.roundings)):
        axes.axvline(boundary - 0.5, color=RULE, linewidth=0.8)
    axes.tick_params(axis="x", length=0)


def draw_chance(axes: Axes) -> None:
    """The band of mean errors that chance explains."""
    axes.axhspan(-CHANCE, CHANCE, color=GREEN, alpha=0.13, linewidth=0)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    reach = max(abs(low), abs(high), CHANCE)
    axes.set(ylim=(-1.2 * reach, 1.45 * reach), ylabel="standard errors")
    axes.set_title(f"Bias: mean error in standard errors, RMSE / √n (band: ±{CHANCE}, no bias)")


def _write_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, alpha=0.7, label=format) for format, colour in FORMAT_COLOURS.items()]
    height = figure.get_figheight()
    figure.legend(handles=patches, loc="upper right", bbox_to_anchor=(0.97, 1 - 0.72 / height), ncols=2, borderpad=0)
