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
fault, and the way out. ComfyUI shows the types as `stochastic_fp8.CheckpointError` and so on, without the pack's path.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .display import printable

SHOWN_MODULE = "stochastic_fp8"
"""The module of the exceptions in messages. The real one would begin with the path of ComfyUI's folder custom_nodes."""


class StochasticFP8Error(Exception):
    """Base class of all exceptions that the library raises on purpose. Can be pickled."""

    _home: ClassVar[str] = __module__
    """The module that defines the class."""
    __module__ = SHOWN_MODULE

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._home, cls.__module__ = cls.__module__, SHOWN_MODULE

    def __reduce__(self) -> tuple[Callable[..., StochasticFP8Error], tuple[Any, ...]]:
        return _restored, (self._home, type(self).__name__, self.args, vars(self))


def _restored(home: str, name: str, arguments: tuple[Any, ...], state: dict[str, Any]) -> StochasticFP8Error:
    kind: type[StochasticFP8Error] = getattr(importlib.import_module(home), name)
    error = kind.__new__(kind, *arguments)
    vars(error).update(state)
    return error


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
    """A file that cannot be read, written or used.

    Attributes: file (its name without folder), fault and way_out, the parts of the message; "" where there is none.
    """

    def __init__(self, message: str, file: str = "", fault: str = "", way_out: str = ""):
        super().__init__(message)
        self.file, self.fault, self.way_out = file, fault or message, way_out


class LimitError(CheckpointError):
    """A file beyond the limits of this library, such as the number of tensors. Other programs may read it."""


class CalibrationError(StochasticFP8Error, ValueError):
    """A calibration that is missing, or does not fit the model or another calibration."""


class ActivationError(StochasticFP8Error, ValueError):
    """Layer inputs with NaN or infinite values while a calibration is recorded."""


class UnsupportedDtypeError(StochasticFP8Error, TypeError):
    """A tensor that is not floating-point, or FP8 without its scale."""


def file_error(path: str | os.PathLike[str], fault: str, way_out: str = "") -> CheckpointError:
    """A CheckpointError of one line: the file's name without its folder, the fault, and the way out."""
    return _file_error(CheckpointError, path, fault, way_out)


def limit_error(path: str | os.PathLike[str], fault: str, way_out: str = "") -> LimitError:
    """The same as a LimitError."""
    return _file_error(LimitError, path, fault, way_out)


_Error = TypeVar("_Error", bound=CheckpointError)


def _file_error(kind: type[_Error], path: str | os.PathLike[str], fault: str, way_out: str) -> _Error:
    file, fault, way_out = (printable(" ".join(text.splitlines())) for text in (Path(path).name, fault, way_out))
    return kind(f"{file}: {fault}{f'; {way_out}' if way_out else ''}", file, fault, way_out)
