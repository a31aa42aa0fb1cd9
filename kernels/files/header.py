"""The header of a safetensors file: read with every claim checked, written byte for byte as the library would.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of length, JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

MAX_HEADER = 100_000_000
"""Bytes; the library's own limit."""
MAX_TENSORS = 1_000_000
MAX_ENTRY = 4096
"""Characters of one tensor's entry."""

DTYPES = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
"""A dtype's code in a file -> its name (torch's, where torch has it) and bits, in the library's order."""

_CODES = {name: code for code, (name, _) in DTYPES.items()}
_BITS = dict(DTYPES.values())
_RANK = {name: rank for rank, name in enumerate(_BITS)}

_SPACE = re.compile(r"[ \t\r\n]*")
_decode_json = json.JSONDecoder().raw_decode


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads(object_pairs_hook=...). Raises ValueError where a name occurs twice."""
    result = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} occurs twice")
        result[name] = value
    return result


_decode_object = json.JSONDecoder(object_pairs_hook=without_duplicates).decode


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a tensor is without its values. `dtype` is torch's name without `torch.`, e.g. "bfloat16"."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * _BITS[self.dtype] // 8


def parse_header(data: bytes) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """The tensors with the offsets of their bytes behind the header, and the metadata, of a header's JSON.

    Entry by entry and not with one json.loads, under which 100 MB of brackets would become gigabytes of lists.
    Raises ValueError: not the JSON of a header, unknown dtype, a size that is not shape × dtype, duplicates, and
    tensors that overlap or leave a hole.
    """
    scanner = _Scanner(data.decode())
    tensors: dict[str, tuple[TensorInfo, int]] = {}
    metadata: dict[str, str] = {}
    for key in scanner.keys():
        if key == "__metadata__":
            metadata = {name: scanner.string() for name in scanner.keys()}
        elif len(tensors) == MAX_TENSORS:
            raise ValueError(f"it lists more than {MAX_TENSORS:,} tensors")
        else:
            tensors[key] = _parse_entry(key, scanner.flat_object())
    scanner.end()
    _check_offsets(tensors)
    return tensors, metadata


def format_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, length included, and each tensor's offset from the start of the file, in file order.

    Larger dtypes first, then names, so that each tensor is aligned: the order in which the library writes. Metadata,
    which the library writes in no fixed order, is sorted.
    """
    order = sorted(tensors, key=lambda key: (-_RANK[tensors[key].dtype], key))
    header: dict = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets = {}
    end = 0
    for key in order:
        info = tensors[key]
        offsets[key], end = end, end + info.nbytes
        header[key] = {"dtype": _CODES[info.dtype], "shape": info.shape, "data_offsets": (offsets[key], end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would have {len(text):,} bytes, and no program reads more than {MAX_HEADER:,}")
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + offset for key, offset in offsets.items()}


class _Scanner:
    """Walks through a JSON text whose shape is known, and never builds more than it is asked for."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def keys(self) -> Iterator[str]:
        """The keys of the object that starts here; the caller takes each value before it asks for the next key."""
        seen: set[str] = set()
        self._take("{")
        if self._next() == "}":
            self.at += 1
            return
        while True:
            key = self.string()
            if key in seen:
                raise ValueError(f"{key!r} occurs twice")
            seen.add(key)
            self._take(":")
            yield key
            if self._next() == "}":
                self.at += 1
                return
            self._take(",")

    def string(self) -> str:
        if self._next() != '"':
            raise ValueError(f"there is no string at character {self.at}")
        value, self.at = _decode_json(self.text, self.at)
        value.encode()  # refuses half a surrogate pair, which no file can hold
        return value

    def flat_object(self) -> dict:
        """The object that starts here and holds no other object."""
        self._next()
        end = self.text.find("}", self.at, self.at + MAX_ENTRY) + 1
        value = _decode_object(self.text[self.at : end])
        self.at = end
        return value

    def end(self) -> None:
        if self._next():
            raise ValueError(f"something follows its end at character {self.at}")

    def _next(self) -> str:
        self.at = _SPACE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"'{character}' is missing at character {self.at}")
        self.at += 1


def _parse_entry(key: str, entry: object) -> tuple[TensorInfo, int]:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {key!r} lacks its dtype, shape or data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {key!r} has the unknown dtype {code!r}; known are {', '.join(DTYPES)}")
    if not _natural_numbers(shape) or len(shape) > 64:
        raise ValueError(f"tensor {key!r} has the impossible shape {shape!r}")
    if not _natural_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {key!r} has the impossible data_offsets {offsets!r}")
    name, bits = DTYPES[code]
    info = TensorInfo(name, tuple(shape))
    if info.elements * bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"tensor {key!r} of shape {shape} and dtype {code} cannot have the {offsets[1] - offsets[0]:,} bytes "
            f"that data_offsets give it"
        )
    return info, offsets[0]


def _natural_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_offsets(tensors: dict[str, tuple[TensorInfo, int]]) -> None:
    """The library refuses holes as well as overlaps."""
    end, last = 0, None
    for key, (info, start) in sorted(tensors.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if start < end:
            raise ValueError(f"tensors {last!r} and {key!r} overlap")
        if start > end:
            raise ValueError(f"no tensor owns the {start - end:,} bytes before {key!r}")
        end, last = start + info.nbytes, key
