"""tensor -> scale -> round -> encode, and back: quantize_tensor and dequantize_tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..choices import choose
from ..errors import NonFiniteError, UnsupportedDtypeError
from .backends import Backend, Task, choose_backend
from .error_statistics import ErrorStatistics, evenly_spaced, merge
from .formats import FORMATS
from .nonfinite import count_nonfinite
from .output_error import OutputError
from .placement import Placement, Slices
from .random_bits import BLOCK, stream_from, stream_key
from .rounding import ROUNDINGS
from .scaling import SCALINGS, amax_to_scale

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in scaled FP8. Dequantized values are `codes * scale`."""

    codes: torch.Tensor
    """float8, contiguous, in the source's shape; on the source's device unless the Placement left them elsewhere."""
    scale: torch.Tensor
    """fp32, 0-dim, on the codes' device."""
    amax: float
    error: ErrorStatistics | None = None
    output_error: OutputError | None = None
    """Predicted error of the layer's output; calibrated rounding only."""


def quantize_tensor(
    x: torch.Tensor,
    *,
    format: str = "float8_e4m3fn",
    rounding: str = "stochastic",
    scaling: str = "absmax",
    seed: int = 0,
    key: str = "",
    statistics: bool = False,
    device: torch.device | str | None = None,
    placement: Placement | None = None,
) -> QuantizedTensor:
    """Quantize a tensor to scaled FP8. The bytes depend on the values and arguments alone, not on device or strides.

    x: float of 16, 32 or 64 bits, any shape and strides. An empty tensor gives no codes and scale 1. An all-zero tensor
    gives zeros and scale 1. -0.0 keeps its sign. Values beyond the format's range saturate (only with scaling "none").
    format, rounding, scaling: keys of FORMATS, ROUNDINGS, SCALINGS. seed: 0..2^64-1.
    key: the tensor key (bare ComfyUI layer name + ".weight"). It selects the random words, together with the seed.
    statistics: whether to measure the errors.
    device: where to compute; the codes return to x's device. Short for Placement(device). None: where x is. With too
    little memory it falls back to smaller slices, then to the CPU.
    placement: device, staging buffer and transfers, for callers that overlap them.

    Raises ValueError for an unknown choice or an unsuitable staging buffer; TypeError for a dtype that is not
    floating-point, or if both `device` and `placement` are given; NonFiniteError for NaN or infinite values (including
    fp64 values beyond fp32's range).
    """
    if device is not None and placement is not None:
        raise TypeError("give either `device` or `placement`, not both: Placement has a `device` of its own")
    float8 = choose(FORMATS, format, "format")
    method = choose(ROUNDINGS, rounding, "rounding")
    scaler = choose(SCALINGS, scaling, "scaling")
    flat, stream = flatten(x, key), stream_key(seed, rounding, key)

    def quantize(slices: Slices) -> QuantizedTensor:
        backend = choose_backend(slices.device)
        amax = find_amax(slices, backend, key)
        scale = amax_to_scale(amax, float8, scaler)
        errors = []
        for start, part, codes in slices.with_codes():
            task = Task(scale, amax, float8, method, stream_from(stream, start // BLOCK))
            errors.append(backend.quantize_slice(part, codes, task, statistics))
        error = merge(each for each in errors if each) if statistics else None
        return build_result(x, flat, slices.codes.view(float8.dtype), scale, amax, error)

    return (placement or Placement(device)).run(quantize, flat, key)


def flatten(x: torch.Tensor, key: str) -> torch.Tensor:
    """x as a contiguous vector, detached. Raises TypeError, naming the tensor, unless it is floating-point."""
    if x.dtype not in SOURCE_DTYPES:
        raise UnsupportedDtypeError(_dtype_error(x, key))
    return x.detach().reshape(-1).contiguous()  # reshape leaves a strided vector as it is


def find_amax(slices: Iterable[torch.Tensor], backend: Backend, key: str) -> float:
    """The largest magnitude of a flat tensor, given in slices. Raises NonFiniteError with the counts of NaN and Inf.

    slices: can be iterated more than once.
    """
    magnitudes = [backend.tensor_to_amax(part) for part in slices]
    if not all(math.isfinite(magnitude) for magnitude in magnitudes):
        counts = [count_nonfinite(part) for part in slices]
        raise NonFiniteError(key, sum(nan for nan, _ in counts), sum(inf for _, inf in counts))
    return max(magnitudes)


def build_result(
    x: torch.Tensor,
    flat: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: float,
    error: ErrorStatistics | None,
) -> QuantizedTensor:
    """The codes in x's shape, the scale on their device, and the statistics with samples of (original, dequantized).

    flat: x as a vector, on any device. codes: float8 (n,).
    """
    if error is not None:
        error = replace(error, samples=_samples(flat, codes, scale))
    return QuantizedTensor(codes.reshape(x.shape), scale.to(codes.device), amax, error)


def dequantize_tensor(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codes * scale, computed in fp32 and returned in `dtype`.

    codes: float8, any shape. scale: fp32, 0-dim (or any shape that broadcasts).
    """
    return (codes.float() * scale.to(device=codes.device, dtype=torch.float32)).to(dtype)


def _dtype_error(x: torch.Tensor, key: str) -> str:
    name = str(x.dtype).removeprefix("torch.")
    hint = "dequantize it first, with its scale" if name.startswith("float8") else "only floating-point tensors can be"
    return f"tensor '{key}' is {name} and cannot be quantized: {hint}"


@lru_cache(maxsize=64)
def _sample_index(count: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(evenly_spaced(count), dtype=torch.int64, device=device)


def _samples(flat: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> tuple[tuple[float, float], ...]:
    some, some_codes = (x[_sample_index(len(x), x.device)].cpu() for x in (flat, codes.view(torch.uint8)))
    dequantized = dequantize_tensor(some_codes.view(codes.dtype), scale)
    return tuple(zip(some.float().tolist(), dequantized.tolist(), strict=True))
