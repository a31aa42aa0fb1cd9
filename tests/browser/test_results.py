"""Results stay and are right: after undo, in other tabs, in either renderer, for cached runs, after errors."""

import json

import pytest
import torch
from browser.chromium import BrowserError
from browser.workspace import RENDERERS, each_page, each_renderer
from safetensors.torch import load_file
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder

STOCHASTIC = "13 layers to float8_e4m3fn, stochastic"
NEAREST = "5 layers to float8_e4m3fn, nearest"
PANEL = "document.querySelector('.stochastic_fp8_panel').shadowRoot"


def add_graph(workspace, file="tiny.safetensors"):
    """Load Diffusion Model -> Quantize -> Save, and two pictures -> Compare Images (A/B); ids by name."""
    ids = {
        "loader": workspace.add("UNETLoader", (100, 150), unet_name=file),
        "quantize": workspace.add("StochasticFP8Quantize", (400, 150)),
        "save": workspace.add("StochasticFP8Save", (820, 150)),
        "compare": workspace.add("StochasticFP8ImageCompare", (820, 480)),
        "picture": workspace.add("EmptyImage", (100, 450), width=64, height=64, color=0xFFFFFF),
    }
    workspace.connect(ids["loader"], 0, ids["quantize"], "model")
    workspace.connect(ids["quantize"], 0, ids["save"], "model")
    for name in ("image_a", "image_b"):
        workspace.connect(ids["picture"], 0, ids["compare"], name)
    workspace.wait_text("2.54\u00a0MB")
    workspace.changed()
    return ids


def choose(workspace, node, name, value):
    workspace.node(node, f"widgets.find((widget) => widget.name === '{name}').value = {json.dumps(value)}")
    workspace.changed()


def wait_for(workspace, numbers, width):
    """Wait until the panel in sight shows these numbers, and the slider in sight pictures of this width."""
    workspace.wait_text(numbers)
    slider = "document.querySelector('.stochastic_fp8_slider').shadowRoot.querySelector('.a')"
    workspace.page.wait(f"{slider}.naturalWidth === {width}")


def use_command(workspace, name):
    workspace.page.evaluate(f"app.extensionManager.command.execute('{name}').then(() => true)")


@each_renderer
def test_results_stay(workspace, renderer):
    """One page for all of it: the page takes longer to load than all the steps."""
    workspace.open(renderer)
    ids = add_graph(workspace)
    workspace.run()
    wait_for(workspace, STOCHASTIC, 64)

    choose(workspace, ids["quantize"], "rounding", "nearest")
    workspace.page.evaluate(
        "app.extensionManager.workflow.activeWorkflow.changeTracker.undo().then(() => true)",
    )
    assert workspace.node(ids["quantize"], "widgets.find(({ name }) => name === 'rounding').value") == "stochastic"
    wait_for(workspace, STOCHASTIC, 64)

    workspace.page.locator("textarea:visible >> nth=0").fill("joint_blocks.0")
    choose(workspace, ids["quantize"], "rounding", "nearest")
    choose(workspace, ids["picture"], "width", 96)
    workspace.run()
    wait_for(workspace, NEAREST, 96)

    use_command(workspace, "Comfy.NewBlankWorkflow")
    workspace.page.wait("document.querySelectorAll('.stochastic_fp8_panel').length === 0")
    use_command(workspace, "Workspace.PreviousOpenedWorkflow")
    wait_for(workspace, NEAREST, 96)

    other = "false" if renderer == "vue" else "true"
    workspace.page.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {other}).then(() => true)")
    wait_for(workspace, NEAREST, 96)


