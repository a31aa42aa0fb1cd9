"""The library: scaled FP8 tensors and checkpoints. Needs torch, numpy and safetensors; never ComfyUI."""

from .error import ErrorStatistics
from .formats import FORMATS
from .quantize import NonFiniteError, QuantizedTensor, dequantize_tensor, quantize_tensor
from .report import KeptTensor, LayerReport, Recipe, Report
from .rounding import ROUNDINGS
from .scaling import SCALINGS

__all__ = [
    "FORMATS",
    "ROUNDINGS",
    "SCALINGS",
    "ErrorStatistics",
    "KeptTensor",
    "LayerReport",
    "NonFiniteError",
    "QuantizedTensor",
    "Recipe",
    "Report",
    "dequantize_tensor",
    "quantize_tensor",
]
