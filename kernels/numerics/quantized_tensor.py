"""tensor -> scale -> round -> encode, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..choices import choose
from ..errors import NonFiniteError, UnsupportedDtypeError
from .backends import Task, choose_backend
from .error_statistics import ErrorStatistics, evenly_spaced, merge
from .formats import FORMATS, Float8Format
from .memory import slices, with_enough_memory
from .output_error import OutputError
from .random_bits import BLOCK, stream_from, stream_key
from .rounding import ROUNDINGS
from .scaling import SCALINGS, Scaling, amax_to_scale
from .transfers import Send, copy, to_device

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in scaled FP8: dequantized values are `codes * scale`."""

    codes: torch.Tensor
    """float8, of the source's shape, contiguous, on its device unless quantize_tensor was told otherwise."""
    scale: torch.Tensor
    """fp32, 0-dim, on the codes' device."""
    amax: float
    error: ErrorStatistics | None = None
    output_error: OutputError | None = None
    """Of the layer's output, where the rounding was calibrated."""


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
    out: torch.Tensor | None = None,
    bring_back: bool = True,
    send: Send = to_device,
) -> QuantizedTensor:
    """Quantize a tensor to scaled FP8. The bytes depend on the values and arguments alone, not on device or strides.

    x: float of 16, 32 or 64 bits, any shape and strides; empty gives no codes and scale 1, all-zero gives zeros and
    scale 1; -0.0 keeps its sign; values beyond the format's range saturate (only with scaling "none").
    format, rounding, scaling: keys of FORMATS, ROUNDINGS, SCALINGS. seed: 0..2^64-1.
    key: the tensor key (bare ComfyUI layer name + ".weight"), which with the seed decides the random words.
    device: where to compute, as far as its memory goes; the result returns to x's device, unless bring_back is False.
    Default: where x is.
    out: memory for codes on x's device, contiguous uint8 (x.numel() or more,). Default: memory of their own, which
    costs more, since the operating system clears every page. bring_back: False leaves the result on the GPU that
    computed it, if it has the memory for all of it, so that it can be fetched while the next tensor is computed.
    send: how x gets to the device, where an Ahead may have sent it already.

    Raises ValueError for an unknown choice or memory that does not do, TypeError for a dtype that is no plain float,
    NonFiniteError for NaN or infinite values (fp64 values beyond fp32's range included).
    """
    float8 = choose(FORMATS, format, "format")
    method = choose(ROUNDINGS, rounding, "rounding")
    scaler = choose(SCALINGS, scaling, "scaling")
    flat, stream = _flat(x, key), stream_key(seed, rounding, key)
    _check_memory(out, flat, key)

    def quantize(device: torch.device, slice_size: int) -> QuantizedTensor:
        parts = slices(flat, device, slice_size, send)
        amax = _amax(parts, flat, key)
        scale = amax_to_scale(amax, float8, scaler)
        stays = not bring_back and device.type == "cuda" and slice_size >= flat.numel()
        home = device if stays else flat.device
        given = out is not None and out.device == home
        codes = out[: flat.numel()] if given else torch.empty(flat.shape, dtype=torch.uint8, device=home)
        errors = []
        for start, part in parts:
            target = codes[start : start + part.numel()]
            made = target if part.device == target.device else torch.empty_like(target, device=part.device)
            task = Task(scale, amax, float8, method, stream_from(stream, start // BLOCK))
            errors.append(choose_backend(part).round_tensor(part, made, task, statistics))
            if made is not target:
                copy(made, target)
        return finish(x, flat, codes.view(float8.dtype), scale, amax, merge(errors) if statistics else None)

    return with_enough_memory(quantize, torch.device(device or x.device), flat.numel(), key)


def scale_tensor(
    x: torch.Tensor, format: Float8Format, scaling: Scaling, key: str, device: torch.device | str | None
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """A tensor, flat and on `device`, with its amax and scale. Raises TypeError, NonFiniteError as quantize_tensor."""
    flat = to_device(_flat(x, key), torch.device(device or x.device))
    amax = _amax([(0, flat)], flat, key)
    return flat, amax, amax_to_scale(amax, format, scaling).to(flat.device)


def finish(
    x: torch.Tensor,
    flat: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: float,
    error: ErrorStatistics | None,
) -> QuantizedTensor:
    """Codes and scale on the codes' device, in x's shape; samples for the statistics."""
    if error is not None:
        error = replace(error, samples=_samples(flat, codes, scale))
    return QuantizedTensor(codes.reshape(x.shape), scale.to(codes.device), amax, error)


def dequantize_tensor(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codes * scale, computed in fp32 and returned in `dtype`.

    codes: float8, any shape. scale: fp32, 0-dim (or any shape that broadcasts).
    """
    return (codes.float() * scale.to(device=codes.device, dtype=torch.float32)).to(dtype)


def _flat(x: torch.Tensor, key: str) -> torch.Tensor:
    if x.dtype not in SOURCE_DTYPES:
        raise UnsupportedDtypeError(_dtype_error(x, key))
    return x.detach().reshape(-1).contiguous()  # reshape leaves a strided vector as it is


def _check_memory(out: torch.Tensor | None, flat: torch.Tensor, key: str) -> None:
    if out is None:
        return
    fits = out.dtype == torch.uint8 and out.ndim == 1 and out.is_contiguous() and len(out) >= flat.numel()
    if not fits or out.device != flat.device:
        raise ValueError(
            f"the memory for the codes of tensor '{key}' is {out.dtype} {tuple(out.shape)} on {out.device}; give "
            f"contiguous torch.uint8 ({flat.numel()} or more,) on {flat.device}"
        )


def _amax(parts: Iterable[tuple[int, torch.Tensor]], flat: torch.Tensor, key: str) -> float:
    """The largest magnitude of a flat tensor that is given in parts."""
    magnitudes = [choose_backend(part).tensor_to_amax(part) for _, part in parts]
    if not all(math.isfinite(magnitude) for magnitude in magnitudes):
        raise NonFiniteError(key, *_count_nonfinite(flat))
    return max(magnitudes)


def _dtype_error(x: torch.Tensor, key: str) -> str:
    name = str(x.dtype).removeprefix("torch.")
    hint = "dequantize it first, with its scale" if name.startswith("float8") else "only floating-point tensors can be"
    return f"tensor '{key}' is {name} and cannot be quantized: {hint}"


def _count_nonfinite(flat: torch.Tensor) -> tuple[int, int]:
    values = flat.float()
    return int(values.isnan().sum()), int(values.isinf().sum())


@lru_cache(maxsize=64)
def _sample_index(count: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(evenly_spaced(count), dtype=torch.int64, device=device)


def _samples(flat: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> tuple[tuple[float, float], ...]:
    some, some_codes = (x[_sample_index(len(x), x.device)].cpu() for x in (flat, codes.view(torch.uint8)))
    dequantized = dequantize_tensor(some_codes.view(codes.dtype), scale)
    return tuple(zip(some.float().tolist(), dequantized.tolist(), strict=True))
