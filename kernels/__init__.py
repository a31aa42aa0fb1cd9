"""The library: scaled FP8 tensors and checkpoints. Needs torch, numpy and safetensors; never ComfyUI."""

from .engine.file_job import plan_file, quantize_file
from .errors import CheckpointError, NonFiniteError
from .numerics.error_statistics import ErrorStatistics
from .numerics.formats import FORMATS
from .numerics.quantized_tensor import QuantizedTensor, dequantize_tensor, quantize_tensor
from .numerics.rounding import ROUNDINGS
from .numerics.scaling import SCALINGS
from .recipe import Recipe
from .report.report import KeptTensor, LayerReport, Report
from .state_dict.inspection import inspect_file
from .state_dict.repair import repair_file

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
