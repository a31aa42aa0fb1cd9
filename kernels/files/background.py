"""Work that goes on beside other work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One task at a time in a thread of its own; what it raises comes out of the next call.

    A context manager, which ends after the last task.
    """

    def __init__(self, name: str):
        self._pool = ThreadPoolExecutor(1, name)
        self._task: Future | None = None

    def run(self, function: Callable, *arguments, here: bool = False) -> None:
        """Begin a task as soon as the one before has ended. here: in this thread, for a task too small to hand over."""
        self.wait()
        if here:
            function(*arguments)
        else:
            self._task = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Until there is no task under way."""
        task, self._task = self._task, None
        if task:
            task.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, exception_type, *exception) -> None:
        try:
            if exception_type is None:
                self.wait()
        finally:
            self._pool.shutdown()
