"""Quantizes the networks of a MODEL or CLIP: the engine with ComfyUI's progress bar and offload device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kernels import Recipe
from ..kernels.calibration.moments import Calibration
from ..kernels.engine.quantization import Quantization
from ..kernels.files.header import TensorInfo
from ..kernels.selection.selection import MEASURED
from ..kernels.state_dict.load import make_codes
from ..kernels.state_dict.scaled_state_dict import ScaledStateDict
from ..kernels.state_dict.size import bytes_beyond_reserve, tensor_bytes
from .networks import Network, beside_tensors
from .progress import JobProgress


class NetworkJob:
    """The quantization of one network: planned and checked when it is made, carried out by `run`."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        device: torch.device,
        calibration: Calibration | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """metadata: entries that Save Scaled FP8 Model will add, which a size limit counts.

        Raises ModelError for weights that are GGUF or unscaled FP8; CalibrationError where the recipe needs a
        calibration and there is none; UnknownPatternError."""
        self.network = network
        self._progress = JobProgress()
        self.quantization = Quantization(
            network,
            recipe,
            calibration,
            device=device,
            observe=self._progress.layer,
            progress=self._progress,
            reserved=_bytes_beside(network, metadata or {}) if recipe.layers == MEASURED else 0,
        )

    def run(self) -> ScaledStateDict:
        """Round each selected weight once, its patches included. The state dict holds no pending weights.

        Raises ModelError naming every tensor with NaN or infinite values, unless nonfinite is "keep".
        """
        state = self.quantization.state_dict()
        make_codes(state, self.network.patcher.offload_device, self._progress)
        return state


def _bytes_beside(network: Network, metadata: Mapping[str, str]) -> int:
    """What Save Scaled FP8 Model writes beside the network, which a size limit counts."""
    beside = beside_tensors(network.patcher)
    tensors = sum(tensor_bytes(name, TensorInfo.of(tensor)) for name, tensor in beside.items())
    return tensors + bytes_beyond_reserve(metadata)
