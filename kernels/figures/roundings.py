"""Compare FP8 Roundings: which to choose, and error and bias of each in both formats, as boxes over layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from .. import display
from ..numerics.formats import FORMATS
from ..numerics.rounding import ROUNDINGS
from ..studies.advice import describe_sample, describe_unseen, recommendations
from ..studies.comparison import Comparison, Trial
from .style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    RULE,
    WIDTH_INCHES,
    add_panels,
    check_size,
    grid_area,
    house_style,
    new_figure,
    write_caption,
    write_inside,
    write_lead,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT_COLOURS = dict(zip(FORMATS, (BLUE, ORANGE), strict=True))
BOX_WIDTH, FORMAT_GAP = 0.22, 0.3
CHANCE = 2
"""Standard errors. The mean error of an unbiased rounding lies within them in 95 % of the layers."""
OTHERS = "other mechanisms"
"""The stochastic roundings besides `stochastic`, which have its distribution, in one column."""


@house_style()
def comparison_figure(comparison: Comparison, *, width: int = 1024, height: int = 832) -> Figure:
    """The advice, and three panels over the roundings: weight error, bias, and systematic error.

    With a calibration, a fourth panel before them: the error of the layer outputs.
    """
    calibrated = comparison.calibration is not None
    figure = new_figure(width, height, _lowest(calibrated))
    write_titles(figure, f"{comparison.source}: which rounding?")
    top = write_lead(figure, *recommendations(comparison), *filter(None, [describe_unseen(comparison)]))
    area = grid_area(figure, left=0.85, right=0.35, top=top + 0.42, bottom=0.95)
    panels = add_panels(figure, 3 + calibrated, 1, area, sharex=True, hspace=0.5 if calibrated else 0.42)
    _write_legend(figure, top + 0.37)
    rmse, bias, systematic = panels[-3:]
    if calibrated:
        draw_output_errors(panels[0], comparison)
    draw_boxes(rmse, comparison, lambda trial: 100 * np.array(trial.relative_rmse))
    rmse.set(ylabel="% of RMS")
    rmse.set_title("Error of the weights")
    draw_boxes(bias, comparison, lambda trial: np.array(trial.bias_in_standard_errors))
    draw_chance(bias)
    draw_boxes(systematic, comparison, lambda trial: 100 * np.array(trial.systematic))
    names = columns(comparison)
    systematic.set(ylabel="% of RMS", xlim=(-0.5, len(names) - 0.5))
    systematic.set_title("Systematic error (what averaging over many seeds cannot remove)")
    systematic.set_xticks(range(len(names)), [_column_label(*column) for column in names.items()], size=9.5)
    for axes in (rmse, systematic):
        axes.set_ylim(0, 1.3 * axes.dataLim.y1 or 1)
    write_caption(
        figure,
        f"{describe_sample(comparison)} · scaling {comparison.scaling} · seed {comparison.seed} · "
        "box: middle half of the layers, whiskers: all layers, number: median",
    )
    return figure


def columns(comparison: Comparison) -> dict[str, list[str]]:
    """Name of a column -> the roundings in it."""
    names: dict[str, list[str]] = {}
    for rounding in comparison.roundings:
        known = ROUNDINGS.get(rounding)
        folded = known is not None and known.stochastic and rounding != "stochastic"
        names.setdefault(OTHERS if folded else rounding, []).append(rounding)
    return names


def _column_label(name: str, roundings: Sequence[str]) -> str:
    return name if name != OTHERS else f"{name}:\n{', '.join(roundings)}"


def check_comparison_size(width: int, height: int, *, calibrated: bool) -> None:
    """Raises ValueError for a size that comparison_figure does not take, before there is anything to draw."""
    check_size(width, height, _lowest(calibrated))


def _lowest(calibrated: bool) -> float:
    return 0.8 if calibrated else 0.7


def draw_output_errors(axes: Axes, comparison: Comparison) -> None:
    """Boxes over the layers that are in the calibration."""
    axes.set(ylabel="% of RMS")
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
    """One box per column and format, coloured by format, with the median above."""
    names = columns(comparison)
    for (i, roundings), (j, format) in product(enumerate(names.values()), enumerate(FORMATS)):
        trials = [trial for trial in comparison.trials if trial.format == format and trial.rounding in roundings]
        place, colour = i + FORMAT_GAP * (j - 0.5), FORMAT_COLOURS[format]
        data = np.concatenate([values(trial) for trial in trials])
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
        axes.annotate(
            display.fixed(median(data), 2),
            (place, data.max()),
            (0, 3),
            textcoords="offset points",
            ha="center",
            size=8.5,
        )
    axes.grid(axis="x", visible=False)
    for boundary in range(1, len(names)):
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


def _write_legend(figure: Figure, bottom: float) -> None:
    """The colours of the formats. bottom: inches from the top of the figure."""
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, alpha=0.7, label=format) for format, colour in FORMAT_COLOURS.items()]
    where = (1 - 0.35 / WIDTH_INCHES, 1 - bottom / figure.get_figheight())
    figure.legend(handles=patches, loc="lower right", bbox_to_anchor=where, ncols=2, borderpad=0, borderaxespad=0)
