"""The data that each figure draws is checked against the report, and its pixels against golden thumbnails.

UPDATE_GOLDENS=1 writes new thumbnails; look at them before committing.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import PACK_ROOT
from matplotlib.collections import QuadMesh
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from PIL import Image
from reports import heavy_tailed, repeated, report_on, small_report
from stochastic_fp8_pack.kernels import ROUNDINGS, ErrorStatistics
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.figures import (
    check_comparison_size,
    comparison_figure,
    error_histogram,
    image_sheet,
    layer_report,
    rounding_curve,
    save_png,
    to_image,
)
from stochastic_fp8_pack.kernels.figures.histogram import in_numbers, in_plain_words
from stochastic_fp8_pack.kernels.figures.layer_report import in_order_of_depth, pool
from stochastic_fp8_pack.kernels.numerics.output_error import OutputError
from stochastic_fp8_pack.kernels.report.report import standing_out, with_statistics
from stochastic_fp8_pack.kernels.studies.comparison import compare_roundings
from stochastic_fp8_pack.kernels.studies.rounding_curve import measure_rounding

SQNR_PANEL = "Signal-to-quantization-noise ratio (SQNR) of each layer"

GOLDENS = Path(__file__).parent / "golden_figures"
GOLDEN_MATPLOTLIB = "3.11."
THUMBNAIL_WIDTH = 256
LONG_NAME = "a_module_with_a_name_of_some_length." * 6 + "weight"

RECIPES = {
    "stochastic": {},
    "nearest": {"rounding": "nearest"},
    "e5m2": {"format": "float8_e5m2"},
    "no scale": {"scaling": "none"},
}


def saturating_report():
    return report_on({"blocks.0.mlp.fc1.weight": heavy_tailed(1, 64, 64) * 200}, scaling="none")


REPORTS = {
    **{name: lambda recipe=recipe: small_report(**recipe) for name, recipe in RECIPES.items()},
    "all zero": lambda: report_on({"blocks.0.weight": torch.zeros(16, 16)}),
    "empty": lambda: report_on({"blocks.0.weight": torch.zeros(0, 16)}),
    "one number": lambda: report_on({"blocks.0.weight": torch.ones(1)}),
    "a thousand layers": lambda: repeated(small_report(), 1000),
    "long names": lambda: report_on({LONG_NAME: heavy_tailed(1, 32, 32)}),
    "saturating": saturating_report,
}


@pytest.fixture(params=REPORTS)
def report(request):
    return REPORTS[request.param]()


def axes_of(figure, title):
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == title)
    return axes


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def pixels(figure):
    return (to_image(figure)[0].numpy() * 255).round().astype(np.uint8)


def assert_readable(figure):
    """Finite axes, and no text that leaves the figure or overlaps another."""
    figure.canvas.draw()
    for axes in figure.axes:
        limits = axes.get_xlim() + axes.get_ylim()
        assert np.isfinite(limits).all()
        assert limits[0] != limits[1]
        assert limits[2] != limits[3]
    boxes = {text: text.get_window_extent() for text in visible_texts(figure)}
    for text, box in boxes.items():
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    listed = list(boxes.items())
    for i, (text, box) in enumerate(listed):
        for other, other_box in listed[i + 1 :]:
            assert not box.shrunk(0.98, 0.8).overlaps(other_box.shrunk(0.98, 0.8)), (text, other)


def visible_texts(figure):
    ticks = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in all_labels(axis)}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in ticks:
            yield text
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False):
                if axis.get_visible() and axes.axison and low <= tick <= high and label.get_text():
                    yield label


def all_labels(axis):
    return axis.get_ticklabels(minor=False) + axis.get_ticklabels(minor=True)


def assert_like_golden(figure, name):
    """The figure at THUMBNAIL_WIDTH, within the mean difference that fonts and antialiasing may cause."""
    if not matplotlib.__version__.startswith(GOLDEN_MATPLOTLIB):
        pytest.skip(f"the goldens were drawn by matplotlib {GOLDEN_MATPLOTLIB}x; others draw text differently")
    height = round(figure.bbox.height * THUMBNAIL_WIDTH / figure.bbox.width)
    thumbnail = Image.fromarray(pixels(figure)).resize((THUMBNAIL_WIDTH, height), Image.Resampling.BOX)
    path = GOLDENS / f"{name}.png"
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDENS.mkdir(exist_ok=True)
        thumbnail.save(path, optimize=True)
    golden = np.asarray(Image.open(path).convert("RGB"), dtype=float)
    difference = np.abs(np.asarray(thumbnail, dtype=float) - golden)
    assert difference.mean() < 1, f"{name}: differs from its golden thumbnail by {difference.mean():.2f} levels of 255"


# --- every figure


def test_matplotlib_is_imported_only_when_a_figure_is_drawn():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import conftest; from reports import small_report;"
        "from stochastic_fp8_pack.kernels.figures import error_histogram, to_image;"
        "assert 'matplotlib' not in sys.modules;"
        "to_image(error_histogram(small_report())); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PACK_ROOT, check=True)


@pytest.mark.parametrize("size", [(1024, 480), (777, 333), (2048, 1024)])
def test_image_size_and_range(size):
    image = to_image(error_histogram(small_report(), width=size[0], height=size[1]))
    assert image.shape == (1, size[1], size[0], 3)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < 0.3
    assert image.max() == 1


def test_width_out_of_range_is_refused():
    with pytest.raises(ValueError, match="width is 99 pixels; choose 256 to 4096"):
        error_histogram(small_report(), width=99)


def test_too_low_a_height_is_refused():
    with pytest.raises(ValueError, match="height is 300 pixels; for a width of 1024 choose 431 to 4096"):
        error_histogram(small_report(), height=300)


def test_comparison_size_is_checked_before_the_work(calibrated_comparison):
    check_comparison_size(1000, 700, calibrated=False)
    with pytest.raises(ValueError, match="height is 700 pixels; for a width of 1000 choose 800 to 4096") as known:
        check_comparison_size(1000, 700, calibrated=True)
    with pytest.raises(ValueError, match=re.escape(str(known.value))):
        comparison_figure(calibrated_comparison, width=1000, height=700)


def test_matplotlib_settings_of_the_user_are_ignored():
    import matplotlib

    plain = pixels(error_histogram(small_report()))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        assert (pixels(error_histogram(small_report())) == plain).all()


def test_png_bytes_repeat(tmp_path):
    for name in ("a.png", "b.png"):
        save_png(error_histogram(small_report()), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (1024, 480)


# --- Error Histogram


def test_histogram_is_readable(report):
    assert_readable(error_histogram(report))


def test_histogram_bars_match_the_report():
    report = small_report()
    axes = axes_of(error_histogram(report), "Error in FP8 steps")
    shares, edges, _ = axes.findobj(StepPatch)[0].get_data()
    counts = np.sum([layer.error.step_histogram for layer in report.layers], axis=0)
    total = sum(layer.error.count for layer in report.layers)
    assert edges == pytest.approx(np.arange(-20, 21) / 16)
    assert shares == pytest.approx(100 * np.delete(counts, 40).reshape(40, 2).sum(1) / total)
    assert shares[19] == pytest.approx(100 * (counts[38] + counts[39]) / total)


def test_values_without_error_are_a_line_at_0():
    report = report_on({"blocks.0.weight": torch.tensor([1.0, 2.0, 3.3, 448.0])}, scaling="none")
    axes = axes_of(error_histogram(report), "Error in FP8 steps")
    (line,) = axes.collections[0].get_segments()
    assert line.tolist() == [[0, 0], [0, 75]]
    assert "at 0: 75 %" in texts(axes)
    inexact = report_on({"blocks.0.weight": torch.full((64, 64), 3.3)}, scaling="none")
    assert "at 0" not in texts(axes_of(error_histogram(inexact), "Error in FP8 steps"))


def test_the_outermost_bars_say_what_they_hold():
    report = saturating_report()
    axes = axes_of(error_histogram(report), "Error in FP8 steps")
    counts = report.layers[0].error.step_histogram
    shares = [patch.get_data().values for patch in axes.findobj(StepPatch)[1:]]
    assert shares == [pytest.approx([100 * sum(ends) / 4096]) for ends in (counts[:2], counts[-2:])]
    assert f"beyond ±1.19:\n{100 * sum(counts[:2] + counts[-2:]) / 4096:.3g} %" in texts(axes)


@pytest.mark.parametrize(("rounding", "limit"), [("nearest", 0.5), ("stochastic", 1)])
def test_no_bar_is_outside_the_theory(rounding, limit):
    axes = axes_of(error_histogram(small_report(rounding=rounding)), "Error in FP8 steps")
    shares, edges, _ = axes.findobj(StepPatch)[0].get_data()
    outside = (edges[:-1] < -limit) | (edges[1:] > limit)
    assert not shares[outside].any()
    assert shares[~outside].all()


@pytest.mark.parametrize(
    ("rounding", "corners"),
    [("stochastic", [(-1, 0), (0, 6.25), (1, 0)]), ("nearest", [(-0.5, 0), (-0.5, 6.25), (0.5, 6.25), (0.5, 0)])],
)
def test_histogram_theory_line(rounding, corners):
    (line,) = axes_of(error_histogram(small_report(rounding=rounding)), "Error in FP8 steps").lines
    assert line.get_xydata() == pytest.approx(np.array(corners))


@pytest.mark.parametrize("panel", ["Error in FP8 steps", "Error relative to amax"])
def test_calibrated_rounding_has_no_theory_lines(panel):
    report = small_report()
    report = replace(report, recipe=replace(report.recipe, rounding="calibrated"))
    axes = axes_of(error_histogram(report), panel)
    assert not axes.lines
    assert "line: " not in texts(axes)


def test_relative_error_bars_match_the_report():
    report = small_report(rounding="nearest")
    axes = axes_of(error_histogram(report), "Error relative to amax")
    shares, edges, _ = axes.findobj(StepPatch)[0].get_data()
    counts = np.sum([layer.error.relative_histogram for layer in report.layers], axis=0)
    widths = np.array([np.log2(1.5), np.log2(4 / 3)] * 32)
    assert shares == pytest.approx(100 * counts / 8192 / widths)
    assert (edges[0], edges[-1]) == (2.0**-32, 1)


@pytest.mark.parametrize(
    ("recipe", "limit"),
    [
        ({"rounding": "nearest"}, 1 / 16),
        ({"rounding": "owlshift"}, 1 / 8),
        ({"rounding": "nearest", "format": "float8_e5m2"}, 1 / 8),
        ({"format": "float8_e5m2"}, 1 / 4),
    ],
)
def test_relative_error_limit(recipe, limit):
    (line,) = axes_of(error_histogram(small_report(**recipe)), "Error relative to amax").lines
    assert line.get_xdata() == [limit, limit]


def test_scatter_shows_the_samples():
    report = small_report()
    axes = axes_of(error_histogram(report), "Before and after")
    drawn = {tuple(point) for point in axes.collections[0].get_offsets().data}
    assert drawn == {pair for layer in report.layers for pair in layer.error.samples}


def test_scatter_gives_every_layer_its_share():
    axes = axes_of(error_histogram(repeated(small_report(), 100)), "Before and after")
    points = axes.collections[0].get_offsets()
    first_layer = set(small_report().layers[0].error.samples)
    share = sum(tuple(point) in first_layer for point in points) / len(points)
    assert share == pytest.approx(0.25, abs=0.02)


def test_saturated_values_have_their_own_colour():
    report = saturating_report()
    axes = axes_of(error_histogram(report), "Before and after")
    marked = {tuple(point) for point in axes.collections[1].get_offsets().data}
    expected = {(before, after) for before, after in report.layers[0].error.samples if abs(before) > 448}
    assert marked == expected
    assert {abs(after) for _, after in marked} == {448}


def test_histogram_of_chosen_layers():
    report = small_report()
    figure = error_histogram(report, report.layers[1:3])
    assert "made_up.safetensors: 2 of 4 layers" in texts(figure)
    shares, _, _ = axes_of(figure, "Error in FP8 steps").findobj(StepPatch)[0].get_data()
    counts = np.add(report.layers[1].error.step_histogram, report.layers[2].error.step_histogram)
    assert shares[20] == pytest.approx(100 * (counts[41] + counts[42]) / 4096)


def test_histogram_without_statistics_is_refused():
    report = small_report()
    report = replace(report, layers=tuple(replace(layer, error=None) for layer in report.layers))
    with pytest.raises(ValueError, match="made_up.safetensors: the report has no error statistics"):
        error_histogram(report)


def test_caption_in_plain_words():
    lossy = ErrorStatistics(count=1000, sum_squared_error=4.0, sum_squared=1600.0, saturated=2, flushed=10)
    assert in_plain_words(lossy) == (
        "The error is 5 % of a typical value. 0.2 % of the values were too large and saturated. "
        "1 % of the values became zero."
    )
    exact_enough = replace(lossy, saturated=0, flushed=0)
    assert in_plain_words(exact_enough) == "The error is 5 % of a typical value. No value saturated or became zero."
    assert in_plain_words(ErrorStatistics(count=4, exact=4)) == "All values are zero: nothing was lost."
    assert in_plain_words(ErrorStatistics(count=4, exact=4, sum_squared=1.0)) == (
        "FP8 represents every value exactly: nothing was lost."
    )
    assert in_plain_words(ErrorStatistics()) == "There are no values."


def test_caption_in_numbers():
    error = ErrorStatistics(
        count=10000, sum_error=-0.01, sum_squared_error=4.0, sum_squared=1600.0, saturated=2, flushed=10
    )
    assert in_numbers(error) == (
        "bias −1.0e−6 (by chance: ±2.0e−4) · relative RMSE 5 % · SQNR 26.0 dB · saturated 0.02 % · flushed 0.1 %"
    )


def test_lowest_histogram_is_readable():
    assert_readable(error_histogram(small_report(), width=1024, height=431))


@pytest.mark.parametrize("name", RECIPES)
def test_histogram_looks_as_before(name):
    assert_like_golden(error_histogram(small_report(**RECIPES[name])), f"error_histogram_{name.replace(' ', '_')}")


def test_histogram_of_a_thousand_layers_draws_as_much_as_one_of_few():
    few, many = (error_histogram(report) for report in (small_report(), repeated(small_report(), 1000)))
    assert len(many.findobj()) < 1.5 * len(few.findobj())


# --- Layer Report


def test_layer_report_is_readable(report):
    if not report.layers[0].error.count:
        with pytest.raises(ValueError, match="has no error statistics"):
            layer_report(report)
        return
    assert_readable(layer_report(report))


def test_lowest_layer_report_is_readable():
    assert_readable(layer_report(small_report(), width=1024, height=615))


def test_layer_report_dots_show_the_sqnr_by_kind():
    report = small_report()
    axes = axes_of(layer_report(report), SQNR_PANEL)
    dots = {dots.get_label(): dots.get_offsets().data.tolist() for dots in axes.collections}
    sqnr = [layer.error.sqnr for layer in report.layers]
    assert dots == {
        "attention": [[1, sqnr[0]]],
        "MLP": [[2, sqnr[1]]],
        "modulation": [[3, sqnr[2]]],
        "other": [[4, sqnr[3]]],
    }


def test_layers_are_in_order_of_depth():
    keys = ["blocks.10.a", "blocks.2.b", "blocks.2.a", "final.a", "a_embedder"]
    layers = [replace(small_report().layers[0], key=key) for key in keys]
    assert [layer.key for layer, _ in in_order_of_depth(with_statistics(layers))] == [
        "a_embedder",
        "blocks.2.a",
        "blocks.2.b",
        "blocks.10.a",
        "final.a",
    ]


def noisier(report, factors):
    """The report with the squared errors of some layers, by place, multiplied."""
    layers = list(report.layers)
    for place, factor in factors.items():
        error = layers[place].error
        layers[place] = replace(layers[place], error=replace(error, sum_squared_error=factor * error.sum_squared_error))
    return replace(report, layers=tuple(layers))


def numbers_beside_dots(axes):
    return {text.get_text(): tuple(text.xy) for text in axes.texts if text.get_text().isdigit()}


def test_no_layer_stands_out():
    report = report_on({f"blocks.{i}.attn.qkv.weight": heavy_tailed(i, 32, 32) for i in range(8)})
    figure = layer_report(report)
    worst = sorted(report.layers, key=lambda layer: layer.error.sqnr)
    written = texts(figure)
    assert "No layer stands out" in written
    assert all(layer.key.removesuffix(".weight") in written for layer in worst[:5])
    assert worst[5].key.removesuffix(".weight") not in written
    axes = axes_of(figure, SQNR_PANEL)
    assert not axes.lines
    assert not numbers_beside_dots(axes)


@pytest.mark.parametrize("places", [(3,), (0, 1, 2, 3), (20, 21, 39), (0, 39, 5, 6, 7, 8, 9)])
def test_layers_that_stand_out_are_numbered(places):
    report = noisier(repeated(small_report(), 40), {place: 30 + 7 * place for place in places})
    figure = layer_report(report)
    axes = axes_of(figure, SQNR_PANEL)
    layers = [(place, report.layers[place]) for place in places]
    layers.sort(key=lambda entry: entry[1].error.sqnr)
    ordered = [layer.key for layer, _ in in_order_of_depth(with_statistics(report.layers))]
    expected = {
        str(rank): (ordered.index(layer.key) + 1, layer.error.sqnr) for rank, (_, layer) in enumerate(layers, 1)
    }
    numbers = numbers_beside_dots(axes)
    assert numbers == {rank: expected[rank] for rank in list(expected)[:5]}
    assert (f"{len(places)} layers stand out" if len(places) > 1 else "1 layer stands out") in texts(figure)
    assert not axes.lines
    assert_readable(figure)


def test_standing_out_is_far_from_the_others():
    assert standing_out([30, 29, 31, 30, 23.4, 30, 29, 10]) == [7, 4]
    assert standing_out([30, 29, 31, 30, 24.1, 30]) == []  # less than twice the error
    assert standing_out([40, 36, 32, 28, 24, 20, 16]) == []  # not further than the others are apart
    assert standing_out([float("inf"), 30, 30, 30, 20]) == [4]
    assert standing_out([float("inf"), 30]) == standing_out([]) == []


def test_lossless_layer_is_a_triangle():
    weights = {"blocks.0.weight": heavy_tailed(0, 32, 32), "blocks.1.weight": torch.zeros(32, 32)}
    figure = layer_report(report_on(weights))
    axes = axes_of(figure, SQNR_PANEL)
    triangle = axes.collections[1].get_offsets().data
    assert triangle[0, 0] == 2
    assert triangle[0, 1] < axes.get_ylim()[1]
    assert "▲ lossless: 1" in texts(figure)


def test_layer_report_cells_show_the_shares():
    report = saturating_report()
    figure = layer_report(report)
    (mesh,) = (mesh for axes in figure.axes for mesh in axes.findobj(QuadMesh) if mesh.get_array().shape == (2, 1))
    error = report.layers[0].error
    flushed, saturated = mesh.get_array()[:, 0]
    assert saturated == error.saturated / 4096 > 0
    assert flushed == error.flushed / 4096 or flushed is np.ma.masked


def test_pooling_keeps_the_largest_share():
    shares = np.zeros((1000, 2))
    shares[[3, 500, 999], [0, 1, 0]] = 0.5, 0.25, 0.125
    pooled = pool(shares)
    assert pooled.shape == (512, 2)
    assert sorted(pooled[pooled > 0]) == [0.125, 0.25, 0.5]
    assert pooled[-1, 0] == 0.125


def test_size_bars_show_the_bytes_by_kind():
    axes = axes_of(layer_report(small_report()), "Size")
    widths = [patch.get_width() for patch in axes.patches]
    assert widths == [4096, 4096, 4096, 4096, 64, 2052, 2052, 2052, 2052, 64]
    assert "16.4 kB" in texts(axes.figure)
    assert "8.27 kB" in texts(axes.figure)


def test_layer_report_looks_as_before():
    assert_like_golden(layer_report(small_report()), "layer_report")


OUTPUTS = "Predicted error of each layer's output"


def calibrated(report, errors):
    """The report with (nearest, chosen) errors of the first layers' outputs."""
    known = [OutputError(5000, *pair) for pair in errors] + [None] * (len(report.layers) - len(errors))
    layers = (replace(layer, output_error=error) for layer, error in zip(report.layers, known, strict=True))
    return replace(report, layers=tuple(layers))