@each_renderer
def test_a_cached_run_shows_its_numbers(workspace, renderer):
    workspace.open(renderer)
    ids = add_graph(workspace)
    workspace.run()
    workspace.wait_text("Lowest SQNR")
    saved = workspace.page.evaluate("app.graph.serialize()")
    workspace.load(saved)
    assert "Lowest SQNR" not in workspace.wait_text("2.54\u00a0MB")
    choose(workspace, ids["save"], "filename_prefix", "again")
    workspace.page.evaluate("""(() => { window.cached = [];
        app.api.addEventListener("execution_cached", ({ detail }) => cached.push(...detail.nodes)); })()""")
    workspace.run()
    assert str(ids["quantize"]) in workspace.page.evaluate("cached")
    workspace.wait_text(STOCHASTIC)
    workspace.wait_text("in output/diffusion_models", "result")


@each_renderer
def test_a_job_of_another_page_is_shown_to_its_end(workspace, renderer):
    """ComfyUI sends this page no messages about it."""
    workspace.open(renderer)
    workspace.add("StochasticFP8QuantizeFile", (400, 150), file="diffusion_models/long.safetensors", overwrite=True)
    prompt = workspace.page.evaluate("app.graphToPrompt()")
    extra = {"extra_pnginfo": {"workflow": prompt["workflow"]}}
    workspace.server.post("/prompt", {"prompt": prompt["output"], "extra_data": extra, "client_id": "another"})
    while not workspace.server.get("/stochastic_fp8/live"):
        workspace.page.waitForTimeout(50)
    workspace.load(prompt["workflow"])
    workspace.wait_text("Layer ")
    shown = f"{PANEL}.querySelector('[role=tabpanel]:not([hidden]) .headline').textContent"
    first = workspace.page.evaluate(shown)
    workspace.page.wait(f"{shown} !== {json.dumps(first)}")
    workspace.server.interrupt()
    workspace.wait_text("Ended after ")


@each_renderer
def test_errors_are_shown_on_the_node(workspace, renderer):
    workspace.open(renderer)
    ids = add_graph(workspace)
    choose(workspace, ids["quantize"], "rounding", "calibrated")
    workspace.wait_text("Rounding calibrated needs a calibration")
    with pytest.raises(BrowserError, match="needs the recorded inputs"):
        workspace.run()
    workspace.page.keyboard.press("Escape")  # ComfyUI's own dialog
    assert "connect FP8 Calibration" in workspace.wait_text("needs the recorded inputs of the layers")
    assert workspace.violations() == []
    workspace.screenshot(f"failed_{renderer}")

    workspace.connect(ids["loader"], 0, ids["save"], "model")
    with pytest.raises(BrowserError, match="is not quantized"):
        workspace.run()
    workspace.page.keyboard.press("Escape")
    workspace.wait_text("this MODEL is not quantized: put Stochastic FP8 before", "result")
    assert workspace.violations("result") == []


@each_renderer
def test_an_error_is_shown_on_a_node_without_a_view(workspace, renderer):
    workspace.open(renderer)
    ids = add_graph(workspace)
    histogram = workspace.add("StochasticFP8ErrorHistogram", (820, 150), layers="pattern", pattern="nothing")
    preview = workspace.add("PreviewImage", (1100, 150))
    workspace.connect(ids["quantize"], 1, histogram, "report")
    workspace.connect(histogram, 0, preview, "images")
    width, height = workspace.node(histogram, "size[0]"), workspace.node(histogram, "size[1]")
    with pytest.raises(BrowserError, match="matches no quantized layer"):
        workspace.run()
    workspace.page.keyboard.press("Escape")
    assert "use names such as joint_blocks.0" in workspace.wait_text("pattern 'nothing' matches", "error")
    assert workspace.violations("error") == []
    workspace.screenshot(f"failed_without_view_{renderer}")
    prompt = workspace.page.evaluate("app.graphToPrompt().then(({ output }) => output)")
    assert "stochastic_fp8_error" not in prompt[str(histogram)]["inputs"]
    workspace.node(histogram, "widgets.find(({ name }) => name === 'pattern').value = 'joint_blocks.0'")
    workspace.page.evaluate("void app.queuePrompt(0)")
    workspace.page.wait("document.querySelectorAll('.stochastic_fp8_error').length === 0")
    assert workspace.node(histogram, "size[0]") == width
    assert workspace.node(histogram, "size[1]") >= height
    workspace.wait_text("Lowest SQNR")


