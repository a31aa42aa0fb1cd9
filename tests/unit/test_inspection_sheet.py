"""The figure of an inspection: its texts, and that nothing overlaps or leaves the page."""

import pytest
from matplotlib.text import Text
from stochastic_fp8_pack.kernels.figures import inspection_sheet, to_image
from stochastic_fp8_pack.kernels.state_dict.compatibility import Verdict
from stochastic_fp8_pack.kernels.state_dict.inspection import Finding, Inspection

VERDICTS = (
    Verdict("ComfyUI 0.3.75", "wrong image", "inline entries are not read"),
    Verdict("ComfyUI 0.33", "exact", ""),
)


def inspection(*findings, verdicts=VERDICTS):
    return Inspection("model.safetensors", "sd3", 21, ("float8_e4m3fn",), ("inline",), findings, verdicts)


def finding(severity="error", where="blocks.0.weight_scale", what="is bfloat16"):
    return Finding(severity, "code", where, what, "Repair rewrites it", True)


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_findings_and_verdicts_are_written_out():
    shown = texts(inspection_sheet(inspection(finding(), finding("warning", "", "a remark"))))
    assert "model.safetensors: problems found" in shown
    assert "blocks.0.weight_scale: is bfloat16. Repair rewrites it." in shown
    assert "a remark. Repair rewrites it." in shown
    assert "result: wrong image; inline entries are not read" in shown
    assert "result: exact" in shown


def test_file_without_problems():
    shown = texts(inspection_sheet(inspection()))
    assert "model.safetensors: ok" in shown
    assert "no problems" in shown


def test_many_findings_are_counted():
    shown = texts(inspection_sheet(inspection(*[finding(where=f"blocks.{i}") for i in range(30)])))
    assert sum(text.endswith("Repair rewrites it.") for text in shown) == 24
    assert "6 more findings: see the text output" in shown


@pytest.mark.parametrize("count", [0, 1, 5, 24, 100])
def test_nothing_overlaps_or_leaves_the_page(count):
    figure = inspection_sheet(inspection(*[finding(what="says more than fits a line, " * 6) for _ in range(count)]))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text()]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    for index, box in enumerate(boxes):
        for other in boxes[:index]:
            assert box.x1 <= other.x0 or other.x1 <= box.x0 or box.y1 <= other.y0 + 1 or other.y1 <= box.y0 + 1


def test_image():
    image = to_image(inspection_sheet(inspection(finding())))
    assert image.shape[0] == 1
    assert image.shape[2:] == (1024, 3)
    assert image.min() < 0.5 < image.mean()
