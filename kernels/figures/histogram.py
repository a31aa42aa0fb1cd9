"""Error Histogram: the quantization errors of a model or of single layers, beside theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import display
from ..numerics.error_statistics import (
    RELATIVE_OCTAVES,
    STEP_BIN_WIDTH,
    STEP_BINS,
    ErrorStatistics,
    evenly_spaced,
    merge,
    relative_bin_edges,
    step_bin_edges,
)
from ..numerics.formats import FORMATS
from ..numerics.rounding import ROUNDINGS
from ..recipe import Recipe
from ..report.report import LayerReport, Report, with_statistics
from .style import (
    BLUE,
    FAINT_BLUE,
    INK,
    STRONG_BLUE,
    VERMILION,
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

SCATTER_POINTS = 6000
DENSITY_BINS = 48
BINS_PER_BAR = 2
"""Bins of `step_histogram` in a bar. 16-bit sources lie on a grid of about 1/16 FP8 step, a comb in thinner bars."""
THEORY_PEAK = 100 * BINS_PER_BAR * STEP_BIN_WIDTH
"""Percent of the values per bar at the peak of the theory, which is the same for nearest and stochastic rounding."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@house_style()
def error_histogram(
    report: Report, layers: Sequence[LayerReport] | None = None, *, width: int = 1024, height: int = 480
) -> Figure:
    """Three panels: error in FP8 steps, error relative to amax, values before and after.

    layers: the layers of `report` to show together; default: all. Layers without statistics are left out.
    Raises ValueError if no layer has statistics.
    """
    chosen = with_statistics(report.layers if layers is None else layers)
    if not chosen:
        raise ValueError(f"{report.source}: the report has no error statistics; quantize with statistics on")
    error = merge(error for _, error in chosen)
    figure = new_figure(width, height, lowest=0.42)
    area = grid_area(figure, left=0.72, right=0.3, top=1.15, bottom=1.32)
    steps, relative, scatter = add_panels(figure, 1, 3, area, wspace=0.32)
    draw_steps(steps, error, report.recipe)
    draw_relative(relative, error, report.recipe)
    draw_scatter(scatter, [error for _, error in chosen], report.recipe)
    write_titles(figure, _title(report, [layer for layer, _ in chosen]), describe_recipe(report.recipe))
    write_caption(figure, in_plain_words(error), in_numbers(error))
    return figure


def draw_steps(axes: Axes, error: ErrorStatistics, recipe: Recipe) -> None:
    """Share of values per bin of the error in FP8 steps, a line for errors of 0, and the distribution in theory."""
    at_0, shares, edges = _bars(_shares(error.step_histogram, error.count))
    axes.stairs(shares, edges, fill=True, color=BLUE, alpha=0.75)
    for outermost in (0, len(shares) - 1):
        axes.stairs(shares[outermost : outermost + 1], edges[outermost : outermost + 2], fill=True, color=VERMILION)
    if recipe.rounding in ROUNDINGS:
        axes.plot(*_theory(recipe), color=INK, linewidth=1.2)
        write_inside(axes, "line: theory", 0.03, 0.96, ha="left", color=INK)
    if at_0 > THEORY_PEAK / 100:
        axes.vlines(0, 0, at_0, color=STRONG_BLUE, linewidth=2)
        write_inside(axes, f"at 0: {display.share(at_0 / 100)}", 0.96, 0.96, ha="right", color=STRONG_BLUE)
    top = _room_for_all_but_spikes(shares)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, top), xticks=(-1, -0.5, 0, 0.5, 1))
    axes.set(xlabel="error (steps of the FP8 grid)", ylabel="values per bin (%)")
    axes.set_title("Error in FP8 steps")
    beyond = (shares[0] + shares[-1]) / 100
    if beyond:
        label = f"beyond ±{edges[-2]:.2f}:\n{display.share(beyond)}"
        write_inside(axes, label, 0.96, 0.62, ha="right", color=VERMILION)


