"""What a node would quantize, from the header of its model's file alone: the plan that its panel shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels import KeptTensor, LayerReport, Recipe, Report
from ..kernels.calibration.file import load_calibration
from ..kernels.calibration.moments import Calibration
from ..kernels.engine.file_job import plan_job, report_plan
from ..kernels.engine.file_weights import FileWeights
from ..kernels.engine.quantization import Quantization
from ..kernels.errors import CalibrationError, StochasticFP8Error, file_error
from ..kernels.files.reader import Source, is_index, is_safetensors
from ..kernels.report.report import join_reports
from ..kernels.selection.components import Components
from ..kernels.selection.foreign import diffusers_model
from ..kernels.selection.presets import DIFFUSION, TEXT_ENCODER
from ..kernels.selection.reasons import Reason
from ..kernels.selection.selection import MEASURED
from ..kernels.state_dict.compatibility import DEGRADED, check_usable, layout_verdicts, verdict_of
from . import models
from .calibration import FOLDER, list_calibrations
from .diffusers_names import open_native
from .files import check_detected, check_entries, check_folder, find_source, is_listed

PARTS = {"file": "the whole file", "model": "its diffusion model", "clip": "its text encoders"}

NAMES = 200
"""The most rows of names that a plan lists under one reason."""


class NoSuchFile(StochasticFP8Error, ValueError):
    """A name that ComfyUI's loaders do not list."""


def make_plan(
    file: str,
    part: str,
    recipe: Recipe,
    requantize: bool = False,
    calibration: str = "",
    for_another_comfyui: bool = False,
) -> dict:
    """What becomes of the tensors of a file, as JSON.

    file: `kind/name` as the file node lists it. part: one of PARTS. calibration: the same for a file that Load
    Calibration lists, for layers `measured`.
    Raises NoSuchFile, and ValueError (one line) for what cannot be quantized so.
    """
    path = _model_path(file)
    known = _calibration(calibration) if recipe.layers == MEASURED else None
    if part == "file":
        with open_native(path) as source:
            job = plan_job(source, recipe, known, requantize=requantize)
            report = report_plan(job)
            return describe(report) | _in_versions(find_source(file)[0], source, job, report, for_another_comfyui)
    models.check_runs(recipe.format)
    with open_native(path) as source:
        jobs = [Quantization(weights, recipe, known) for weights in _networks(source, part)]
        problems = [text for job in jobs if part == "model" for text in _nothing_left(job)]
        reports = [job.report() for job in jobs]
    return describe(join_reports(reports, path.name)) | {"problems": problems}


def describe(report: Report) -> dict:
    """The plan that a report without measurements stands for: sizes, and tensors by what becomes of them."""
    kept: dict[Reason, list[KeptTensor]] = defaultdict(list)
    for tensor in report.kept:
        kept[tensor.reason].append(tensor)
    rows = [
        _row(tensors, sum(t.nbytes for t in tensors)) | {"reason": reason.to_dict()} for reason, tensors in kept.items()
    ]
    users = {*report.recipe.keep, *report.recipe.only}
    return {
        "source": report.source,
        "family": report.family,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "quantized": _row(report.layers, sum(layer.bytes_before for layer in report.layers))
        | {"bytes_after": sum(layer.bytes_after for layer in report.layers)},
        "kept": sorted(rows, key=lambda row: -row["bytes"]),
        "hits": [{"pattern": name, "count": n, "yours": name in users} for name, n in report.pattern_hits],
        "problems": [],
        "notes": list(report.notes),
        "elsewhere": [],
    }


def _nothing_left(job: Quantization) -> Iterator[str]:
    """Why the run would fail, if there is nothing to quantize."""
    try:
        job.check_anything_left()
    except StochasticFP8Error as error:
        yield str(error)


