"""What the panel on a node shows of its job: messages while the job runs, and a summary at its end."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

from comfy_execution.utils import get_executing_context
from comfyui_version import __version__ as COMFYUI_VERSION
from server import PromptServer

from ..kernels import ROUNDINGS, ErrorStatistics, Report
from ..kernels.numerics.error_statistics import step_bin_edges
from ..kernels.report.report import with_output_errors
from ..kernels.state_dict.compatibility import is_elsewhere
from .running import Prompt, is_link, running_prompt, running_prompts

EVENT = "stochastic_fp8.live"

OUTPUT = "stochastic_fp8"
"""The key of the summary among the outputs that a node reports to the page."""

FILES = "stochastic_fp8_files"
"""The key of the files that a node wrote among its outputs."""

INTERVAL = 0.1
"""Least time between two messages of a job, in seconds."""

WORST = 5
"""Layers that a summary lists by name: those with the lowest SQNR or, if calibrated, the largest output error."""

MOST_SUMMARIES = 256
"""Summaries that are remembered for runs which ComfyUI answers from its cache."""


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
        running = {prompt_id for _, prompt_id, *_ in running_prompts()}
        return [message for message in list(self._by_node.values()) if message["prompt"] in running]


last_messages = LastMessages()


class Summaries:
    """The summaries of earlier runs, by all that they were computed from."""

    def __init__(self) -> None:
        self._by_inputs: dict[str, dict[str, Any]] = {}

    def keep(self, prompt: Prompt, node: str, summary: dict[str, Any]) -> None:
        """Remember what a node of this prompt reported. The oldest are forgotten."""
        key = _inputs_key(prompt, node)
        self._by_inputs.pop(key, None)
        self._by_inputs[key] = summary
        while len(self._by_inputs) > MOST_SUMMARIES:
            del self._by_inputs[next(iter(self._by_inputs))]

    def of(self, prompt: Prompt) -> dict[str, dict[str, Any]]:
        """Node id -> summary, for the nodes that have run with the same inputs before."""
        kept = {node: self._by_inputs.get(_inputs_key(prompt, node)) for node in prompt}
        return {node: summary for node, summary in kept.items() if summary}


summaries = Summaries()


def summaries_of_prompt(prompt_id: str) -> dict[str, dict[str, Any]]:
    """Node id -> summary, for a prompt that runs or has run; empty for any other."""
    prompt = running_prompt(prompt_id)
    if prompt is None:
        history = PromptServer.instance.prompt_queue.get_history(prompt_id=prompt_id)
        prompt = history[prompt_id]["prompt"][2] if prompt_id in history else None
    return summaries.of(prompt) if prompt else {}


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
        prompt = running_prompt(identity["prompt"])
        if prompt and identity["node"] in prompt:
            summaries.keep(prompt, identity["node"], summary)
    return {OUTPUT: [summary]}


def files_output(folder: str, files: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Files that a node wrote, as part of what it reports to the page.

    folder: under output/. files: path by the name under which ComfyUI's loaders list it.
    """
    return {
        FILES: [
            {"name": name, "folder": f"output/{folder}", "bytes": path.stat().st_size} for name, path in files.items()
        ]
    }


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
        "output_error": _output_error(report),
        "steps": {"low": edges[0], "high": edges[-1], "counts": list(error.step_histogram)},
        "nearest_gain": _nearest_gain(report.recipe.rounding, error),
        "notes": [note for note in report.notes if not is_elsewhere(COMFYUI_VERSION, note)],
        "elsewhere": [note for note in report.notes if is_elsewhere(COMFYUI_VERSION, note)],
    }


def _nearest_gain(rounding: str, error: ErrorStatistics) -> float | None:
    """By how many dB nearest would be closer to the original. None where that is not known, and for other roundings
    than those that draw."""
    return error.nearest_gain if rounding in ROUNDINGS and ROUNDINGS[rounding].draw else None


def _output_error(report: Report) -> dict[str, Any] | None:
    """The predicted errors over the layers' outputs: medians, and the layers with the largest. None if unknown."""
    errors = [error for _, error in with_output_errors(report.layers)]
    if not errors:
        return None
    return {
        "chosen": median(error.chosen for error in errors),
        "nearest": median(error.nearest for error in errors),
        "worst": [{"key": layer.key, "error": error.chosen} for layer, error in report.worst_outputs(WORST)],
    }


def _inputs_key(prompt: Prompt, node: str) -> str:
    """A text that is equal for nodes with equal inputs, up to the first loader."""
    upstream: dict[str, Any] = {}
    waiting = [node]
    while waiting:
        name = waiting.pop()
        if name not in upstream and name in prompt:
            inputs = prompt[name]["inputs"]
            upstream[name] = [prompt[name]["class_type"], inputs]
            waiting += [value[0] for value in inputs.values() if is_link(value)]
    text = json.dumps([node, upstream], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity() -> dict[str, Any]:
    """The running node, its prompt, and the workflow of the page that queued it; empty outside an execution."""
    context = get_executing_context()
    if context is None:
        return {}
    workflow = next((_workflow_id(item[3]) for item in running_prompts() if item[1] == context.prompt_id), None)
    return {"node": context.node_id, "prompt": context.prompt_id, "workflow": workflow}


def _workflow_id(extra_data: dict[str, Any]) -> str | None:
    workflow = (extra_data.get("extra_pnginfo") or {}).get("workflow") or {}
    return workflow.get("id")


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal and noise else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
