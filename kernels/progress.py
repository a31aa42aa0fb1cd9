"""Progress of a job over tensors, counted in bytes."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int, int, str], None]
"""progress(bytes done, bytes in total, tensor key). An exception raised in it cancels the job."""


class Meter:
    """Calls a ProgressCallback before each tensor, and once more when everything is done."""

    def __init__(self, total: int, callback: ProgressCallback | None = None):
        """total: bytes of all tensors; a tensor that is read twice counts twice."""
        self._total, self._done, self._callback = total, 0, callback

    def start(self, key: str, nbytes: int) -> None:
        """The next tensor has `nbytes` bytes."""
        if self._callback:
            self._callback(self._done, self._total, key)
        self._done += nbytes

    def finish(self) -> None:
        """All tensors are done: the last moment at which the callback can cancel the job."""
        if self._callback:
            self._callback(self._total, self._total, "")