def two_calibrated():
    return calibrated(small_report(), [(0.014, 0.004), (0.02, 0.02)])


def test_layer_report_shows_the_output_errors():
    figure = layer_report(two_calibrated())
    assert list(figure.axes).index(axes_of(figure, OUTPUTS)) < list(figure.axes).index(axes_of(figure, SQNR_PANEL))
    axes = axes_of(figure, OUTPUTS)
    ties, nearest, chosen = axes.collections
    assert nearest.get_offsets().data == pytest.approx(np.array([[1, 1.4], [2, 2.0]]))
    assert chosen.get_offsets().data == pytest.approx(np.array([[1, 0.4], [2, 2.0]]))
    assert ties.get_segments()[0] == pytest.approx(np.array([[1, 0.4], [1, 1.4]]))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["nearest", "calibrated"]
    assert nearest.get_facecolor()[0].mean() > chosen.get_facecolor()[0].mean(), "light and dark"
    assert axes.get_yscale() == "log"
    assert "error (% of output)" in texts(axes)
    assert axes.get_xlim() == axes_of(figure, SQNR_PANEL).get_xlim() == (0.5, 4.5)


def test_output_errors_of_zero_are_triangles():
    axes = axes_of(layer_report(calibrated(small_report(), [(0.0, 0.0), (0.01, 0.0), (0.01, 0.005)])), OUTPUTS)
    low, high = axes.get_ylim()
    edges = [dots.get_offsets().data for dots in axes.collections if len(dots.get_paths()[0].vertices) == 4]
    assert [sorted(points[:, 0]) for points in edges] == [[1], [1, 2]]
    assert all(low < y < low * (high / low) ** 0.1 for points in edges for y in points[:, 1])
    assert "▼ no error: 2" in texts(axes)


