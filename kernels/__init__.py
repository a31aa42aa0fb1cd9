"""The library: scaled FP8 tensors and checkpoints. Needs torch, numpy and safetensors; never ComfyUI."""

from .checkpoint import plan_file, quantize_file
from .error import ErrorStatistics
from .formats import FORMATS
from .inspection import inspect_file
from .quantize import NonFiniteError, QuantizedTensor, dequantize_tensor, quantize_tensor
from .repair import repair_file
from .report import KeptTensor, LayerReport, Recipe, Report
from .rounding import ROUNDINGS
from .safetensors_io import CheckpointError
from .scaling import SCALINGS

__all__ = [
    "FORMATS",
    "ROUNDINGS",
    "SCALINGS",
    "CheckpointError",
    "ErrorStatistics",
    "KeptTensor",
    "LayerReport",
    "NonFiniteError",
    "QuantizedTensor",
    "Recipe",
    "Report",
    "dequantize_tensor",
    "inspect_file",
    "plan_file",
    "quantize_file",
    "quantize_tensor",
    "repair_file",
]
