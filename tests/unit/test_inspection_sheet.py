"""The figure of an inspection: its texts, and that nothing overlaps or leaves the page."""

from dataclasses import replace

import pytest
import torch
from matplotlib.text import Text
from reports import report_on
from stochastic_fp8_pack.kernels.figures import inspection_sheet, layer_report, to_image
from stochastic_fp8_pack.kernels.state_dict.compatibility import Verdict
from stochastic_fp8_pack.kernels.state_dict.findings import Finding, Inspection

VERDICTS = (
    Verdict("ComfyUI 0.3.75", "wrong image", "inline entries are not read"),
    Verdict("ComfyUI 0.33", "exact", ""),
)


def inspection(*findings, verdicts=VERDICTS):
    return Inspection("model.safetensors", "sd3", 21, ("float8_e4m3fn",), ("inline",), findings, verdicts)


def finding(severity="error", where="blocks.0.weight_scale", what="is bfloat16", code="code"):
    return Finding(severity, code, where, what, "Repair rewrites it", True)


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
    kinds = [finding(code=f"code {i}") for i in range(30)]
    shown = texts(inspection_sheet(inspection(*kinds)))
    assert sum(text.endswith("Repair rewrites it.") for text in shown) == 24
    assert "6 more kinds of findings: see the text output" in shown


def test_findings_of_one_kind_share_a_line():
    shown = texts(inspection_sheet(inspection(*[finding(where=f"blocks.{i}") for i in range(1200)])))
    assert "blocks.0: is bfloat16. Repair rewrites it. (1,199 more like this)" in shown
    assert not any("blocks.1:" in text for text in shown)


def test_hostile_names_are_escaped():
    name = "a\x1b[2J\u202eb\nc"
    shown = texts(inspection_sheet(replace(inspection(finding(where=name)), source=name)))
    assert all(text.isprintable() for text in shown)
    assert sum("a\\x1b[2J\\u202eb\\nc" in text for text in shown) == 2


def test_hostile_names_are_escaped_in_the_report_of_layers():
    name = "a\x1b[2J\u202eb\nc"
    report = replace(report_on({f"{name}.weight": torch.randn(8, 8), "d.weight": torch.randn(8, 8)}), source=name)
    shown = [text for text in texts(layer_report(report)) if "[2J" in text]
    assert len(shown) >= 2
    assert all("\x1b" not in text and "\u202e" not in text and "b\nc" not in text for text in shown)


@pytest.mark.parametrize("count", [0, 1, 5, 24, 100])
def test_nothing_overlaps_or_leaves_the_page(count):
    figure = inspection_sheet(
        inspection(*[finding(what="says more than fits a line, " * 6, code=f"code {i}") for i in range(count)])
    )
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
