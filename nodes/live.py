"""What the panel on a node shows of its job: messages while the job runs, and a summary at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..kernels import ErrorStatistics, Report
from ..kernels.numerics.error_statistics import step_bin_edges

EVENT = "stochastic_fp8.live"

OUTPUT = "stochastic_fp8"
"""The key of the summary among the outputs that a node reports to the page."""

INTERVAL = 0.1
"""Least time between two messages of a job, in seconds."""

WORST = 5
"""Layers that a summary lists by name, those with the lowest SQNR."""


class LastMessages:
    """The last message of each node in the newest prompt, for a page that reloads while it runs."""

    def __init__(self) -> None:
        self._by_node: dict[str, dict[str, Any]] = {}

    def keep(self, message: dict[str, Any]) -> None:
        """message: what was sent, with the `node` and the `prompt` it belongs to."""
        if any(known["prompt"] != message["prompt"] for known in self._by_node.values()):
            self._by_node.clear()
        self._by_node[message["node"]] = message

    def of_running_prompts(self) -> list[dict[str, Any]]:
        running = {prompt_id for _, prompt_id, *_ in _running()}
        return [message for message in list(self._by_node.values()) if message["prompt"] in running]


last_messages = LastMessages()


class LiveJob:
    """Sends the progress of the running node to the page that queued it. Does nothing outside an execution."""

    def __init__(self) -> None:
        self._state = _identity()
        self._started = time.monotonic()
        self._sent = -math.inf
        self._signal = self._noise = 0.0

    def tensor(self, done: int, total: int, key: str) -> None:
        """Bytes done, bytes in total, and the next tensor."""
        self._send({"done": done, "total": total, "key": key}, last=done == total)

    def layer(self, done: int, total: int, error: ErrorStatistics | None) -> None:
        """Layers done, layers in total, and the error of the last one. Sent with the next tensor."""
        if error is not None:
            self._signal += error.sum_squared
            self._noise += error.sum_squared_error
        self._state |= {"layer": done, "layers": total, "sqnr": _decibels(self._signal, self._noise)}

    def _send(self, news: dict[str, Any], last: bool) -> None:
        now = time.monotonic()
        if "node" not in self._state or (now - self._sent < INTERVAL and not last):
            return
        self._sent = now
        self._state |= {**news, "seconds": now - self._started}
        message = dict(self._state)
        last_messages.keep(message)
        server = PromptServer.instance
        server.send_sync(EVENT, message, server.client_id)


def summary_output(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The summary of a report as part of what a node reports to the page."""
    summary = summarize(report)
    identity = _identity()
    if identity:
        last_messages.keep({**identity, "summary": summary})
    return {OUTPUT: [summary]}


def summarize(report: Report) -> dict[str, Any]:
    """A report's main numbers as JSON. Numbers that are not finite are None."""
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
        "worst": [
            {"key": layer.key, "sqnr": _finite(layer.error.sqnr)} for layer in report.worst(WORST) if layer.error
        ],
        "steps": {"low": edges[0], "high": edges[-1], "counts": list(error.step_histogram)},
        "notes": list(report.notes),
    }


def _identity() -> dict[str, Any]:
    """The running node, its prompt, and the workflow of the page that queued it; empty outside an execution."""
    context = get_executing_context()
    if context is None:
        return {}
    workflow = next((_workflow_id(item[3]) for item in _running() if item[1] == context.prompt_id), None)
    return {"node": context.node_id, "prompt": context.prompt_id, "workflow": workflow}


def _running() -> Sequence[tuple]:
    """The prompts that ComfyUI is executing: (number, prompt id, prompt, extra data, ...)."""
    return PromptServer.instance.prompt_queue.get_current_queue()[0]


def _workflow_id(extra_data: dict[str, Any]) -> str | None:
    workflow = (extra_data.get("extra_pnginfo") or {}).get("workflow") or {}
    return workflow.get("id")


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal and noise else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
