"""The header of a safetensors file: parsed and validated, or written as the safetensors library writes it.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of length, JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

import torch

from .bounded_json import TooLargeError

MAX_HEADER = 32 << 20
"""Bytes. Those of published models have less than 2 MB; the safetensors library reads 100 MB."""
MAX_TENSORS = 200_000
MAX_NAME = 1024
"""Characters of a tensor's name."""
MAX_ENTRY = 4096
"""Characters of one tensor's entry in the header."""
MAX_METADATA = 10_000
"""Entries in the metadata."""

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
"""Code of a dtype in a file -> its name (that of torch, if torch has it) and bits, in the library's order."""

_CODES = {name: code for code, (name, _) in DTYPES.items()}
_BITS = dict(DTYPES.values())
_RANK = {name: rank for rank, name in enumerate(_BITS)}

_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")
_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_decode_json = json.JSONDecoder().raw_decode


def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For json.loads(object_pairs_hook=...). Raises ValueError if a name occurs twice."""
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} occurs twice")
        result[name] = value
    return result


_decode_object = json.JSONDecoder(object_pairs_hook=without_duplicates).decode


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype and shape of a tensor. `dtype` is torch's name without `torch.`, e.g. "bfloat16"."""

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


def parse_header(data: bytes | bytearray) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """The tensors, with the offsets of their bytes after the header, and the metadata, from a header's JSON.

    The JSON is decoded entry by entry: json.loads would turn 100 MB of brackets into gigabytes of lists.
    Raises TooLargeError: beyond the limits above; ValueError: not the JSON of a header, an unknown dtype, a size that
    is not shape × dtype, duplicates, tensors that overlap or leave gaps.
    """
    scanner = _Scanner(data.decode())
    del data  # the caller may hold no other reference
    tensors: dict[str, tuple[TensorInfo, int]] = {}
    metadata: dict[str, str] = {}
    for key in scanner.keys():
        if key == "__metadata__":
            for name in scanner.keys():
                if len(metadata) == MAX_METADATA:
                    raise TooLargeError(f"its metadata has more than {MAX_METADATA:,} entries")
                metadata[name] = scanner.string()
        elif len(tensors) == MAX_TENSORS:
            raise TooLargeError(f"it lists more than {MAX_TENSORS:,} tensors")
        elif len(key) > MAX_NAME:
            raise TooLargeError(
                f"tensor {key[:40]!r}… has a name of {len(key):,} characters; at most {MAX_NAME:,} are read"
            )
        else:
            tensors[key] = _parse_entry(key, scanner.flat_object())
    scanner.end()
    _check_offsets(tensors)
    return tensors, metadata


def format_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, with the length, and each tensor's offset from the start of the file, in file order.

    The order is that of the library: larger dtypes first, then by name, so that every tensor is aligned. Metadata is
    sorted; the library writes it in no fixed order. Raises ValueError: the header is beyond what parse_header reads.
    """
    _check_names(tensors)
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"the metadata has {len(metadata):,} entries; at most {MAX_METADATA:,} can be read again")
    order = sorted(tensors, key=lambda key: (-_RANK[tensors[key].dtype], key))
    parts = [f'"__metadata__":{_to_json(dict(sorted(metadata.items())))}'] if metadata else []
    offsets = {}
    end = 0
    for key in order:
        info = tensors[key]
        offsets[key], end = end, end + info.nbytes
        entry = {"dtype": _CODES[info.dtype], "shape": info.shape, "data_offsets": (offsets[key], end)}
        parts.append(f"{_to_json(key)}:{_to_json(entry)}")
    text = f"{{{','.join(parts)}}}".encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header has {len(text):,} bytes; at most {MAX_HEADER:,} can be read again")
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + offset for key, offset in offsets.items()}


def check_count(tensors: int) -> None:
    """Raises ValueError if a header cannot hold this number of tensors."""
    if tensors > MAX_TENSORS:
        raise ValueError(f"it would hold {tensors:,} tensors or more; at most {MAX_TENSORS:,} can be read again")


def _check_names(tensors: Collection[str]) -> None:
    """Raises ValueError if a header cannot hold tensors of these names."""
    check_count(len(tensors))
    longest = max(tensors, key=len, default="")
    if len(longest) > MAX_NAME:
        raise ValueError(
            f"tensor {longest[:40]!r}… has a name of {len(longest):,} characters; {MAX_NAME:,} can be read again"
        )


class _Scanner:
    """Reads a JSON text of known structure, and decodes only the values that are requested."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def keys(self) -> Iterator[str]:
        """The keys of the object that starts here. The caller reads each value before it asks for the next key."""
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
        value: str
        value, self.at = _decode_json(self.text, self.at)
        if _SURROGATE.search(value):
            raise ValueError(f"a string that ends at character {self.at} has surrogates, which no file can hold")
        return value

    def flat_object(self) -> object:
        """The object that starts here and contains no other object."""
        if self._next() != "{":
            raise ValueError(f"there is no object at character {self.at}")
        end = self.text.find("}", self.at, self.at + MAX_ENTRY) + 1
        if not end and self.text.find("}", self.at) > 0:
            raise TooLargeError(f"the entry at character {self.at} has more than {MAX_ENTRY:,} characters")
        value: object = _decode_object(self.text[self.at : end])
        self.at = end
        return value

    def end(self) -> None:
        if self._next():
            raise ValueError(f"there is more text after its end, at character {self.at}")

    def _next(self) -> str:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at
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
        raise ValueError(f"tensor {key!r} has the unknown dtype {code!r}; known dtypes: {', '.join(DTYPES)}")
    if not _natural_numbers(shape) or len(shape) > 64:
        raise ValueError(f"tensor {key!r} has the invalid shape {shape!r}")
    if not _natural_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {key!r} has the invalid data_offsets {offsets!r}")
    name, bits = DTYPES[code]
    info = TensorInfo(name, _shared(tuple(shape)))
    if info.elements * bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"tensor {key!r} has shape {shape} and dtype {code}, but {offsets[1] - offsets[0]:,} bytes by data_offsets"
        )
    return info, offsets[0]


@lru_cache(4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One object for equal shapes, of which most models have few."""
    return shape


def _natural_numbers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_offsets(tensors: dict[str, tuple[TensorInfo, int]]) -> None:
    """Raises ValueError for overlaps and gaps, as the library does."""
    end, last = 0, ""
    for key, (info, start) in sorted(tensors.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if start < end:
            raise ValueError(f"tensors {last!r} and {key!r} overlap")
        if start > end:
            raise ValueError(f"there is a gap of {start - end:,} bytes before tensor {key!r}")
        end, last = start + info.nbytes, key
