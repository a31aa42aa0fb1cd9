"""ComfyUI's page as a user sees it: nodes, their panels, the queue."""

import json

import pytest
from comfyui.server import PACK_ROOT

SCREENSHOTS = PACK_ROOT / ".build" / "screenshots"
AXE = PACK_ROOT / ".build" / "node" / "node_modules" / "axe-core" / "axe.min.js"

READY = """
    window.app?.vueAppReady && app.extensionManager?.workflow?.activeWorkflow?.isLoaded
    && LiteGraph.registered_node_types.StochasticFP8Quantize
"""
ADD_NODE = """(() => {
    const { type, pos, widgets } = %s;
    const node = LiteGraph.createNode(type);
    node.pos = pos;
    app.graph.add(node);
    for (const widget of node.widgets ?? []) if (widget.name in widgets) widget.value = widgets[widget.name];
    return node.id;
})()"""
CHANGED = """(() => {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
    (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
})()"""
SETTINGS = {
    "LiteGraph.Canvas.MaximumFps": 15,  # drawing takes most of the processor's time
    "Comfy.VueNodes.AutoScaleLayout": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Canvas.SelectionToolbox": False,
}
EMPTY = {"version": 0.4, "last_node_id": 0, "last_link_id": 0, "nodes": [], "links": []}
RENDERERS = ("canvas", "vue")
PAGES = (
    ("bundled", "canvas", "dark"),
    ("bundled", "vue", "light"),
    ("newest", "canvas", "light"),
    ("newest", "vue", "dark"),
)
"""Front end, renderer, theme: each pair of two values once."""

each_page = pytest.mark.parametrize(("frontend", "renderer", "theme"), PAGES)
each_renderer = pytest.mark.parametrize(("frontend", "renderer"), [page[:2] for page in PAGES])


class Workspace:
    """``page``: the Browser. Methods that take a node take its id."""

    def __init__(self, page, server):
        self.page, self.server = page, server

    def open(self, renderer="canvas", theme="dark"):
        """Show an empty graph and clear the server's caches. Loads the page if necessary."""
        self.server.free()
        if not self.page.evaluate("location.href").startswith(self.server.url):
            self.page.goto(self.server.url)
            self.page.wait(READY)
        settings = {"Comfy.VueNodes.Enabled": renderer == "vue", "Comfy.ColorPalette": theme, **SETTINGS}
        self.page.evaluate(f"""Promise.all(Object.entries({json.dumps(settings)}).map(
            ([name, value]) => app.extensionManager.setting.set(name, value))).then(() => true)""")
        self.clear()
        return self

    def clear(self):
        """Show an empty workflow at 100 %."""
        self.page.evaluate(f"app.loadGraphData({{ id: crypto.randomUUID(), ...{json.dumps(EMPTY)} }}).then(() => true)")
        self.page.evaluate("app.canvas.ds.reset()")

    def reload(self):
        self.page.reload()
        self.page.wait(READY)

    def close(self):
        """Clean up for the next test, and fail if our files caused an error."""
        self.server.interrupt()
        self.clear()
        errors, _ = self.page.take_log()
        assert not errors, "\n".join(errors)

    # --- the graph

    def add(self, type_, pos=(100, 200), **widgets):
        """Add a node. Returns its id."""
        return self.page.evaluate(ADD_NODE % json.dumps({"type": type_, "pos": pos, "widgets": widgets}))

    def connect(self, source, output, target, name):
        """Link the output of that index to the input of that name."""
        self.page.evaluate(
            f"(() => {{ const target = {self._node(target)};"
            f"{self._node(source)}.connect({output}, target, target.findInputSlot({json.dumps(name)})); }})()"
        )

    def node(self, node, expression):
        """The value of ``node.expression`` in the page."""
        return self.page.evaluate(f"{self._node(node)}.{expression}")

    def changed(self):
        """Let ComfyUI notice changes, as it does after a click or a key."""
        self.page.evaluate(CHANGED)

    def queue(self):
        self.page.evaluate("void app.queuePrompt(0)")

    def run(self):
        """Queue the graph and wait for its end."""
        self.page.evaluate("""new Promise((resolve, reject) => {
            const once = { once: true };
            app.api.addEventListener("execution_success", resolve, once);
            app.api.addEventListener("execution_error", ({ detail }) => reject(detail.exception_message), once);
            app.api.addEventListener("execution_interrupted", () => reject("interrupted"), once);
            void app.queuePrompt(0);
        }).then(() => true)""")

    def load(self, workflow):
        self.page.evaluate(f"app.loadGraphData({json.dumps(workflow)}).then(() => true)")

    @staticmethod
    def _node(node):
        return f"app.graph.getNodeById({json.dumps(node)})"

    # --- what is in it

    def find(self, selector, kind="panel", index=0):
        """A part of the index-th panel or slider."""
        return self.page.locator(f".stochastic_fp8_{kind} >> nth={index} >> {selector}")

    def wait_text(self, text, kind="panel", index=0):
        """Wait until the visible part of a panel contains a text. Returns everything that it shows."""
        shown = f"[...document.querySelectorAll('.stochastic_fp8_{kind}')][{index}]?.shadowRoot.querySelector('.frame')"
        self.page.wait(f"{shown}?.innerText.includes({json.dumps(text)})")
        return self.page.evaluate(f"{shown}.innerText")

    def screenshot(self, name):
        self.page.screenshot({"path": str(SCREENSHOTS / f"{name}.png")})

    def violations(self, kind="panel"):
        """The rules of axe-core that our elements break, each with its elements."""
        self.page.addScriptTag({"path": str(AXE)})
        return self.page.evaluate(f"""axe.run({{ include: [".stochastic_fp8_{kind}"] }}).then(({{ violations }}) =>
            violations.map(({{ id, nodes }}) => [id, ...nodes.map(({{ target }}) => JSON.stringify(target))]))""")
