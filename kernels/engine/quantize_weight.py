"""One weight as a recipe says: the one place that chooses between rounding numbers and rounding whole weights."""

from __future__ import annotations

from typing import Any

import torch

from ..calibration.calibrate_tensor import calibrate_tensor
from ..calibration.moments import Calibration
from ..errors import CalibrationError
from ..numerics.formats import E4M3FN
from ..numerics.placement import Placement
from ..numerics.quantized_tensor import QuantizedTensor, quantize_tensor
from ..numerics.rounding import CALIBRATED
from ..numerics.scaling import SMALLEST_SCALE
from ..recipe import Recipe

INPUT_MARGIN = 1.25
"""Room above the largest input that was seen: other prompts go further. On a logarithmic grid it costs nothing."""


def quantize_weight(
    x: torch.Tensor,
    key: str,
    recipe: Recipe,
    calibration: Calibration | None,
    *,
    statistics: bool = True,
    placement: Placement | None = None,
) -> QuantizedTensor:
    """Quantize the weight of one layer as the recipe says.

    x: float (out, in); any shape for roundings other than calibrated. key: the tensor key. Calibrated rounding falls
    back to nearest for a layer that the calibration does not hold, or holds with another width, and for the reasons in
    OutputError.fallback.

    Raises as quantize_tensor, and CalibrationError where the recipe needs a calibration and there is none.
    """
    check_calibration(recipe, calibration)
    choices: dict[str, Any] = {"format": recipe.format, "scaling": recipe.scaling, "key": key, "statistics": statistics}
    if recipe.rounding != CALIBRATED.name:
        return quantize_tensor(x, rounding=recipe.rounding, seed=recipe.seed, placement=placement, **choices)
    layer = calibration.layer_of(key, x) if calibration else None
    if layer is None:
        return quantize_tensor(x, rounding="nearest", placement=placement, **choices)
    where = placement or Placement()
    moves: dict[str, Any] = {"device": where.device, "leave_on_device": where.leave_on_device, "send": where.send}
    return calibrate_tensor(x, layer, **moves, **choices)


def check_calibration(recipe: Recipe, calibration: Calibration | None) -> None:
    """Raises CalibrationError where the recipe needs a calibration and there is none."""
    if recipe.rounding == CALIBRATED.name and calibration is None:
        raise CalibrationError(
            "rounding 'calibrated' needs the recorded inputs of the layers: connect FP8 Calibration or Load "
            "Calibration to the input 'calibration' (on the command line: --calibration FILE)"
        )


def input_scale(calibration: Calibration | None, key: str, recipe: Recipe) -> torch.Tensor | None:
    """What a layer's inputs are divided by before they are cast to E4M3: fp32, 0-dim.

    None where they are not cast (matmul "full"), or were never seen.
    """
    if recipe.matmul != "fp8" or calibration is None or key not in calibration.layers:
        return None
    scale = INPUT_MARGIN * calibration.layers[key].amax / E4M3FN.max
    return torch.tensor(max(scale, SMALLEST_SCALE), dtype=torch.float32, device="cpu")