@each_renderer
def test_files_and_findings_are_shown_on_the_node(workspace, renderer):
    workspace.open(renderer)
    workspace.add("StochasticFP8QuantizeFile", (100, 150), file="diffusion_models/tiny.safetensors")
    inspect = workspace.add("StochasticFP8Inspect", (520, 150), file="diffusion_models/tiny.safetensors")
    workspace.run()
    assert "in output/diffusion_models" in workspace.wait_text("tiny_float8_e4m3fn_0")
    workspace.wait_text("the file has no FP8 weights", "result")
    widget = "widgets.find(({ name }) => name === 'stochastic_fp8_result')"
    assert workspace.node(inspect, f"{widget}.options.hideInPanel")
    assert workspace.violations("result") == []
    workspace.screenshot(f"results_{renderer}")


@each_renderer
def test_the_end_of_a_long_job_is_announced(workspace, renderer):
    workspace.open(renderer)
    save = workspace.add("StochasticFP8SaveCalibration")
    events = f"""app.api.dispatchCustomEvent("executing", "{save}");
        Date.now = () => now() + 31_000;
        app.api.dispatchCustomEvent("executing", null);"""
    workspace.page.evaluate(f"(() => {{ const {{ now }} = Date; {events} Date.now = now; }})()")
    workspace.page.wait("document.body.innerText.includes('Save Calibration: done')")


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("frontend", ["newest"])
def test_the_side_panel_leaves_the_panel_in_its_node(workspace, renderer):
    """ComfyUI 0.3.75's own front end has no such side panel."""
    workspace.open(renderer)
    quantize = add_graph(workspace)["quantize"]
    before = workspace.find(".frame").boundingBox()
    workspace.page.evaluate(f"void app.canvas.selectItems([app.graph.getNodeById({json.dumps(quantize)})])")
    toggle = workspace.page.locator(".icon-\\[lucide--panel-right\\] >> nth=0")
    toggle.click()
    workspace.page.wait("document.body.innerText.includes('Parameters')")
    assert workspace.find(".frame").boundingBox() == before
    assert "stochastic_fp8_panel" not in workspace.page.evaluate("document.body.innerText")
    workspace.screenshot(f"side_panel_{renderer}")
    toggle.click()


def write_inputs(folder, source):
    """A calibration file with inputs of each Linear layer of a model that are alike."""
    recorder = ActivationRecorder()
    for name, weight in load_file(source).items():
        if weight.ndim == 2 and name.endswith(".weight"):
            generator = torch.Generator().manual_seed(len(name))
            common = torch.randn(4000, 1, generator=generator)
            recorder.observe(name, common + 0.3 * torch.randn(4000, weight.shape[1], generator=generator))
    path = folder / "inputs.safetensors"
    save_calibration(recorder.result(), path, overwrite=True)
    return path.name


@each_page
def test_calibrated_leads_with_the_output_error(workspace, renderer, theme):
    workspace.open(renderer, theme)
    ids = add_graph(workspace)
    models = workspace.server.models
    file = write_inputs(models("fp8_calibrations"), models("diffusion_models") / "tiny.safetensors")
    loader = workspace.add("StochasticFP8LoadCalibration", (100, 320), calibration_name=file)
    workspace.connect(loader, 0, ids["quantize"], "calibration")
    choose(workspace, ids["quantize"], "rounding", "calibrated")
    workspace.run()
    shown = workspace.wait_text("Largest predicted output error")
    assert shown.index("Predicted output error (median)") < shown.index("SQNR of weights")
    assert "Lowest SQNR" not in shown
    assert workspace.violations() == []
    workspace.screenshot(f"calibrated_{renderer}_{theme}")
    chosen, nearest = workspace.page.evaluate(f"""[...{PANEL}.querySelectorAll('.facts')].slice(0, 1)
        .flatMap((list) => [...list.querySelectorAll('dd')].map(({{ textContent }}) => parseFloat(textContent)))""")
    assert 0 < chosen < nearest
