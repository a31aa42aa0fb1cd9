"""What the command says: reports and comparisons as plain text and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median

from ..numerics.error_statistics import ErrorStatistics, merge
from ..report.report import Report
from ..report.table import describe_bytes, describe_output_error, number_of
from ..studies.comparison import (
    OUTPUT_COLUMN,
    Comparison,
    Trial,
    describe_sample,
    describe_unseen,
    recommendations,
    typical_output_error,
)

WORST = 5


def summary(report: Report, target: str, seconds: float) -> str:
    """What quantizing did: sizes, error, the worst layers."""
    error = report.error
    lines = [
        f"{report.source} -> {target} in {seconds:.1f} s",
        *_table([*_facts(report), ("error", *describe_error(error)), *_output_error(report)]),
        "",
        "the layers with the lowest SQNR",
        *_table([layer.key, *describe_error(layer.error)] for layer in report.worst(WORST)),
        *_notes(report),
    ]
    return "\n".join(lines)


def plan(report: Report, target: str) -> str:
    """What quantizing would do: sizes, and which tensors stay as they are and why."""
    reasons = Counter(tensor.reason.text for tensor in report.kept)
    lines = [
        f"{report.source} -> {target}: dry run, nothing is written",
        *_table(_facts(report)),
        *(["", "why tensors are kept"] if reasons else []),
        *_table((f"{count:,}", reason) for reason, count in reasons.most_common()),
        *(["", "patterns and the layers they name"] if report.pattern_hits else []),
        *_table((f"{hits:,}", pattern) for pattern, hits in report.pattern_hits),
        *_notes(report),
    ]
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> str:
    """A row a format and rounding, over the values of all layers; of errors of outputs the median."""
    calibrated = comparison.calibration is not None
    heads = ("format", "rounding", "RMSE", "bias", "bias by chance", "quality", "flushed")
    rows = [
        (
            trial.format,
            trial.rounding,
            f"{error.rmse:.3e}",
            f"{error.bias:+.2e}",
            f"±{_chance(error):.2e}",
            _quality(error),
            _share(error.flushed, error.count),
            *([typical_output_error(trial)] if calibrated else []),
        )
        for trial, error in _merged(comparison)
    ]
    return "\n".join(
        (
            f"{comparison.source}: {describe_sample(comparison)}, scaling {comparison.scaling}, seed {comparison.seed}",
            *_table([(*heads, OUTPUT_COLUMN) if calibrated else heads, *rows]),
            "",
            *recommendations(comparison),
            *filter(None, [describe_unseen(comparison)]),
        )
    )


def comparison_data(comparison: Comparison) -> dict:
    """The table as JSON-able data; SQNR is None where nothing was lost, the output's error where it is not known."""
    rows = [
        {
            "format": trial.format,
            "rounding": trial.rounding,
            "rmse": error.rmse,
            "relative_rmse": error.relative_rmse,
            "bias": error.bias,
            "bias_by_chance": _chance(error),
            "sqnr": error.sqnr if math.isfinite(error.sqnr) else None,
            "saturated": error.saturated,
            "flushed": error.flushed,
            "count": error.count,
            "output_error": median(trial.output_errors) if trial.output_errors else None,
        }
        for trial, error in _merged(comparison)
    ]
    choices = ("source", "scaling", "seed", "keys", "total", "calibration", "unseen")
    return {**{name: getattr(comparison, name) for name in choices}, "trials": rows}


def report_data(report: Report) -> dict:
    """The report with sizes and the error over all layers beside it, JSON-able."""
    total = report.error
    derived = ("bias", "rmse", "relative_rmse", "sqnr")
    error = {name: getattr(total, name) for name in (*derived, "saturated", "flushed", "count")} if total else None
    if error and not math.isfinite(error["sqnr"]):
        error["sqnr"] = None
    sizes = {"bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
    return {**sizes, "error": error, **asdict(report)}


def describe_error(error: ErrorStatistics) -> tuple[str, ...]:
    return (
        _quality(error),
        f"bias {error.bias:+.1e}",
        f"saturated {_share(error.saturated, error.count)}",
        f"flushed {_share(error.flushed, error.count)}",
    )


def _facts(report: Report) -> list[Sequence[str]]:
    recipe, before, after = report.recipe, report.bytes_before, report.bytes_after
    return [
        ("family", report.family),
        ("recipe", f"{recipe.format}, {recipe.rounding}, {recipe.scaling}, seed {recipe.seed}, layout {recipe.layout}"),
        ("layers", f"{number_of(len(report.layers), 'tensor')} quantized, {len(report.kept):,} kept"),
        ("size", f"{describe_bytes(before)} -> {describe_bytes(after)} ({after / before - 1:+.0%})"),
    ]


def _output_error(report: Report) -> Iterable[Sequence[str]]:
    text = describe_output_error(report)
    return [("outputs", text)] if text else []


def _notes(report: Report) -> Iterable[str]:
    return ("", *(f"note: {note}" for note in report.notes)) if report.notes else ()


def _merged(comparison: Comparison) -> list[tuple[Trial, ErrorStatistics]]:
    return [(trial, merge(trial.errors)) for trial in comparison.trials]


def _chance(error: ErrorStatistics) -> float:
    """How far from 0 the mean of errors of random sign lies."""
    return error.rmse / math.sqrt(error.count) if error.count else 0.0


def _quality(error: ErrorStatistics) -> str:
    return f"SQNR {error.sqnr:.2f} dB" if math.isfinite(error.sqnr) else "lossless"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if part else "0"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with the columns under each other. A last cell may be of any length."""
    rows = [tuple(row) for row in rows]
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if len(row) > i + 1 or len(row) == columns > i) for i in range(columns)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