@pytest.mark.parametrize("size", [(1024, 717), (1024, 768), (768, 576), (1600, 1200)])
@pytest.mark.parametrize(("layers", "decades"), [(1, 0), (4, 0.5), (57, 1.4), (57, 2.4), (1000, 6)])
def test_layer_report_with_output_errors_is_readable(size, layers, decades):
    rank = np.random.default_rng(0).random((layers, 2))
    errors = np.sort(0.01 * 10 ** (decades * (rank - 0.5)), axis=1)[:, ::-1]
    figure = layer_report(calibrated(repeated(small_report(), layers), errors.tolist()), width=size[0], height=size[1])
    assert_readable(figure)
    axes = axes_of(figure, OUTPUTS)
    low, high = axes.get_ylim()
    assert low < 100 * errors.min() <= 100 * errors.max() < high
    assert sum(low <= tick <= high for tick in axes.get_yticks()) in range(2, 8)


def test_worst_layers_of_a_calibrated_model_have_the_largest_output_errors():
    report = noisier(repeated(small_report(), 20), {0: 100})
    errors = [(0.01, 0.004)] * 20
    errors[7] = (0.5, 0.025)
    figure = layer_report(calibrated(report, errors))
    written = texts(figure)
    assert "1 layer stands out" in written
    assert "Largest error:" in written
    assert "2.5 % of output, other" in written
    ordered = [layer.key for layer, _ in in_order_of_depth(with_statistics(report.layers))]
    place = ordered.index(report.layers[7].key) + 1
    assert numbers_beside_dots(axes_of(figure, OUTPUTS)) == {"1": (place, pytest.approx(2.5))}
    assert not numbers_beside_dots(axes_of(figure, SQNR_PANEL))
    assert_readable(figure)


