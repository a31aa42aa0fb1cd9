"""Model files in the diffusers layout, under the names that ComfyUI's loader gives their tensors.

For such a file, the loader renames tensors, joins some (q, k and v to qkv) and swaps the halves of others. Here the
running ComfyUI's own conversion does that to the numbers of the rows instead of their values. The result says which
rows each tensor consists of, and the file is read in that order.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.utils
import torch
from comfyui_version import __version__ as COMFYUI_VERSION

from ..kernels.display import count
from ..kernels.files.header import TensorInfo
from ..kernels.files.reader import Source, open_source
from ..kernels.files.renamed import Rows, renamed
from ..kernels.selection.foreign import diffusers_model
from .networks import plain_settings
from .published_names import detect_config, diffusion_names

log = logging.getLogger("stochastic_fp8")

MOST_ROWS = 1 << 25
"""Rows of all tensors of a model. Flux has 6 million."""

Run = tuple[int, int]
"""The number of the first row of several consecutive ones, and the number after the last. All rows of a file are
numbered through."""


@contextmanager
def open_native(path: Path) -> Iterator[Source]:
    """open_source, under ComfyUI's names."""
    with open_source(path) as source:
        yield with_comfyui_names(source)


def with_comfyui_names(source: Source) -> Source:
    """A source in the diffusers layout as ComfyUI's loader converts it; nothing is read.

    Returns any other source as it is, and one that the running ComfyUI cannot convert completely.
    """
    layout = diffusers_model(source.tensors)
    if layout is None:
        return source
    try:
        return _converted(source, layout) or source
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:  # ComfyUI expects whole models
        log.debug("%s: ComfyUI cannot convert its names: %r", source.name, error)
        return source


def _converted(source: Source, layout: str) -> Source | None:
    counts = [info.shape[0] if info.shape else 1 for info in source.tensors.values()]
    if not all(counts) or sum(counts) > MOST_ROWS:
        return None
    moved, unet = _convert(_numbered(source.tensors, counts), source.tensors)
    runs = {name: _runs(column) for name, column in moved.items()}
    if not _each_once([run for of_tensor in runs.values() for run in of_tensor], sum(counts)):
        return None
    starts, stored = list(accumulate(counts, initial=0)), list(source.tensors)
    rows = {name: list(_rows(of_tensor, starts, stored)) for name, of_tensor in runs.items()}
    tensors = _without_values(renamed(source, rows).tensors)
    config = detect_config(tensors)
    joined = [name for name, parts in rows.items() if len({part.name for part in parts}) > 1]
    if config is None or unet is not None and not _agree(config, unet) or not _fills(tensors, joined):
        return None
    norms = [name for name, tensor in tensors.items() if tensor.ndim == 1 and name.endswith(".weight")]
    names = {published: rows[name] for name, published in diffusion_names(config, tensors, norms).items()}
    return renamed(source, dict(sorted(names.items())), [_note(layout, names)])


def _note(layout: str, names: Mapping[str, Sequence[Rows]]) -> str:
    stored = {part.name for rows in names.values() for part in rows}
    joined = sum(len({part.name for part in rows}) > 1 for rows in names.values())
    return (
        f"{layout} in the diffusers layout: {count(len(stored), 'tensor')} converted to {len(names):,} under ComfyUI's "
        f"names, as ComfyUI {COMFYUI_VERSION} does on loading; {joined:,} joined from several"
    )


def _numbered(infos: Mapping[str, TensorInfo], counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """Columns of the numbers of all rows, in place of the tensors: (rows, 1, ...) with as many dimensions. counts: the
    rows of each tensor."""
    numbers = torch.arange(sum(counts), dtype=torch.int32, device="cpu").split(list(counts))
    return {
        name: column.reshape(*info.shape[:1], *(1 for _ in info.shape[1:]))
        for (name, info), column in zip(infos.items(), numbers, strict=True)
    }


def _convert(columns: dict[str, torch.Tensor], infos: Mapping[str, TensorInfo]) -> tuple[dict[str, torch.Tensor], Any]:
    """The columns as ComfyUI's loader moves them; for a U-Net, with its configuration.

    Empty for a model that it does not convert, and where it leaves out a tensor.
    """
    left = dict(columns)  # the loader removes what it has converted
    moved = comfy.model_detection.convert_diffusers_mmdit(left, "")
    if moved is not None:
        return ({} if left else moved), None
    unet = comfy.model_detection.model_config_from_diffusers_unet(_without_values(infos))
    keys = comfy.utils.unet_to_diffusers(unet.unet_config) if unet else {}
    if not columns.keys() <= keys.keys():
        return {}, None
    return {keys[name]: column for name, column in columns.items()}, unet


def _runs(column: torch.Tensor) -> list[Run]:
    """The numbers of a column as runs, in order. Raises ValueError unless only the first dimension is longer than 1."""
    if column.numel() != (column.shape[0] if column.ndim else 1):
        raise ValueError(f"a column has the shape {tuple(column.shape)}")
    numbers = column.reshape(-1)
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    firsts = [0, *breaks.tolist()]
    lengths = [end - first for first, end in zip(firsts, [*firsts[1:], len(numbers)], strict=True)]
    return [(start, start + length) for start, length in zip(numbers[firsts].tolist(), lengths, strict=True)]


def _each_once(runs: list[Run], total: int) -> bool:
    """Whether the runs hold each row of a file exactly once. ComfyUI leaves places without a source unwritten."""
    end = 0
    for start, stop in sorted(runs):
        if start != end:
            return False
        end = stop
    return end == total


def _fills(tensors: Mapping[str, torch.Tensor], joined: Collection[str]) -> bool:
    """Whether ComfyUI's model of these tensors finds all its parameters among them, and no joined one is shorter: the
    last part of it can be missing.

    The loader leaves the others as they were made, without an error. The model is made on `meta`, without memory, and
    without the tensors: SD 2.x reads values to tell what it predicts.
    """
    config = detect_config(tensors)
    config.custom_operations = _LayersWithParameters
    given = config.process_unet_state_dict(dict(tensors))
    network = config.get_model({}, "", device=torch.device("meta")).diffusion_model
    parameters = dict(network.named_parameters())
    full = all(given[name].shape[0] == parameters[name].shape[0] for name in joined if name in parameters)
    return full and parameters.keys() <= given.keys()


class _LayersWithParameters(comfy.ops.manual_cast):
    """With dynamic VRAM, ComfyUI makes Linear layers without parameters, unless a subclass loads by itself, as here."""

    class Linear(comfy.ops.manual_cast.Linear):
        _load_from_state_dict = torch.nn.Module._load_from_state_dict

    class Embedding(comfy.ops.manual_cast.Embedding):
        _load_from_state_dict = torch.nn.Module._load_from_state_dict


def _rows(runs: list[Run], starts: list[int], names: list[str]) -> Iterator[Rows]:
    """The runs, cut where one tensor ends. starts: the number of the first row of each tensor, and of the end."""
    for start, stop in runs:
        while start < stop:
            index = bisect_right(starts, start) - 1
            end = min(stop, starts[index + 1])
            yield Rows(names[index], start - starts[index], end - starts[index])
            start = end


def _agree(one: Any, other: Any) -> bool:
    """Whether two configurations are of the same class, and equal in all settings that both have."""
    settings, others = plain_settings(one), plain_settings(other)
    return type(one) is type(other) and all(settings[name] == others[name] for name in settings.keys() & others.keys())


def _without_values(infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(info.shape, dtype=getattr(torch, info.dtype, torch.uint8), device="meta")
        for name, info in infos.items()
    }
