"""Layer Report: the quantization error of each layer along the network, and the sizes before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import display
from ..numerics.error_statistics import ErrorStatistics
from ..report.report import (
    Calibrated,
    LayerReport,
    Measured,
    Report,
    standing_out,
    with_output_errors,
    with_statistics,
)
from ..report.table import KEPT, describe_output_error, layer_kind, sizes_by_kind
from .histogram import describe_recipe
from .style import (
    BLUE,
    FAINT,
    FAINT_BLUE,
    FAINT_VERMILION,
    GREEN,
    GREY,
    INK,
    MARGIN,
    ORANGE,
    PANEL,
    PAPER,
    PURPLE,
    RULE,
    STRONG_BLUE,
    STRONG_VERMILION,
    VERMILION,
    WIDTH_INCHES,
    add_panels,
    grid_area,
    house_style,
    ink_on,
    new_figure,
    write_caption,
    write_inside,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_COLOURS = {"attention": BLUE, "MLP": ORANGE, "modulation": GREEN, "other": PURPLE, KEPT: GREY}
ROOMY = 0.7
"""Height over width from which the panel of output errors fits."""
WORST = 5
NUMBER_SIZE = 9
"""Height of the number beside a dot in points."""
NUMBER_OFFSETS = np.array([(0, -12), (12, 0), (-12, 0), (10, -10), (-10, -10), (10, 10), (-10, 10), (0, 12)])
"""Where a number can be, from its dot, in points; the best place first."""
LEAST_RANGE = 3
"""Smallest range of the SQNR axis in dB, so that small differences look small."""
LEAST_FACTOR = 10
"""Smallest range of the axis of output errors, as a factor."""
LOG_STEPS = {30: (1, 2, 5), 600: (1, 3), math.inf: (1,)}
"""Upper limit of the range of that axis, as a factor -> its ticks in each decade."""
STRIP_COLUMNS = 512
LEAST_SHARE = 1e-6
"""The low end of the colour scale."""
STRIP_COLOURS = (FAINT_VERMILION, VERMILION, STRONG_VERMILION)


@dataclass(frozen=True)
class Ranking:
    """The worst layers by what counts most for the image, worst first, and how many stand out from the others."""

    measure: str
    """Such as "Lowest SQNR"."""
    layers: Sequence[LayerReport]
    values: Sequence[str]
    """Of each of `layers`."""
    outstanding: int

    @property
    def marked(self) -> Sequence[LayerReport]:
        """Those of `layers` that stand out."""
        return self.layers[: self.outstanding]

    @property
    def heading(self) -> str:
        if not self.outstanding:
            return "No layer stands out" if self.layers else "Nothing was lost"
        return f"{display.count(self.outstanding, 'layer')} stand{'s' if self.outstanding == 1 else ''} out"


@house_style()
def layer_report(report: Report, *, width: int = 1024, height: int = 768) -> Figure:
    """SQNR of each layer along the network, shares of saturated and flushed values, and sizes before and after.

    If layers were calibrated, their predicted output errors come first. If the height is below ROOMY times the width,
    they come instead of the SQNR. Raises ValueError if no layer has statistics.
    """
    layers = in_order_of_depth(entry for entry in with_statistics(report.layers) if entry[1].count)
    if not layers:
        raise ValueError(f"{report.source}: the report has no error statistics; quantize with statistics on")
    calibrated = bool(with_output_errors(layer for layer, _ in layers))
    figure = new_figure(width, height, lowest=0.6)
    area = grid_area(figure, left=0.95, right=3.35, top=1.1, bottom=2.75)
    *panels, strip = _panels_along_depth(figure, area, with_both=calibrated and height >= ROOMY * width)
    ranking = rank_by_output_error(report) if calibrated else rank_by_sqnr(report)
    dots = draw_output_errors(panels[0], [layer for layer, _ in layers]) if calibrated else {}
    if not calibrated or len(panels) > 1:
        sqnr = draw_quality(panels[-1], layers)
        dots = dots or sqnr
    mark(panels[0], [dots[layer.key] for layer in ranking.marked if layer.key in dots])
    draw_losses(strip, [error for _, error in layers])
    (sizes,) = add_panels(figure, 1, 1, _sizes_area(figure))
    draw_sizes(sizes, report)
    write_ranking(figure, panels[0], ranking)
    write_titles(figure, report.source, describe_recipe(report.recipe))
    write_caption(figure, *filter(None, (output_summary(report), summary(layers), size_summary(report))))
    return figure


def rank_by_sqnr(report: Report) -> Ranking:
    lossy = [entry for entry in with_statistics(report.worst(len(report.layers))) if math.isfinite(entry[1].sqnr)]
    outstanding = standing_out([error.sqnr for _, error in with_statistics(report.layers) if error.count])
    worst = lossy[:WORST]
    values = [display.decibels(error.sqnr) for _, error in worst]
    return Ranking("Lowest SQNR", [layer for layer, _ in worst], values, len(outstanding))


def rank_by_output_error(report: Report) -> Ranking:
    errors = [error.chosen for _, error in with_output_errors(report.layers)]
    levels = [-20 * math.log10(error) if error else math.inf for error in errors]
    worst: Sequence[Calibrated] = [entry for entry in report.worst_outputs(WORST) if entry[1].chosen]
    values = [f"{display.share(error.chosen)} of output" for _, error in worst]
    return Ranking("Largest error", [layer for layer, _ in worst], values, len(standing_out(levels)))


def _panels_along_depth(figure: Figure, area: dict[str, float], *, with_both: bool) -> Sequence[Axes]:
    if not with_both:
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


Dots = dict[str, tuple[float, float]]
"""Tensor key -> where the layer's dot is in its panel."""