def _in_versions(kind: str, source: Source, job: Quantization, report: Report, for_another_comfyui: bool) -> dict:
    """What the running ComfyUI would make of the file badly (`problems`), what other versions would make of it
    (`elsewhere`), and the other notes.

    kind: the folder of the source.
    """
    layout, components = job.recipe.layout, job.selection.components
    verdicts = layout_verdicts(layout, job.formats, components)
    running = verdict_of(COMFYUI_VERSION, verdicts)
    problems = []
    try:
        if not for_another_comfyui:
            check_entries(layout, [job.recipe.format])
            check_folder(kind, source, components)
            check_usable(COMFYUI_VERSION, layout, [job.recipe.format], components, kept=job.kept_formats)
            check_detected(source, components)
            problems += [str(running)] * (running.outcome == DEGRADED)
    except ValueError as error:
        problems.append(str(error))
    known = [str(verdict) for verdict in verdicts]
    return {
        "problems": problems,
        "notes": [note for note in report.notes if note not in known or (note == str(running) and not problems)],
        "elsewhere": [note for note in report.notes if note in known and note != str(running)],
    }


def _row(tensors: Iterable[LayerReport | KeptTensor], nbytes: int) -> dict:
    names: dict[str, list[str]] = defaultdict(list)
    for tensor in tensors:
        names[_over_blocks(tensor.key)].append(tensor.key)
    by_count = sorted(names.items(), key=lambda item: -len(item[1]))
    rows = [{"name": keys[0] if len(keys) == 1 else name, "count": len(keys)} for name, keys in by_count]
    return {
        "count": sum(len(keys) for keys in names.values()),
        "bytes": nbytes,
        "names": rows[:NAMES],
        "more": len(rows[NAMES:]),
    }


def _over_blocks(key: str) -> str:
    """The name with its numbers as `*`, so that the same layer of all blocks is one row."""
    return ".".join("*" if part.isdigit() else part for part in key.split("."))


def _model_path(file: str) -> Path:
    """The path of a file that ComfyUI lists. It may be a link to another disk, which the loaders follow as well."""
    if not is_safetensors(file) and not is_index(file):
        raise NoSuchFile(f"{file}: a plan needs a .safetensors file, the only kind that is read")
    if not is_listed(file):
        raise NoSuchFile(f"{file}: ComfyUI lists no such file among its models")
    try:
        return find_source(file)[1]
    except FileNotFoundError:
        raise NoSuchFile(f"{file}: is missing, or is a link that leads nowhere") from None


def _calibration(name: str) -> Calibration | None:
    """The calibration of a file that is listed. Raises CalibrationError without measured effects: the plan would have
    to read the whole model."""
    kind, _, listed = name.partition("/")
    if not name:
        return None
    if kind != FOLDER or listed not in list_calibrations():
        raise NoSuchFile(f"{name}: ComfyUI lists no such calibration")
    calibration = load_calibration(folder_paths.get_full_path_or_raise(FOLDER, listed))
    if calibration.sensitivity is None:
        raise CalibrationError(
            f"{listed} has no measured effects: measure them with Layer Sensitivity, or press Run to choose by "
            "predicted errors"
        )
    return calibration


def _networks(source: Source, part: str) -> Iterator[FileWeights]:
    """Each network that ComfyUI would make of this part of the file, under its bare names."""
    model = diffusers_model(source.tensors)
    if model:
        text = f"holds {model} in the diffusers layout, in which ComfyUI renames the layers: only a run can tell"
        raise file_error(source.path, text)
    components = Components(source.tensors)
    if part == "model":
        yield FileWeights(source, component=components.main, kind=DIFFUSION, requantize=True)
        return
    encoders = [component for component in components.others if component.family != "vae"]
    if components.all_in_one and not encoders:
        raise file_error(source.path, "holds no text encoder: load one with a CLIP loader")
    for component in encoders if components.all_in_one else [components.main]:
        yield FileWeights(source, component=component, kind=TEXT_ENCODER, requantize=True)
