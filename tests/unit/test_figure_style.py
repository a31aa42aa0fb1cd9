"""The themes of the figures, and names in scripts that their font lacks."""

import logging
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from reports import small_report
from stochastic_fp8_pack.kernels import UnknownChoiceError
from stochastic_fp8_pack.kernels.figures import THEMES, drawn_in, error_histogram, layer_report, style, to_image
from stochastic_fp8_pack.kernels.figures.fonts import find_fonts


def contrast(one, other):
    """Of two colours, from 1 to 21, as in the Web Content Accessibility Guidelines 2.1."""

    def luminance(colour):
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return np.dot(channels, (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_colours_stand_out_from_the_paper(theme):
    with drawn_in(theme), style.house_style():
        for ground in (style.PAPER, style.PANEL):
            assert contrast(style.INK, ground) > 12
            assert contrast(style.FAINT, ground) > 4.5
            assert contrast(style.STRONG_BLUE, ground) > 7
            for colour in (style.BLUE, style.GREEN, style.VERMILION):
                assert contrast(colour, ground) > 3
        assert all(contrast(style.ink_on(colour), colour) > 4 for colour in ("C0", "C1", "C2", "C3", "C4", "C5"))


def test_a_theme_is_for_its_block_alone():
    def paper():
        return to_image(error_histogram(small_report()))[0, 0, 0]

    assert paper().min() == 1
    with drawn_in("dark"):
        dark = paper()
        with drawn_in("light"):
            assert paper().min() == 1
        assert paper().equal(dark)
    assert dark.max() < 0.2
    assert paper().min() == 1


def test_an_unknown_theme_is_refused():
    with pytest.raises(UnknownChoiceError, match="unknown theme 'pink': choose one of dark, light"), drawn_in("pink"):
        pass


# --- fonts


@pytest.fixture
def only_fonts(monkeypatch):
    """only_fonts(wanted): as on a machine that has only the fonts for which wanted(font) is true."""

    def only(wanted):
        monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if wanted(font)])
        find_fonts.cache_clear()

    yield only
    find_fonts.cache_clear()


@pytest.fixture
def bundled_fonts(only_fonts):
    """matplotlib's own."""
    only_fonts(lambda font: "mpl-data" in font.fname)


def shown(name, caplog):
    """The texts of a figure of a model and a layer of this name, drawn without a warning and without a log record."""
    report = small_report()
    first, *rest = report.layers
    report = replace(report, source=f"{name}.safetensors", layers=(replace(first, key=f"{name}.weight"), *rest))
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG, logger="matplotlib.font_manager"):
        warnings.simplefilter("error")
        figure = layer_report(report)
        caplog.clear()
        to_image(figure)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    return {text.get_text(): text for text in figure.findobj(Text)}


@pytest.mark.parametrize("name", ["Модель пейзаж", "Ελληνικά", "Größe µ", "مشهد"])
def test_scripts_of_the_usual_font(bundled_fonts, caplog, name):
    texts = shown(name, caplog)
    assert texts[f"{name}.safetensors"].get_fontfamily() == ["DejaVu Sans"]
    assert name in texts


@pytest.mark.parametrize("name", ["风景模型", "モデル名前", "풍경", "🚀"])
def test_characters_that_no_font_has_are_question_marks(bundled_fonts, caplog, name):
    texts = shown(name, caplog)
    assert f"{'?' * len(name)}.safetensors" in texts
    assert "?" * len(name) in texts


def test_another_font_is_used_where_one_has_the_characters(bundled_fonts, caplog):
    texts = shown("\N{SMILE}\N{FROWN}", caplog)
    assert texts["\N{SMILE}\N{FROWN}.safetensors"].get_fontfamily() == ["DejaVu Sans", "STIXGeneral"]
    assert find_fonts(frozenset("\N{SMILE}风")) == (("STIXGeneral",), frozenset("风"))
    assert find_fonts(frozenset("风")) == ((), frozenset("风"))


def test_a_font_without_a_bold_weight_is_not_logged(only_fonts, caplog):
    only_fonts(lambda font: font.name in ("DejaVu Sans", "STIXSizeFiveSym"))
    texts = shown("\N{TOP SQUARE BRACKET}", caplog)
    title = texts["\N{TOP SQUARE BRACKET}.safetensors"]
    assert (title.get_fontfamily(), title.get_weight()) == (["DejaVu Sans", "STIXSizeFiveSym"], "bold")