def draw_quality(axes: Axes, layers: Sequence[Measured]) -> Dots:
    """One dot per layer at its SQNR, coloured by kind. Lossless layers are triangles at the upper edge."""
    values = np.array([error.sqnr for _, error in layers])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 40)
    middle, room = (low + high) / 2, max(high - low, LEAST_RANGE)
    low, high = middle - 0.68 * room, middle + 0.68 * room
    places = np.arange(1, len(layers) + 1)
    kinds = np.array([layer_kind(layer.key) for layer, _ in layers])
    for kind, colour in KIND_COLOURS.items():
        dots = (kinds == kind) & np.isfinite(values)
        if dots.any():
            axes.scatter(places[dots], values[dots], s=_dot_area(len(layers)), color=colour, linewidths=0, label=kind)
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
    return {layer.key: (place, error.sqnr) for place, (layer, error) in enumerate(layers, 1)}


def _dot_area(layers: int) -> float:
    """In points²."""
    return min(max(6000 / layers, 9), 36)


def mark(axes: Axes, dots: Sequence[tuple[float, float]]) -> None:
    """Rings around dots, and beside each its rank, where it covers no other of them."""
    if not dots:
        return
    x, y = zip(*dots, strict=True)
    axes.scatter(x, y, s=70, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=4)
    centres = axes.transData.transform(dots) * 72 / axes.figure.dpi
    inside = axes.get_window_extent().padded(-NUMBER_SIZE * axes.figure.dpi / 72)
    taken = [tuple(centre) for centre in centres]
    for rank, (dot, centre) in enumerate(zip(dots, centres, strict=True), 1):
        spots = [(offset, tuple(centre + offset)) for offset in NUMBER_OFFSETS]
        free = [
            (offset, spot)
            for offset, spot in spots
            if all(math.dist(spot, other) > NUMBER_SIZE for other in taken)
            and inside.contains(*np.multiply(spot, axes.figure.dpi / 72))
        ]
        offset, spot = (free or spots)[0]
        taken.append(spot)
        options: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "weight": "bold"}
        axes.annotate(str(rank), dot, offset, size=NUMBER_SIZE, **options)


def write_ranking(figure: Figure, beside: Axes, ranking: Ranking) -> None:
    """The names of the worst layers, to the right of a panel. Those that stand out have the numbers of their dots."""
    box = beside.get_position()
    left, line = box.x1 + 0.25 / WIDTH_INCHES, 1 / figure.get_figheight()
    top = box.y1 + 0.08 * line
    figure.text(left, top, ranking.heading, weight="bold", size=10.5, va="bottom")
    if ranking.layers:
        figure.text(left, top - 0.05 * line, f"{ranking.measure}:", size=9, va="top")
    for rank, (layer, value) in enumerate(zip(ranking.layers, ranking.values, strict=True), 1):
        y = top - (0.38 * rank - 0.12) * line
        if rank <= ranking.outstanding:
            figure.text(left, y, f"{rank}", weight="bold", size=9, va="top")
        figure.text(left + 0.02, y, f"{value}, {layer_kind(layer.key)}", size=9, va="top")
        name = display.shorten_middle(display.printable(layer.key.removesuffix(".weight")), 38)
        figure.text(left + 0.02, y - 0.16 * line, name, size=8, color=FAINT, va="top")


def draw_output_errors(axes: Axes, layers: Sequence[LayerReport]) -> Dots:
    """Two connected dots per calibrated layer on a log axis: its output error with nearest, and with calibrated.

    Errors of 0 are triangles at the lower edge.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    calibrated = [(place, layer.output_error) for place, layer in enumerate(layers, 1) if layer.output_error]
    places = np.array([place for place, _ in calibrated])
    drawn = {
        "nearest": (FAINT_BLUE, np.array([100 * error.nearest for _, error in calibrated])),
        "calibrated": (STRONG_BLUE, np.array([100 * error.chosen for _, error in calibrated])),
    }
    low, high = _log_range(np.concatenate([values for _, values in drawn.values()]))
    edge = low * (high / low) ** 0.05
    area = _dot_area(len(layers))
    (_, above), (_, below) = drawn.values()
    axes.vlines(places, np.maximum(below, edge), np.maximum(above, edge), color=FAINT_BLUE, linewidth=1, zorder=1)
    for label, (colour, values) in drawn.items():
        lossy = values > 0
        axes.scatter(places[lossy], values[lossy], s=area, color=colour, linewidths=0, label=label)
        if not lossy.all():
            axes.scatter(places[~lossy], [edge] * (~lossy).sum(), s=26, color=colour, marker="v")
    if not below.all():
        write_inside(axes, f"▼ no error: {(below == 0).sum()}", 0.01, 0.14, ha="left")
    axes.set(yscale="log", xlim=(0.5, len(layers) + 0.5), ylim=(low, high), ylabel="error (% of output)")
    steps = next(steps for widest, steps in LOG_STEPS.items() if high / low < widest)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("Predicted error of each layer's output")
    axes.tick_params(labelbottom=False, bottom=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1, handletextpad=0.2)
    return {layers[place - 1].key: (place, max(100 * error.chosen, edge)) for place, error in calibrated}


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
    scale = axes.inset_axes((1.06, 0.0, 0.36, 0.25))
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
                ink = ink_on(colour)
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
