"""The request: every choice that decides the result of a quantization, and the tables of choices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .choices import choose
from .errors import ChoiceError
from .numerics.formats import FORMATS
from .numerics.rounding import METHODS
from .numerics.scaling import SCALINGS
from .selection.selection import LAYERS, MEASURED
from .state_dict.layouts import LAYOUTS

MATMULS = {
    "full": "activations stay in 16 bits",
    "fp8": "activations are rounded to FP8 too, on GPUs that multiply FP8: faster, and visibly less exact",
}

NONFINITE = {
    "error": "stop, and name every tensor with NaN or infinite values",
    "keep": "leave such a tensor unchanged, and list it",
}

CHOICES: Mapping[str, Mapping[str, object]] = {
    "format": FORMATS,
    "rounding": METHODS,
    "scaling": SCALINGS,
    "layers": LAYERS,
    "layout": LAYOUTS,
    "matmul": MATMULS,
    "nonfinite": NONFINITE,
}
"""Field of a Recipe -> the table of its choices."""


@dataclass(frozen=True)
class Recipe:
    """Every choice that decides the bytes of the result. Stored in the file's metadata under `stochastic_fp8`.

    Raises UnknownChoiceError for a choice that is not in its table, and ChoiceError unless `layers` is "measured" with
    exactly one of size_limit and target_quality, or something else with neither.
    """

    format: str = "float8_e4m3fn"
    rounding: str = "stochastic"
    scaling: str = "absmax"
    seed: int = 0
    """0..2^64-1."""
    layers: str = "auto"
    keep: Collection[str] = ()
    """Patterns of layers that stay as they are. Stored as a tuple; so are `only` and `suffixes`."""
    only: Collection[str] = ()
    """Patterns: quantize nothing else. Empty: everything that `layers` chooses."""
    suffixes: Collection[str] = (".weight",)
    """Endings of tensor names, one of which must match."""
    layout: str = "native"
    matmul: str = "full"
    nonfinite: str = "error"
    calibration: str = ""
    """Name of the calibration in use, if any."""
    size_limit: float = 0.0
    """The largest file, in GB of 10^9 bytes, for layers "measured". 0: none."""
    target_quality: float = 0.0
    """The smallest predicted latent dB, for layers "measured". 0: none."""

    def __post_init__(self) -> None:
        for name, table in CHOICES.items():
            choose(table, getattr(self, name), name)
        for name in ("keep", "only", "suffixes"):
            names = getattr(self, name)
            object.__setattr__(self, name, (names,) if isinstance(names, str) else tuple(names))
        _check_limits(self.layers, self.size_limit, self.target_quality)


def _check_limits(layers: str, size_limit: float, target_quality: float) -> None:
    for name, limit in (("size_limit", size_limit), ("target_quality", target_quality)):
        if not isinstance(limit, (int, float)) or not 0 <= limit < math.inf:
            raise ChoiceError(f"{name} is {limit}; give a number from 0 (no limit) up")
    if layers != MEASURED and (size_limit or target_quality):
        name = "size_limit" if size_limit else "target_quality"
        raise ChoiceError(
            f"{name} works with layers 'measured' only, not with '{layers}': set it to 0, or choose 'measured'"
        )
    if layers == MEASURED and size_limit and target_quality:
        raise ChoiceError("size_limit and target_quality exclude each other: set one of them to 0")
    if layers == MEASURED and not size_limit and not target_quality:
        raise ChoiceError("layers 'measured' needs to know when to stop: set size_limit or target_quality")


def recipe_from(recipe: Recipe | None, choices: Mapping[str, Any]) -> Recipe:
    """The recipe of a call that takes either a Recipe or its fields as keywords.

    Raises TypeError where both are given, or for a keyword that is not a field of Recipe.
    """
    if recipe is None:
        return Recipe(**choices)
    if choices:
        raise TypeError(f"give a recipe or its fields as keywords, not both: {', '.join(choices)}")
    return recipe


def with_calibration(recipe: Recipe, source: str) -> Recipe:
    """The recipe with the name of the calibration that it is used with."""
    return replace(recipe, calibration=source)
