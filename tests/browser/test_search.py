"""The search box of the newest front end finds the right node. It ranks by display name and id, then by aliases."""

import json

import pytest

PLACES = 2
"""Places of the list in which the node must be."""

QUANTIZE, FILE, TEXT_ENCODER = (f"StochasticFP8{name}" for name in ("Quantize", "QuantizeFile", "QuantizeTextEncoder"))

BY_NAME = {
    "fp8": QUANTIZE,
    "quantize": QUANTIZE,
    "stochastic": QUANTIZE,
    "convert file": FILE,
    "convert to fp8": FILE,
    "quantize file": FILE,
}
BY_ALIAS = {"compress": QUANTIZE, "smaller model": QUANTIZE, "vram": QUANTIZE, "t5 fp8": TEXT_ENCODER}
"""ComfyUI 0.3.75 has no aliases."""

STORE = 'document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s.get("%s")'
SEARCH = f"""
    {STORE % "nodeDef"}.nodeSearchService.searchNode(%s)
        .filter((node) => node.python_module !== "custom_nodes.test-nodes").map((node) => node.name)
"""


@pytest.mark.parametrize("frontend", ["newest"])
def test_terms_find_the_node(workspace, frontend):
    workspace.open()
    workspace.page.wait(f"{STORE % 'nodeFrequency'}?.isLoaded")  # often used nodes come first
    has_aliases = "search_aliases" in workspace.server.object_info(QUANTIZE)
    terms = BY_NAME | (BY_ALIAS if has_aliases else {})
    found = {term: workspace.page.evaluate(SEARCH % json.dumps(term)) for term in (*terms, "convert")}
    assert {term: found[term][:8] for term, node in terms.items() if node not in found[term][:PLACES]} == {}
    assert FILE in found["convert"][:8]  # after nodes of ComfyUI that begin with the word and are often used
