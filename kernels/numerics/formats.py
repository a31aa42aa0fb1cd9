"""The two FP8 formats as data. Three numbers define a format; every other constant follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Float8Format:
    """An 8-bit float: one sign bit and seven magnitude bits, which count up with the value.

    The next representable neighbour of a code is therefore that code plus or minus one.
    Source: Micikevicius et al., FP8 Formats for Deep Learning (2022), table 1.
    """

    name: str
    """Name of the torch dtype."""
    mantissa_bits: int
    exponent_bias: int
    max_code: int
    """Magnitude code of the largest finite value."""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    @property
    def quantum(self) -> float:
        """The smallest subnormal, which is the grid step around zero."""
        return math.ldexp(1.0, 1 - self.exponent_bias - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, 1 - self.exponent_bias)

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.decode(self.max_code)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The values of all 256 codes, including NaN and infinities."""
        return tuple(self.decode(code) for code in range(256))

    def decode(self, code: int) -> float:
        """The value of one code. Raises ValueError unless 0 <= code <= 255."""
        if not 0 <= code <= 0xFF:
            raise ValueError(f"{code} is not a code of {self.name}: codes run from 0 to 255")
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = divmod(code & 0x7F, 1 << self.mantissa_bits)
        if (code & 0x7F) > self.max_code:
            return sign * math.inf if mantissa == 0 else math.nan
        if exponent == 0:
            return sign * mantissa * self.quantum
        return sign * math.ldexp(1 + mantissa / (1 << self.mantissa_bits), exponent - self.exponent_bias)


E4M3FN = Float8Format("float8_e4m3fn", mantissa_bits=3, exponent_bias=7, max_code=0x7E)
E5M2 = Float8Format("float8_e5m2", mantissa_bits=2, exponent_bias=15, max_code=0x7B)

FORMATS = {float8.name: float8 for float8 in (E4M3FN, E5M2)}
