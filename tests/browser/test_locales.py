"""The page in Chinese: names, inputs and help of a node, and its panel."""

import pytest
from browser.workspace import READY
from tools import locales

NODE = "StochasticFP8Quantize"


@pytest.fixture
def chinese(workspace):
    """The page in Chinese. Names of nodes are translated while the page loads."""
    workspace.server.post("/settings/Comfy.Locale", "zh")
    workspace.page.goto(workspace.server.url)
    workspace.page.wait(READY)
    yield workspace
    workspace.server.post("/settings/Comfy.Locale", "en")
    workspace.server.post("/settings/Comfy.RightSidePanel.IsOpen", False)  # the help was shown there
    workspace.reload()


@pytest.mark.parametrize("frontend", ["newest"])
def test_node_is_chinese(chinese):
    """Front ends before 1.33, such as that of ComfyUI 0.3.75, forget names and tooltips: there, only the help page and
    the panel are translated."""
    words = locales.read_files("zh")["nodeDefs.json"][NODE]
    chinese.open("vue")
    node = chinese.add(NODE)
    assert chinese.node(node, "title") == words["display_name"]
    assert chinese.node(node, "inputs.find(({ name }) => name === 'layers').localized_name") == "层"
    assert chinese.node(node, "outputs[1].localized_name") == "报告"
    chinese.wait_text(locales.read_panel_texts()["zh"]["plan"])

    chinese.page.evaluate("app.extensionManager.setting.set('Comfy.Canvas.SelectionToolbox', true).then(() => true)")
    chinese.page.evaluate(f"app.canvas.selectNode(app.graph.getNodeById({node}))")
    chinese.page.locator("[data-testid=info-button]").click()
    help_page = "document.querySelector('.node-help-content')?.innerText ?? ''"
    chinese.page.wait(f"{help_page}.includes('仅量化的层 (only)')")
    assert "<!--" not in chinese.page.evaluate(help_page)
    chinese.screenshot("chinese")
