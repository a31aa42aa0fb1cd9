"""The library: scaled FP8 tensors and checkpoints. Needs torch, numpy and safetensors; never ComfyUI."""

from .command.starting import is_command, quiet_start

with quiet_start(is_command()):
    from .calibration.file import load_calibration
    from .engine.file_job import plan_file, quantize_file
    from .errors import (
        ActivationError,
        CalibrationError,
        CheckpointError,
        ChoiceError,
        NonFiniteError,
        PatternError,
        StochasticFP8Error,
        UnknownChoiceError,
        UnknownPatternError,
        UnsupportedDtypeError,
    )
    from .numerics.backends import list_backends
    from .numerics.error_statistics import ErrorStatistics
    from .numerics.formats import FORMATS
    from .numerics.quantized_tensor import QuantizedTensor, dequantize_tensor, quantize_tensor
    from .numerics.rounding import ROUNDINGS
    from .numerics.scaling import SCALINGS
    from .recipe import CHOICES, Recipe
    from .report.report import KeptTensor, LayerReport, Report
    from .state_dict.inspection import inspect_file
    from .state_dict.repair import repair_file
    from .studies.comparison import compare_roundings

__all__ = [
    "CHOICES",
    "FORMATS",
    "ROUNDINGS",
    "SCALINGS",
    "ActivationError",
    "CalibrationError",
    "CheckpointError",
    "ChoiceError",
    "ErrorStatistics",
    "KeptTensor",
    "LayerReport",
    "NonFiniteError",
    "PatternError",
    "QuantizedTensor",
    "Recipe",
    "Report",
    "StochasticFP8Error",
    "UnknownChoiceError",
    "UnknownPatternError",
    "UnsupportedDtypeError",
    "compare_roundings",
    "dequantize_tensor",
    "inspect_file",
    "list_backends",
    "load_calibration",
    "plan_file",
    "quantize_file",
    "quantize_tensor",
    "repair_file",
]
