"""FP8 Layer Report: the quantization error of each layer along the network, and the sizes before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from .. import display
from ..numerics.error_statistics import ErrorStatistics
from ..report.report import LayerReport, Measured, Report, with_statistics
from ..report.table import KEPT, describe_output_error, layer_kind, sizes_by_kind
from .histogram import describe_recipe
from .style import (
    BLUE,
    DARK_BLUE,
    FAINT,
    GREEN,
    INK,
    LIGHT_BLUE,
    MARGIN,
    ORANGE,
    PANEL,
    PAPER,
    PURPLE,
    RULE,
    WIDTH_INCHES,
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

KIND_COLOURS = {"attention": BLUE, "MLP": ORANGE, "modulation": GREEN, "other": PURPLE, KEPT: "#b5bcc4"}
ROOMY = 0.7
"""Height over width from which the panel of output errors fits."""
WORST = 5
LEAST_RANGE = 3
"""Smallest range of the SQNR axis in dB, so that small differences look small."""
LEAST_FACTOR = 10
"""Smallest range of the axis of output errors, as a factor."""
LOG_STEPS = {30: (1, 2, 5), 600: (1, 3), math.inf: (1,)}
"""Upper limit of the range of that axis, as a factor -> its ticks in each decade."""
STRIP_COLUMNS = 512
LEAST_SHARE = 1e-6
"""The low end of the colour scale."""
STRIP_COLOURS = ("#fbdcc8", "#d55e00", "#4a1d00")


@house_style()
def layer_report(report: Report, *, width: int = 1024, height: int = 768) -> Figure:
    """SQNR of each layer along the network, shares of saturated and flushed values, and sizes before and after.

    If layers were calibrated and the height is ROOMY times the width, the predicted output errors too.
    Raises ValueError if no layer has statistics.
    """
    layers = in_order_of_depth(entry for entry in with_statistics(report.layers) if entry[1].count)
    if not layers:
        raise ValueError(f"{report.source}: the report has no error statistics; quantize with statistics on")
    worst = [entry for entry in with_statistics(report.worst(WORST)) if math.isfinite(entry[1].sqnr)]
    figure = new_figure(width, height, lowest=0.6)
    area = grid_area(figure, left=0.95, right=3.35, top=1.1, bottom=2.75)
    calibrated = any(layer.output_error for layer, _ in layers)
    quality, *outputs, strip = _panels_along_depth(figure, area, calibrated and height >= ROOMY * width)
    draw_quality(quality, layers, worst)
    for axes in outputs:
        draw_output_errors(axes, [layer for layer, _ in layers])
    draw_losses(strip, [error for _, error in layers])
    (sizes,) = add_panels(figure, 1, 1, _sizes_area(figure))
    draw_sizes(sizes, report)
    list_worst(figure, quality, worst)
    write_titles(figure, report.source, describe_recipe(report.recipe))
    write_caption(figure, *filter(None, (summary(layers), output_summary(report), size_summary(report))))
    return figure


def _panels_along_depth(figure: Figure, area: dict[str, float], with_outputs: bool) -> Sequence[Axes]:
    if not with_outputs:
        return add_panels(figure, 2, 1, area, sharex=True, height_ratios=(5, 1), hspace=0.1)
    gap = 0.45 / (figure.get_figheight() * (area["top"] - area["bottom"]))
    heights = (0.48 - gap / 2, gap, 0.36 - gap / 2, 0.04, 0.12)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0, **area)
    first = figure.add_subplot(grid[0])
    return first, *(figure.add_subplot(grid[row], sharex=first) for row in (2, 4))


def in_order_of_depth(layers: Iterable[Measured]) -> list[Measured]:
    """Sorted by name, with numbers by value: block 2 before block 10."""
    return sorted(layers, key=lambda entry: _name_order(entry[0].key))


def _name_order(key: str) -> list[tuple[str, int]]:
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", key)]


def draw_quality(axes: Axes, layers: Sequence[Measured], worst: Sequence[Measured]) -> None:
    """One dot per layer at its SQNR, coloured by kind. Lossless layers are triangles at the upper edge."""
    values = np.array([error.sqnr for _, error in layers])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 40)
    middle, room = (low + high) / 2, max(high - low, LEAST_RANGE)
    low, high = middle - 0.85 * room, middle + 0.7 * room
    places = np.arange(1, len(layers) + 1)
    kinds = np.array([layer_kind(layer.key) for layer, _ in layers])
    for kind, colour in KIND_COLOURS.items():
        dots = (kinds == kind) & np.isfinite(values)
        if dots.any():
            area = min(max(6000 / len(layers), 9), 36)
            axes.scatter(places[dots], values[dots], s=area, color=colour, linewidths=0, label=kind)
        lossless = (kinds == kind) & np.isinf(values)
        if lossless.any():
            axes.scatter(
                places[lossless], [high - 0.06 * (high - low)] * lossless.sum(), color=colour, marker="^", s=26
            )
    if len(finite) < len(values):
        write_inside(axes, f"▲ lossless: {len(values) - len(finite)}", 0.01, 0.86, ha="left")
    axes.set(xlim=(0.5, len(layers) + 0.5), ylim=(low, high), ylabel="SQNR (dB)")
    if not len(finite):
        axes.set_yticks(())
    axes.set_title("Signal-to-quantization-noise ratio (SQNR) of each layer")
    axes.tick_params(labelbottom=False, bottom=False)
    _number_worst(axes, layers, worst)


def _number_worst(axes: Axes, layers: Sequence[Measured], worst: Sequence[Measured]) -> None:
    """Numbers along the lower edge, with lines to the dots of the worst layers."""
    places = {layer.key: place for place, (layer, _) in enumerate(layers, 1)}
    ranked = sorted((places[layer.key], error.sqnr, rank) for rank, (layer, error) in enumerate(worst, 1))
    low, high = axes.get_ylim()
    row = low + 0.07 * (high - low)
    span = len(layers)
    for spot, (place, sqnr, rank) in zip(spread([x for x, *_ in ranked], span), ranked, strict=True):
        axes.plot((place, spot), (sqnr, row), color=FAINT, linewidth=0.7, zorder=0.9)
        badge = {"boxstyle": "circle,pad=0.25", "facecolor": INK, "edgecolor": "none"}
        axes.text(spot, row, str(rank), color=PAPER, size=7.5, weight="bold", ha="center", va="center", bbox=badge)


def spread(places: Sequence[float], layers: int) -> list[float]:
    """Ascending places on an axis from 0.5 to layers + 0.5, moved apart so that labels there do not overlap."""
    gap = layers * 0.045
    spots: list[float] = []
    for place in places:
        spots.append(max(place, spots[-1] + gap) if spots else place)
    limit = layers + 0.5 - gap / 2
    for i in reversed(range(len(spots))):
        spots[i] = min(spots[i], limit)
        limit = spots[i] - gap
    return spots


def list_worst(figure: Figure, beside: Axes, worst: Sequence[Measured]) -> None:
    """The names of the numbered layers, to the right of a panel."""
    box = beside.get_position()
    left, line = box.x1 + 0.25 / WIDTH_INCHES, 1 / figure.get_figheight()
    top = box.y1 + 0.08 * line
    figure.text(left, top, "Lowest SQNR" if worst else "Nothing was lost", weight="bold", size=10.5, va="bottom")
    for rank, (layer, error) in enumerate(worst, 1):
        y = top - (0.42 * rank - 0.3) * line
        figure.text(left, y, f"{rank}", weight="bold", size=9, va="top")
        figure.text(left + 0.02, y, f"{display.decibels(error.sqnr)}, {layer_kind(layer.key)}", size=9, va="top")
        name = display.shorten_middle(display.printable(layer.key.removesuffix(".weight")), 38)
        figure.text(left + 0.02, y - 0.17 * line, name, size=8, color=FAINT, va="top")


def draw_output_errors(axes: Axes, layers: Sequence[LayerReport]) -> None:
    """Two connected dots per calibrated layer on a log axis: its output error with nearest, and with calibrated.

    Errors of 0 are triangles at the lower edge.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    calibrated = [(place, layer.output_error) for place, layer in enumerate(layers, 1) if layer.output_error]
    places = np.array([place for place, _ in calibrated])
    drawn = {
        "nearest": (LIGHT_BLUE, np.array([100 * error.nearest for _, error in calibrated])),
        "calibrated": (DARK_BLUE, np.array([100 * error.chosen for _, error in calibrated])),
    }
    low, high = _log_range(np.concatenate([values for _, values in drawn.values()]))
    edge = low * (high / low) ** 0.05
    area = min(max(6000 / len(layers), 9), 36)
    (_, above), (_, below) = drawn.values()
    axes.vlines(places, np.maximum(below, edge), np.maximum(above, edge), color=LIGHT_BLUE, linewidth=1, zorder=1)
    for label, (colour, values) in drawn.items():
        lossy = values > 0
        axes.scatter(places[lossy], values[lossy], s=area, color=colour, linewidths=0, label=label)
        if not lossy.all():
            axes.scatter(places[~lossy], [edge] * (~lossy).sum(), s=26, color=colour, marker="v")
    if not below.all():
        write_inside(axes, f"▼ no error: {(below == 0).sum()}", 0.01, 0.14, ha="left")
    axes.set(yscale="log", ylim=(low, high), ylabel="error (% of output)")
    steps = next(steps for widest, steps in LOG_STEPS.items() if high / low < widest)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("Predicted error of each layer's output")
    axes.tick_params(labelbottom=False, bottom=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1, handletextpad=0.2)


