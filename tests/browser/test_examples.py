"""Every example workflow opens and runs in the page, and its panels show the numbers of its reports."""

import pytest
import tiny_models
from browser.workspace import RENDERERS
from comfyui.workflows import WORKFLOWS, read_workflow
from stochastic_fp8_pack.kernels.engine.file_job import quantize_file

FIRST = "Try it now"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json") if path.stem != FIRST)
SMALL_PICTURES = """(() => {
    const small = { steps: 2, width: 128, height: 128 };
    for (const { type, widgets } of app.graph.nodes) {
        if (!["KSampler", "EmptySD3LatentImage"].includes(type) && !widgets?.some((w) => w.name === "steps")) continue;
        for (const widget of widgets) widget.value = small[widget.name] ?? widget.value;
    }
})()"""
PANEL_NODES = {"StochasticFP8Quantize", "StochasticFP8QuantizeTextEncoder", "StochasticFP8QuantizeFile"}


@pytest.fixture(scope="module")
def example_models(models, tmp_path_factory):
    """Tiny models under the names that the examples ask for."""
    large = tiny_models.write_sd3(models.models("diffusion_models") / "sd3.5_large.safetensors")
    medium = "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors"
    tiny_models.write_sd3_checkpoint(models.models("checkpoints") / medium)
    tiny_models.write_sd3_lora(models.models("loras") / "my_lora.safetensors")
    tiny_models.write_clip_l(models.models("text_encoders") / "clip_l.safetensors")
    tiny_models.write_t5xxl(models.models("text_encoders") / "t5xxl_fp16.safetensors")
    quantize_file(large, models.models("diffusion_models") / "my_fp8_model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(workspace, example_models, name):
    workspace.open()
    workflow = read_workflow(name)
    workspace.load(workflow)
    workspace.page.evaluate(SMALL_PICTURES)
    panels = [node for node in workflow["nodes"] if node["type"] in PANEL_NODES]
    for index, node in enumerate(panels):
        measured = "measured" in node["widgets_values"]
        workspace.wait_text("needs a calibration file" if measured else "B →", index=index)
    workspace.run()
    for index in range(len(panels)):
        assert "SQNR" in workspace.wait_text("Flushed to 0", index=index)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_the_first_example_looks_right(workspace, renderer):
    workspace.open(renderer)
    workspace.load(read_workflow(FIRST))
    workspace.run()
    shown = workspace.wait_text("Lowest SQNR")
    report = quantize_file(
        tiny_models.LANDSCAPES, workspace.server.base / "temp" / "expected.safetensors", overwrite=True
    )
    assert f"{report.error.sqnr:.1f} dB" in shown
    workspace.page.wait(
        "document.querySelector('.stochastic_fp8_slider').shadowRoot.querySelector('.a').naturalWidth === 256"
    )
    workspace.page.evaluate("app.canvas.fitViewToSelectionAnimated?.()")
    workspace.page.waitForTimeout(800)
    workspace.screenshot(f"try_it_now_{renderer}")