def test_low_layer_report_has_the_output_errors_alone():
    figure = layer_report(two_calibrated(), width=1024, height=640)
    assert OUTPUTS in texts(figure)
    assert SQNR_PANEL not in texts(figure)
    assert "median 1.2 % of the output, 1.7 % with nearest" in texts(figure)
    assert_readable(figure)


def test_layer_report_with_output_errors_looks_as_before():
    assert_like_golden(layer_report(two_calibrated()), "layer_report_calibrated")


def test_layer_report_of_a_thousand_layers_draws_as_much_as_one_of_few():
    few, many = (layer_report(calibrated(repeated(small_report(), n), [(0.02, 0.005)] * n)) for n in (4, 1000))
    assert len(many.findobj()) < 1.5 * len(few.findobj())


# --- Compare FP8 Roundings


@pytest.fixture(scope="module")
def comparison():
    return compare_roundings(
        ((f"blocks.{i}.mlp.fc1.weight", heavy_tailed(i, 64, 32)) for i in range(4)), source="made_up.safetensors"
    )


FOLDED = ("owlshift", "complex_neighbor", "shift_perturb")
COLUMNS = (("stochastic",), ("nearest",), FOLDED)


def assert_boxes(axes, comparison, columns, values):
    """A box of the quartiles of each column, E4M3 left of E5M2."""
    boxes = [patch.get_path().vertices for patch in axes.patches if patch.get_facecolor()[3] < 1]
    expected = [(i, name, format) for i, name in enumerate(columns) for format in ("float8_e4m3fn", "float8_e5m2")]
    for box, (i, names, format) in zip(boxes, expected, strict=True):
        trials = [trial for trial in comparison.trials if trial.rounding in names and trial.format == format]
        assert len(trials) == len(names)
        quartiles = np.percentile([value for trial in trials for value in values(trial)], (25, 75))
        assert (box[:, 1].min(), box[:, 1].max()) == pytest.approx(tuple(quartiles))
        assert box[:, 0].mean() == pytest.approx(i + {"e4": -0.15, "e5": 0.15}[format[7:9]], abs=0.05)


