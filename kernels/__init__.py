"""The library: scaled FP8 tensors and checkpoints. Needs torch, numpy and safetensors; never ComfyUI."""

from .checkpoint.inspection import inspect_file
from .checkpoint.job import plan_file, quantize_file
from .checkpoint.repair import repair_file
from .checkpoint.safetensors_io import CheckpointError
from .error import ErrorStatistics
from .formats import FORMATS
from .quantize import NonFiniteError, QuantizedTensor, dequantize_tensor, quantize_tensor
from .reports.report import KeptTensor, LayerReport, Recipe, Report
from .rounding import ROUNDINGS
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
