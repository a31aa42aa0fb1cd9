"""What a quantization did, as plain data: the FP8_REPORT of the nodes, the `--json` of the command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from ..numerics.error_statistics import ErrorStatistics, merge
from ..numerics.output_error import OutputError
from ..recipe import Recipe
from ..selection.reasons import Reason

REPORT_VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight."""

    key: str
    """Tensor key: the bare ComfyUI layer name + `.weight`, without any file prefix."""
    shape: tuple[int, ...]
    source_dtype: str
    """dtype that the weight had before, e.g. "bfloat16"."""
    bytes_before: int
    amax: float
    scale: float
    error: ErrorStatistics | None = None
    output_error: OutputError | None = None
    """Of the layer's output, where the rounding was calibrated."""

    @property
    def elements(self) -> int:
        n = 1
        for side in self.shape:
            n *= side
        return n

    @property
    def bytes_after(self) -> int:
        """One byte a code and the fp32 scale."""
        return self.elements + 4


@dataclass(frozen=True)
class KeptTensor:
    """One tensor that stays as it was, and why."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    reason: Reason


@dataclass(frozen=True)
class Report:
    """A whole model's quantization: the choices, each layer, what was kept, and what a user should know."""

    source: str
    """File name (no path) or model name."""
    family: str
    """The preset's family, e.g. "sd3", or "unknown"."""
    recipe: Recipe
    layers: tuple[LayerReport, ...] = ()
    kept: tuple[KeptTensor, ...] = ()
    pattern_hits: tuple[tuple[str, int], ...] = ()
    """Each preset or user pattern and how many tensors it matched."""
    notes: tuple[str, ...] = ()
    """Warnings and remarks, one plain sentence each."""
    version: int = field(default=REPORT_VERSION)

    @property
    def error(self) -> ErrorStatistics | None:
        """All layers' statistics merged; None where none were gathered."""
        gathered = [layer.error for layer in self.layers if layer.error is not None]
        return merge(gathered) if gathered else None

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers) + sum(tensor.nbytes for tensor in self.kept)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers) + sum(tensor.nbytes for tensor in self.kept)

    def worst(self, n: int = 5) -> tuple[LayerReport, ...]:
        """The n layers with the lowest SQNR, worst first."""
        measured = [layer for layer in self.layers if layer.error is not None and layer.error.count]
        return tuple(sorted(measured, key=lambda layer: (layer.error.sqnr, layer.key))[:n])

    def to_dict(self) -> dict:
        return asdict(self)

    def to_json(self, **options) -> str:
        """Strict JSON: no NaN or Infinity occurs, since only sums and counts are stored."""
        return json.dumps(self.to_dict(), allow_nan=False, **options)

    @classmethod
    def from_dict(cls, data: dict) -> Report:
        return cls(
            source=data["source"],
            family=data["family"],
            recipe=Recipe(**{name: _tuple(value) for name, value in data["recipe"].items()}),
            layers=tuple(_layer(entry) for entry in data["layers"]),
            kept=tuple(KeptTensor(**{name: _tuple(value) for name, value in entry.items()}) for entry in data["kept"]),
            pattern_hits=tuple((pattern, hits) for pattern, hits in data["pattern_hits"]),
            notes=tuple(data["notes"]),
            version=data["version"],
        )

    @classmethod
    def from_json(cls, text: str) -> Report:
        return cls.from_dict(json.loads(text))


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _layer(entry: dict) -> LayerReport:
    error, output_error = entry["error"], entry.get("output_error")
    return LayerReport(
        **{
            **entry,
            "shape": tuple(entry["shape"]),
            "error": error and ErrorStatistics.from_dict(error),
            "output_error": output_error and OutputError(**output_error),
        }
    )
