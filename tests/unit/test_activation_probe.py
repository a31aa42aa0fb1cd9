"""The activation probe's numbers, tables and figure, from made-up differences."""

import math

import numpy as np
import pytest
from stochastic_fp8_pack.kernels.figures import activation_probe_figure, to_image
from stochastic_fp8_pack.kernels.studies.activation_probe import Probe, list_layers, to_markdown


def probe(*steps, blocks=None):
    blocks = blocks or ("input", "blocks.0", "blocks.1", "output")
    return Probe("SD3", "2 steps, euler/simple", blocks, steps or ((0.0, 0.03, 0.05, 0.05), (0.03, 0.05, 0.05, 0.13)))


def test_growth_counts_the_steps_in_which_the_difference_grows():
    """Block 0: √((0.03² + (0.05² - 0.03²)) / 2); block 1: √(0.04² / 2); output: √(0.12² / 2)."""
    assert probe().rises == tuple(
        pytest.approx(value / math.sqrt(2)) for value in (0.03, math.sqrt(0.0009 + 0.0016), 0.04, 0.12)
    )


def test_a_difference_that_shrinks_does_not_count():
    assert probe((0.05, 0.03, 0.02, 0.01)).rises == (pytest.approx(0.05), 0, 0, 0)
    assert probe((0.05, 0.03, 0.02, 0.01)).worst == []


def test_means_are_over_the_steps():
    assert probe().means[3] == pytest.approx(math.sqrt((0.05**2 + 0.13**2) / 2))


def test_the_worst_blocks_are_blocks():
    """Input and output differ most, and are not blocks."""
    assert [probe().blocks[i] for i in probe().worst] == ["blocks.0"]


@pytest.mark.parametrize(("blocks", "worst"), [(3, 1), (6, 2), (14, 4), (40, 5)])
def test_few_of_the_blocks_are_the_worst(blocks, worst):
    assert len(many(blocks + 2, 3).worst) == worst


def test_the_table():
    lines = to_markdown(probe()).splitlines()
    assert "| blocks.0 | 4.12 % | 3.54 % | 2 |" in lines
    assert "| blocks.1 | 5 % | 2.83 % | 1 |" in lines
    assert lines[-1] == "Blocks in which the difference grows most: blocks.0"


def test_the_list_of_layers():
    shapes = {"embed": (8, 4), "blocks.1.fc": (4, 2), "blocks.10.fc": (3, 2), "blocks.1.attn.q": (2, 2)}
    assert list_layers(["blocks.1", "blocks.10"], shapes).splitlines() == [
        "blocks.1",
        "  blocks.1.fc  4×2",
        "  blocks.1.attn.q  2×2",
        "blocks.10",
        "  blocks.10.fc  3×2",
        "outside of the blocks",
        "  embed  8×4",
    ]


def many(blocks, steps):
    names = ("input", *(f"double_blocks.{i}" for i in range(blocks - 2)), "output")
    rows = tuple(tuple(0.001 * (1 + step) * (1 + i % 5) for i in range(blocks)) for step in range(steps))
    return probe(*rows, blocks=names)


@pytest.mark.parametrize(("blocks", "steps"), [(3, 1), (60, 20), (400, 50)])
@pytest.mark.parametrize("size", [(1024, 768), (256, 200), (4096, 4096)])
def test_the_figure_has_the_size_asked_for(blocks, steps, size):
    image = to_image(activation_probe_figure(many(blocks, steps), width=size[0], height=size[1]))
    assert image.shape == (1, size[1], size[0], 3)
    assert len(np.unique(image.numpy())) > 20


def test_names_below_the_axis_stand_apart():
    figure = activation_probe_figure(many(60, 4))
    figure.canvas.draw()
    labels = [tick for axes in figure.axes for tick in axes.get_xticks() if "growth" in axes.get_ylabel()]
    assert min(np.diff(labels)) >= 2
    assert len(labels) <= 18


def test_equal_models_give_a_picture():
    figure = activation_probe_figure(probe((0.0,) * 4, (0.0,) * 4))
    assert "all outputs are equal" in {text.get_text() for axes in figure.axes for text in axes.texts}
    assert to_image(figure).isfinite().all()
