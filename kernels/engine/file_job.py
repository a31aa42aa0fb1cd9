"""The file job: one streamed pass from a checkpoint to a scaled FP8 one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..calibration.file import load_calibration
from ..calibration.moments import Calibration
from ..errors import file_error
from ..files.reader import Source, open_source
from ..files.writer import check_target, refuse_same_file
from ..progress import Meter, ProgressCallback
from ..recipe import Recipe, recipe_from
from ..report.report import Report
from ..state_dict.compatibility import EXACT, Verdict, check_usable, layout_verdicts, verdict_of
from ..state_dict.size import bytes_beyond_reserve
from ..state_dict.write import write_state_dict
from .file_weights import FileWeights
from .quantization import RECIPE_ENTRY, LayerCallback, Quantization, recipe_entry

log = logging.getLogger("stochastic_fp8")


def quantize_file(
    source: str | os.PathLike[str] | Source,
    target: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    statistics: bool = True,
    metadata: Mapping[str, str] | None = None,
    for_comfyui: str | None = None,
    progress: ProgressCallback | None = None,
    observe: LayerCallback | None = None,
    **choices: Any,
) -> Report:
    """Quantize a checkpoint file to a new scaled FP8 file, which is verified before it appears.

    source: a .safetensors file, the .safetensors.index.json of several, or an open Source. recipe: the choices; its
    fields can be given as keywords instead. calibration: recorded layer inputs, or their file, for rounding
    "calibrated" and for the input scales of matmul "fp8". requantize: allow layers that are already in this format.
    metadata: entries to add. for_comfyui: a version of ComfyUI that must be able to use the file, such as "0.3.75".
    Weights that are scaled FP8 are dequantized first. Tensors that are not quantized keep every bit. The same source
    and recipe give the same file, byte for byte (calibrated rounding: on one device and version of torch).

    Raises CheckpointError: files that cannot be read, used or written, a source that changes meanwhile, and non-finite
    weights; UnknownChoiceError and UnknownPatternError; CalibrationError: rounding "calibrated" without a calibration;
    TypeError: a recipe and keywords. The target is then unchanged.
    """
    recipe, calibration, target = recipe_from(recipe, choices), _opened(calibration), Path(target)
    with _opened_source(source) as opened:
        refuse_same_file(opened, target)
        check_target(target, overwrite)
        weights = FileWeights(opened, requantize=requantize)
        job = Quantization(
            weights,
            recipe,
            calibration,
            device=device,
            statistics=statistics,
            observe=observe,
            progress=progress,
            reserved=bytes_beyond_reserve(metadata or {}),
        )
        job.check_anything_left()
        _check_usable(job, target, for_comfyui)
        look_first = recipe.nonfinite == "keep"  # the header of a file holds all sizes
        meter = Meter(job.source_bytes + (job.quantized_bytes if look_first else 0), progress)
        if look_first:
            job.keep_nonfinite(meter)
            job.check_anything_left()
        state = job.state_dict()
        state.metadata[RECIPE_ENTRY] = json.dumps(recipe_entry(job.report()), sort_keys=True)
        unscaled = [("missing_scale", name) for name in state.tensors]  # they had no scale in the source
        inspection = write_state_dict(
            state,
            target,
            layout=recipe.layout,
            metadata=metadata,
            overwrite=overwrite,
            source=opened,
            accept=unscaled,
            progress=meter,
        )
        # Errors that were accepted, such as legacy E5M2, are in the job's own verdicts.
        verdicts = inspection.verdicts if inspection.ok else _verdicts(job)
        report = _report(job, verdicts, for_comfyui)
        log.info(
            "%s: %d layers quantized to %s, %d tensors kept",
            target,
            len(report.layers),
            recipe.format,
            len(report.kept),
        )
        if for_comfyui:
            for loss in _losses(verdicts, for_comfyui):
                log.warning("%s: %s", target.name, loss)
        return report


def plan_file(
    source: str | os.PathLike[str] | Source,
    recipe: Recipe | None = None,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    requantize: bool = False,
    **choices: Any,
) -> Report:
    """What quantize_file would do, from the header alone: layers with amax and scale 0, kept tensors, notes, sizes.

    Raises as quantize_file does before it begins to write.
    """
    with _opened_source(source) as opened:
        return report_plan(plan_job(opened, recipe_from(recipe, choices), _opened(calibration), requantize=requantize))


def plan_job(
    source: Source, recipe: Recipe, calibration: Calibration | None = None, *, requantize: bool = False
) -> Quantization:
    """The quantization of a file, checked but not carried out. Raises as plan_file does."""
    job = Quantization(FileWeights(source, requantize=requantize), recipe, calibration)
    job.check_anything_left()
    return job


def report_plan(job: Quantization) -> Report:
    """The report of a planned job, with what ComfyUI versions make of its file."""
    return _report(job, _verdicts(job))


def read_weights(
    source: str | os.PathLike[str], recipe: Recipe | None = None, **choices: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """(tensor key, weight) of each layer that quantize_file would quantize, each valid until the next is read.

    Raises as plan_file does, and for weights that cannot be read.
    """
    with open_source(source) as opened:
        job = Quantization(FileWeights(opened, requantize=True), recipe_from(recipe, choices))
        job.check_anything_left()
        names = job.quantized
        with job.weights.reading(names, torch.device("cpu")) as reads:
            for name, read in zip(names, reads, strict=True):
                yield job.selection.tensor_key(name), read()[0]


def _check_usable(job: Quantization, target: Path, version: str | None) -> None:
    """Raises CheckpointError where ComfyUI of this version would misread the file, or not load it."""
    if version is None:
        return
    try:
        check_usable(version, job.recipe.layout, [job.recipe.format], job.selection.components, kept=job.kept_formats)
    except ValueError as error:
        raise file_error(target, str(error)) from error


def _verdicts(job: Quantization) -> tuple[Verdict, ...]:
    """What ComfyUI versions make of the file, as far as the recipe and the names tell."""
    return layout_verdicts(job.recipe.layout, job.formats, job.selection.components)


def _report(job: Quantization, found: Sequence[Verdict], version: str | None = None) -> Report:
    """The job's report, with what ComfyUI versions make of the file where that is not simply exact.

    Losses come first: those in `version` or, without one, in any version.
    """
    losses = _losses(found, version)
    remarks = [verdict for verdict in found if verdict not in losses and (verdict.outcome != EXACT or verdict.text)]
    report = job.report([str(verdict) for verdict in remarks])
    return replace(report, notes=(*map(str, losses), *report.notes))


def _losses(found: Sequence[Verdict], version: str | None) -> list[Verdict]:
    """The verdicts that are not exact, of one version or of all."""
    running = found if version is None else (verdict_of(version, found),)
    return [verdict for verdict in running if verdict.outcome != EXACT]


def _opened_source(source: str | os.PathLike[str] | Source) -> AbstractContextManager[Source]:
    """The source, which is closed at the end of the block unless the caller has opened it."""
    return nullcontext(source) if isinstance(source, Source) else open_source(source)


def _opened(calibration: Calibration | str | os.PathLike[str] | None) -> Calibration | None:
    return load_calibration(calibration) if isinstance(calibration, (str, os.PathLike)) else calibration
