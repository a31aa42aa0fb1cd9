"""The request: every choice that decides the result of a quantization."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Every choice that decides the bytes of the result. Stored in the file's metadata under `stochastic_fp8`."""

    format: str = "float8_e4m3fn"
    rounding: str = "stochastic"
    scaling: str = "absmax"
    seed: int = 0
    layers: str = "auto"
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".weight",)
    layout: str = "native"
    matmul: str = "full"
    nonfinite: str = "error"
    calibration: str = ""
    """Name of the calibration in use, if any."""
