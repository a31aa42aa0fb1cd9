"""Rounding Curve: what a rounding does to each value in a range, measured with the real kernels, beside theory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import display
from ..numerics.rounding import ROUNDINGS
from ..studies.rounding_curve import RoundingCurve
from .style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
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

DOTS: dict[str, Any] = {"s": 7, "linewidths": 0, "color": BLUE, "zorder": 3}
THEORY: dict[str, Any] = {"color": INK, "linewidth": 1, "zorder": 2}

ACROSS_A_STEP = np.concatenate([np.linspace(0, 0.5, 17), np.linspace(0.5, 1, 17)])
"""Where lines are drawn in a step: from one FP8 value, 0, to the next, 1. Twice in the middle, where nearest jumps."""


@dataclass(frozen=True)
class Theory:
    """What a rounding does to a value v between two FP8 values. Heights are of the lines, at ACROSS_A_STEP."""

    up: np.ndarray
    """Probability of rounding up."""
    up_text: str
    error: np.ndarray
    """Mean error, in FP8 steps."""
    error_text: str
    variance: np.ndarray
    """In squared FP8 steps."""
    variance_text: str
    rms_error: str
    """RMS error of one draw, for values evenly spread over a step."""


UNBIASED = Theory(
    up=ACROSS_A_STEP,
    up_text="line: (v − xL) / (xH − xL), unbiased",
    error=np.zeros_like(ACROSS_A_STEP),
    error_text="band: ±2 standard errors, if unbiased",
    variance=ACROSS_A_STEP * (1 - ACROSS_A_STEP),
    variance_text="line: (xH − v)(v − xL), the minimum if unbiased",
    rms_error="theory: 0.408; nearest: 0.289",
)
_ABOVE_THE_MIDDLE = np.repeat((0.0, 1.0), 17)
NEAREST = Theory(
    up=_ABOVE_THE_MIDDLE,
    up_text="line: 1 if v is closer to xH, else 0",
    error=_ABOVE_THE_MIDDLE - ACROSS_A_STEP,
    error_text="line: nearest FP8 value − v",
    variance=np.zeros_like(ACROSS_A_STEP),
    variance_text="line: 0, every draw is the same",
    rms_error="theory: 0.289",
)


@house_style()
def rounding_curve(curve: RoundingCurve, *, width: int = 1024, height: int = 768) -> Figure:
    """Four panels over the value: result, probability of rounding up, bias and variance."""
    figure = new_figure(width, height, lowest=0.6)
    area = grid_area(figure, left=0.9, right=0.35, top=1.15, bottom=1.45)
    result, up, bias, variance = add_panels(figure, 2, 2, area, sharex=True, hspace=0.32, wspace=0.22)
    draw_result(result, curve)
    draw_up(up, curve)
    draw_mean_error(bias, curve)
    draw_variance(variance, curve)
    for axes in (up, bias, variance):
        if np.isnan(curve.step).all():
            write_inside(axes, "no value lies between two FP8 values")
    for axes in (bias, variance):
        axes.set(xlabel="value v before rounding (FP8 units)", xlim=(curve.values[0], curve.values[-1]))
    draws = f", {display.count(curve.draws, 'draw')} per value" if _is_random(curve) else ""
    write_titles(
        figure,
        f"{curve.rounding} rounding to {curve.format}",
        f"{len(curve.values)} values{draws}, no scale. xL, xH: the FP8 values below and above v.",
    )
    write_caption(figure, in_plain_words(curve), in_numbers(curve))
    return figure


def draw_result(axes: Axes, curve: RoundingCurve) -> None:
    """The results between the staircases of the two neighbours: one draw, and the mean of all draws if they differ."""
    for neighbour in (curve.below, curve.above):
        axes.step(curve.values, neighbour, where="mid", color=FAINT, linewidth=0.7, zorder=1)
    axes.plot(curve.values, curve.values, label="v", **THEORY)
    axes.scatter(curve.values, curve.one_draw, label="one draw" if _is_random(curve) else "result", **DOTS)
    if _is_random(curve):
        axes.plot(curve.values, curve.mean, color=VERMILION, linewidth=1.6, label="mean of all draws", zorder=4)
    axes.set(ylabel="value after rounding (FP8 units)")
    axes.set_title("Result: xL or xH")
    axes.legend(loc="upper left", handlelength=1.4, borderaxespad=0.2)


def draw_up(axes: Axes, curve: RoundingCurve) -> None:
    axes.plot(*_over_steps(curve, _theory(curve).up), **THEORY)
    axes.scatter(curve.values, curve.up, **DOTS)
    axes.set(ylabel="share rounded to xH", ylim=(-0.05, 1.22), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set_title("Probability of rounding up")
    write_inside(axes, _theory(curve).up_text, 0.02, 0.95, ha="left", color=INK)


def draw_mean_error(axes: Axes, curve: RoundingCurve) -> None:
    theory = _theory(curve)
    x, spread = _over_steps(curve, 2 * np.sqrt(theory.variance / curve.draws))
    if theory.variance.any():
        axes.fill_between(x, -spread, spread, color=GREEN, alpha=0.25, linewidth=0)
    axes.plot(*_over_steps(curve, theory.error), **THEORY)
    error = mean_error(curve)
    axes.scatter(curve.values, error, **DOTS)
    reach = 1.35 * max(np.nanmax(np.abs(error), initial=0), np.nanmax(spread, initial=0)) or 1
    axes.set(ylabel="mean − v (FP8 steps)", ylim=(-reach, 1.15 * reach))
    axes.set_title("Bias: mean error")
    write_inside(axes, theory.error_text, 0.02, 0.95, ha="left", color=INK)


def draw_variance(axes: Axes, curve: RoundingCurve) -> None:
    axes.plot(*_over_steps(curve, _theory(curve).variance), **THEORY)
    measured = curve.variance / curve.step**2
    axes.scatter(curve.values, measured, **DOTS)
    top = 1.25 * max(0.25, np.nanmax(measured, initial=0))
    axes.set(ylabel="variance (FP8 steps²)", ylim=(-0.04 * top, top))
    axes.set_title("Variance")
    write_inside(axes, _theory(curve).variance_text, 0.02, 0.95, ha="left", color=INK)


def mean_error(curve: RoundingCurve) -> np.ndarray:
    """Mean of the draws minus v, in FP8 steps; NaN on the grid and outside its range."""
    return (curve.mean - curve.values) / curve.step


def in_plain_words(curve: RoundingCurve) -> str:
    """Whether the mean of the draws differs from the value by more than chance, as one sentence."""
    beyond = float(np.mean((curve.values < curve.below) | (curve.values > curve.above)))
    saturated = f" {display.share(beyond)} of the values are outside the FP8 range and saturate." if beyond else ""
    measured, chance = _root_mean_square(mean_error(curve)), _chance(curve)
    if not np.isfinite(measured):
        return f"No value in this range lies between two FP8 values, so none is rounded.{saturated}"
    if measured < 1.5 * chance:
        return f"The mean of many draws is the value: no bias, but a single draw scatters.{saturated}"
    return f"A value is always rounded the same way: no scatter, but a bias that averaging cannot remove.{saturated}"


def in_numbers(curve: RoundingCurve) -> str:
    """RMS of the bias and of the error of one draw; "" if nothing was rounded."""
    squared = curve.variance / curve.step**2 + mean_error(curve) ** 2
    if np.isnan(squared).all():
        return ""
    error = f"{display.number(_root_mean_square(np.sqrt(squared)))} steps ({_theory(curve).rms_error})"
    if not _is_random(curve):
        return f"RMS error {error}"
    return (
        f"RMS bias {display.number(_root_mean_square(mean_error(curve)))} steps (by chance: "
        f"{display.number(_chance(curve))}) · RMS error of one draw {error}"
    )


def _chance(curve: RoundingCurve) -> float:
    """RMS error of the mean of unbiased draws, in FP8 steps."""
    return _root_mean_square(np.sqrt(curve.theory_variance / curve.draws) / curve.step)


def _root_mean_square(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else float("nan")


def _is_random(curve: RoundingCurve) -> bool:
    return ROUNDINGS[curve.rounding].stochastic


def _theory(curve: RoundingCurve) -> Theory:
    return UNBIASED if _is_random(curve) else NEAREST


def _over_steps(curve: RoundingCurve, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line across every FP8 step that holds a value, as (x, y), with NaN between the steps.

    heights: at ACROSS_A_STEP. The axes cut off what lies outside the range.
    """
    neighbours = np.unique(np.stack([curve.below, curve.above]), axis=1)
    low, high = neighbours[:, neighbours[0] < neighbours[1], None]
    across, heights = (np.append(values, np.nan) for values in (ACROSS_A_STEP, heights))
    return (low + across * (high - low)).ravel(), np.tile(heights, len(low))
