"""Everything that a file says about scaled layers, as it says it, right or wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import limit_error
from ..files.bounded_json import MAX_VALUES, TooLargeError, count_values, parse_json
from ..files.header import TensorInfo
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
TOO_LARGE = "is too large for an inline entry"
"""The fault of an entry that was not read: other programs may read it."""
MAX_ALL_INLINE = 16 << 20
"""Bytes of all inline entries together."""

_SCALE_WORD = re.compile(r"scal|amax|absmax|dequant|(?:^|_)(?:max|s)(?:_|$)")
"""In the part of a lower-case name that follows the layer: what programs call a scale."""
_SEPARATOR = re.compile(r"[._]")
_LONGEST_ENDING, _MOST_SEPARATORS = 64, 8
"""Characters and separators at the end of a name that may follow the name of the weight. Hostile files have more."""


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
    tensors: dict[str, str | None] = field(default_factory=dict)
    """Name of each tensor above -> its layer; None for a legacy marker."""

    def entry(self, layer: str, prefix: str = "") -> dict[str, object]:
        """What is declared for a layer; its name may be given without the prefix. The header overrides inline."""
        for entries, name in ((self.header, layer), (self.header, layer.removeprefix(prefix)), (self.inline, layer)):
            if name in entries:
                entry = entries[name]
                return entry if isinstance(entry, dict) else {"format": entry}
        if prefix in self.legacy:
            return {FULL_PRECISION: self.legacy[prefix].elements == 2}
        return {}

    def prefix_of(self, name: str, prefix: str) -> str:
        """The prefix of the network of a tensor. prefix: what its name alone tells; "" is also said of networks under a
        prefix that is not known. The prefix is then that of the nearest marker above the tensor, if there is one."""
        above = name
        while above and not prefix and self.legacy:
            above = above.rpartition(".")[0]
            prefix = f"{above}." if f"{above}." in self.legacy else ""
        return prefix

    def foreign_markers(self, prefixes: Iterable[str]) -> list[str]:
        """Legacy markers under none of these prefixes, those of the networks of a file: they stay as they are, because
        nobody knows what they mark."""
        known = {"", *prefixes}
        return [prefix + LEGACY_MARKER for prefix in self.legacy if prefix not in known]

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
        layer: str | None
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
            layer = None
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
            raise limit_error(
                source.path, f"has a {HEADER_ENTRY} beyond the limits: {error}", "start from the 16-bit file"
            ) from error
    return markings


def parameters(tensors: Mapping[str, StoredTensor], markings: Markings) -> dict[str, StoredTensor]:
    """The tensors of a file without legacy markers and without the scales and markers of FP8 weights.

    What looks like a marking of another weight stays: it may be a scale of int8 or NVFP4 codes. Markers that belong to
    no network are `Markings.foreign_markers`.
    """

    def is_marking(name: str) -> bool:
        if name not in markings.tensors:
            return False
        layer = markings.tensors[name]
        weight = tensors.get(f"{layer}.weight")
        return layer is None or weight is not None and weight.dtype in FORMATS

    return {name: info for name, info in tensors.items() if not is_marking(name)}


def scaled_layers(
    tensors: Mapping[str, StoredTensor], markings: Markings, prefix_of: Callable[[str], str]
) -> dict[str, ScaledLayer]:
    """weight name -> layer, for every FP8 weight that has a scale. prefix_of(name): what Markings.prefix_of takes."""
    layers = {}
    for name in markings.weight_scales:
        weight = f"{name}.weight"
        if weight in tensors and tensors[weight].dtype in FORMATS:
            prefix = markings.prefix_of(weight, prefix_of(weight))
            full_precision = markings.entry(name, prefix).get(FULL_PRECISION, False) is True
            layers[weight] = ScaledLayer(name, tensors[weight].dtype, full_precision, prefix)
    return layers


def unknown_scales(tensors: Mapping[str, TensorInfo], markings: Markings) -> dict[str, str]:
    """FP8 tensor -> a tensor beside it that looks like its scale, and is not a scale or marker that is read here.

    Everything under the weight's own name (`X.weight.…`, `X.weight_…`) looks like one. Beside the weight (`X.…`, `X_…`,
    `scales.X`) a word for a scale must occur. Upper and lower case are the same.
    """
    fp8 = {name for name, info in tensors.items() if info.dtype in FORMATS and name not in markings.tensors}
    weights = {name.lower(): name for name in fp8}
    layers = {name.lower().removesuffix(".weight"): name for name in fp8}
    unknown: dict[str, str] = {}
    for name in tensors if fp8 else ():
        if name in markings.tensors:
            layer = markings.tensors[name]
            if layer is None or f"{layer}.weight" in tensors:
                continue
        weight = _scaled_by(name.lower(), weights, layers)
        if weight is not None:
            unknown.setdefault(weight, name)
    return unknown


def _scaled_by(name: str, weights: Mapping[str, str], layers: Mapping[str, str]) -> str | None:
    """The FP8 tensor that a tensor of this lower-case name seems to belong to as its scale."""
    root, _, rest = name.partition(".")
    if _SCALE_WORD.search(root) and (rest in weights or rest in layers):
        return weights.get(rest) or layers[rest]
    separators = list(_SEPARATOR.finditer(name, max(0, len(name) - _LONGEST_ENDING)))
    for separator in separators[-_MOST_SEPARATORS:]:
        layer, ending = name[: separator.start()], name[separator.end() :]
        if layer.endswith(".weight") and layer in weights:
            return weights[layer]
        if layer in layers and "." not in ending and _SCALE_WORD.search(ending):
            return layers[layer]
    return None


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
        raise limit_error(
            source.path,
            f"has {size:,} bytes of inline entries; at most {MAX_ALL_INLINE:,} are read",
            "start from the 16-bit file",
        )
    entries: dict[str, object] = {}
    last, entry = b"", None  # most layers have the same entry: one object for all of them
    values = 0
    for layer, name in names.items():
        entries[layer] = {}
        if source.tensors[name].nbytes > MAX_INLINE:
            faults[name] = TOO_LARGE
            continue
        text = source.read_bytes(name)
        values += count_values(text)
        if values > MAX_VALUES:
            raise limit_error(
                source.path,
                f"has inline entries of more than {MAX_VALUES:,} values together",
                "start from the 16-bit file",
            )
        if not entry or text != last:
            last, entry = text, _parse_json(text, name, faults)
        entries[layer] = entry
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
