"""How a tensor was rounded, in words, for the debug log."""

from __future__ import annotations

import torch

from .error_statistics import evenly_spaced
from .formats import FORMATS
from .quantized_tensor import QuantizedTensor
from .random_bits import random_words, stream_key
from .rounding import FRACTION_BITS, METHODS, ONE, Rounding, code_positions

TRACED = 4
"""Elements of each tensor that are described."""


def trace(key: str, x: torch.Tensor, q: QuantizedTensor, *, rounding: str, seed: int) -> str:
    """dtype, shape, range and scale of a tensor, then bracket, draw and decision for a few of its elements.

    x: the tensor that was quantized to q with this key, rounding and seed.
    """
    flat, codes = x.reshape(-1), q.codes.reshape(-1).view(torch.uint8)
    dtype = str(x.dtype).removeprefix("torch.")
    low, high = (bound.item() for bound in torch.aminmax(flat)) if len(flat) else (0.0, 0.0)
    lines = [f"{key}: {dtype} {tuple(x.shape)}, {low:.6g} to {high:.6g}, amax {q.amax:.6g}, scale {q.scale:.9g}"]
    stream = stream_key(seed, rounding, key)
    for index in evenly_spaced(len(flat), TRACED):
        word = int(random_words(stream, index, 1))
        lines.append(f"  [{index}] {_element(flat[index], int(codes[index]), word, q, METHODS[rounding])}")
    return "\n".join(lines)


def _element(value: torch.Tensor, code: int, word: int, q: QuantizedTensor, rounding: Rounding) -> str:
    float8 = FORMATS[str(q.codes.dtype).removeprefix("torch.")]
    scaled = value.float().cpu() / q.scale.cpu()
    below, fraction = divmod(int(code_positions(scaled.reshape(1), float8, FRACTION_BITS)), ONE)
    sign = -1 if scaled < 0 else 1
    start = f"{value:.6g} / scale = {scaled:.6g}"
    result = f"-> 0x{code:02x} = {float8.decode(code) * float(q.scale):.6g}"
    if q.output_error and not q.output_error.fallback:
        return f"{start}: minimizing the error of the layer's output {result}"
    if below >= float8.max_code:
        return f"{start}: at or beyond the largest value {result}"
    if not fraction:
        return f"{start}: is representable {result}"
    low, high = (sign * float8.decode(magnitude) for magnitude in (below, below + 1))
    step = "away from zero" if code & 0x7F > below else "towards zero"
    bracket = f"between {low:g} and {high:g}, {fraction / ONE:.4f} of the way"
    return f"{start}: {bracket}, {_draw(fraction, word, rounding)}: {step} {result}"


def _draw(fraction: int, word: int, rounding: Rounding) -> str:
    """Every stochastic method steps away from zero when the fraction plus its draw reaches 1."""
    if not rounding.stochastic:
        return "nearest"
    total = fraction + (ONE - 1 - word if rounding.complements_words else word)
    return f"with the draw {total / ONE:.4f}, which is {'at least' if total >= ONE else 'below'} 1"
