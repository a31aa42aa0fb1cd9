"""The panel of the quantize nodes: plan, run, reload, copies and subgraphs."""

import json

import pytest
import tiny_models
from browser.workspace import each_page, each_renderer
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.moments import Calibration
from stochastic_fp8_pack.kernels.calibration.sensitivity import LayerEffect, RoundingErrors, Sensitivity
from stochastic_fp8_pack.kernels.engine.file_job import plan_file, quantize_file

PANEL = "document.querySelector('.stochastic_fp8_panel').shadowRoot"
LIVE_MESSAGES = """(() => {
    window.liveMessages = [];
    app.api.addEventListener("stochastic_fp8.live", ({ detail }) => liveMessages.push(detail));
})()"""

COUNT_LISTENERS = """(() => {
    const { addEventListener } = EventTarget.prototype;
    window.listenersAdded = { inside: 0, outside: 0 };
    EventTarget.prototype.addEventListener = function (...args) {
        const ours = new Error().stack.includes("stochastic-fp8");
        if (ours) listenersAdded[this instanceof Element && !document.contains(this) ? "inside" : "outside"] += 1;
        return addEventListener.apply(this, args);
    };
})()"""


def add_quantize(workspace, file="tiny.safetensors", **widgets):
    """Load Diffusion Model -> Stochastic FP8 -> Save Scaled FP8 Model; the id of the middle one."""
    loader = workspace.add("UNETLoader", (100, 150), unet_name=file)
    quantize = workspace.add("StochasticFP8Quantize", (400, 150), **widgets)
    save = workspace.add("StochasticFP8Save", (820, 150))
    workspace.connect(loader, 0, quantize, "model")
    workspace.connect(quantize, 0, save, "model")
    return quantize


