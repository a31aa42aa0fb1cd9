"""Size and Quality: predicted quality against file size, and which kinds of layers stay in 16 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .. import display
from ..studies.size_quality import Curve, SizeQuality
from .layer_report import KIND_COLOURS
from .style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    PAPER,
    add_panels,
    grid_area,
    house_style,
    new_figure,
    write_caption,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUNDING_COLOURS = {"nearest": BLUE, "calibrated": GREEN}

SIZES = (8e9, 12e9, 16e9, 24e9)
"""File sizes in bytes at which a line is drawn: those of common GPUs. The model needs more memory than its file."""

DEVIATION = 3
"""dB. How far the prediction was from real renders of the landscape model at most: tests/benchmarks/RESULTS.md."""

RANGE = 40
"""dB above the worst file that are shown at most."""


@house_style()
def size_quality_figure(study: SizeQuality, *, width: int = 1024, height: int = 832) -> Figure:
    """Two panels over the size of the file: predicted latent dB of each rounding, and what is kept of each kind."""
    figure = new_figure(width, height, lowest=0.65)
    area = grid_area(figure, left=0.85, right=0.4, top=1.05, bottom=1.5)
    curves, kinds = add_panels(figure, 2, 1, area, sharex=True, hspace=0.24, height_ratios=(3, 2))
    draw_curves(curves, study)
    draw_kinds(kinds, study)
    write_titles(
        figure,
        f"{study.source}: size and quality",
        f"layers measured in {study.format} · {display.count(len(study.best.order), 'layer')} · {study.how}",
    )
    write_caption(figure, *_caption(study))
    return figure


def draw_curves(axes: Axes, study: SizeQuality) -> None:
    """One line per rounding with a band of ±DEVIATION, and the preset as a diamond."""
    low, high = _range(study)
    unit = _unit(study)[0]
    for curve in study.curves:
        colour = ROUNDING_COLOURS[curve.rounding]
        finite = [point for point in curve.points if math.isfinite(point.decibels)]
        sizes, levels = [point.nbytes / unit for point in finite], [point.decibels for point in finite]
        axes.fill_between(
            sizes,
            [level - DEVIATION for level in levels],
            [level + DEVIATION for level in levels],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
        axes.plot(sizes, levels, color=colour, linewidth=2, label=curve.rounding)
        _mark_preset(axes, curve, colour, unit)
    axes.set(ylim=(low, high), ylabel="predicted latent dB")
    axes.set_title(f"Predicted quality of the latent image (band: ±{DEVIATION} dB)")
    axes.tick_params(labelbottom=False, bottom=False)
    axes.plot([], [], "D", color=FAINT, markersize=6, label=f"preset {study.family}")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.98))
    _draw_sizes(axes, study, labelled=True)


def draw_kinds(axes: Axes, study: SizeQuality) -> None:
    """The share of the parameters of each kind of layers that stays in 16 bits."""
    unit, name = _unit(study)
    sizes = [point.nbytes / unit for point in study.best.points]
    for kind in study.kinds:
        shares = [100 * point.shares[kind.name] for point in study.best.points]
        axes.plot(sizes, shares, color=KIND_COLOURS[kind.name], label=kind.name, drawstyle="steps-post")
    axes.set(xlabel=f"size of the file ({name})", ylabel="% of the parameters", ylim=(0, 128), yticks=(0, 50, 100))
    axes.set_xlim(sizes[0] - 0.03 * (sizes[-1] - sizes[0]), sizes[-1] + 0.03 * (sizes[-1] - sizes[0]))
    axes.set_title(f"Layers in 16 bits, by kind ({study.best.rounding})")
    axes.legend(loc="upper left", ncols=len(study.kinds), bbox_to_anchor=(0.0, 1.0))
    _draw_sizes(axes, study, labelled=False)


def _mark_preset(axes: Axes, curve: Curve, colour: str, unit: float) -> None:
    preset = curve.preset
    if math.isfinite(preset.decibels):
        axes.plot(preset.nbytes / unit, preset.decibels, "D", color=colour, markeredgecolor=PAPER, markersize=7)


def _unit(study: SizeQuality) -> tuple[float, str]:
    """Bytes of the unit in which sizes are drawn, and its name."""
    return (1e9, "GB") if study.best.points[-1].nbytes >= 1e9 else (1e6, "MB")


def _draw_sizes(axes: Axes, study: SizeQuality, *, labelled: bool) -> None:
    low, high = study.best.points[0].nbytes, study.best.points[-1].nbytes
    for size in SIZES:
        if low <= size <= high:
            axes.axvline(size / 1e9, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            if labelled:
                axes.annotate(
                    f"{size / 1e9:.0f} GB file",
                    (size / 1e9, 0),
                    (4, 6),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    size=8.5,
                )


def _range(study: SizeQuality) -> tuple[float, float]:
    levels = [p.decibels for curve in study.curves for p in (*curve.points, curve.preset) if math.isfinite(p.decibels)]
    if not levels:
        return 0, RANGE
    low = min(levels) - DEVIATION - 1
    return low, min(max(levels) + DEVIATION + 2, low + RANGE)


def _caption(study: SizeQuality) -> list[str]:
    best = study.best
    preset, same_size = best.preset, [p.decibels for p in best.points if p.nbytes <= best.preset.nbytes]
    texts = []
    if same_size:
        texts.append(
            f"Predicted at the size of the preset ({display.bytes(preset.nbytes)}) for {best.rounding}: "
            f"{display.decibels(max(same_size))} with layers measured, {display.decibels(preset.decibels)} with auto."
        )
    first = study.kinds[0]
    texts.append(
        f"Most effect per parameter: {first.name}, with {display.share(round(first.parameters, 3))} of the parameters "
        f"and {display.share(round(first.effect, 3))} of the change."
    )
    if study.unknown:
        texts.append(f"{display.count(study.unknown, 'layer')} without a known effect stay in 16 bits in all files.")
    texts.append("Sizes are those of the file. To render, a model needs more memory than its file takes.")
    return texts
