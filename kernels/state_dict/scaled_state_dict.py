"""A scaled FP8 state dict: the one form in which quantized weights are written, loaded, verified and repaired.

It holds tensors by published name. Some weights are FP8 codes with a scale; everything else is a tensor that is
copied or read when its turn comes. Weights that are not quantized yet are *pending*: their codes are made, one by one,
by the RoundingPass of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from ..files.header import TensorInfo
from ..files.reader import Source
from ..files.writer import Writer
from ..numerics.quantized_tensor import QuantizedTensor
from .layouts import INLINE_SUFFIX, INPUT_SCALES, WEIGHT_SCALES, Layout, ScaledLayer


class Entry(Protocol):
    """A tensor of a state dict, whose values are read when they are needed."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self) -> torch.Tensor:
        """The values, on whatever device they are."""

    def write(self, writer: Writer, name: str) -> None:
        """Write the tensor to a file under a name."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A tensor of a file, copied bit for bit."""

    source: Source
    key: str
    look: Callable[[str, memoryview], None] | None = None
    """look(key, piece): called with each piece of the tensor's bytes while it is copied."""

    @property
    def info(self) -> TensorInfo:
        return self.source.tensors[self.key]

    def read(self) -> torch.Tensor:
        return self.source.read(self.key)

    def write(self, writer: Writer, name: str) -> None:
        writer.copy(name, self.source, self.key, partial(self.look, self.key) if self.look else None)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that `get` returns, in memory or computed."""

    info: TensorInfo
    get: Callable[[], torch.Tensor] = field(repr=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorEntry:
        return cls(TensorInfo.of(tensor), lambda: tensor)

    def read(self) -> torch.Tensor:
        return self.get()

    def write(self, writer: Writer, name: str) -> None:
        writer.write(name, self.get().cpu())


@dataclass(frozen=True, slots=True)
class PendingWeight:
    """A weight that will be FP8 codes with a scale; the engine makes both when its turn comes."""

    layer: ScaledLayer
    shape: tuple[int, ...]
    input_scale: torch.Tensor | None = None
    """fp32, 0-dim: the scale of the layer's inputs where FP8 matmul casts them."""
    source_bytes: int = 0
    """Bytes to read for it, which progress counts."""

    @property
    def key(self) -> str:
        """The tensor key: the name without the prefix of its network."""
        return self.layer.weight.removeprefix(self.layer.prefix)

    @property
    def info(self) -> TensorInfo:
        """dtype and shape of the codes."""
        return TensorInfo(self.layer.format, self.shape)

    def coded(self, codes: Entry, scale: torch.Tensor) -> ScaledWeight:
        """The weight once its codes and scale are made."""
        return ScaledWeight(self.layer, self.shape, codes, scale, self.input_scale, self.source_bytes)


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A weight as FP8 codes with a scale."""

    layer: ScaledLayer
    shape: tuple[int, ...]
    codes: Entry
    """float8, of the weight's shape."""
    scale: torch.Tensor
    """fp32, 0-dim."""
    input_scale: torch.Tensor | None = None
    """As PendingWeight's."""
    source_bytes: int = 0
    """As PendingWeight's."""

    @property
    def info(self) -> TensorInfo:
        """dtype and shape of the codes."""
        return TensorInfo(self.layer.format, self.shape)

    def under(self, prefix: str) -> ScaledWeight:
        """The same weight in a checkpoint that puts `prefix` before the names of its network."""
        return replace(self, layer=replace(self.layer, name=prefix + self.layer.name, prefix=prefix))


Round = Callable[["torch.Tensor | None"], "QuantizedTensor | None"]
"""round(staging buffer) -> codes and scale of one pending weight, or None for one that cannot be quantized.

The codes lie in the staging buffer (uint8, 1-D, long enough; None: memory of their own), or on the GPU that computed
them.
"""

RoundingPass = Callable[[Sequence[str]], AbstractContextManager[Iterator[tuple[str, Round]]]]
"""Goes through pending weights in the given order. Advancing the iterator prefetches; Round does the work."""


