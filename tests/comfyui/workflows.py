"""Example workflows (the format that ComfyUI's page saves) as prompts (the format that its server runs)."""

import json
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
PAGE_ONLY = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}


def read_workflow(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def to_prompt(workflow, object_info):
    """A workflow as a prompt. Raises KeyError for a node type that the server does not have."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        inputs = _widget_inputs(node, object_info[node["type"]])
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widget_inputs(node, info):
    """The values of a node's widgets by name; the page stores them in order, what follows a seed included.

    A workflow from before a widget was added has no value for it: the widget then has its default.
    """
    values = iter(node["widgets_values"])
    inputs = {}
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            if not (isinstance(type_, list) or type_ in WIDGET_TYPES):
                continue
            inputs[name] = next(values, options[0].get("default") if options else None)
            default = type_ == "INT" and name in SEEDS
            if options and options[0].get("control_after_generate", default):
                next(values)
    leftover = list(values)
    if leftover:
        raise ValueError(f"node {node['id']} ({node['type']}) stores values of no widget: {leftover}")
    return inputs


def replace_models(prompt, names):
    """Replace the model names of an example by those of the tiny ones: the only change that a test makes."""
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, str) and value.endswith(".safetensors"):
                node["inputs"][name] = names[value]
    return prompt
