"""The library's exceptions.

StochasticFP8Error
 ├── UnknownChoiceError    an option that is not in its table of choices
 ├── ChoiceError           options that exclude each other, or that cannot be met
 ├── PatternError          an invalid layer pattern: empty, too long, or not text
 │    └── UnknownPatternError   a layer pattern that matches no tensor
 ├── NonFiniteError        a tensor with NaN or infinite values
 ├── CheckpointError       a file that cannot be read, written or used
 │    └── LimitError            a file beyond the limits of this library; other programs may read it
 ├── CalibrationError      a calibration that is missing, or does not fit the model
 ├── ActivationError       layer inputs with NaN or infinite values while a calibration is recorded
 └── UnsupportedDtypeError a tensor that is not floating-point (also a TypeError)

All except UnsupportedDtypeError are also ValueErrors. Every message is one line: the file, tensor or option, the
fault, and the way out.
"""

from __future__ import annotations

import os
from pathlib import Path

from .display import printable


class StochasticFP8Error(Exception):
    """Base class of all exceptions that the library raises on purpose."""


class UnknownChoiceError(StochasticFP8Error, ValueError):
    """An option that is not in its table of choices."""


class ChoiceError(StochasticFP8Error, ValueError):
    """Options that exclude each other, or that cannot be met."""


class PatternError(StochasticFP8Error, ValueError):
    """An invalid layer pattern: empty, not text, or too long together with the others of a request."""


class UnknownPatternError(PatternError):
    """A layer pattern that matches no tensor."""


class NonFiniteError(StochasticFP8Error, ValueError):
    """A tensor with NaN or infinite values, which scaled FP8 cannot represent. Attributes: key, nan, inf (counts)."""

    def __init__(self, key: str, nan: int, inf: int):
        self.key, self.nan, self.inf = key, nan, inf
        super().__init__(f"tensor '{key}' holds {nan} NaN and {inf} infinite values")


class CheckpointError(StochasticFP8Error, ValueError):
    """A file that cannot be read, written or used."""


class LimitError(CheckpointError):
    """A file beyond the limits of this library, such as the number of tensors. Other programs may read it."""


class CalibrationError(StochasticFP8Error, ValueError):
    """A calibration that is missing, or does not fit the model or another calibration."""


class ActivationError(StochasticFP8Error, ValueError):
    """Layer inputs with NaN or infinite values while a calibration is recorded."""


class UnsupportedDtypeError(StochasticFP8Error, TypeError):
    """A tensor that is not floating-point, or FP8 without its scale."""


def file_error(path: str | os.PathLike[str], text: str) -> CheckpointError:
    """A CheckpointError of one line: the file's name without its folder, then the text."""
    return CheckpointError(_file_message(path, text))


def limit_error(path: str | os.PathLike[str], text: str) -> LimitError:
    """The same as a LimitError."""
    return LimitError(_file_message(path, text))


def _file_message(path: str | os.PathLike[str], text: str) -> str:
    return printable(" ".join(f"{os.fspath(Path(path).name)}: {text}".splitlines()))
