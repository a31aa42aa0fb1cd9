"""Reports and comparisons as plain text for the terminal, and as data for --json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from .. import display
from ..numerics.error_statistics import ErrorStatistics, merge
from ..report.report import KeptTensor, Report
from ..report.table import describe_output_error
from ..studies.advice import describe_sample, describe_unseen, recommendations
from ..studies.comparison import Comparison, Trial
from ..studies.table import OUTPUT_COLUMN, typical_output_error

WORST = 5


def summary(report: Report, target: str, seconds: float) -> str:
    """What quantizing did: sizes, error, the worst layers, notes."""
    lines = [
        display.printable(f"{report.source} → {target} in {display.seconds(seconds)}"),
        *_table([*_facts(report), ("error", *_describe_error(report.error)), *_output_error(report)]),
        "",
        "the layers with the lowest SQNR",
        *_table([layer.key, *_describe_error(layer.error)] for layer in report.worst(WORST)),
        *_notes(report),
    ]
    return "\n".join(lines)


def plan(report: Report, target: str) -> str:
    """What quantizing would do: sizes, which tensors are kept and why, notes."""
    reasons = Counter(tensor.reason.text for tensor in report.kept)
    lines = [
        display.printable(f"{report.source} → {target}: dry run, nothing is written"),
        *_table(_facts(report)),
        *(["", "why tensors are kept"] if reasons else []),
        *_table((f"{count:,}", reason) for reason, count in reasons.most_common()),
        *(["", "patterns and the number of tensors they match"] if report.pattern_hits else []),
        *_table((f"{hits:,}", pattern) for pattern, hits in report.pattern_hits),
        *_notes(report),
    ]
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> str:
    """One row per format and rounding, over the values of all layers. Output errors are medians over the layers."""
    calibrated = comparison.calibration is not None
    heads = ("format", "rounding", "RMSE", "bias", "bias by chance", "SQNR", "flushed")
    rows = [
        (
            trial.format,
            trial.rounding,
            display.number(error.rmse),
            display.small(error.bias),
            f"±{display.small(_chance(error))}",
            display.decibels(error.sqnr),
            display.share(error.flushed / (error.count or 1)),
            *([typical_output_error(trial)] if calibrated else []),
        )
        for trial, error in _merged(comparison)
    ]
    return "\n".join(
        (
            f"{display.printable(comparison.source)}: {describe_sample(comparison)}, scaling {comparison.scaling}, "
            f"seed {comparison.seed}",
            *_table([(*heads, OUTPUT_COLUMN) if calibrated else heads, *rows]),
            "",
            *recommendations(comparison),
            *filter(None, [describe_unseen(comparison)]),
        )
    )


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """The table as JSON-able data. sqnr is None if nothing was lost, output_error if it is not known."""
    rows = [
        {
            "format": trial.format,
            "rounding": trial.rounding,
            "rmse": error.rmse,
            "relative_rmse": error.relative_rmse,
            "bias": error.bias,
            "bias_by_chance": _chance(error),
            "sqnr": _finite(error.sqnr),
            "saturated": error.saturated,
            "flushed": error.flushed,
            "count": error.count,
            "output_error": median(trial.output_errors) if trial.output_errors else None,
        }
        for trial, error in _merged(comparison)
    ]
    choices = ("source", "scaling", "seed", "keys", "total", "calibration", "unseen")
    return {**{name: getattr(comparison, name) for name in choices}, "trials": rows}


def report_data(report: Report) -> dict[str, Any]:
    """The report, with its sizes and the error over all layers, as JSON-able data. sqnr is None if nothing was lost."""
    total = report.error
    error = None
    if total is not None:
        names = ("bias", "rmse", "relative_rmse", "sqnr", "saturated", "flushed", "count")
        error = {name: getattr(total, name) for name in names} | {"sqnr": _finite(total.sqnr)}
    sizes = {"bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
    kept = [_kept_data(tensor) for tensor in report.kept]
    return {**sizes, "error": error, **asdict(report), "kept": kept}


def _kept_data(tensor: KeptTensor) -> dict[str, Any]:
    """`reason` is the text; its parts stand beside it."""
    reason = tensor.reason
    parts = {"kind": reason.kind, "pattern": reason.pattern, "preset": reason.preset}
    return {**asdict(tensor), "reason": reason.text, **parts}


def _describe_error(error: ErrorStatistics | None) -> tuple[str, ...]:
    if error is None:
        return ()
    count = error.count or 1
    return (
        f"SQNR {display.decibels(error.sqnr)}",
        f"bias {display.small(error.bias)}",
        f"saturated {display.share(error.saturated / count)}",
        f"flushed {display.share(error.flushed / count)}",
    )


def _facts(report: Report) -> list[Sequence[str]]:
    recipe = report.recipe
    return [
        ("family", report.family),
        ("recipe", f"{recipe.format}, {recipe.rounding}, {recipe.scaling}, seed {recipe.seed}, layout {recipe.layout}"),
        ("layers", f"{display.count(len(report.layers), 'tensor')} quantized, {len(report.kept):,} kept"),
        ("size", display.sizes(report.bytes_before, report.bytes_after)),
    ]


def _output_error(report: Report) -> Iterable[Sequence[str]]:
    text = describe_output_error(report)
    return [("outputs", text)] if text else []


def _notes(report: Report) -> Iterable[str]:
    return ("", *(display.printable(f"note: {note}") for note in report.notes)) if report.notes else ()


def _merged(comparison: Comparison) -> list[tuple[Trial, ErrorStatistics]]:
    return [(trial, merge(trial.errors)) for trial in comparison.trials]


def _chance(error: ErrorStatistics) -> float:
    """Standard error of the mean if the signs of the errors were random."""
    return error.rmse / math.sqrt(error.count) if error.count else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with aligned columns. The last cell of a row may be of any length."""
    rows = [tuple(map(display.printable, row)) for row in rows]
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if len(row) > i + 1 or len(row) == columns > i) for i in range(columns)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
