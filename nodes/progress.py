"""The progress bar and the live panel of a long job, which the user can cancel between two tensors."""

from __future__ import annotations

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
