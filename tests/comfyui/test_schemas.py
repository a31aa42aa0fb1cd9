"""What users and saved workflows depend on: every node's id, inputs and outputs, its tooltips and its help page.

    UPDATE_SCHEMAS=1 make test PYTEST_ARGS="tests/comfyui/test_schemas.py"

writes schemas.json anew. Look at the difference before you commit it.
"""

import difflib
import json
import os
import re
from pathlib import Path

import pytest
from comfyui.server import PACK_ROOT

SNAPSHOT = Path(__file__).with_name("schemas.json")

MACHINE_DEPENDENT = {"calibration_name", "device", "file", "sampler_name", "scheduler"}
"""Inputs whose options, and so their defaults, depend on the machine or on ComfyUI's version."""

RULES = f"""
The nodes differ from {SNAPSHOT.name}. Saved workflows store widget values by position and links by slot, so only
appending is allowed: new inputs and outputs come last, with a default that keeps the old behaviour. Never rename,
remove or reorder. A list of options may lose some only if the node's validate_inputs still accepts them. If you only
appended, regenerate the file with
UPDATE_SCHEMAS=1 make test PYTEST_ARGS="tests/comfyui/test_schemas.py" and commit it.
"""


@pytest.fixture(scope="module")
def nodes(comfyui):
    """/object_info of the pack's nodes, by id."""
    return {name: info for name, info in comfyui.object_info().items() if name.startswith("StochasticFP8")}


def inputs_of(info):
    """(name, type, options, required) of each input in order. Older versions give a combo's options as its type."""
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, ()):
            kind, *rest = info["input"][group][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                kind, options["options"] = "COMBO", kind
            yield name, kind, options, group == "required"


def input_schema(name, kind, options, required):
    kept = (
        ("min", "max", "multiline") if name in MACHINE_DEPENDENT else ("default", "min", "max", "multiline", "options")
    )
    schema = {"name": name, "type": kind, "required": required}
    return schema | {key: options[key] for key in kept if options.get(key) is not None}


def schema(info):
    """The part of a node's description that does not depend on the machine or on ComfyUI's version."""
    outputs = zip(info["output_name"], info["output"], info["output_is_list"], strict=True)
    return {
        "display_name": info["display_name"],
        "category": info["category"],
        "output_node": info["output_node"],
        "inputs": [input_schema(*each) for each in inputs_of(info)],
        "outputs": [{"name": name, "type": kind, "is_list": is_list} for name, kind, is_list in outputs],
    }


def as_text(schemas):
    """JSON with one line per input and output, so that a difference reads well."""
    text = json.dumps(schemas, indent=1, ensure_ascii=False)
    one_line = re.compile(r"\{\n {4}([^{}]*?)\n {3}\}")
    return one_line.sub(lambda found: "{" + re.sub(r"\n\s*", " ", found[1]) + "}", text) + "\n"


def test_schemas_are_the_committed_ones(nodes):
    current = {name: schema(info) for name, info in nodes.items()}
    if os.environ.get("UPDATE_SCHEMAS"):
        SNAPSHOT.write_text(as_text(current))
    committed, found = (text.splitlines() for text in (SNAPSHOT.read_text(), as_text(current)))
    assert found == committed, "\n".join([RULES, *difflib.unified_diff(committed, found, "committed", "found", n=1)])


def test_names_differ_when_they_are_cut_off(nodes):
    """The page's list of nodes shows about this many characters."""
    assert len({info["display_name"][:20] for info in nodes.values()}) == len(nodes)


@pytest.mark.parametrize("name", ["keep", "only"])
def test_boxes_for_patterns_have_hints(nodes, name):
    hint = nodes["StochasticFP8Quantize"]["input"]["optional"][name][1]
    for text in (hint["placeholder"], hint["display_name"]):
        assert text.startswith(f"{name} (one pattern per line)")
        assert "blocks." in text


def test_calibrating_is_advised_with_one_number(comfyui, nodes):
    """The README's figures are of as many images."""
    page = comfyui.get("/extensions/stochastic-fp8/docs/StochasticFP8Calibrate.md").decode()
    node = nodes["StochasticFP8Calibrate"]
    runs = node["input"]["required"]["runs"][1]["tooltip"]
    for text in (runs, node["description"], page, (PACK_ROOT / "README.md").read_text()):
        assert "Render 32 images" in text


def test_rare_inputs_are_behind_a_button(comfyui, nodes):
    if comfyui.version < (0, 33):
        pytest.skip("ComfyUI 0.3.75 and 0.8 show every input")
    shown = [name for name, _, options, _ in inputs_of(nodes["StochasticFP8Quantize"]) if not options.get("advanced")]
    assert shown == ["model", "format", "rounding", "layers", "keep", "calibration", "size_limit"]


def test_every_node_is_described(nodes):
    assert [name for name, info in nodes.items() if len(info["description"]) < 30] == []


def test_every_input_and_output_has_a_tooltip(nodes):
    missing = []
    for node, info in nodes.items():
        missing += [f"{node}, input {name}" for name, _, options, _ in inputs_of(info) if not options.get("tooltip")]
        tooltips = info.get("output_tooltips") or [""] * len(info["output"])
        outputs = zip(info["output_name"], tooltips, strict=True)
        missing += [f"{node}, output {name}" for name, tooltip in outputs if not tooltip]
    assert not missing, "\n".join(missing)


def test_help_pages_name_every_input_and_output(comfyui, nodes):
    missing = []
    for node, info in nodes.items():
        page = comfyui.get(f"/extensions/stochastic-fp8/docs/{node}.md").decode()
        names = [name for name, *_ in inputs_of(info)] + info["output_name"]
        missing += [f"{node}.md: {name}" for name in names if not re.search(rf"\b{re.escape(name)}\b", page)]
    assert not missing, "\n".join(missing)
