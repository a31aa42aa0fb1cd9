"""Every example workflow opens readable on a laptop's page, runs at once, and stays in its place after the run."""

import json
from itertools import cycle

import pytest
import tiny_models
from comfyui.workflows import WORKFLOWS, read_workflow
from stochastic_fp8_pack.kernels.engine.file_job import quantize_file

FIRST = "1 Try it now"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
LAPTOP = {"width": 1440, "height": 900}
SMALLEST_TEXT = 9.95
"""Pixels on the screen. 10, less the rounding of a browser that draws text at 88.5 %."""

PAGES = (
    ("newest", "vue", "dark"),
    ("newest", "canvas", "light"),
    ("newest", "vue", "light"),
    ("bundled", "canvas", "dark"),
)
"""Front end, renderer, theme. Nodes 2.0 of ComfyUI 0.3.75 is a beta with taller rows, which no layout fits as well."""

SEEN = [(name, *page) for name, page in zip(NAMES, cycle(PAGES), strict=False)]
"""Each example on one page: its layout is the same on all."""

SLOW = ("7 Fit my memory", "canvas")
"""Not run once more: it measures every layer."""

OPEN_TEMPLATE = "app.loadGraphData(%s, true, true, %s, { openSource: 'template' }).then(() => true)"

QUICK = """(() => {
    const small = { steps: 1, seeds: 1, runs: 1, most_layers: 4, draws: 100 };
    for (const { type, widgets } of app.graph.nodes) {
        const smaller = type === "EmptySD3LatentImage" ? { width: 128, height: 128 } : small;
        for (const widget of widgets ?? []) widget.value = smaller[widget.name] ?? widget.value;
    }
})()"""

BOXES = """(() => {
    const { scale, offset } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    return Object.fromEntries(app.graph.nodes.map((node) => {
        const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
        const [x, y, width, height] = drawn
            ? [(drawn.x - canvas.x) / scale - offset[0], (drawn.y - canvas.y) / scale - offset[1],
               drawn.width / scale, drawn.height / scale]
            : node.boundingRect;
        return [node.id, [x, y, x + width, y + height]];
    }));
})()"""
"""Node id -> left, top, right, bottom with the title, in units of the graph."""

SCREEN = """(() => {
    const { scale, offset } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const bar = document.querySelector(".side-tool-bar-container, .comfyui-body-left")?.getBoundingClientRect();
    const [left, top] = [Math.max(canvas.x, bar?.right ?? 0) - canvas.x, Math.max(canvas.y, 38) - canvas.y];
    const corner = (x, y) => [x / scale - offset[0], y / scale - offset[1]];
    return [...corner(left, top), ...corner(innerWidth - canvas.x, innerHeight - canvas.y)];
})()"""
"""What is seen of the graph, in its units."""

TEXTS = """(() => {
    const texts = [];
    const visit = (element) => {
        const children = element.shadowRoot ?? element;
        for (const child of children.children) visit(child);
        const writes = [...children.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const { width, height } = element.getBoundingClientRect();
        if (!writes || !width || !height || ["TEXTAREA", "LABEL"].includes(element.tagName)) return;
        if (!element.checkVisibility({ visibilityProperty: true })) return;
        texts.push([parseFloat(getComputedStyle(element).fontSize) * app.canvas.ds.scale, element.textContent.trim()]);
    };
    document.querySelectorAll("[data-node-id], .dom-widget").forEach(visit);
    const drawing = CanvasRenderingContext2D.prototype, { fillText } = drawing;
    drawing.fillText = function (text, ...place) {
        const size = parseFloat(/([\\d.]+)px/.exec(this.font)[1]);
        texts.push([(size * this.getTransform().a) / devicePixelRatio, text]);
        return fillText.call(this, text, ...place);
    };
    app.canvas.draw(true, true);
    drawing.fillText = fillText;
    return texts;
})()"""
"""The size on the screen of every text in the nodes and on the canvas. For textareas, ComfyUI has a setting."""

