"""A worker thread for one task at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """Runs one task at a time in a thread of its own. An exception of a task is raised by the next call.

    A context manager, which waits for the last task.
    """

    def __init__(self, name: str):
        self._pool = ThreadPoolExecutor(1, name)
        self._task: Future[Any] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, here: bool = False) -> None:
        """Wait for the previous task, then start this one. here: run it in the calling thread, for a short task."""
        self.wait()
        if here:
            function(*arguments)
        else:
            self._task = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Wait for the running task, if any."""
        task, self._task = self._task, None
        if task:
            task.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, exception: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if exception_type is None:
                self.wait()
        finally:
            self._pool.shutdown()