def names_of_columns(figure):
    return [label.get_text() for label in figure.axes[-1].get_xticklabels()]


def test_comparison_boxes_show_the_layers(comparison):
    figure = comparison_figure(comparison)
    assert_readable(figure)
    axes = axes_of(figure, "Error of the weights")
    assert_boxes(axes, comparison, COLUMNS, lambda trial: [100 * error.rmse / error.rms for error in trial.errors])
    assert names_of_columns(figure) == ["stochastic", "nearest", f"other mechanisms:\n{', '.join(FOLDED)}"]


def test_comparison_begins_with_the_advice(calibrated_comparison):
    figure = comparison_figure(calibrated_comparison)
    figure.canvas.draw()
    (advice,) = [text for text in figure.texts if text.get_text().startswith("Choose calibrated in float8_e4m3fn")]
    assert advice.get_weight() == "bold"
    panels = [axes.get_tightbbox() for axes in figure.axes]
    assert all(advice.get_window_extent().y0 > box.y1 for box in panels)


def test_comparison_without_errors_is_readable():
    figure = comparison_figure(compare_roundings([("a.weight", torch.zeros(4, 4))], source=LONG_NAME))
    assert_readable(figure)
    assert "Every rounding in both formats keeps these layers exactly." in texts(figure)


def test_comparison_says_which_layers(comparison):
    figure = comparison_figure(replace(comparison, total=120))
    assert "4 of 120 layers, evenly spaced · scaling absmax · seed 0" in texts(figure)


