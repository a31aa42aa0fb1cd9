"""A comparison of roundings as a Markdown table."""

from __future__ import annotations

from statistics import median

from .. import display
from .advice import describe_sample, describe_unseen, recommendations
from .comparison import Comparison, Trial

COLUMNS = ("format", "rounding", "relative RMSE", "bias / standard error", "systematic error", "SQNR")
OUTPUT_COLUMN = "output error"
"""Added with a calibration."""


def to_markdown(comparison: Comparison) -> str:
    """The recommendations, then one row per format and rounding with medians over the layers."""
    calibrated = comparison.calibration is not None
    unseen = describe_unseen(comparison)
    calibration = f", calibration {display.markdown(comparison.calibration or 'without a name')}" if calibrated else ""
    lines = [
        *recommendations(comparison),
        *([unseen] if unseen else []),
        "",
        f"{display.markdown(comparison.source)}: {describe_sample(comparison)}, scaling {comparison.scaling}"
        f"{calibration}; medians over layers",
        "",
        f"| {' | '.join((*COLUMNS, OUTPUT_COLUMN) if calibrated else COLUMNS)} |",
        f"|---|---|---:|---:|---:|---:|{'---:|' if calibrated else ''}",
    ]
    for trial in comparison.trials:
        lines.append(f"| {' | '.join(_cells(trial) + ([typical_output_error(trial)] if calibrated else []))} |")
    return "\n".join(lines) + "\n"


def typical_output_error(trial: Trial) -> str:
    """The median over the layers; "" if no layer is in the calibration."""
    return display.share(median(trial.output_errors)) if trial.output_errors else ""


def _cells(trial: Trial) -> list[str]:
    return [
        trial.format,
        trial.rounding,
        display.share(median(trial.relative_rmse)),
        display.number(median(map(abs, trial.bias_in_standard_errors))),
        display.share(median(trial.systematic)),
        display.decibels(median(error.sqnr for error in trial.errors)),
    ]