def add_file(workspace, file="long.safetensors"):
    return workspace.add("StochasticFP8QuantizeFile", (400, 150), file=f"diffusion_models/{file}", overwrite=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The report that the library gives for a file like the one that the node's model comes from."""
    folder = tmp_path_factory.mktemp("expected")
    return quantize_file(tiny_models.write_sd3(folder / "tiny.safetensors"), folder / "out.safetensors")


@each_page
def test_plan_then_run(workspace, expected, renderer, theme):
    workspace.open(renderer, theme)
    add_quantize(workspace)
    assert "13" in workspace.wait_text("2.54\u00a0MB → 1.90\u00a0MB (−25 %)")
    assert workspace.violations() == []
    workspace.screenshot(f"plan_{renderer}_{theme}")

    workspace.run()
    shown = workspace.wait_text("Lowest SQNR")
    assert f"{expected.error.sqnr:.1f} dB" in shown
    assert "2.54\u00a0MB → 1.90\u00a0MB" in shown
    assert "13 layers to float8_e4m3fn, stochastic; 38 tensors kept" in shown
    assert [layer.key in shown for layer in expected.worst(5)] == [True] * 5
    assert f"Nearest would be about {expected.error.nearest_gain:.1f} dB closer" in shown
    assert workspace.violations() == []
    workspace.screenshot(f"run_{renderer}_{theme}")


@each_renderer
def test_a_click_sets_nearest(workspace, expected, renderer):
    workspace.open(renderer)
    quantize = add_quantize(workspace)
    workspace.run()
    workspace.wait_text("Nearest would be about")
    workspace.find("button >> text=Use nearest").click()
    workspace.wait_text("Rounding is set to nearest. Run again.")
    assert workspace.node(quantize, "widgets.find(({ name }) => name === 'rounding').value") == "nearest"
    if renderer == "vue":
        assert "nearest" in workspace.page.locator(f"[data-node-id='{quantize}']").innerText()
    workspace.run()
    shown = workspace.wait_text("float8_e4m3fn, nearest")
    assert "Nearest would be" not in shown
    sqnr = float(shown.split("SQNR\n")[1].split(" dB")[0])
    assert sqnr == pytest.approx(expected.error.sqnr + expected.error.nearest_gain, abs=0.1)


@each_renderer
def test_the_wheel_and_the_middle_button_reach_the_canvas(workspace, renderer):
    workspace.open(renderer)
    add_quantize(workspace)
    workspace.wait_text("2.54\u00a0MB")
    view = "[app.canvas.ds.scale, ...app.canvas.ds.offset]"
    tabs = workspace.find("[role=tablist]").boundingBox()
    x, y = tabs["x"] + tabs["width"] - 10, tabs["y"] + 10
    workspace.page.mouse.move(x, y)
    workspace.page.mouse.wheel(0, 100)
    workspace.page.wait("app.canvas.ds.scale < 1")
    workspace.page.evaluate("app.canvas.ds.reset()")
    workspace.page.evaluate("app.canvas.draw(true, true)")
    workspace.page.mouse.down({"button": "middle"})
    workspace.page.mouse.move(x + 30, y + 40, {"steps": 3})
    workspace.page.mouse.up({"button": "middle"})
    assert workspace.page.evaluate(view) == [1, 30, 40]

    panel = workspace.find("[role=tabpanel]:not([hidden])")
    panel.click({"position": {"x": 5, "y": 5}})  # newer pages scroll only what has the focus
    workspace.page.mouse.wheel(0, 40)
    workspace.page.wait(f"{PANEL}.querySelector('[role=tabpanel]:not([hidden])').scrollTop === 40")
    assert workspace.page.evaluate(view)[0] == 1


@each_renderer
def test_the_sockets_have_colours_in_every_theme(workspace, renderer):
    for theme in ("dark", "light"):
        workspace.open(renderer, theme)
        for type_ in ("FP8_REPORT", "FP8_CALIBRATION"):
            colours = workspace.page.evaluate(
                f"""[app.canvas.default_connection_color_byType.{type_}, LGraphCanvas.link_type_colors.{type_},
                getComputedStyle(document.body).getPropertyValue("--color-datatype-{type_}")]"""
            )
            assert len(set(colours)) == 1
            assert colours[0].startswith("#")


@each_renderer
def test_the_plan_follows_what_is_typed(workspace, renderer):
    workspace.open(renderer)
    add_quantize(workspace)
    workspace.wait_text("2.54\u00a0MB")
    keep = workspace.page.locator("textarea:visible >> nth=0")
    keep.fill("joint_blocks.0")
    kept = plan_file(workspace.server.models("diffusion_models") / "tiny.safetensors", keep=["joint_blocks.0"])
    shown = workspace.wait_text("joint_blocks.0 (your pattern)")
    assert (len(kept.layers), dict(kept.pattern_hits)["joint_blocks.0"]) == (5, 10)
    assert "joint_blocks.0 × 10" in " ".join(shown.split())
    keep.fill("joint_block, foo, bar")
    shown = workspace.wait_text("pattern 'foo' matches no tensor")
    assert "did you mean" in shown
    assert "pattern 'bar' matches no tensor" in shown
    assert shown.index("matches") < shown.index("joint_blocks.0 (your pattern)"), "the last plan stays"
    keep.fill("*")
    shown = workspace.wait_text("has nothing to quantize: kept by pattern '*'")
    assert shown.index("nothing to quantize") < shown.index("MB →")
    keep.fill("joint..blocks")
    workspace.wait_text("is not a pattern: give whole dotted parts")
    assert workspace.page.take_log()[0] == [], "no 4xx in the console"
    workspace.find("button >> text=Run").click()
    assert "Numbers appear here" in workspace.wait_text("when this node runs")


def write_effects(folder, source):
    """A calibration file with an effect of each layer of a model."""
    errors = RoundingErrors(*({"float8_e4m3fn": 0.02, "float8_e5m2": 0.04} for _ in range(2)))
    effects = {name: LayerEffect(1e-5 * (1 + i % 5), errors) for i, name in enumerate(sorted(load_file(source)))}
    path = folder / "effects.safetensors"
    save_calibration(Calibration({}, "", Sensitivity(effects, 1.0, 2)), path, overwrite=True)
    return path.name


@each_page
def test_the_plan_shows_the_measured_choice_while_the_limit_is_typed(workspace, renderer, theme):
    workspace.open(renderer, theme)
    models = workspace.server.models
    file = write_effects(models("fp8_calibrations"), models("diffusion_models") / "tiny.safetensors")
    quantize = add_quantize(workspace, layers="measured", rounding="nearest", size_limit=0.003)
    workspace.wait_text("needs a calibration file. Connect Load Calibration")
    loader = workspace.add("StochasticFP8LoadCalibration", (100, 400), calibration_name=file)
    workspace.connect(loader, 0, quantize, "calibration")
    shown = workspace.wait_text("chosen by measured effect per byte")
    assert "changes the picture most per byte" in shown
    assert "The file takes at most 2.9" in shown
    assert workspace.violations() == []
    workspace.screenshot(f"measured_{renderer}_{theme}")
    limit = "widgets.find(({ name }) => name === 'size_limit')"
    workspace.page.evaluate(
        f"(() => {{ const w = app.graph.getNodeById({json.dumps(quantize)}).{limit};"
        "w.value = 0.001; w.callback?.(0.001); })()"
    )
    workspace.wait_text("is too small: the smallest possible file takes")


def test_the_rows_of_a_plan_open_by_keyboard(workspace):
    workspace.open()
    add_quantize(workspace)
    workspace.wait_text("2.54\u00a0MB")
    row = workspace.find("button >> text=Quantized")
    assert row.getAttribute("aria-expanded") == "false"
    row.press("Enter")
    assert row.getAttribute("aria-expanded") == "true"
    assert "joint_blocks.*.x_block.mlp.fc1.weight × 2" in workspace.wait_text("mlp.fc1")
    workspace.find("[role=tab] >> text=Plan").press("ArrowRight")
    assert workspace.find("[role=tab] >> text=Run").getAttribute("aria-selected") == "true"


def test_the_histogram_can_be_read_by_keyboard_and_hover(workspace):
    workspace.open()
    add_quantize(workspace, rounding="nearest")
    workspace.run()
    workspace.wait_text("Lowest SQNR")
    bars = workspace.find(".bars")
    assert bars.getAttribute("aria-valuetext").startswith("at 0: ")
    bars.press("Home")
    assert bars.getAttribute("aria-valuetext") == "below −1.13: 0 %"  # nearest errs by half a step at most
    workspace.find(".bars > div >> nth=13").hover()
    assert bars.getAttribute("aria-valuenow") == "13"


def test_without_a_loader_the_plan_says_what_to_connect(workspace):
    workspace.open()
    quantize = workspace.add("StochasticFP8Quantize")
    workspace.wait_text("Connect a loader node to model to see the plan.")
    sampling = workspace.add("ModelSamplingSD3", (100, 400))
    workspace.connect(sampling, 0, quantize, "model")
    workspace.wait_text("ModelSamplingSD3 names no model file. Connect a loader node to see the plan.")
    loader = workspace.add("StochasticFP8DemoModel", (500, 600))
    workspace.connect(loader, 0, sampling, "model")
    workspace.changed()
    assert "tiny_sd3_landscapes.safetensors · sd3" in workspace.wait_text("MB →")


def test_a_long_job_shows_progress_and_survives_a_reload(workspace):
    workspace.open()
    add_file(workspace)
    workspace.page.evaluate(LIVE_MESSAGES)
    workspace.queue()
    first = layer_shown(workspace)
    workspace.page.wait("liveMessages.length >= 5")
    sent = [message["seconds"] for message in workspace.page.evaluate("liveMessages")]
    gaps = [later - earlier for earlier, later in zip(sent, sent[1:], strict=False)]
    assert min(gaps) > 0.099, "by the server's clock, at most ten messages per second"
    workspace.screenshot("running")
    workspace.reload()
    assert layer_shown(workspace) > first
    workspace.server.interrupt()
    assert "Cancelled after " in workspace.wait_text("Cancelled after")


def layer_shown(workspace):
    text = workspace.wait_text("Layer ")
    return int(text.split("Layer ")[1].split(" of ")[0].replace(",", ""))


def test_a_workflow_opened_again_shows_no_old_numbers(workspace):
    workspace.open()
    quantize = add_quantize(workspace)
    workspace.run()
    workspace.wait_text("Lowest SQNR")
    saved = workspace.page.evaluate("app.graph.serialize()")
    values = next(node["widgets_values"] for node in saved["nodes"] if str(node["id"]) == str(quantize))
    choices = ["float8_e4m3fn", "stochastic", "absmax", 0, "auto", "", "", "full precision", "error", "auto", 0, 0]
    assert values == choices
    workspace.load(saved)
    assert "Lowest SQNR" not in workspace.wait_text("2.54\u00a0MB")
    workspace.find("button >> text=Run").click()
    workspace.wait_text("Numbers appear here when this node runs.")
    prompt = workspace.page.evaluate("app.graphToPrompt().then(({ output }) => output)")
    assert not [name for node in prompt.values() for name in node["inputs"] if name.startswith("stochastic_fp8")]


def test_a_message_of_another_workflow_is_ignored(workspace):
    workspace.open()
    quantize = add_quantize(workspace)
    workspace.wait_text("2.54\u00a0MB")
    state = {"node": str(quantize), "prompt": "p", "done": 1, "total": 2, "key": "k", "seconds": 1}
    send = "app.api.dispatchEvent(new CustomEvent('stochastic_fp8.live', {{ detail: {} }}))"
    workspace.page.evaluate(send.format(json.dumps({**state, "workflow": "another"})))
    assert workspace.find("[role=tab] >> text=Plan").getAttribute("aria-selected") == "true"
    workspace.page.evaluate(send.format(json.dumps({**state, "workflow": None})))
    workspace.wait_text("Quantizing …")


@each_renderer
def test_copied_collapsed_resized_and_muted_nodes_keep_working(workspace, renderer):
    workspace.open(renderer)
    quantize = add_quantize(workspace)
    workspace.wait_text("2.54\u00a0MB")
    workspace.page.evaluate(f"""(() => {{
        const copy = app.graph.getNodeById({quantize}).clone();
        copy.pos = [820, 400];
        app.graph.add(copy);
        app.graph.getNodeById({quantize}).connect(0, copy, 0);
    }})()""")
    assert "2.54\u00a0MB" in workspace.wait_text("2.54\u00a0MB", index=1)

    before = workspace.find(".frame").boundingBox()["height"]
    workspace.node(quantize, "setSize([420, 1000])")
    workspace.page.waitForTimeout(300)
    after = workspace.find(".frame").boundingBox()
    assert after["height"] >= before
    workspace.node(quantize, "collapse()")
    workspace.page.waitForTimeout(300)
    workspace.node(quantize, "collapse()")
    workspace.wait_text("2.54\u00a0MB")
    workspace.node(quantize, "mode = 2")
    workspace.changed()
    workspace.wait_text("Connect a loader node to model", index=1)


def test_a_node_in_a_subgraph_keeps_working(workspace, expected):
    workspace.open()
    quantize = add_quantize(workspace)
    workspace.wait_text("2.54\u00a0MB")
    workspace.page.evaluate(f"""(() => {{
        const {{ node, subgraph }} = app.graph.convertToSubgraph(new Set([app.graph.getNodeById({quantize})]));
        app.canvas.setGraph(subgraph);
    }})()""")
    workspace.wait_text("2.54\u00a0MB → 1.90\u00a0MB")
    workspace.run()
    assert f"{expected.error.sqnr:.1f} dB" in workspace.wait_text("Lowest SQNR")


def test_a_removed_node_leaves_nothing_behind(workspace):
    workspace.open()
    workspace.page.evaluate(COUNT_LISTENERS)
    ids = [workspace.add("StochasticFP8Quantize"), workspace.add("StochasticFP8ImageCompare", (600, 200))]
    workspace.wait_text("Connect a loader node to model")
    assert workspace.page.evaluate("listenersAdded.inside > 20 && listenersAdded.outside === 0")
    for node in ids:
        workspace.page.evaluate(f"app.graph.remove(app.graph.getNodeById({node}))")
    for kind in ("panel", "slider"):
        workspace.page.wait(f"document.querySelectorAll('.stochastic_fp8_{kind}').length === 0")


@each_renderer
def test_a_saved_preset_outside_the_list_stays(workspace, renderer):
    """Workflows that were saved when the list had every preset."""
    workspace.open(renderer)
    quantize = add_quantize(workspace)
    workspace.wait_text("2.54\u00a0MB → 1.90\u00a0MB")
    assert "t5xxl" not in workspace.node(quantize, "widgets.find(({ name }) => name === 'layers').options.values")
    saved = workspace.page.evaluate("app.graph.serialize()")
    node = next(node for node in saved["nodes"] if str(node["id"]) == str(quantize))
    node["widgets_values"][4] = "t5xxl"
    workspace.load(saved)
    assert workspace.node(quantize, "widgets.find(({ name }) => name === 'layers').value") == "t5xxl"
    workspace.wait_text("2.54\u00a0MB → 1.90\u00a0MB")
    workspace.screenshot(f"saved_preset_{renderer}")
    if renderer == "vue":
        shown = workspace.page.locator(f"[data-node-id='{quantize}']").innerText()
        assert "t5xxl" in shown
    workspace.run()
    workspace.wait_text("Lowest SQNR")
