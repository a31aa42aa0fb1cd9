"""Run the commands, and turn how they end into exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import display
from ..calibration.file import load_calibration
from ..engine.file_job import plan_file, quantize_file, read_weights
from ..errors import CheckpointError
from ..report.report import Report
from ..state_dict.inspection import inspect_file
from ..state_dict.repair import repair_file
from ..studies.comparison import compare_roundings
from . import arguments, tables
from .starting import CANCELLED, NOTHING_CHANGED, quiet_start

DONE, FAILED, MISUSED = 0, 1, 2

log = logging.getLogger("stochastic_fp8")


class OutputError(Exception):
    """The result of a command cannot be printed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Raises SystemExit for a wrong command line and for --help."""
    with quiet_start():
        _open_standard_streams()
        options = arguments.parse(sys.argv[1:] if argv is None else argv)
        before = _written(options)
    with _logging(options.debug):
        try:
            return JOBS[options.command](options)
        except KeyboardInterrupt:
            if _written(options) == before:
                return _fail(CANCELLED, NOTHING_CHANGED)
            return _fail(CANCELLED, f"cancelled; {_complete(options)}")
        except Exception as error:  # the outermost level: any error becomes one line
            if options.debug:
                _print_aside(traceback.format_exc())
            code, text = _diagnose(error)
            return _fail(code, text if _written(options) == before else f"{text}; {_complete(options)}")


def quantize(options: argparse.Namespace) -> int:
    recipe = arguments.recipe(options)
    if options.dry_run:
        report = plan_file(options.source, recipe, calibration=options.calibration, requantize=options.requantize)
        _print_result(options, lambda: tables.plan(report, options.target), tables.report_data(report))
        return DONE
    folder = _plot_folder(options) if options.plot else None
    start = time.perf_counter()
    with _progress(options) as progress:
        report = quantize_file(
            options.source,
            options.target,
            recipe,
            calibration=options.calibration,
            requantize=options.requantize,
            overwrite=options.overwrite,
            device=options.device or ("cuda" if torch.cuda.is_available() else None),
            progress=progress,
        )
    seconds = time.perf_counter() - start
    _print_result(options, lambda: tables.summary(report, options.target, seconds), tables.report_data(report))
    if folder:
        _plot(report, folder, options)
    return DONE


def inspect(options: argparse.Namespace) -> int:
    inspection = inspect_file(options.source, deep=options.deep)
    if options.repair:
        repaired = repair_file(options.source, options.repair, layout=options.layout, overwrite=options.overwrite)
        text = f"{inspection.summary}\n\nrepaired: {repaired.summary}"
        _print_result(options, lambda: text, {"before": inspection.to_dict(), "after": repaired.to_dict()})
        inspection = repaired
    else:
        _print_result(options, lambda: inspection.summary, inspection.to_dict())
    return DONE if inspection.ok else FAILED


def compare(options: argparse.Namespace) -> int:
    recipe = arguments.layer_recipe(options)
    calibration = load_calibration(options.calibration) if options.calibration else None
    total = len(plan_file(options.source, recipe, requantize=True).layers)
    with _progress(options, unit=" layers") as progress:
        comparison = compare_roundings(
            read_weights(options.source, recipe),
            scaling=recipe.scaling,
            seed=recipe.seed,
            source=Path(options.source).name,
            calibration=calibration,
            progress=lambda done, key: progress(done, total, key),
        )
    _print_result(options, lambda: tables.comparison_table(comparison), tables.comparison_data(comparison))
    return DONE


JOBS = {"quantize": quantize, "inspect": inspect, "compare": compare}


def _target(options: argparse.Namespace) -> Path | None:
    """The file that a command writes, if it writes one."""
    target: str | None = {"quantize": "target", "inspect": "repair"}.get(options.command)
    path = getattr(options, target) if target else None
    return Path(path) if path else None


def _written(options: argparse.Namespace) -> tuple[int, ...] | None:
    """What changes when the target is replaced; None where there is no target."""
    target = _target(options)
    with suppress(OSError):
        if target:
            status = target.stat()
            return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _complete(options: argparse.Namespace) -> str:
    return f"{_target(options)} was written before that and is complete"


def _print_result(options: argparse.Namespace, text: Callable[[], str], data: dict[str, Any]) -> None:
    """Print a result. Raises OutputError: stdout was closed by its reader, or its disk is full."""
    if sys.stdout is None:  # started without a terminal: nobody reads it
        return
    output = _to_json(data) if options.json else display.printable_lines(text())
    try:
        sys.stdout.write(output + "\n")
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: a stream closed by this program
        _discard(sys.stdout)
        raise OutputError(f"the result cannot be printed: {error}") from error


def _to_json(data: Any) -> str:
    try:
        return json.dumps(data, allow_nan=False, indent=1)
    except ValueError:
        return json.dumps(_without_nan(data), indent=1)


def _without_nan(data: Any) -> Any:
    """The data with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {name: _without_nan(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return data


def _fail(code: int, text: str) -> int:
    """Print an error in one line."""
    _print_aside(f"error: {' '.join(text.split())}\n")
    return code


def _print_aside(text: str) -> None:
    """Print to stderr. A closed one does not end the job."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(display.printable_lines(text))
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Send what is left in a broken stream nowhere, or Python fails on it at exit."""
    with suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def _open_standard_streams() -> None:
    """Open the closed ones of descriptors 0 to 2: a file that got one would receive what libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _diagnose(error: Exception) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if isinstance(error, ModuleNotFoundError):
        return FAILED, f"the Python package {error.name} is missing: pip install {error.name}"
    if isinstance(error, OutputError):
        return FAILED, str(error)
    if isinstance(error, OSError):
        return FAILED, f"{error.filename or 'file system'}: {error.strerror or error}"
    if isinstance(error, CheckpointError):
        return FAILED, str(error)
    if isinstance(error, ValueError):  # a pattern that matches nothing, a seed out of range
        return MISUSED, str(error)
    return FAILED, f"{type(error).__name__}: {error} (--debug shows the traceback)"


class _Printable(logging.Formatter):
    """Messages name tensors and files, which can hold control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return display.printable_lines(super().format(record))


@contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """The library's log on the terminal: warnings, with --debug everything."""
    handler, level = logging.StreamHandler(), log.level
    handler.setFormatter(_Printable())
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def _progress(options: argparse.Namespace, unit: str = "B") -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with the tensor key and the speed. Disabled by --debug, whose log shows each tensor."""
    from tqdm import tqdm

    silent = options.debug or sys.stderr is None
    with ExitStack() as stack:
        bar: Any = None

        def progress(done: int, total: int, key: str) -> None:
            nonlocal bar
            try:
                if bar is None:  # not before the first tensor, so that an error message stands alone
                    bar = stack.enter_context(
                        tqdm(total=total, unit=unit, unit_scale=unit == "B", disable=silent, leave=False)
                    )
                bar.set_postfix_str(display.printable(key), refresh=not done)
                bar.update(done - bar.n)
            except (OSError, ValueError):  # stderr was closed
                _discard(sys.stderr)

        yield progress


def _plot_folder(options: argparse.Namespace) -> Path:
    """Create the folder and import matplotlib before the job, so that a long job does not fail at its end."""
    importlib.import_module("matplotlib")
    target = Path(options.target)
    folder = Path(options.plot_dir) if options.plot_dir else target.with_name(f"{target.stem}_plots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _plot(report: Report, folder: Path, options: argparse.Namespace) -> None:
    from .plots import draw

    for path in draw(report, folder, options.plot_max_tensors, options.plot_sample_size):
        _print_aside(f"figure: {path}\n")
