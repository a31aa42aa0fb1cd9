"""The prompts that ComfyUI is executing, and the file that a node's model was loaded from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import folder_paths
from comfy_execution.utils import get_executing_context
from server import PromptServer

import nodes as comfy_nodes

from .demo import MODEL_FILE, StochasticFP8DemoModel

Prompt = dict[str, dict[str, Any]]
"""A prompt in ComfyUI's API format: node id -> its class_type and inputs."""


def running_prompts() -> Sequence[tuple]:
    """(number, prompt id, prompt, extra data, ...) of each."""
    return PromptServer.instance.prompt_queue.get_current_queue()[0]


def running_prompt(prompt_id: str) -> Prompt | None:
    return next((item[2] for item in running_prompts() if item[1] == prompt_id), None)


def is_link(value: Any) -> bool:
    """Whether an input of a prompt is [node id, index of the output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def source_name(input: str, kind: str) -> str | None:
    """The name, without folder, of the file behind an input of the running node.

    kind: the type of the input, such as "MODEL". Several files of one loader are joined by " + ". None outside an
    execution, and where no loader names a file.
    """
    context = get_executing_context()
    prompt = running_prompt(context.prompt_id) if context else None
    if context is None or prompt is None or context.node_id not in prompt:
        return None
    link, seen = prompt[context.node_id]["inputs"].get(input), set()
    while is_link(link) and link[0] in prompt and link[0] not in seen:
        seen.add(link[0])
        entry = prompt[link[0]]
        link = _upstream(prompt, entry, kind)
        if link is None:
            return _loaded_file(entry, kind)
    return None


def _upstream(prompt: Prompt, entry: dict[str, Any], kind: str) -> list[Any] | None:
    """A node's first input of this type, or else of any type; None for a loader."""
    links = [value for value in entry["inputs"].values() if is_link(value)]
    return next((link for wanted in (kind, "*") for link in links if _output_type(prompt, link) == wanted), None)


def _output_type(prompt: Prompt, link: list[Any]) -> str | None:
    """The type of the output that a link comes from; None for a node that is not installed, or makes no such output,
    and for a list of choices."""
    made = comfy_nodes.NODE_CLASS_MAPPINGS.get(prompt.get(link[0], {}).get("class_type"))
    types = getattr(made, "RETURN_TYPES", ())
    found = types[link[1]] if 0 <= link[1] < len(types) else None
    return found if isinstance(found, str) else None


def _loaded_file(entry: dict[str, Any], kind: str) -> str | None:
    """The names of model files among a loader's inputs; of a MODEL, the first."""
    if entry["class_type"] == StochasticFP8DemoModel.__name__:
        return MODEL_FILE
    endings = (*folder_paths.supported_pt_extensions, ".gguf")
    files = [value for value in entry["inputs"].values() if isinstance(value, str) and value.lower().endswith(endings)]
    names = [file.replace("\\", "/").rpartition("/")[2] for file in files]
    return " + ".join(names if kind == "CLIP" else names[:1]) or None