def draw_relative(axes: Axes, error: ErrorStatistics, recipe: Recipe) -> None:
    """Share of values per octave of |error| / amax on a log axis, and the largest error that the rounding can make."""
    edges = np.array(relative_bin_edges())
    shares = _shares(error.relative_histogram, error.count) / np.diff(np.log2(edges))
    first = edges[np.argmax(shares > 0)] if shares.any() else 1.0
    axes.set_xscale("log", base=2)
    axes.stairs(shares, edges, fill=True, color=BLUE, alpha=0.75)
    axes.set(xlim=(min(first, 2.0**-16), 1), ylim=(0, max(1.25 * shares.max(), 1)))
    _label_octaves(axes)
    axes.set(xlabel="|error| / amax of the layer", ylabel="values per octave (%)")
    axes.set_title("Error relative to amax")
    if recipe.rounding in ROUNDINGS:
        axes.axvline(_largest_relative_error(recipe), color=INK, linewidth=1.2)
        write_inside(axes, "line: largest error\nof a normal value", 0.03, 0.92, ha="left", color=INK)
    if error.exact == error.count:
        write_inside(axes, "no errors", 0.4, 0.4)
    elif error.exact:
        write_inside(axes, f"not shown:\n{display.share(error.exact / error.count)} unchanged", 0.03, 0.76, ha="left")


def draw_scatter(axes: Axes, errors: Sequence[ErrorStatistics], recipe: Recipe) -> None:
    """Sampled values after quantization over those before, stronger where dense, and the line of no change."""
    from matplotlib.colors import LinearSegmentedColormap

    pairs = sample_pairs(errors)
    axes.set(xlabel="original value", ylabel="dequantized value")
    axes.set_title("Before and after")
    if not len(pairs):
        write_inside(axes, "no values")
        return
    largest = float(np.abs(pairs).max()) or 1.0
    axes.plot((-largest, largest), (-largest, largest), color=INK, linewidth=0.9, zorder=1)
    density, pairs = _with_density(pairs, largest)
    colours = LinearSegmentedColormap.from_list("density", (FAINT_BLUE, STRONG_BLUE))
    level = np.log(density)
    area = min(max(4000 / len(pairs), 7), 30)
    x, y = pairs.T
    axes.scatter(x, y, c=level, vmin=0, vmax=max(level.max(), 1), cmap=colours, s=area, linewidths=0, zorder=2)
    saturated = _beyond_range(x, recipe)
    if saturated.any():
        axes.scatter(x[saturated], y[saturated], color=VERMILION, s=area + 2, linewidths=0, zorder=3)
        write_inside(axes, "saturated", 0.97, 0.06, ha="right", color=VERMILION)
    axes.set(xlim=(-1.08 * largest, 1.08 * largest), ylim=(-1.08 * largest, 1.08 * largest))
    axes.locator_params(nbins=5)
    write_inside(axes, "line: no change", 0.03, 0.96, ha="left", color=INK)


def sample_pairs(errors: Sequence[ErrorStatistics]) -> np.ndarray:
    """At most SCATTER_POINTS of the (original, dequantized) samples, evenly spaced: float64 (n, 2)."""
    pairs = [pair for error in errors for pair in error.samples]
    return np.array([pairs[i] for i in evenly_spaced(len(pairs), SCATTER_POINTS)], dtype=np.float64).reshape(-1, 2)


def describe_recipe(recipe: Recipe) -> str:
    """Format, rounding, scaling and seed on one line."""
    return f"{recipe.format} · {recipe.rounding} · scaling {recipe.scaling} · seed {recipe.seed}"


