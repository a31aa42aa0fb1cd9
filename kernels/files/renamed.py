"""An open source under other names, with tensors that are joined from rows of the stored ones. Nothing is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .header import TensorInfo
from .reader import Extent, Source, StoredTensor


class Rows(NamedTuple):
    """Rows `start` to `stop` (exclusive) of a stored tensor, along its first dimension."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class JoinedTensor(StoredTensor):
    """A tensor whose bytes are in several places. `offset` and `file` are where the first ones are."""

    parts: tuple[Extent, ...]

    @property
    def extents(self) -> Sequence[Extent]:
        return self.parts


def renamed(source: Source, names: Mapping[str, Sequence[Rows]], notes: Sequence[str] = ()) -> Source:
    """The same open files, with other tensors.

    names: new name -> the rows that the tensor consists of, in order. Stored tensors that are not mentioned are left
    out. notes: what the user should know about it.

    Raises KeyError: a name that is not stored; ValueError: rows that do not fit together, or do not exist.
    """
    tensors = {name: _tensor(source, name, rows) for name, rows in names.items()}
    result = Source(source.path, source.files, tensors, source.metadata)
    result.metadata_by_file = source.metadata_by_file
    result.notes = (*source.notes, *notes)
    return result


def _tensor(source: Source, name: str, rows: Sequence[Rows]) -> StoredTensor:
    first = source.tensors[rows[0].name]
    if len(rows) == 1 and rows[0].stop - rows[0].start == _rows(first):
        return first
    parts = tuple(_extent(source.tensors[part.name], part, first, name) for part in rows)
    shape = (sum(part.stop - part.start for part in rows), *first.shape[1:])
    return JoinedTensor(first.dtype, shape, parts[0].offset, parts[0].file, parts)


def _extent(stored: StoredTensor, rows: Rows, first: TensorInfo, name: str) -> Extent:
    if (stored.dtype, stored.shape[1:]) != (first.dtype, first.shape[1:]):
        raise ValueError(f"{name!r} cannot be joined: {rows.name!r} is {stored}, and its first part is {first}")
    count = _rows(stored)
    if not 0 <= rows.start < rows.stop <= count or stored.nbytes % count:
        raise ValueError(f"{name!r} cannot be joined: {rows.name!r} has no rows {rows.start} to {rows.stop}")
    (whole,) = stored.extents
    width = stored.nbytes // count
    return Extent(whole.file, whole.offset + rows.start * width, (rows.stop - rows.start) * width)


def _rows(info: TensorInfo) -> int:
    """The length of the first dimension; a 0-dim tensor is one row."""
    return info.shape[0] if info.shape else 1
