"""Everything that a file says about scaled layers, as it says it, right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import file_error
from ..files.bounded_json import MAX_VALUES, TooLargeError, count_values, parse_json
from ..files.reader import Source, StoredTensor
from ..numerics.formats import FORMATS
from .layouts import (
    FULL_PRECISION,
    HEADER_ENTRY,
    INLINE_SUFFIX,
    INPUT_SCALES,
    LEGACY_MARKER,
    WEIGHT_SCALES,
    ScaledLayer,
)

MAX_INLINE = 1 << 16
"""Bytes. An inline entry is one small JSON object."""
MAX_ALL_INLINE = 16 << 20
"""Bytes of all inline entries together."""


@dataclass
class Markings:
    """Everything that a file says about scaling, as it says it, right or wrong."""

    weight_scales: dict[str, str] = field(default_factory=dict)
    """layer -> the name of its scale."""
    doubled: dict[str, tuple[str, str]] = field(default_factory=dict)
    """layer -> two names, for a layer with more than one scale."""
    input_scales: dict[str, str] = field(default_factory=dict)
    header: dict[str, object] = field(default_factory=dict)
    """layer -> its entry, which should be a dict with a "format"."""
    inline: dict[str, object] = field(default_factory=dict)
    legacy: dict[str, StoredTensor] = field(default_factory=dict)
    """prefix -> marker tensor."""
    faults: dict[str, str] = field(default_factory=dict)
    """Where something cannot be read at all -> why."""
    tensors: dict[str, str] = field(default_factory=dict)
    """Name of each tensor above -> its layer; "" for a legacy marker."""

    def entry(self, layer: str, prefix: str = "") -> dict[str, object]:
        """What is declared for a layer; its name may be given without the prefix. The header overrides inline."""
        for entries, name in ((self.header, layer), (self.header, layer.removeprefix(prefix)), (self.inline, layer)):
            if name in entries:
                entry = entries[name]
                return entry if isinstance(entry, dict) else {"format": entry}
        if prefix in self.legacy:
            return {FULL_PRECISION: self.legacy[prefix].elements == 2}
        return {}

    def declares(self, layer: str, prefix: str) -> bool:
        """Whether something says that a layer is scaled FP8, apart from its scale."""
        bare = layer.removeprefix(prefix)
        return layer in self.header or bare in self.header or layer in self.inline or prefix in self.legacy


def read_markings(source: Source) -> Markings:
    """Gather what a file says about scaling. Reads the header and the inline entries.

    Raises CheckpointError for entries beyond the limits.
    """
    markings = Markings()
    inline = {}
    for name, tensor in source.tensors.items():
        layer, dot, ending = name.rpartition(".")
        if dot + ending in WEIGHT_SCALES:
            if layer in markings.weight_scales:
                markings.doubled[layer] = (markings.weight_scales[layer], name)
            else:
                markings.weight_scales[layer] = name
        elif dot + ending in INPUT_SCALES:
            markings.input_scales[layer] = name
        elif dot + ending == INLINE_SUFFIX:
            inline[layer] = name
        elif ending == LEGACY_MARKER:
            markings.legacy[layer + dot] = tensor
            layer = ""
        else:
            continue
        markings.tensors[name] = layer
    markings.inline = _read_inline(source, inline, markings.faults)
    for metadata in source.metadata_by_file:  # each file of a set describes its own layers
        if HEADER_ENTRY not in metadata:
            continue
        try:
            markings.header |= _read_header_entry(metadata[HEADER_ENTRY], markings.faults)
        except TooLargeError as error:
            raise file_error(
                source.path, f"has a {HEADER_ENTRY} beyond the limits: {error}; start from the 16-bit file"
            ) from error
    return markings


def parameters(tensors: Mapping[str, StoredTensor], markings: Markings) -> dict[str, StoredTensor]:
    """The tensors of a file without legacy markers and without the scales and markers of FP8 weights.

    What looks like a marking of another weight stays: it may be a scale of int8 or NVFP4 codes.
    """

    def is_marking(name: str) -> bool:
        layer = markings.tensors.get(name)
        weight = tensors.get(f"{layer}.weight")
        return layer == "" or weight is not None and weight.dtype in FORMATS

    return {name: info for name, info in tensors.items() if not is_marking(name)}


def scaled_layers(
    tensors: Mapping[str, StoredTensor], markings: Markings, prefix_of: Callable[[str], str]
) -> dict[str, ScaledLayer]:
    """weight name -> layer, for every FP8 weight that has a scale. prefix_of(name): the prefix of its network."""
    layers = {}
    for name in markings.weight_scales:
        weight = f"{name}.weight"
        if weight in tensors and tensors[weight].dtype in FORMATS:
            prefix = prefix_of(weight)
            full_precision = markings.entry(name, prefix).get(FULL_PRECISION, False) is True
            layers[weight] = ScaledLayer(name, tensors[weight].dtype, full_precision, prefix)
    return layers


def read_scale(source: Source, name: str) -> torch.Tensor:
    """A scale of any float dtype and any shape of one element, as fp32 0-dim.

    Raises ValueError: more than one element, or not finite and above zero.
    """
    scale = read_scales(source, name)
    if scale.numel() != 1:
        raise ValueError(f"scale {name!r} has shape {tuple(scale.shape)}; scaled FP8 layers have one number")
    return scale.reshape(())


def read_scales(source: Source, name: str) -> torch.Tensor:
    """A scale of any float dtype and shape, as fp32.

    Raises ValueError: not floating-point, or not finite and above zero (of several numbers some may be zero).
    """
    info = source.tensors[name]
    if not info.dtype.startswith(("float", "bfloat")):
        raise ValueError(f"scale {name!r} is {info.dtype}, which is not a floating-point dtype")
    scale = source.read(name).float()
    wrong = scale[~(scale.isfinite() & (scale > 0))]
    if len(wrong):
        raise ValueError(
            f"scale {name!r} is {wrong[0].item()}" + (f" in {len(wrong)} places" if len(wrong) > 1 else "")
        )
    return scale


def _read_inline(source: Source, names: Mapping[str, str], faults: dict[str, str]) -> dict[str, object]:
    """layer -> its entry. names: layer -> the tensor that holds it."""
    size = sum(source.tensors[name].nbytes for name in names.values())
    if size > MAX_ALL_INLINE:
        raise file_error(
            source.path,
            f"has {size:,} bytes of inline entries; at most {MAX_ALL_INLINE:,} are read: start from the 16-bit file",
        )
    entries: dict[str, object] = {}
    values = 0
    for layer, name in names.items():
        entries[layer] = {}
        if source.tensors[name].nbytes > MAX_INLINE:
            faults[name] = "is too large for an inline entry"
            continue
        text = source.read_bytes(name)
        values += count_values(text)
        if values > MAX_VALUES:
            raise file_error(
                source.path,
                f"has inline entries of more than {MAX_VALUES:,} values together; start from the 16-bit file",
            )
        entries[layer] = _parse_json(text, name, faults)
    return entries


def _read_header_entry(text: str, faults: dict[str, str]) -> dict[str, object]:
    entry = _parse_json(text, HEADER_ENTRY, faults)
    layers = entry.get("layers") if isinstance(entry, dict) else None
    if not isinstance(layers, dict):
        faults.setdefault(HEADER_ENTRY, "lists no layers")
        return {}
    return layers


def _parse_json(text: str | bytes, where: str, faults: dict[str, str]) -> object:
    try:
        return parse_json(text)
    except TooLargeError:
        raise
    except (ValueError, RecursionError) as error:
        faults[where] = f"is not JSON: {error}"
        return {}