def test_comparison_looks_as_before(comparison):
    assert_like_golden(comparison_figure(comparison), "comparison")


@pytest.fixture(scope="module")
def calibrated_comparison():
    """Four layers, three of them in the calibration."""
    recorder = ActivationRecorder()
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        shared = torch.randn(4000, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
        recorder.observe(f"blocks.{i}.mlp.fc1.weight", shared + 0.5 * torch.randn(4000, 32, generator=generator))
    return compare_roundings(
        ((f"blocks.{i}.mlp.fc1.weight", heavy_tailed(i, 64, 32)) for i in range(4)),
        source="made_up.safetensors",
        calibration=recorder.result("prompts"),
    )


OUTPUT_PANEL = "Error of the layer outputs on recorded inputs"


def test_calibration_adds_a_panel_and_a_rounding(calibrated_comparison):
    figure = comparison_figure(calibrated_comparison)
    assert len(figure.axes) == 4
    axes = axes_of(figure, OUTPUT_PANEL)
    columns = (("stochastic",), ("nearest",), ("calibrated",), FOLDED)
    assert all(len(trial.output_errors) == 3 for trial in calibrated_comparison.trials)
    assert_boxes(axes, calibrated_comparison, columns, lambda trial: 100 * np.array(trial.output_errors))
    assert names_of_columns(figure)[:3] == ["stochastic", "nearest", "calibrated"]
    assert "1 of these 4 layers is not in the calibration" in texts(figure)


@pytest.mark.parametrize("size", [(1024, 820), (1024, 832), (1024, 1024), (768, 768), (1600, 1400)])
def test_comparison_with_a_calibration_is_readable(calibrated_comparison, size):
    assert_readable(comparison_figure(calibrated_comparison, width=size[0], height=size[1]))


def test_calibration_of_another_model_leaves_the_panel_empty(calibrated_comparison):
    recorder = ActivationRecorder()
    recorder.observe("another.weight", torch.ones(9, 32))
    weights = [("blocks.0.mlp.fc1.weight", heavy_tailed(0, 64, 32))]
    figure = comparison_figure(compare_roundings(weights, source="x", calibration=recorder.result()))
    assert_readable(figure)
    assert not axes_of(figure, OUTPUT_PANEL).patches
    assert "none of these layers is in the calibration" in texts(figure)


def test_comparison_with_a_calibration_looks_as_before(calibrated_comparison):
    assert_like_golden(comparison_figure(calibrated_comparison, height=1024), "comparison_calibrated")


# --- Rounding Curve


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_curve_is_readable(rounding):
    assert_readable(rounding_curve(measure_rounding("float8_e5m2", rounding, draws=50)))


@pytest.mark.parametrize("limits", [(-0.02, 0.03), (400, 500), (500, 600), (-1e-9, 1e-9), (-6e4, 6e4)])
def test_rounding_curve_of_any_range_is_readable(limits):
    assert_readable(rounding_curve(measure_rounding("float8_e4m3fn", "stochastic", *limits, draws=20)))


def test_rounding_curve_shows_the_measurements():
    curve = measure_rounding("float8_e4m3fn", "stochastic", draws=100)
    figure = rounding_curve(curve)
    dots = axes_of(figure, "Probability of rounding up").collections[0].get_offsets()
    assert dots[:, 0].data == pytest.approx(curve.values)
    known = ~np.isnan(curve.up)
    assert dots[known, 1].data == pytest.approx(curve.up[known])
    line = axes_of(figure, "Variance").lines[0].get_xydata()
    assert [1.0625, 0.25] in line.tolist()


# Lines that are drawn across the E4M3 step from 1 to 1.125: where they begin, pass and end.
CURVE_LINES = {
    ("stochastic", "Probability of rounding up"): [(1, 0), (1.0625, 0.5), (1.125, 1)],
    ("stochastic", "Bias: mean error"): [(1, 0), (1.0625, 0), (1.125, 0)],
    ("stochastic", "Variance"): [(1, 0), (1.0625, 0.25), (1.125, 0)],
    ("nearest", "Probability of rounding up"): [(1, 0), (1.0625, 0), (1.0625, 1), (1.125, 1)],
    ("nearest", "Bias: mean error"): [(1, 0), (1.0625, -0.5), (1.0625, 0.5), (1.125, 0)],
    ("nearest", "Variance"): [(1, 0), (1.0625, 0), (1.125, 0)],
}


@pytest.mark.parametrize(("rounding", "panel"), CURVE_LINES)
def test_rounding_curve_theory_lines(rounding, panel):
    figure = rounding_curve(measure_rounding("float8_e4m3fn", rounding, draws=2))
    line = axes_of(figure, panel).lines[0].get_xydata()
    (begin,) = np.flatnonzero((line[:, 0] == 1) & np.append(True, np.isnan(line[:-1, 0])))
    (end,) = np.flatnonzero((line[:, 0] == 1.125) & np.append(np.isnan(line[1:, 0]), True))
    across = [tuple(point) for point in line[begin : end + 1]]
    expected = CURVE_LINES[rounding, panel]
    assert (across[0], across[-1]) == (expected[0], expected[-1])
    assert set(expected) <= set(across)


def test_the_curve_of_nearest_does_not_speak_of_draws():
    written = texts(rounding_curve(measure_rounding("float8_e4m3fn", "nearest")))
    for word in ("unbiased", "standard error", "mean of all draws", "by chance", "stochastic", "1,000 draws"):
        assert word not in written, word


def test_rounding_curve_says_whether_the_mean_is_the_value():
    unbiased, biased = (
        texts(rounding_curve(measure_rounding("float8_e5m2", rounding, draws=200)))
        for rounding in ("owlshift", "nearest")
    )
    assert "The mean of many draws is the value: no bias" in unbiased
    assert "a bias that averaging cannot remove" in biased


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_rounding_curve_looks_as_before(rounding):
    assert_like_golden(rounding_curve(measure_rounding("float8_e4m3fn", rounding)), f"rounding_curve_{rounding}")


# --- Compare Images (A/B)


def gradient(rows, columns):
    ramp = np.linspace(0.2, 0.8, columns)
    return np.broadcast_to(ramp[None, :, None], (rows, columns, 3)).copy()


def test_image_sheet_shows_a_b_and_their_difference():
    a = gradient(48, 64)
    b = a.copy()
    b[10:20, 10:20] += 0.1
    figure = image_sheet(a, b, psnr=30, ssim=0.9, amplify=4)
    assert_readable(figure)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["A", "B", "difference × 4"]
    assert np.array_equal(shown[0], a)
    assert np.array_equal(shown[1], b)
    assert shown[2][15, 15] == pytest.approx([0.4] * 3)
    assert not shown[2][30, 30].any()
    assert "3.26 % of the pixels differ by more than 8 of 255 levels, 96.7 % by less than 1." in texts(figure)
    assert "PSNR 30.0 dB · SSIM 0.9000 · mean difference 0.83 levels · largest 26 levels" in texts(figure)


def test_image_sheet_names_the_images():
    a = gradient(8, 8)
    figure = image_sheet(a, a, psnr=1, ssim=1, names=("16 bits", "nearest"), which="pair 2 of 3")
    assert [axes.get_title(loc="left") for axes in figure.axes][:2] == ["16 bits", "nearest"]
    assert "16 bits and nearest, pair 2 of 3" in texts(figure)
    assert "A and B" in texts(image_sheet(a, a, psnr=1, ssim=1))
    assert_readable(image_sheet(a, a, psnr=1, ssim=1, names=("a long name " * 9, "$another_{long} name " * 9)))


def test_image_sheet_of_equal_images():
    figure = image_sheet(gradient(8, 8), gradient(8, 8), psnr=float("inf"), ssim=1)
    assert "The images are identical." in texts(figure)
    assert "PSNR ∞ dB" in texts(figure)


@pytest.mark.parametrize("shape", [(2, 64), (64, 64), (256, 64)])
def test_image_sheet_fits_any_shape(shape):
    figure = image_sheet(gradient(*shape), gradient(*shape), psnr=1, ssim=1, width=512)
    assert_readable(figure)
    assert all(
        axes.bbox.width == pytest.approx(axes.bbox.height * shape[1] / shape[0], rel=0.01) for axes in figure.axes
    )


def test_image_sheet_refuses_images_it_cannot_compare():
    with pytest.raises(ValueError, match="A is 8 × 4 pixels, B is 4 × 8 pixels; both must have the same size"):
        image_sheet(gradient(4, 8), gradient(8, 4), psnr=1, ssim=1)
    with pytest.raises(ValueError, match="8 × 40 pixels are too tall; crop them to at most 4 times their width"):
        image_sheet(gradient(40, 8), gradient(40, 8), psnr=1, ssim=1)


def test_image_sheet_looks_as_before():
    a = gradient(48, 64)
    assert_like_golden(image_sheet(a, a[:, ::-1], psnr=10, ssim=0.5), "image_sheet")
