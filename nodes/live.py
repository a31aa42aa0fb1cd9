"""What the panel in the page shows of a job: messages while it runs, and the summary at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..kernels import ErrorStatistics, Report
from ..kernels.numerics.error_statistics import step_bin_edges

EVENT = "stochastic_fp8.live"
OUTPUT = "stochastic_fp8"
"""The key of a summary among a node's outputs for the page."""

INTERVAL = 0.1
"""Seconds between two messages, at least."""

WORST = 5

_states: dict[str, dict] = {}
"""Node -> its last message in the running prompt, for a page that is loaded in the middle of it."""


class LiveJob:
    """Tells the page that queued the running node how far it is. Does nothing outside of ComfyUI's execution."""

    def __init__(self) -> None:
        self._state = _identity()
        self._started = time.monotonic()
        self._sent = -math.inf
        self._signal = self._noise = 0.0
        if self._state and not _same_prompt(self._state):
            _states.clear()

    def tensor(self, done: int, total: int, key: str) -> None:
        """Bytes done, bytes in all, and the tensor that comes next."""
        self._send({"done": done, "total": total, "key": key}, last=done == total)

    def layer(self, done: int, total: int, error: ErrorStatistics | None) -> None:
        """Layers done, layers in all, and the statistics of the last one."""
        if error is not None:
            self._signal += error.sum_squared
            self._noise += error.sum_squared_error
        self._state |= {"layer": done, "layers": total, "sqnr": _decibels(self._signal, self._noise)}

    def _send(self, news: dict, last: bool) -> None:
        now = time.monotonic()
        if "node" not in self._state or (now - self._sent < INTERVAL and not last):
            return
        self._sent = now
        self._state |= {**news, "seconds": now - self._started}
        _states[self._state["node"]] = dict(self._state)
        server = PromptServer.instance
        server.send_sync(EVENT, dict(self._state), server.client_id)


def summary_output(report: Report) -> dict[str, list]:
    """The part of a node's outputs for the page that its panel reads."""
    summary = summarize(report)
    identity = _identity()
    if identity:
        _states[identity["node"]] = {**identity, "summary": summary}
    return {OUTPUT: [summary]}


def summarize(report: Report) -> dict:
    """A report's main numbers, as JSON: what is not finite is None."""
    error = report.error or ErrorStatistics()
    edges = step_bin_edges()
    return {
        "source": report.source,
        "format": report.recipe.format,
        "rounding": report.recipe.rounding,
        "layers": len(report.layers),
        "kept": len(report.kept),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "count": error.count,
        "sqnr": _finite(error.sqnr),
        "bias": error.bias,
        "relative_rmse": error.relative_rmse,
        "saturated": error.saturated,
        "flushed": error.flushed,
        "worst": [{"key": layer.key, "sqnr": _finite(layer.error.sqnr)} for layer in report.worst(WORST)],
        "steps": {"low": edges[0], "high": edges[-1], "counts": list(error.step_histogram)},
        "notes": list(report.notes),
    }


def live_states() -> list[dict]:
    """The last message of each node of the prompt that is running now."""
    running = {prompt_id for _, prompt_id, *_ in _running()}
    return [state for state in list(_states.values()) if state["prompt"] in running]


def _identity() -> dict:
    """The node that runs now, its prompt and the page's workflow; empty outside of an execution."""
    context = get_executing_context()
    if context is None:
        return {}
    workflow = next((_workflow_id(item[3]) for item in _running() if item[1] == context.prompt_id), None)
    return {"node": context.node_id, "prompt": context.prompt_id, "workflow": workflow}


def _same_prompt(state: dict) -> bool:
    return all(known["prompt"] == state["prompt"] for known in _states.values())


def _running() -> Sequence[tuple]:
    return PromptServer.instance.prompt_queue.get_current_queue()[0]


def _workflow_id(extra_data: dict) -> str | None:
    workflow = (extra_data.get("extra_pnginfo") or {}).get("workflow") or {}
    return workflow.get("id")


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal and noise else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