@dataclass
class ScaledStateDict:
    """Tensors, scaled weights and pending weights by published name; a name is in one of them only."""

    tensors: dict[str, Entry] = field(default_factory=dict)
    weights: dict[str, ScaledWeight] = field(default_factory=dict)
    pending: dict[str, PendingWeight] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    rounding_pass: RoundingPass | None = None
    """Makes the codes of pending weights; None where there are none."""

    @property
    def layers(self) -> tuple[ScaledLayer, ...]:
        """Every layer that is scaled or will be."""
        return tuple(weight.layer for weight in self._all_weights())

    @property
    def source_bytes(self) -> int:
        """Bytes to read for all tensors."""
        tensors = sum(entry.info.nbytes for entry in self.tensors.values())
        return tensors + sum(weight.source_bytes for weight in self._all_weights())

    def start_pass(self, names: Sequence[str]) -> AbstractContextManager[Iterator[tuple[str, Round]]]:
        """Start to quantize pending weights, in this order. To be called once."""
        rounding_pass, self.rounding_pass = self.rounding_pass, None  # which holds this state dict and its source
        return rounding_pass(names) if rounding_pass and names else nullcontext(iter(()))

    def add_weight(self, name: str, weight: ScaledWeight) -> None:
        """Add a scaled weight in place of the tensor of this name and of whatever marked that tensor before."""
        self._remove(name, weight.layer)
        self.weights[name] = weight

    def add_pending(self, name: str, weight: PendingWeight) -> None:
        """The same for a weight that is quantized later."""
        self._remove(name, weight.layer)
        self.pending[name] = weight

    def keep(self, name: str, entry: Entry) -> None:
        """Replace a pending weight that cannot be quantized by its tensor."""
        del self.pending[name]
        self.tensors[name] = entry

    def _all_weights(self) -> Iterator[ScaledWeight | PendingWeight]:
        yield from self.weights.values()
        yield from self.pending.values()

    def _remove(self, name: str, layer: ScaledLayer) -> None:
        for obsolete in (name, *marking_names(layer.name)):
            self.tensors.pop(obsolete, None)

    def keep_scaled(self, name: str, weight: ScaledWeight) -> None:
        """Replace a pending weight that cannot be quantized by the scaled weight that it was before."""
        del self.pending[name]
        self.weights[name] = weight

    def add(self, other: ScaledStateDict, prefix: str = "") -> None:
        """Add the tensors and weights of another network, none pending, under a prefix."""
        self.tensors |= {prefix + name: entry for name, entry in other.tensors.items()}
        self.weights |= {prefix + name: weight.under(prefix) for name, weight in other.weights.items()}

    def renamed(self, names: Mapping[str, str]) -> ScaledStateDict:
        """The same tensors and weights, none pending, under other names. names: name -> the other one, for each."""

        def layer(weight: ScaledWeight, name: str) -> ScaledLayer:
            return replace(weight.layer, name=name.removesuffix(".weight"))

        return ScaledStateDict(
            {names[name]: entry for name, entry in self.tensors.items()},
            {names[name]: replace(each, layer=layer(each, names[name])) for name, each in self.weights.items()},
            metadata=self.metadata,
        )

    def add_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add plain tensors."""
        self.tensors |= {name: TensorEntry.of(tensor) for name, tensor in tensors.items()}

    def small_tensors(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Markers, and every scale that is known before the pass; on the CPU.

        Raises ValueError where the layout cannot describe these layers together.
        """
        small = layout.markers(self.layers)
        for weight in self.weights.values():
            small[weight.layer.name + layout.weight_scale] = weight.scale.cpu()
        for any_weight in self._all_weights():
            if any_weight.input_scale is not None:
                small[any_weight.layer.name + layout.input_scale] = any_weight.input_scale.cpu()
        return small

    def infos(self, layout: Layout) -> dict[str, TensorInfo]:
        """dtype and shape of every tensor of a file in this layout."""
        return {
            **{name: entry.info for name, entry in self.tensors.items()},
            **{name: weight.info for name, weight in self.weights.items()},
            **{name: weight.info for name, weight in self.pending.items()},
            **{layer.name + layout.weight_scale: TensorInfo("float32", ()) for layer in self.layers},
            **{name: TensorInfo.of(tensor) for name, tensor in self.small_tensors(layout).items()},
        }


def marking_names(layer: str) -> Iterable[str]:
    """Every name under which a file may hold a scale or a marker of a layer."""
    return (layer + suffix for suffix in (*WEIGHT_SCALES, *INPUT_SCALES, INLINE_SUFFIX))
