"""Where weights come from: the protocol between the engine and its sources.

A new kind of source is one class that implements Weights. There are two: FileWeights, and the Network of a MODEL or
CLIP in nodes/networks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ..files.header import TensorInfo
from ..numerics.transfers import Send
from ..recipe import Recipe
from ..state_dict.scaled_state_dict import Entry, ScaledWeight

Read = Callable[[], "tuple[torch.Tensor, Send]"]
"""Reads one weight: the values to quantize, in a float dtype, and how they get to a device."""


class Weights(Protocol):
    """Named tensors, some of which can be quantized."""

    @property
    def name(self) -> str:
        """Name of the file (without its folder) or of the model, for people."""

    @property
    def kind(self) -> str | None:
        """What Components takes: DIFFUSION or TEXT_ENCODER for the bare names of one network, None for a whole file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by published name, without scales and markers of scaled weights."""

    @property
    def scaled(self) -> Mapping[str, ScaledWeight]:
        """The weights that are already in scaled FP8."""

    @property
    def patched(self) -> Collection[str]:
        """The weights whose values differ from what is stored: LoRAs and other patches."""

    @property
    def linear_names(self) -> Collection[str] | None:
        """Names of the Linear modules; None where only names and shapes are known."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Entries that a file made from these weights keeps."""

    @property
    def notes(self) -> Sequence[str]:
        """What else the user should know about this source."""

    @property
    def nonfinite(self) -> Mapping[str, tuple[int, int]]:
        """Tensors that were copied, and hold NaN or infinite values -> how many of each. Empty where nobody looked."""

    def check(self, names: Collection[str], recipe: Recipe) -> None:
        """Raises where these weights cannot be quantized from this source."""

    def entry(self, name: str) -> Entry:
        """A tensor that is not quantized: stored FP8 is multiplied out, patches are applied."""

    def input_scale(self, name: str) -> torch.Tensor | None:
        """The scale of a layer's inputs, fp32 0-dim, where the source has one."""

    def reading(self, names: Sequence[str], device: torch.device) -> AbstractContextManager[Iterator[Read]]:
        """Reads these weights in this order, each one ahead of its turn. Values are valid until the next is read."""

    def error(self, text: str) -> Exception:
        """What to raise about this source; the text goes on after its name."""
