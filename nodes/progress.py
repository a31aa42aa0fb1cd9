"""The progress bar and the live panel of a long job, which the user can cancel between two tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.utils
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

from ..kernels import ErrorStatistics
from .live import LiveJob

STEPS = 1000
"""Steps of the progress bar. ComfyUI sends one message per step: these are enough for a smooth bar."""


class JobProgress:
    """Shows a job's progress, and stops it when the user cancels.

    Call it with (bytes done, bytes in total, key of the next tensor). Raises ComfyUI's InterruptProcessingException
    after a cancel.
    """

    def __init__(self) -> None:
        self._bar = ProgressBar(STEPS)
        self._shown = -1
        self._live = LiveJob()

    def __call__(self, done: int, total: int, key: str) -> None:
        throw_exception_if_processing_interrupted()
        step = STEPS * done // total if total else STEPS
        if step != self._shown:
            self._bar.update_absolute(step)
            self._shown = step
        self._live.tensor(done, total, key)

    def layer(self, done: int, total: int, error: ErrorStatistics | None) -> None:
        """Layers done, layers in total, and the error of the last one."""
        self._live.layer(done, total, error)


@dataclass
class Parts:
    """The parts of a job, each with a progress bar of its own."""

    part: int = 0
    """The one that runs, from 0."""


@contextmanager
def one_bar(count: int) -> Iterator[Parts]:
    """Show the bars that ComfyUI makes in this block as one, which each of `count` equal parts moves on.

    Set `part` of the result when the next part starts.
    """
    shown, parts = comfy.utils.PROGRESS_BAR_HOOK, Parts()

    def show(value, total, *further, **named):
        shown(parts.part * total + value, count * total, *further, **named)

    if shown is not None:
        comfy.utils.set_progress_bar_global_hook(show)
    try:
        yield parts
    finally:
        comfy.utils.set_progress_bar_global_hook(shown)