def in_plain_words(error: ErrorStatistics) -> str:
    """What quantization did to the values, in one to three sentences."""
    if not error.count:
        return "There are no values."
    if error.exact == error.count:
        zeros = "All values are zero" if not error.sum_squared else "FP8 represents every value exactly"
        return f"{zeros}: nothing was lost."
    sentences = [f"The error is {display.share(error.relative_rmse)} of a typical value."]
    if error.saturated:
        sentences.append(f"{display.share(error.saturated / error.count)} of the values were too large and saturated.")
    if error.flushed:
        sentences.append(f"{display.share(error.flushed / error.count)} of the values became zero.")
    if len(sentences) == 1:
        sentences.append("No value saturated or became zero.")
    return " ".join(sentences)


def in_numbers(error: ErrorStatistics) -> str:
    """Bias, relative RMSE, SQNR, saturated and flushed shares on one line."""
    count = error.count or 1
    chance = error.rmse / math.sqrt(count)
    return " · ".join(
        (
            f"bias {display.small(error.bias)} (by chance: ±{display.small(chance)})" if error.rmse else "bias 0",
            f"relative RMSE {display.share(error.relative_rmse)}",
            f"SQNR {display.decibels(error.sqnr)}",
            f"saturated {display.share(error.saturated / count)}",
            f"flushed {display.share(error.flushed / count)}",
        )
    )


def _title(report: Report, layers: Sequence[LayerReport]) -> str:
    if len(layers) == 1:
        return layers[0].key
    which = "all" if len(layers) == len(report.layers) else f"{len(layers):,} of"
    return f"{report.source}: {which} {display.count(len(report.layers), 'layer')}"


def _shares(counts: Sequence[int], total: int) -> np.ndarray:
    return 100 * np.array(counts, dtype=np.float64) / (total or 1)


def _bars(shares: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The share at 0, the shares in bars of BINS_PER_BAR other bins, and the edges of the bars."""
    middle = STEP_BINS // 2
    bars = np.delete(shares, middle).reshape(-1, BINS_PER_BAR).sum(1)
    return shares[middle], bars, np.unique(step_bin_edges())[::BINS_PER_BAR]


def _theory(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Distribution of the error in FP8 steps for values uniform between their neighbours, as a polygon."""
    if ROUNDINGS[recipe.rounding].stochastic:
        return (-1, 0, 1), (0, THEORY_PEAK, 0)
    return (-0.5, -0.5, 0.5, 0.5), (0, THEORY_PEAK, THEORY_PEAK, 0)


def _largest_relative_error(recipe: Recipe) -> float:
    """For normal values that do not saturate: half a step for nearest, a whole step for stochastic rounding."""
    step = 2.0 ** -FORMATS[recipe.format].mantissa_bits
    return step / 2 if recipe.rounding == "nearest" else step


def _room_for_all_but_spikes(shares: np.ndarray) -> float:
    """Top of the axis. The line at 0 and the outermost bars may exceed it; they are labelled."""
    return 1.3 * max(THEORY_PEAK, shares[1:-1].max())


def _label_octaves(axes: Axes) -> None:
    """Ticks at powers of ten, which read better than powers of two."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lowest = axes.get_xlim()[0]
    powers = [power for power in range(-RELATIVE_OCTAVES, 1) if 10.0**power >= lowest]
    stride = -(-len(powers) // 6)
    axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in powers[::-1][::stride]]))
    axes.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    axes.xaxis.set_minor_locator(NullLocator())


def _power_of_ten(x: float, position: int | None = None) -> str:
    exponent = round(math.log10(x))
    return f"10{str(exponent).translate(SUPERSCRIPTS)}" if exponent else "1"


def _with_density(pairs: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Number of samples in the cell of each sample, on a grid of DENSITY_BINS², and the samples; sparse cells first."""
    cells = ((pairs / largest + 1) / 2 * (DENSITY_BINS - 1)).astype(int) @ (DENSITY_BINS, 1)
    density = np.bincount(cells)[cells]
    order = np.argsort(density, kind="stable")
    return density[order], pairs[order]


def _beyond_range(values: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Which values saturated. Only scaling "none" lets any."""
    return (np.abs(values) > FORMATS[recipe.format].max) & (recipe.scaling == "none")
