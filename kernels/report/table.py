"""A report as a table: one row a layer, worst first, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from statistics import median

from .report import LayerReport, Report

KEPT = "kept"
KINDS = {
    "modulation": re.compile(r"modulation|adaln|(^|[._])mod([._]|$)", re.IGNORECASE),
    "attention": re.compile(r"attn|attention|(^|[._])(to_)?(q|k|v|qkv|kv)(_proj|_img)?\.", re.IGNORECASE),
    "MLP": re.compile(r"(^|[._])(mlp|ff|ffn|feed_forward|fc\d|ff_i|densereludense)[._]", re.IGNORECASE),
    "other": re.compile(""),
}
"""What a layer does -> how its name tells; the first that matches."""

_EMBEDDER = re.compile(r"embed", re.IGNORECASE)

COLUMNS = ("layer", "kind", "shape", "amax", "scale", "SQNR (dB)", "relative RMSE", "bias", "saturated", "flushed")


OUTPUT_COLUMNS = ("output error", "of nearest", "rows")
"""Beside the others where any layer was calibrated."""


def layer_kind(key: str) -> str:
    """One of KINDS, by a layer's name. Embedders count as other, whatever they are made of."""
    if _EMBEDDER.search(key):
        return "other"
    return next(kind for kind, pattern in KINDS.items() if pattern.search(key))


def sizes_by_kind(report: Report) -> dict[str, tuple[int, int]]:
    """Bytes (before, after) of the layers of each kind, and of the tensors that were KEPT; kinds in a fixed order."""
    before, after = Counter(), Counter()
    for layer in report.layers:
        before[layer_kind(layer.key)] += layer.bytes_before
        after[layer_kind(layer.key)] += layer.bytes_after
    kept = sum(tensor.nbytes for tensor in report.kept)
    before[KEPT] = after[KEPT] = kept
    return {kind: (before[kind], after[kind]) for kind in (*KINDS, KEPT) if before[kind]}


def number_of(count: int, thing: str) -> str:
    """A count and its thing, in the plural where it is: "3 layers"."""
    return f"{count} {thing}" if count == 1 else f"{count:,} {thing}s"


def describe_bytes(count: float) -> str:
    """A size with three digits, in decimal units: 7800000 -> "7.8 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def describe_output_error(report: Report) -> str:
    """The predicted error of the layers' outputs beside that of nearest, in a phrase; "" where none was calibrated."""
    errors = [layer.output_error for layer in report.layers if layer.output_error]
    if not errors:
        return ""
    chosen, nearest = (100 * median(getattr(error, name) for error in errors) for name in ("chosen", "nearest"))
    layers = number_of(len(errors), "calibrated layer")
    return f"median {chosen:.3g} % of the output, nearest {nearest:.3g} % (predicted for {layers})"


def table_rows(report: Report) -> list[dict]:
    """One dict a layer, lowest SQNR first; layers without statistics come last, with None for what is not known.

    Saturated and flushed are shares of 1; SQNR is None also where nothing was lost. Calibrated layers have their
    `output_error` beside it, a dict.
    """
    worst_first = report.worst(len(report.layers))
    rest = [layer for layer in report.layers if layer not in worst_first]
    return [_row(layer) for layer in (*worst_first, *rest)]


def to_markdown(report: Report) -> str:
    """The table in Markdown, after a line on the recipe and one on the sizes."""
    recipe = report.recipe
    lines = [
        f"**{report.source}**: {recipe.format}, {recipe.rounding}, scaling {recipe.scaling}, seed {recipe.seed}",
        "",
        f"{number_of(len(report.layers), 'layer')} in FP8, {number_of(len(report.kept), 'tensor')} kept: "
        f"{describe_bytes(report.bytes_before)} before, {describe_bytes(report.bytes_after)} after",
        "",
    ]
    rows = table_rows(report)
    calibrated = any("output_error" in row for row in rows)
    columns = (*COLUMNS, *OUTPUT_COLUMNS) if calibrated else COLUMNS
    if calibrated:
        lines += [f"Error of the layers' outputs: {describe_output_error(report)}", ""]
    lines += [f"| {' | '.join(columns)} |", "|---|---|---|" + "---:|" * (len(columns) - 3)]
    for row in rows:
        lines.append(f"| {' | '.join(_cells(row) + (_output_cells(row) if calibrated else []))} |")
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """The table, the recipe and the sizes in bytes as strict JSON."""
    return json.dumps(
        {
            "source": report.source,
            "family": report.family,
            "recipe": asdict(report.recipe),
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "kept": len(report.kept),
            "notes": report.notes,
            "layers": table_rows(report),
        },
        allow_nan=False,
        indent=1,
    )


def _row(layer: LayerReport) -> dict:
    row = {
        "layer": layer.key,
        "kind": layer_kind(layer.key),
        "shape": list(layer.shape),
        "amax": layer.amax,
        "scale": layer.scale,
    }
    if layer.output_error:
        row["output_error"] = asdict(layer.output_error)
    error = layer.error
    if error is None or not error.count:
        return row | dict.fromkeys(("sqnr", "relative_rmse", "bias", "saturated", "flushed"))
    return row | {
        "sqnr": error.sqnr if math.isfinite(error.sqnr) else None,
        "relative_rmse": error.relative_rmse,
        "bias": error.bias,
        "saturated": error.saturated / error.count,
        "flushed": error.flushed / error.count,
    }


def _output_cells(row: dict) -> list[str]:
    if "output_error" not in row:
        return ["", "", ""]
    error = row["output_error"]
    return [f"{100 * error['chosen']:.3g} %", f"{100 * error['nearest']:.3g} %", f"{error['rows']:,}"]


def _cells(row: dict) -> list[str]:
    cells = [row["layer"].replace("|", "\\|"), row["kind"], " × ".join(map(str, row["shape"]))]
    cells += [f"{row['amax']:.3g}", f"{row['scale']:.3g}"]
    if row["relative_rmse"] is None:
        return cells + [""] * 5
    sqnr = "lossless" if row["sqnr"] is None else f"{row['sqnr']:.2f}"
    shares = [f"{100 * row[name]:.3g} %" for name in ("saturated", "flushed")]
    return [*cells, sqnr, f"{100 * row['relative_rmse']:.3g} %", f"{row['bias']:.2e}", *shares]
