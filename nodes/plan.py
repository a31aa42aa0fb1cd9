"""What a node would quantize, from the header of its model's file alone: the plan that its panel shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ..kernels import KeptTensor, LayerReport, Recipe, Report
from ..kernels.engine.file_job import plan_file
from ..kernels.engine.file_weights import FileWeights
from ..kernels.engine.quantization import Quantization
from ..kernels.errors import StochasticFP8Error, file_error
from ..kernels.files.reader import Source, open_source
from ..kernels.report.report import join_reports
from ..kernels.selection.presets import DIFFUSION, TEXT_ENCODER, Components, diffusers_model
from ..kernels.selection.reasons import Reason
from . import models
from .demo import MODELS
from .files import OUTPUT_FOLDERS, find_source

PARTS = {"file": "the whole file", "model": "its diffusion model", "clip": "its text encoders"}

DEMO = "demo/tiny_sd3_landscapes.safetensors"
"""The model that ships with the pack, which no loader lists."""

NAMES = 200
"""The most rows of names that a plan lists under one reason."""


class NoSuchFile(StochasticFP8Error, ValueError):
    """A name that ComfyUI's loaders do not list."""


def make_plan(file: str, part: str, recipe: Recipe, requantize: bool = False) -> dict:
    """What becomes of the tensors of a file, as JSON.

    file: `kind/name` as the file node lists it. part: one of PARTS.
    Raises NoSuchFile, and ValueError (one line) for what cannot be quantized so.
    """
    path = _model_path(file)
    if part == "file":
        return describe(plan_file(path, recipe, requantize=requantize))
    models.check_runs(recipe.format)
    with open_source(path) as source:
        reports = [Quantization(weights, recipe).report() for weights in _networks(source, part)]
    return describe(join_reports(reports, path.name))


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
        "notes": list(report.notes),
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
    if file == DEMO:
        return MODELS / "tiny_sd3_landscapes.safetensors"
    kind, _, name = file.partition("/")
    if not name.endswith(".safetensors"):
        raise NoSuchFile(f"{file}: a plan needs a .safetensors file, the only kind that is read")
    if kind not in OUTPUT_FOLDERS or name not in folder_paths.get_filename_list(kind):
        raise NoSuchFile(f"{file}: ComfyUI lists no such file among its models")
    try:
        return find_source(file)[1]
    except FileNotFoundError:
        raise NoSuchFile(f"{file}: is missing, or is a link that leads nowhere") from None


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
    for component in encoders if components.all_in_one else [components.main]:
        yield FileWeights(source, component=component, kind=TEXT_ENCODER, requantize=True)
