"""The slider of Compare Images (A/B)."""

import math

import pytest
import torch
from browser.workspace import SCREENSHOTS, each_page
from PIL import Image


@pytest.fixture
def pictures(workspace):
    """Two 64 x 48 pictures in input/: A grey with a white left half, B grey."""
    for name, left in (("a", 1.0), ("b", 0.5)):
        pixels = torch.full((48, 64, 3), 0.5)
        pixels[:, :32] = left
        Image.fromarray((255 * pixels).byte().numpy()).save(workspace.server.base / "input" / f"{name}.png")


def compare(workspace, batch=1, **labels):
    """Two pictures -> Compare Images (A/B), run. ``batch``: how many pairs."""
    node = workspace.add("StochasticFP8ImageCompare", (500, 150), **labels)
    for index, name in enumerate("ab"):
        source = workspace.add("LoadImage", (100, 150 + 350 * index), image=f"{name}.png")
        if batch > 1:
            repeat = workspace.add("RepeatImageBatch", (300, 150 + 350 * index), amount=batch)
            workspace.connect(source, 0, repeat, "image")
            source = repeat
        workspace.connect(source, 0, node, f"image_{name}")
    workspace.run()
    workspace.page.wait(
        "document.querySelector('.stochastic_fp8_slider').shadowRoot.querySelector('.a').naturalWidth === 64"
    )
    return node


def stage(workspace):
    return workspace.find(".pictures", "slider")


@each_page
def test_drag_and_keys_move_the_divider(workspace, pictures, renderer, theme):
    workspace.open(renderer, theme)
    node = compare(workspace)
    where = workspace.node(node, "pos[0]")
    pictures = stage(workspace)
    assert pictures.getAttribute("aria-valuenow") == "50"
    box = pictures.boundingBox()
    assert box["width"] / box["height"] == pytest.approx(64 / 48, abs=0.02)
    middle = box["y"] + box["height"] / 3
    workspace.page.mouse.move(box["x"] + box["width"] / 2, middle)
    workspace.page.mouse.down()
    workspace.page.mouse.move(box["x"] + 0.8 * box["width"], middle, {"steps": 5})
    workspace.page.mouse.up()
    assert int(pictures.getAttribute("aria-valuenow")) == pytest.approx(80, abs=1)
    assert workspace.node(node, "pos[0]") == where
    psnr, ssim = workspace.find(".score", "slider").textContent().split(", ")
    assert float(psnr.removeprefix("PSNR ").removesuffix(" dB")) == pytest.approx(-10 * math.log10(0.5**2 / 2), abs=0.1)
    assert 0 < float(ssim.removeprefix("SSIM ")) < 1
    for key, value in (("End", "100"), ("ArrowLeft", "98"), ("Shift+ArrowLeft", "88"), ("Home", "0"), ("PageUp", "10")):
        pictures.press(key)
        assert pictures.getAttribute("aria-valuenow") == value
    assert pictures.getAttribute("aria-valuetext") == "10 % image A"
    pictures.press("End")
    assert workspace.violations("slider") == []
    workspace.screenshot(f"slider_{renderer}_{theme}")


def test_the_divider_shows_a_left_and_b_right(workspace, pictures):
    workspace.open()
    compare(workspace)
    assert colours(workspace, "divider_middle") == [255, 127]
    stage(workspace).press("Home")
    assert colours(workspace, "divider_left") == [127, 127]


def test_the_images_show_their_labels(workspace, pictures):
    workspace.open()
    compare(workspace, label_a="sixteen bits", label_b="nearest " * 20)
    assert "between image sixteen bits and image nearest" in stage(workspace).getAttribute("aria-label")
    boxes = [workspace.find(f".label.{side}", "slider").boundingBox() for side in ("left", "right")]
    assert workspace.find(".label.left", "slider").textContent() == "sixteen bits"
    inside = stage(workspace).boundingBox()
    assert boxes[0]["x"] + boxes[0]["width"] < inside["x"] + inside["width"] / 2 < boxes[1]["x"]
    assert workspace.violations("slider") == []
    workspace.screenshot("slider_names")


def test_the_difference_is_amplified(workspace, pictures):
    workspace.open()
    node = compare(workspace)
    workspace.find("button >> text=Difference", "slider").click()
    assert stage(workspace).getAttribute("role") == "img"
    assert stage(workspace).getAttribute("aria-valuenow") is None
    assert colours(workspace, "difference") == [255, 0]
    workspace.node(node, "widgets.find(({ name }) => name === 'amplify').value = 1")
    workspace.node(node, "widgets.find(({ name }) => name === 'amplify').callback(1)")
    assert colours(workspace, "difference_once") == [128, 0]
    assert workspace.violations("slider") == []


def colours(workspace, name):
    """The grey levels at a quarter and at three quarters of what the slider shows."""
    path = SCREENSHOTS / f"{name}.png"
    stage(workspace).screenshot({"path": str(path)})
    with Image.open(path).convert("L") as picture:
        return [picture.getpixel((int(picture.width * at), int(picture.height * 0.7))) for at in (0.25, 0.75)]


def test_a_batch_is_shown_pair_by_pair(workspace, pictures):
    workspace.open()
    compare(workspace, batch=3)
    assert "Pair 1 of 3" in workspace.wait_text("Pair", "slider")
    following = workspace.find("[aria-label='Next pair']", "slider")
    following.click()
    following.click()
    workspace.wait_text("Pair 3 of 3", "slider")
    assert following.isDisabled()
    workspace.find("[aria-label='Previous pair']", "slider").click()
    workspace.wait_text("Pair 2 of 3", "slider")
    assert "00002_" in workspace.find(".a", "slider").getAttribute("src")
