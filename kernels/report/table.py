"""A report as a table: one row per layer, lowest SQNR first, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from statistics import median
from typing import Any

from .. import display
from .report import LayerReport, Report, with_output_errors

KEPT = "kept"
KINDS = {
    "modulation": re.compile(r"modulation|adaln|(^|[._])mod([._]|$)", re.IGNORECASE),
    "attention": re.compile(r"attn|attention|(^|[._])(to_)?(q|k|v|qkv|kv)(_proj|_img)?\.", re.IGNORECASE),
    "MLP": re.compile(r"(^|[._])(mlp|ff|ffn|feed_forward|fc\d|ff_i|densereludense)[._]", re.IGNORECASE),
    "other": re.compile(""),
}
"""Kind of a layer -> pattern of its name. The first match counts."""

_EMBEDDER = re.compile(r"embed", re.IGNORECASE)

COLUMNS = ("layer", "kind", "shape", "amax", "scale", "SQNR", "relative RMSE", "bias", "saturated", "flushed")

OUTPUT_COLUMNS = ("output error", "with nearest", "input rows")
"""Added if any layer was calibrated."""


def layer_kind(key: str) -> str:
    """One of KINDS, by the layer's name. Embedders are "other", whatever they consist of."""
    if _EMBEDDER.search(key):
        return "other"
    return next(kind for kind, pattern in KINDS.items() if pattern.search(key))


def sizes_by_kind(report: Report) -> dict[str, tuple[int, int]]:
    """Bytes (before, after) of the layers of each kind and of the KEPT tensors, in a fixed order of kinds."""
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for layer in report.layers:
        before[layer_kind(layer.key)] += layer.bytes_before
        after[layer_kind(layer.key)] += layer.bytes_after
    kept = sum(tensor.nbytes for tensor in report.kept)
    before[KEPT] = after[KEPT] = kept
    return {kind: (before[kind], after[kind]) for kind in (*KINDS, KEPT) if before[kind]}


def describe_output_error(report: Report) -> str:
    """The predicted error of the layer outputs, and with nearest, as a phrase; "" if no layer was calibrated."""
    errors = [error for _, error in with_output_errors(report.layers)]
    if not errors:
        return ""
    chosen = display.share(median(error.chosen for error in errors))
    nearest = display.share(median(error.nearest for error in errors))
    layers = display.count(len(errors), "calibrated layer")
    return f"median {chosen} of the output, {nearest} with nearest (predicted, {layers})"


def table_rows(report: Report) -> list[dict[str, Any]]:
    """One dict per layer, lowest SQNR first. Layers without statistics come last, with None for the unknown values.

    saturated and flushed are shares of 1. sqnr is None also for a lossless layer. Calibrated layers have an
    `output_error`, a dict.
    """
    worst_first = report.worst(len(report.layers))
    rest = [layer for layer in report.layers if not (layer.error and layer.error.count)]
    return [_row(layer) for layer in (*worst_first, *rest)]


def to_markdown(report: Report) -> str:
    """The table in Markdown, below one line about the recipe and one about the sizes."""
    recipe = report.recipe
    lines = [
        f"**{display.markdown(report.source)}**: {recipe.format}, {recipe.rounding}, scaling {recipe.scaling}, "
        f"seed {recipe.seed}",
        "",
        f"{display.count(len(report.layers), 'layer')} in FP8, {display.count(len(report.kept), 'tensor')} kept: "
        f"{display.sizes(report.bytes_before, report.bytes_after)}",
        "",
    ]
    rows = table_rows(report)
    calibrated = any("output_error" in row for row in rows)
    columns = (*COLUMNS, *OUTPUT_COLUMNS) if calibrated else COLUMNS
    if calibrated:
        lines += [f"Output error: {describe_output_error(report)}", ""]
    lines += [f"| {' | '.join(columns)} |", "|---|---|---|" + "---:|" * (len(columns) - 3)]
    for row in rows:
        lines.append(f"| {' | '.join(_cells(row) + (_output_cells(row) if calibrated else []))} |")
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """The table, the recipe and the sizes in bytes as strict JSON (no NaN, no Infinity)."""
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


def _row(layer: LayerReport) -> dict[str, Any]:
    row: dict[str, Any] = {
        "layer": layer.key,
        "kind": layer_kind(layer.key),
        "shape": list(layer.shape),
        "amax": layer.amax,
        "scale": layer.scale,
    }
    if layer.output_error:
        row["output_error"] = {name: value for name, value in asdict(layer.output_error).items() if value != ""}
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


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [display.markdown(row["layer"]), row["kind"], " × ".join(map(str, row["shape"]))]
    cells += [display.number(row["amax"]), display.number(row["scale"])]
    if row["relative_rmse"] is None:
        return cells + [""] * 5
    return [
        *cells,
        display.decibels(row["sqnr"]),
        display.share(row["relative_rmse"]),
        display.small(row["bias"]),
        display.share(row["saturated"]),
        display.share(row["flushed"]),
    ]


def _output_cells(row: dict[str, Any]) -> list[str]:
    if "output_error" not in row:
        return ["", "", ""]
    error = row["output_error"]
    return [display.share(error["chosen"]), display.share(error["nearest"]), f"{error['rows']:,}"]
