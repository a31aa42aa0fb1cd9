"""The figures of --plot, as PNG files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..figures import error_histogram, layer_report, save_png
from ..numerics.error_statistics import evenly_spaced
from ..report.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(report: Report, folder: Path, max_tensors: int, sample_size: int) -> Iterator[Path]:
    """Write the figures of all layers and of each of the `max_tensors` worst layers; yields each path when written.

    sample_size: largest number of dots per figure.
    """
    yield _save(error_histogram(thin_samples(report, report.layers, sample_size)), folder / "all_layers.png")
    yield _save(layer_report(report), folder / "layer_by_layer.png")
    for rank, layer in enumerate(report.worst(max_tensors), 1):
        figure = error_histogram(thin_samples(report, [layer], sample_size))
        yield _save(figure, folder / f"worst_{rank:02}_{file_name(layer.key)}.png")


def thin_samples(report: Report, layers: Sequence[LayerReport], total: int) -> Report:
    """A report on these layers with at most `total` samples in all, evenly spaced."""
    shares = [total * (i + 1) // len(layers) - total * i // len(layers) for i in range(len(layers))]
    return replace(report, layers=tuple(map(_thin, layers, shares)))


def file_name(key: str) -> str:
    """A tensor key as a file name that is valid on every file system."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", key)[:150]


def _thin(layer: LayerReport, limit: int) -> LayerReport:
    if layer.error is None:
        return layer
    samples = layer.error.samples
    kept = tuple(samples[i] for i in evenly_spaced(len(samples), limit)) if limit else ()
    return replace(layer, error=replace(layer.error, samples=kept))


def _save(figure: Figure, path: Path) -> Path:
    save_png(figure, path)
    return path
