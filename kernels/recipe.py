"""The request: every choice that decides the result of a quantization, and the tables of choices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .choices import choose
from .numerics.formats import FORMATS
from .numerics.rounding import METHODS
from .numerics.scaling import SCALINGS
from .selection.selection import LAYERS
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

    Raises UnknownChoiceError for a choice that is not in its table.
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

    def __post_init__(self) -> None:
        for name, table in CHOICES.items():
            choose(table, getattr(self, name), name)
        for name in ("keep", "only", "suffixes"):
            names = getattr(self, name)
            object.__setattr__(self, name, (names,) if isinstance(names, str) else tuple(names))


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
