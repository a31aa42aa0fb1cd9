"""A scaled FP8 state dict: the one form in which quantized weights are written, loaded, verified and repaired.

It holds tensors by published name. Some weights are FP8 codes with a scale; everything else is a tensor that is
copied or read when its turn comes. Weights that are not quantized yet are *pending*: their codes are made, one by one,
by the RoundingPass of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class FileEntry:
    """A tensor of a file, copied bit for bit."""

    source: Source
    key: str

    @property
    def info(self) -> TensorInfo:
        return self.source.tensors[self.key]

    def read(self) -> torch.Tensor:
        return self.source.read(self.key)

    def write(self, writer: Writer, name: str) -> None:
        writer.copy(name, self.source, self.key)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ScaledWeight:
    """A weight as FP8 codes with a scale; pending as long as codes and scale are None."""

    layer: ScaledLayer
    shape: tuple[int, ...]
    codes: Entry | None = None
    """float8, of the weight's shape."""
    scale: torch.Tensor | None = None
    """fp32, 0-dim."""
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
    """Tensors and scaled weights by published name; no name is in both."""

    tensors: dict[str, Entry] = field(default_factory=dict)
    weights: dict[str, ScaledWeight] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    start_pass: RoundingPass | None = None
    """Makes the codes of pending weights; None where there are none."""

    @property
    def layers(self) -> tuple[ScaledLayer, ...]:
        return tuple(weight.layer for weight in self.weights.values())

    @property
    def pending(self) -> tuple[str, ...]:
        """Names of the weights whose codes are not made yet."""
        return tuple(name for name, weight in self.weights.items() if weight.codes is None)

    @property
    def source_bytes(self) -> int:
        """Bytes to read for all tensors."""
        tensors = sum(entry.info.nbytes for entry in self.tensors.values())
        return tensors + sum(weight.source_bytes for weight in self.weights.values())

    def add_weight(self, name: str, weight: ScaledWeight) -> None:
        """Add a scaled weight in place of the tensor of this name and of whatever marked that tensor before."""
        for obsolete in (name, *marking_names(weight.layer.name)):
            self.tensors.pop(obsolete, None)
        self.weights[name] = weight

    def keep(self, name: str, entry: Entry) -> None:
        """Replace a weight that cannot be quantized by its tensor."""
        del self.weights[name]
        self.tensors[name] = entry

    def add(self, other: ScaledStateDict, prefix: str = "") -> None:
        """Add the tensors and weights of another network, none pending, under a prefix."""
        self.tensors |= {prefix + name: entry for name, entry in other.tensors.items()}
        self.weights |= {prefix + name: weight.under(prefix) for name, weight in other.weights.items()}

    def add_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add plain tensors."""
        self.tensors |= {name: TensorEntry.of(tensor) for name, tensor in tensors.items()}

    def small_tensors(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Markers, and every scale that is known before the pass; on the CPU.

        Raises ValueError where the layout cannot describe these layers together.
        """
        small = layout.markers(self.layers)
        for weight in self.weights.values():
            if weight.scale is not None:
                small[weight.layer.name + layout.weight_scale] = weight.scale.cpu()
            if weight.input_scale is not None:
                small[weight.layer.name + layout.input_scale] = weight.input_scale.cpu()
        return small

    def infos(self, layout: Layout) -> dict[str, TensorInfo]:
        """dtype and shape of every tensor of a file in this layout."""
        return {
            **{name: entry.info for name, entry in self.tensors.items()},
            **{name: weight.info for name, weight in self.weights.items()},
            **{layer.name + layout.weight_scale: TensorInfo("float32", ()) for layer in self.layers},
            **{name: TensorInfo.of(tensor) for name, tensor in self.small_tensors(layout).items()},
        }


def marking_names(layer: str) -> Iterable[str]:
    """Every name under which a file may hold a scale or a marker of a layer."""
    return (layer + suffix for suffix in (*WEIGHT_SCALES, *INPUT_SCALES, INLINE_SUFFIX))