CROSSINGS = """((boxes) => {
    const context = document.createElement("canvas").getContext("2d");
    context.lineWidth = 24;
    const { links, reroutes } = app.graph;
    const paths = [...(links.values?.() ?? Object.values(links)), ...(reroutes?.values() ?? [])].filter((w) => w.path);
    const under = new Set();
    for (const [id, [left, top, right, bottom]] of Object.entries(boxes))
        for (let x = left + 24; x <= right - 24; x += 17)
            for (let y = top + 14; y <= bottom - 14; y += 17)
                for (const { path } of paths) if (context.isPointInStroke(path, x, y)) under.add(id);
    return [paths.length, ...under];
})(%s)"""
"""How many wires there are, and the ids of nodes with a wire beneath: within 12 units of one of many points."""

UNLISTED = """app.graph.nodes.filter((node) => node.mode === 0).flatMap((node) => (node.widgets ?? [])
    .filter((w) => w.type === "combo" && Array.isArray(w.options.values) && !w.options.values.includes(w.value))
    .map((w) => `${node.type}: ${w.name} ${w.value}`))"""


def inside(inner, outer, slack=1):
    return all(inner[i] >= outer[i] - slack for i in (0, 1)) and all(inner[i] <= outer[i] + slack for i in (2, 3))


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def check_places(workspace, workflow):
    """Nodes do not overlap, keep within their groups and the page, and no wire runs beneath one."""
    boxes, screen = workspace.page.evaluate(BOXES), workspace.page.evaluate(SCREEN)
    titles = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}
    named = {titles[id_]: box for id_, box in boxes.items()}
    assert not {name: box for name, box in named.items() if not inside(box, screen)}, screen
    overlaps = [{a, b} for a in named for b in named if a < b and not apart(named[a], named[b])]
    assert not overlaps
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        frame = (x, y, x + width, y + height)
        assert inside(frame, screen, slack=2), group["title"]
        outside = [name for name, box in named.items() if not (apart(box, frame) or inside(box, frame))]
        assert not outside, group["title"]
    wires, *under = workspace.page.evaluate(CROSSINGS % json.dumps(boxes))
    assert wires >= len(workflow["links"])
    assert not [titles[id_] for id_ in under]


@pytest.mark.parametrize(("name", "frontend", "renderer", "theme"), SEEN)
def test_examples(workspace, name, renderer, theme):
    workspace.page.setViewportSize(LAPTOP)
    workspace.open(renderer, theme)
    workflow = read_workflow(name)
    workspace.page.evaluate(OPEN_TEMPLATE % (json.dumps(workflow), json.dumps(name)))
    workspace.page.waitForTimeout(700)  # the page lays out its elements
    assert workspace.page.evaluate(UNLISTED) == []
    small = [(round(size, 2), text) for size, text in workspace.page.evaluate(TEXTS) if size < SMALLEST_TEXT]
    assert not small
    check_places(workspace, workflow)
    if (name, renderer) == SLOW:
        return
    workspace.page.evaluate(QUICK)
    workspace.run()
    workspace.page.waitForTimeout(500)
    workspace.screenshot(f"{name} {renderer} {theme}")
    check_places(workspace, workflow)


def test_the_panel_shows_the_report(workspace):
    workspace.open()
    workspace.load(read_workflow(FIRST))
    workspace.page.evaluate(QUICK)
    workspace.run()
    shown = workspace.wait_text("Lowest SQNR")
    target = workspace.server.base / "temp" / "expected.safetensors"
    report = quantize_file(tiny_models.LANDSCAPES, target, overwrite=True)
    assert f"{report.error.sqnr:.1f} dB" in shown


@pytest.mark.parametrize("frontend", ["bundled", "newest"])
def test_templates_are_in_order(workspace):
    workspace.open()
    (listed,) = workspace.page.evaluate("app.api.getWorkflowTemplates().then(Object.values)")
    assert listed == NAMES
