"""Quantizes the networks of a MODEL or CLIP: the engine with ComfyUI's progress bar and offload device."""

from __future__ import annotations

import torch

from ..kernels import Recipe
from ..kernels.calibration.moments import Calibration
from ..kernels.engine.quantization import Quantization
from ..kernels.state_dict.load import make_codes
from ..kernels.state_dict.scaled_state_dict import ScaledStateDict
from .networks import Network
from .progress import JobProgress


def quantize_network(
    network: Network, recipe: Recipe, device: torch.device, calibration: Calibration | None = None
) -> tuple[Quantization, ScaledStateDict]:
    """Round each selected weight once, its patches included. The state dict holds no pending weights.

    Raises ModelError naming every tensor with NaN or infinite values (unless nonfinite is "keep"), and for weights
    that are GGUF or unscaled FP8; CalibrationError where the recipe needs a calibration and there is none.
    """
    progress = JobProgress()
    quantization = Quantization(network, recipe, calibration, device=device, observe=progress.layer)
    state = quantization.state_dict()
    make_codes(state, network.patcher.offload_device, progress)
    return quantization, state
