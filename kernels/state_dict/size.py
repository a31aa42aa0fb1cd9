"""The size of a file before it is written: bytes counted from above, tensor by tensor, so that counts can be added."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..files.header import TensorInfo
from .layouts import LAYOUTS, Layout
from .scaled_state_dict import PendingWeight, ScaledStateDict, ScaledWeight

METADATA_BYTES = 1_000_000
"""Set aside for the recipe, the workflow, and whatever else is added to the metadata when the file is written."""
RECIPE_BYTES = METADATA_BYTES // 2
"""The part of it that stays free for the recipe."""

HEADER_ENTRY_BYTES = 104
"""The most that a tensor's entry in the header has, without its name and its dimensions."""
DIMENSION_BYTES = 14


def tensor_bytes(name: str, info: TensorInfo) -> int:
    """A tensor with its entry in the header."""
    return info.nbytes + _json_bytes(name) + HEADER_ENTRY_BYTES + DIMENSION_BYTES * len(info.shape)


def scaled_bytes(weight: PendingWeight | ScaledWeight) -> int:
    """A scaled weight with its scales and markings, in the layout that is larger."""
    return tensor_bytes(weight.layer.weight, weight.info) + max(
        _marking_bytes(weight, each) for each in LAYOUTS.values()
    )


def state_dict_bytes(state: ScaledStateDict) -> int:
    """A whole file, with METADATA_BYTES."""
    tensors = sum(tensor_bytes(name, entry.info) for name, entry in state.tensors.items())
    weights = sum(map(scaled_bytes, state.weights.values())) + sum(map(scaled_bytes, state.pending.values()))
    return tensors + weights + metadata_bytes(state.metadata) + METADATA_BYTES


def metadata_bytes(metadata: Mapping[str, str]) -> int:
    """Entries of the metadata."""
    return sum(_json_bytes(name) + _json_bytes(text) + 2 for name, text in metadata.items())


def bytes_beyond_reserve(metadata: Mapping[str, str]) -> int:
    """What these entries take beyond METADATA_BYTES, of which RECIPE_BYTES stay free."""
    return max(0, metadata_bytes(metadata) - (METADATA_BYTES - RECIPE_BYTES))


def _marking_bytes(weight: PendingWeight | ScaledWeight, layout: Layout) -> int:
    layer, scale = weight.layer, TensorInfo("float32", ())
    small = {name: TensorInfo.of(tensor) for name, tensor in layout.markers([layer]).items()}
    small[layer.name + layout.weight_scale] = scale
    if weight.input_scale is not None:
        small[layer.name + layout.input_scale] = scale
    tensors = sum(tensor_bytes(name, info) for name, info in small.items())
    return tensors + metadata_bytes(layout.metadata([layer]))


def _json_bytes(text: str) -> int:
    """The bytes of a text in JSON, with its quotes."""
    return len(json.dumps(text, ensure_ascii=False).encode())
