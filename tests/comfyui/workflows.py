"""Example workflows (the format that ComfyUI's page saves) as prompts (the format that its server runs)."""

import json
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
PAGE_ONLY = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4  # the page leaves out such nodes; links lead through bypassed ones
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}


def read_workflow(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def to_prompt(workflow, object_info):
    """A workflow as a prompt. Raises KeyError for a node type that the server does not have."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    sources = {id_: _source(link, nodes, links) for id_, link in links.items()}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in PAGE_ONLY or node["mode"] in (MUTED, BYPASSED):
            continue
        inputs = _widget_inputs(node, object_info[node["type"]])
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _source(link, nodes, links):
    """[node id, output] where a link begins; behind bypassed nodes, whose first input of the same type counts."""
    _, origin, output, _, _, type_ = link
    node = nodes[origin]
    if node["mode"] != BYPASSED:
        return [str(origin), output]
    before = next(slot["link"] for slot in node["inputs"] if slot["type"] == type_)
    return _source(links[before], nodes, links)


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
