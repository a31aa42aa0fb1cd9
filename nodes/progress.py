"""The progress bar and the live panel of a long job, which a user can cancel between two tensors."""

from __future__ import annotations

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

from ..kernels import ErrorStatistics
from .live import LiveJob

STEPS = 1000
"""ComfyUI sends one message a step: enough for a smooth bar, few enough not to slow the job."""


class Progress:
    """Call it with (done, total, tensor key). Raises ComfyUI's InterruptProcessingException once cancelled."""

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

    def observe(self, done: int, total: int, error: ErrorStatistics | None) -> None:
        """Layers done, layers in all, and the statistics of the last one."""
        self._live.layer(done, total, error)
