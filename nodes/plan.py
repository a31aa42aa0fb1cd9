"""What a node would quantize, from the header of its model's file alone: the plan that its panel shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ..kernels import KeptTensor, LayerReport, Recipe, Report
from ..kernels.engine.file_job import plan_file
from ..kernels.errors import file_error
from ..kernels.files.header import TensorInfo
from ..kernels.files.reader import Source, open_source
from ..kernels.selection.presets import Components, diffusers_model
from ..kernels.selection.reasons import UNTOUCHED_NETWORK, Reason
from ..kernels.selection.selection import select_layers
from ..kernels.state_dict.layouts import read_markings
from . import in_graph, models
from .demo import MODELS
from .files import OUTPUT_FOLDERS, find_source
from .options import keywords

PARTS = {"file": "the whole file", "model": "its diffusion model", "clip": "its text encoders"}

DEMO = "demo/tiny_sd3_landscapes.safetensors"
"""The model that ships with the pack, which no loader lists."""

NAMES = 200
"""The most rows of names that a plan lists under one reason."""

Tensors = dict[str, TensorInfo]


class NoSuchFile(ValueError):
    """A name that ComfyUI's loaders do not list."""


class OutsideModels(ValueError):
    """A listed name that is a link to somewhere else."""


def make_plan(file: str, part: str, recipe: Recipe, requantize: bool = False) -> dict:
    """What becomes of the tensors of a file, as JSON.

    file: `kind/name` as the file node lists it. part: one of PARTS.
    Raises NoSuchFile, OutsideModels, and ValueError (one line) for what cannot be quantized so.
    """
    path = _model_path(file)
    if part == "file":
        return describe(plan_file(path, requantize=requantize, **keywords(recipe)))
    models.check_runs(recipe.format)
    with open_source(path) as source:
        reports = [_plan_network(tensors, part, recipe, source.name) for tensors in _networks(source, part)]
    return describe(in_graph.join_reports(reports, path.name))


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
    rows = [{"name": keys[0] if len(keys) == 1 else name, "count": len(keys)} for name, keys in names.items()]
    rows.sort(key=lambda row: -row["count"])
    return {
        "count": sum(row["count"] for row in rows),
        "bytes": nbytes,
        "names": rows[:NAMES],
        "more": len(rows[NAMES:]),
    }


def _over_blocks(key: str) -> str:
    """The name with its numbers as `*`, so that the same layer of all blocks is one row."""
    return ".".join("*" if part.isdigit() else part for part in key.split("."))


def _model_path(file: str) -> Path:
    if file == DEMO:
        return MODELS / Path(DEMO).name
    kind, _, name = file.partition("/")
    if not name.endswith(".safetensors"):
        raise NoSuchFile(f"{file}: a plan needs a .safetensors file, the only kind that is read")
    if kind not in OUTPUT_FOLDERS or name not in folder_paths.get_filename_list(kind):
        raise NoSuchFile(f"{file}: ComfyUI lists no such file among its models")
    path = find_source(file)[1]
    folders = [Path(folder).resolve() for kind in OUTPUT_FOLDERS for folder in folder_paths.get_folder_paths(kind)]
    if not any(path.resolve().is_relative_to(folder) for folder in folders):
        raise OutsideModels(f"{file}: leads out of ComfyUI's model folders; add its folder to extra_model_paths.yaml")
    return path


def _networks(source: Source, part: str) -> Iterator[Tensors]:
    """The tensors of each network that ComfyUI would make of this part of the file, under their bare names."""
    model = diffusers_model(source.tensors)
    if model:
        text = f"holds {model} in the diffusers layout, of which ComfyUI renames the layers: only a run can tell"
        raise file_error(source.path, text)
    components = Components(source.tensors)
    text_encoders = tuple(component for component in components.others if component.family != "vae")
    wanted = text_encoders if part == "clip" and components.all_in_one else (components.main,)
    markings = read_markings(source).tensors
    for component in wanted:
        yield {
            name.removeprefix(component.prefix): info
            for name, info in source.tensors.items()
            if components.of(name) is component and name not in markings
        }


def _plan_network(tensors: Tensors, part: str, recipe: Recipe, source: str) -> Report:
    selection = select_layers(tensors, layers=recipe.layers, keep=recipe.keep, only=recipe.only)
    reason = in_graph.untouchable(selection) if part == "clip" else ""
    kept = [(name, Reason(UNTOUCHED_NETWORK, detail=reason)) for name in tensors] if reason else selection.kept
    layers = () if reason else selection.quantize
    return Report(
        source,
        selection.family,
        recipe,
        tuple(_layer(name, tensors[name]) for name in layers),
        tuple(
            KeptTensor(name, tensors[name].shape, tensors[name].dtype, tensors[name].nbytes, why) for name, why in kept
        ),
        selection.pattern_hits,
        selection.notes,
    )


def _layer(name: str, info: TensorInfo) -> LayerReport:
    return LayerReport(name, info.shape, info.dtype, info.nbytes, amax=0.0, scale=0.0)
