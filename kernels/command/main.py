"""Run the commands, and turn how they end into exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..calibration.file import load_calibration
from ..engine.file_job import plan_file, quantize_file, read_weights
from ..errors import CheckpointError
from ..report.report import Report
from ..state_dict.inspection import inspect_file
from ..state_dict.repair import repair_file
from ..studies.comparison import compare_roundings
from . import arguments, tables

DONE, FAILED, MISUSED = 0, 1, 2
CANCELLED = 130
"""The code that shells give a program ended by Ctrl+C."""

log = logging.getLogger("stochastic_fp8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Raises SystemExit for a wrong command line and for --help."""
    options = arguments.parse(sys.argv[1:] if argv is None else argv)
    with _logging(options.debug):
        try:
            return JOBS[options.command](options)
        except KeyboardInterrupt:
            return _fail(CANCELLED, "cancelled; no file was changed")
        except Exception as error:  # the outermost level: any error becomes one line
            if options.debug:
                traceback.print_exc()
            return _fail(*_diagnose(error))


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


def _print_result(options: argparse.Namespace, text: Callable[[], str], data: dict[str, Any]) -> None:
    sys.stdout.write((json.dumps(data, allow_nan=False, indent=1) if options.json else text()) + "\n")


def _fail(code: int, text: str) -> int:
    """Print an error in one line."""
    sys.stderr.write(f"error: {' '.join(text.split())}\n")
    return code


def _diagnose(error: Exception) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if isinstance(error, ModuleNotFoundError):
        return FAILED, f"the Python package {error.name} is missing: pip install {error.name}"
    if isinstance(error, OSError):
        return FAILED, f"{error.filename or 'file system'}: {error.strerror or error}"
    if isinstance(error, CheckpointError):
        return FAILED, str(error)
    if isinstance(error, ValueError):  # a pattern that matches nothing, a seed out of range
        return MISUSED, str(error)
    return FAILED, f"{type(error).__name__}: {error} (--debug shows the traceback)"


@contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """The library's log on the terminal: warnings, with --debug everything."""
    handler, level = logging.StreamHandler(), log.level
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

    with ExitStack() as stack:
        bar: Any = None

        def progress(done: int, total: int, key: str) -> None:
            nonlocal bar
            if bar is None:  # not before the first tensor, so that an error message stands alone
                bar = stack.enter_context(
                    tqdm(total=total, unit=unit, unit_scale=unit == "B", disable=options.debug, leave=False)
                )
            bar.set_postfix_str(key, refresh=not done)
            bar.update(done - bar.n)

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
        sys.stderr.write(f"figure: {path}\n")
