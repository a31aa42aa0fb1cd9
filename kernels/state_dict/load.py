"""scaled state dict -> tensors in memory, as ComfyUI's loaders take them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..numerics.transfers import begin_transfer
from ..progress import Meter, ProgressCallback
from .layouts import LAYOUTS
from .scaled_state_dict import ScaledStateDict, TensorEntry


def make_codes(state: ScaledStateDict, device: torch.device, progress: ProgressCallback | None = None) -> None:
    """Quantize the pending weights of a state dict; their codes end up on `device` (the CPU, or where models offload).

    The codes of one weight travel from the GPU while the next one is rounded. Raises what the rounding pass raises.
    """
    pending = dict(state.pending)
    if not pending:
        return
    meter = Meter(sum(weight.source_bytes for weight in pending.values()), progress)
    in_flight: list[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]] = []  # at most one weight

    def land() -> None:
        for name, scale, codes in in_flight:
            state.weights[name] = state.pending.pop(name).coded(TensorEntry.of(codes()), scale.to(device))
        in_flight.clear()

    with state.start_pass(list(pending)) as rounds:
        for name, round_weight in rounds:
            meter.start(pending[name].key, pending[name].source_bytes)
            land()
            q = round_weight(None)
            if q is not None:
                in_flight.append((name, q.scale, begin_transfer(q.codes, device)))
            del q  # frees the codes on the GPU once they have left
        land()
    meter.finish()


def native_tensors(state: ScaledStateDict) -> dict[str, torch.Tensor]:
    """Every tensor of a state dict without pending weights, named as in layout native; markers are left out.

    The header and inline entries that go with it are `LAYOUTS["native"].metadata` and `.markers` of `state.layers`.
    """
    layout = LAYOUTS["native"]
    tensors = {name: entry.read() for name, entry in state.tensors.items()}
    for name, weight in state.weights.items():
        tensors[name] = weight.codes.read()
        tensors[weight.layer.name + layout.weight_scale] = weight.scale
        if weight.input_scale is not None:
            tensors[weight.layer.name + layout.input_scale] = weight.input_scale
    return tensors
