"""The weights of a safetensors file, whatever FP8 or 16-bit form they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial

import torch

from ..errors import CheckpointError, file_error
from ..files.header import TensorInfo
from ..files.reader import Source
from ..files.staging import alternating_buffers
from ..numerics.formats import FORMATS
from ..numerics.nonfinite import FLOATS, count_nonfinite
from ..numerics.transfers import Send, to_device
from ..recipe import Recipe
from ..selection.blocks import incomplete_blocks
from ..selection.components import Component, Components
from ..selection.foreign import diffusers_model, foreign_kind, other_quantizer
from ..state_dict.layouts import HEADER_ENTRY, SOURCE_ONLY_SCALE
from ..state_dict.markings import parameters, read_markings, read_scale, read_scales, scaled_layers, unknown_scales
from ..state_dict.scaled_state_dict import Entry, FileEntry, ScaledWeight, TensorEntry
from ..state_dict.source_scales import check_shapes, dequantize_blocks
from .notes import finely_scaled_note
from .weights import Read

INLINE_BYTES = 1 << 20
"""Smaller tensors are read by the calling thread: handing them to another one would cost more."""


class FileWeights:
    """The weights of a safetensors file, or of one network in it under its bare names."""

    linear_names = None
    patched: Collection[str] = ()

    def __init__(
        self, source: Source, *, component: Component | None = None, kind: str | None = None, requantize: bool = False
    ):
        """component, kind: the network, and what it is; None for the whole file. requantize: allow weights that are
        scaled FP8 in the recipe's format already."""
        self._source, self._requantize = source, requantize
        self._nonfinite: dict[str, tuple[int, int]] = {}
        self._markings = read_markings(source)
        self.name, self.kind = source.name, kind
        self.metadata = {name: text for name, text in source.metadata.items() if name != HEADER_ENTRY}
        stored = parameters(source.tensors, self._markings)
        self._components = Components(stored)
        prefix = component.prefix if component else ""
        self._layers = scaled_layers(source.tensors, self._markings, self._components.prefix_of)
        prefixes = [*(layer.prefix for layer in self._layers.values()), *(each.prefix for each in self._components.all)]
        stored |= {name: source.tensors[name] for name in self._markings.foreign_markers(prefixes)}
        mine = [name for name in stored if component is None or self._components.of(name) == component]
        self._names = {name.removeprefix(prefix): name for name in mine}
        self.tensors = {name: self._info(stored_name) for name, stored_name in self._names.items()}

    @property
    def scaled(self) -> dict[str, ScaledWeight]:
        return {name: self._scaled(name) for name, stored in self._names.items() if self._has_one_scale(stored)}

    @property
    def notes(self) -> list[str]:
        blocks = sum(stored in self._layers and not self._has_one_scale(stored) for stored in self._names.values())
        return [*self._source.notes, *([finely_scaled_note(blocks)] if blocks else [])]

    @property
    def nonfinite(self) -> dict[str, tuple[int, int]]:
        return {name: self._nonfinite[stored] for name, stored in self._names.items() if stored in self._nonfinite}

    def check(self, names: Collection[str], recipe: Recipe) -> None:
        """Raises CheckpointError for a file that cannot be quantized as asked."""
        other = other_quantizer(self._source.tensors)
        if other:
            raise self.error(f"is already quantized by {other[0]}, e.g. {other[1]!r}; start from the 16-bit file")
        foreign = foreign_kind(self._source.tensors, self._source.name)
        if foreign:
            raise self.error(f"is {foreign[0]}; {foreign[1]}")
        model = diffusers_model(self._source.tensors)
        if model:
            raise self.error(
                f"holds {model} in the diffusers layout, for which ComfyUI drops the scales; quantize the ComfyUI "
                "version of this model, or load it in ComfyUI and save it as a checkpoint first"
            )
        for where, fault in self._markings.faults.items():
            raise self.error(f"{where} {fault}; start from the 16-bit file")
        for layer, entry in (self._markings.inline | self._markings.header).items():
            format = entry.get("format") if isinstance(entry, dict) else entry
            if not isinstance(format, str) or format not in FORMATS:
                if format is None:
                    raise self.error(f"the entry of layer {layer!r} has no format; start from the 16-bit file")
                raise self.error(f"layer {layer!r} is already quantized as {format}; start from the 16-bit file")
        for block, fault in incomplete_blocks(self._components, self._names.values()):
            raise self.error(f"{block} {fault}; download the model again")
        for stored in self._names.values():
            self._check_scale(stored)
        same = [name for name in names if self._stored_dtype(name) == recipe.format and self._is_tensor_wise(name)]
        if same and not self._requantize:
            raise self.error(
                f"{len(same)} layers are already {recipe.format}, e.g. {same[0]!r}; start from the 16-bit file, "
                f"{self._way_to_keep(same, names)}or ask to requantize, which loses quality a second time"
            )

    def entry(self, name: str) -> Entry:
        stored = self._names[name]
        if stored in self._layers and not self._has_one_scale(stored):
            return TensorEntry(self.tensors[name], lambda: self._in_high_precision(stored))
        return FileEntry(self._source, stored, self._look)

    def input_scale(self, name: str) -> torch.Tensor | None:
        stored = self._markings.input_scales.get(self._names[name].removesuffix(".weight"))
        return self._read(read_scale, stored) if stored else None

    @contextmanager
    def reading(self, names: Sequence[str], device: torch.device) -> Iterator[Iterator[Read]]:
        with ThreadPoolExecutor(1, "read") as reader:
            yield self._read_ahead(reader, names)

    def error(self, text: str) -> CheckpointError:
        return file_error(self._source.path, text)

    def _read_ahead(self, reader: ThreadPoolExecutor, names: Sequence[str]) -> Iterator[Read]:
        """While one weight is worked on, the next is read."""
        buffers = alternating_buffers(
            max((self._source.tensors[self._names[name]].nbytes for name in names), default=0)
        )
        current: Callable[[], torch.Tensor] | None = None
        for name in names:
            read = partial(self._read_weight, name, next(buffers))
            following = read if self.tensors[name].nbytes < INLINE_BYTES else reader.submit(read).result
            if current:
                yield partial(_with_send, current)
            current = following
        if current:
            yield partial(_with_send, current)

    def _read_weight(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """A weight to quantize; FP8 is widened to a dtype that holds its values."""
        stored = self._names[name]
        if stored in self._layers:
            return self._dequantized(stored, buffer)
        x = self._source.read(stored, buffer)
        return x.to(torch.bfloat16) if self.tensors[name].dtype in FORMATS else x

    def _dequantized(self, stored: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        codes, scale = self._source.read(stored, buffer), self._read(read_scales, self._scale_name(stored))
        try:
            return dequantize_blocks(codes, scale)
        except ValueError as error:
            raise self._scale_error(stored, error) from error

    def _in_high_precision(self, stored: str) -> torch.Tensor:
        """A kept weight with a scale per row or block."""
        x = self._dequantized(stored).to(torch.bfloat16)
        self._count(stored, x)
        return x

    def _look(self, stored: str, piece: memoryview) -> None:
        """Look for NaN in a tensor while it is copied: a second pass would read the whole file again."""
        dtype = self._source.tensors[stored].dtype
        if dtype in FLOATS:
            self._count(stored, torch.frombuffer(piece, dtype=getattr(torch, dtype)))

    def _count(self, stored: str, x: torch.Tensor) -> None:
        """Add the NaN and infinite values of a tensor, or of a piece of it."""
        nan, inf = count_nonfinite(x)
        if nan or inf:
            before = self._nonfinite.get(stored, (0, 0))
            self._nonfinite[stored] = before[0] + nan, before[1] + inf

    def _scaled(self, name: str) -> ScaledWeight:
        stored = self._names[name]
        info = self._source.tensors[stored]
        scale = self._read(read_scale, self._scale_name(stored))
        return ScaledWeight(
            self._layers[stored],
            info.shape,
            FileEntry(self._source, stored, self._look),
            scale,
            self.input_scale(name),
            info.nbytes,
        )

    def _info(self, stored: str) -> TensorInfo:
        """A weight with a scale per row or block that is kept is written in bf16."""
        info = self._source.tensors[stored]
        return (
            TensorInfo("bfloat16", info.shape) if stored in self._layers and not self._has_one_scale(stored) else info
        )

    def _stored_dtype(self, name: str) -> str:
        return self._source.tensors[self._names[name]].dtype

    def _is_tensor_wise(self, name: str) -> bool:
        """Whether an FP8 weight has one scale that ComfyUI reads, or none."""
        stored = self._names[name]
        if stored not in self._layers:
            return True
        return self._has_one_scale(stored) and not self._scale_name(stored).endswith(SOURCE_ONLY_SCALE)

    def _has_one_scale(self, stored: str) -> bool:
        return stored in self._layers and self._source.tensors[self._scale_name(stored)].elements == 1

    def _scale_name(self, stored: str) -> str:
        return self._markings.weight_scales[self._layers[stored].name]

    def _check_scale(self, stored: str) -> None:
        """Raises CheckpointError for an FP8 weight whose scale is missing, ambiguous or not understood."""
        info = self._source.tensors[stored]
        if info.dtype not in FORMATS:
            return
        layer = stored.removesuffix(".weight")
        if layer in self._markings.doubled:
            names = " and ".join(map(repr, self._markings.doubled[layer]))
            raise self.error(
                f"layer {layer!r} has two scales, {names}: delete the wrong one, or start from the 16-bit file"
            )
        unknown = self._unknown_scales.get(stored)
        if unknown:
            raise self.error(
                f"weight {stored!r} is FP8, and {unknown!r} beside it looks like a scale of an unknown kind; start "
                "from the 16-bit file"
            )
        if stored in self._layers:
            scale = self._read(read_scales, self._scale_name(stored))
            try:
                check_shapes(info.shape, scale.shape)
            except ValueError as error:
                raise self._scale_error(stored, error) from error
            return
        prefix = self._markings.prefix_of(stored, self._components.prefix_of(stored))
        if self._markings.declares(layer, prefix) and self._components.is_linear(stored, info):
            raise self.error(f"layer {layer!r} is marked as scaled FP8 but has no scale; start from the 16-bit file")

    def _way_to_keep(self, same: Collection[str], names: Collection[str]) -> str:
        """How to leave a network of an all-in-one checkpoint as it is, where another one can be quantized."""
        components = {self._components.of(self._names[name]) for name in same}
        others = {self._components.of(self._names[name]) for name in names} - components
        prefixes = [component.prefix for component in components if component and component.prefix]
        if not others or len(prefixes) != len(components):
            return ""
        patterns = " ".join(sorted(prefix.removesuffix(".").removesuffix(".transformer") for prefix in prefixes))
        return f"keep them as they are (--keep {patterns}), "

    @cached_property
    def _unknown_scales(self) -> dict[str, str]:
        return unknown_scales(self._source.tensors, self._markings)

    def _read(self, read: Callable[[Source, str], torch.Tensor], stored: str) -> torch.Tensor:
        try:
            return read(self._source, stored)
        except ValueError as error:
            raise self.error(f"{error}; start from the 16-bit file") from error

    def _scale_error(self, stored: str, error: ValueError) -> CheckpointError:
        return self.error(f"scale {self._scale_name(stored)!r} is not understood: {error}; start from the 16-bit file")


def _with_send(read: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Send]:
    return read(), to_device
