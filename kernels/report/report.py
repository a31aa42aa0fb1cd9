"""What a quantization did, as plain data: the FP8_REPORT of the nodes, the `--json` of the command."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import quantiles

from ..numerics.error_statistics import ErrorStatistics, merge
from ..numerics.output_error import OutputError
from ..recipe import Recipe
from ..selection.reasons import Reason

REPORT_VERSION = 1

TWICE_THE_ERROR = 20 * math.log10(2)
"""Difference of two levels in dB."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized weight."""

    key: str
    """Tensor key: the bare ComfyUI layer name + `.weight`, without any file prefix."""
    shape: tuple[int, ...]
    source_dtype: str
    """dtype of the original weight, e.g. "bfloat16"."""
    bytes_before: int
    amax: float
    scale: float
    error: ErrorStatistics | None = None
    """None where no statistics were gathered."""
    output_error: OutputError | None = None
    """Predicted error of the layer's output; None unless the rounding was calibrated."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_after(self) -> int:
        """One byte per code, and the fp32 scale."""
        return self.elements + 4


Measured = tuple[LayerReport, ErrorStatistics]
"""A layer and its error statistics."""


def with_statistics(layers: Iterable[LayerReport]) -> list[Measured]:
    """The layers that have error statistics, with these."""
    return [(layer, layer.error) for layer in layers if layer.error is not None]


Calibrated = tuple[LayerReport, OutputError]
"""A layer and the predicted error of its output."""


def with_output_errors(layers: Iterable[LayerReport]) -> list[Calibrated]:
    """The layers that were calibrated, with these."""
    return [(layer, layer.output_error) for layer in layers if layer.output_error is not None]


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """One tensor that was not quantized, and why."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    reason: Reason


@dataclass(frozen=True)
class Report:
    """The quantization of a whole model: the recipe, the layers, the kept tensors, and notes for the user."""

    source: str
    """File name (no path) or model name."""
    family: str
    """The preset's family, e.g. "sd3", or "unknown"."""
    recipe: Recipe
    layers: tuple[LayerReport, ...] = ()
    kept: tuple[KeptTensor, ...] = ()
    pattern_hits: tuple[tuple[str, int], ...] = ()
    """Each preset or user pattern, and the number of tensors that it matched."""
    notes: tuple[str, ...] = ()
    """Warnings and remarks, one sentence each."""
    version: int = field(default=REPORT_VERSION)

    @property
    def error(self) -> ErrorStatistics | None:
        """The statistics of all layers together; None if none were gathered."""
        gathered = [error for _, error in with_statistics(self.layers)]
        return merge(gathered) if gathered else None

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers) + sum(tensor.nbytes for tensor in self.kept)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers) + sum(tensor.nbytes for tensor in self.kept)

    def worst(self, n: int = 5) -> tuple[LayerReport, ...]:
        """The n layers with the lowest SQNR, lowest first. Empty layers and those without statistics are left out."""
        ranked = [(error.sqnr, layer.key, layer) for layer, error in with_statistics(self.layers) if error.count]
        ranked.sort(key=lambda entry: entry[:2])
        return tuple(layer for *_, layer in ranked[:n])

    def worst_outputs(self, n: int = 5) -> list[Calibrated]:
        """The n calibrated layers with the largest predicted error of their output, largest first."""
        return sorted(with_output_errors(self.layers), key=lambda entry: (-entry[1].chosen, entry[0].key))[:n]


def standing_out(levels: Sequence[float]) -> list[int]:
    """Places of the levels, in dB, that are far below the others; worst first.

    Far below: 6 dB below the median, which is twice the error, and 1.5 interquartile ranges below the lower quartile.
    """
    finite = [level for level in levels if math.isfinite(level)]
    if len(finite) < 2:
        return []
    highest = max(finite)
    low, middle, high = quantiles([min(level, highest) for level in levels], n=4, method="inclusive")
    limit = min(middle - TWICE_THE_ERROR, low - 1.5 * (high - low))
    return sorted((i for i, level in enumerate(levels) if level < limit), key=lambda i: levels[i])


def join_reports(reports: Iterable[Report], source: str) -> Report:
    """One report on several networks. Family and recipe are those of a network that was quantized, if there is one."""
    reports = sorted(reports, key=lambda report: not report.layers)
    return replace(
        reports[0],
        source=source,
        layers=sum((report.layers for report in reports), ()),
        kept=sum((report.kept for report in reports), ()),
        pattern_hits=sum((report.pattern_hits for report in reports), ()),
        notes=sum((report.notes for report in reports), ()),
    )