def _log_range(values: np.ndarray) -> tuple[float, float]:
    """Axis limits around the values above 0, at least LEAST_FACTOR apart."""
    lossy = values[values > 0]
    low, high = (lossy.min(), lossy.max()) if len(lossy) else (0.1, 1)
    middle, reach = math.sqrt(high * low), 1.4 * math.sqrt(max(high / low, LEAST_FACTOR))
    return middle / reach, middle * reach


def draw_losses(axes: Axes, errors: Sequence[ErrorStatistics]) -> None:
    """Two rows of cells: the shares of flushed and of saturated values of each layer, on a log colour scale."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator

    shares = pool(np.array([(error.flushed / error.count, error.saturated / error.count) for error in errors]))
    edges = np.linspace(0.5, len(errors) + 0.5, len(shares) + 1)
    colours = LinearSegmentedColormap.from_list("losses", STRIP_COLOURS).with_extremes(bad=PANEL)
    drawn = np.ma.masked_equal(shares.T, 0)
    mesh = axes.pcolormesh(edges, (0, 1, 2), drawn, cmap=colours, norm=LogNorm(LEAST_SHARE, 1, clip=True))
    axes.axhline(1, color=PAPER, linewidth=2)
    axes.grid(False)
    axes.set(yticks=(0.5, 1.5), yticklabels=("flushed", "saturated"), xlabel="layers, sorted by name")
    axes.tick_params(left=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if not shares.any():
        write_inside(axes, "no value saturated or was flushed to zero")
        return
    scale = axes.inset_axes((1.06, 0.45, 0.36, 0.25))
    bar = axes.figure.colorbar(mesh, cax=scale, orientation="horizontal", ticks=(1e-6, 1e-4, 1e-2, 1))
    bar.ax.set_xticklabels(("0.0001", "0.01", "1", "100 %"))
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    scale.set_title("share of the layer's values", size=8.5, weight="normal", pad=3)


def pool(shares: np.ndarray) -> np.ndarray:
    """At most STRIP_COLUMNS rows, each the maximum of neighbours, so that no layer vanishes between pixels."""
    if len(shares) <= STRIP_COLUMNS:
        return shares
    starts = np.arange(STRIP_COLUMNS) * len(shares) // STRIP_COLUMNS
    return np.maximum.reduceat(shares, starts)


def draw_sizes(axes: Axes, report: Report) -> None:
    """Two stacked bars, before and after, with one segment per kind of layer and one for the kept tensors."""
    sizes = sizes_by_kind(report)
    total = max(report.bytes_before, report.bytes_after) or 1
    for row in (0, 1):
        start = 0
        for kind, colour in KIND_COLOURS.items():
            size = sizes.get(kind, (0, 0))[row]
            label = kind if row == 0 and size else None
            axes.barh(row, size, left=start, color=colour, height=0.72, edgecolor=PAPER, linewidth=1, label=label)
            if size > 0.07 * total:
                ink = INK if kind in ("MLP", "other", KEPT) else PAPER
                axes.text(start + size / 2, row, display.bytes(size), ha="center", va="center", size=8.5, color=ink)
            start += size
        axes.text(start + 0.008 * total, row, display.bytes(start), va="center", size=9.5, weight="bold")
    axes.set(xlim=(0, 1.1 * total), ylim=(1.5, -0.5), yticks=(0, 1), yticklabels=("before", "after"), xticks=())
    axes.set_title("Size")
    axes.grid(False)
    axes.tick_params(left=False)
    axes.set_facecolor(PAPER)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.axvline(0, color=RULE, linewidth=1)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.1, handlelength=1, columnspacing=1.2)


def summary(layers: Sequence[Measured]) -> str:
    """The median and the lowest SQNR, and the shares of saturated and flushed values."""
    levels = [error.sqnr for _, error in layers]
    lowest = min(levels)
    if math.isinf(lowest):
        return "No layer lost anything."
    count = sum(error.count for _, error in layers)
    saturated = sum(error.saturated for _, error in layers) / count
    flushed = sum(error.flushed for _, error in layers) / count
    worst = min(layer.key for layer, error in layers if error.sqnr == lowest)
    name = display.shorten_middle(worst.removesuffix(".weight"), 60)
    return (
        f"SQNR: median {display.decibels(median(levels))}, lowest {display.decibels(lowest)} in {name}. "
        f"{display.share(saturated)} of all values saturated, {display.share(flushed)} became zero."
    )


def output_summary(report: Report) -> str:
    """The predicted output errors; "" if no layer was calibrated."""
    text = describe_output_error(report)
    return f"Output error: {text}." if text else ""


def size_summary(report: Report) -> str:
    """Numbers of quantized and kept tensors, and the sizes before and after."""
    return (
        f"{display.count(len(report.layers), 'layer')} in FP8, {display.count(len(report.kept), 'tensor')} kept: "
        f"{display.sizes(report.bytes_before, report.bytes_after)}."
    )


def _sizes_area(figure: Figure) -> dict[str, float]:
    height = figure.get_figheight()
    return grid_area(figure, left=0.95, right=MARGIN, top=height - 1.85, bottom=1.0)
