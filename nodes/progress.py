"""The progress bar, the live panel and the time left of a long job, which the user can cancel between two tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.utils
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..kernels import ErrorStatistics, display
from .live import LiveJob

STEPS = 1000
"""Steps of the progress bar. ComfyUI sends one message per step: these are enough for a smooth bar."""

TEXT_INTERVAL = 0.5
"""Least time between two texts on the node, in seconds."""


class TimeLeft:
    """What a job does, and the time left, as text on the running node."""

    def __init__(self) -> None:
        self._started = self._shown = time.monotonic()

    def show(self, text: str, done: int, total: int) -> None:
        """Show a text with the time left. The parts of the job, `done` of `total`, take about as long as each other."""
        now = time.monotonic()
        if done and now - self._shown >= TEXT_INTERVAL:
            self._shown = now
            left = (now - self._started) / done * max(total - done, 0)
            show_text(f"{text}\n{display.seconds(left)} left")

    def finish(self, text: str) -> None:
        """Show a last text: what was done, and how long it took."""
        show_text(f"{text} in {display.seconds(time.monotonic() - self._started)}")


def show_text(text: str) -> None:
    """Show a text on the running node. Does nothing outside an execution."""
    context = get_executing_context()
    if context is not None and PromptServer.instance.client_id is not None:
        PromptServer.instance.send_progress_text(text, context.node_id, PromptServer.instance.client_id)


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
def one_bar(count: int, name: str) -> Iterator[Parts]:
    """Show the bars that ComfyUI makes in this block as one, which each of `count` equal parts moves on, and the time
    left.

    name: what a part is, such as "run". Set `part` of the result when the next part starts.
    """
    shown, parts, left = comfy.utils.PROGRESS_BAR_HOOK, Parts(), TimeLeft()

    def show(value, total, *further, **named):
        shown(parts.part * total + value, count * total, *further, **named)
        left.show(f"{name} {parts.part + 1} of {count}", parts.part * total + value, count * total)

    if shown is not None:
        comfy.utils.set_progress_bar_global_hook(show)
    try:
        yield parts
        left.finish(display.count(count, name))
    finally:
        comfy.utils.set_progress_bar_global_hook(shown)
