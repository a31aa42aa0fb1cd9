"""Numbers as people read them. tests/display_cases.json holds what Python and the page have in common.

An input that is a list holds a function's arguments; null is an infinite level; the page writes sizes with a
non-breaking space.
"""

import json
import math
from pathlib import Path

import pytest
from stochastic_fp8_pack.kernels import display

SHARED = json.loads((Path(__file__).parents[1] / "display_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "given", "expected"), [(name, *case) for name, cases in SHARED.items() for case in cases]
)
def test_shared_cases(name, given, expected):
    arguments = given if isinstance(given, list) else [given]
    assert getattr(display, name)(*arguments) == expected


def test_shared_cases_cover_every_function_of_the_page():
    assert set(SHARED) == {"bytes", "share", "decibels", "seconds", "small", "count"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (16_230_000_000, 8_400_000_000, "16.2 GB → 8.40 GB (−48 %)"),
        (2_000_000, 1_000_000, "2.00 MB → 1.00 MB (−50 %)"),
        (1000, 1001, "1.00 kB → 1.00 kB (±0 %)"),
        (1000, 1200, "1.00 kB → 1.20 kB (+20 %)"),
        (0, 0, "0 B → 0 B"),
    ],
)
def test_sizes(before, after, expected):
    assert display.sizes(before, after) == expected


def test_infinite_decibels():
    assert display.decibels(math.inf) == "∞ dB"


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0, "0"),
        (1, "1"),
        (448.0, "448"),
        (-0.0128, "−0.0128"),
        (0.30000001, "0.3"),
        (0.0001, "0.0001"),
        (2.794e-5, "2.79e−5"),
        (999.6, "1,000"),
        (57344, "57,344"),
        (-1.5e6, "−1.50e6"),
    ],
)
def test_number(x, expected):
    assert display.number(x) == expected


def test_shorten_middle():
    assert display.shorten_middle("short", 5) == "short"
    assert display.shorten_middle("abcdefghijklmnop", 10) == "abc…klmnop"
    assert display.shorten_middle("风景模型", 8) == "风景模型"
    assert display.shorten_middle("风景模型风景模型", 10) == "风…景模型"


def test_fixed():
    assert [display.fixed(x, 2) for x in (-0.2799, 2.6, -0.001, 0)] == ["−0.28", "2.60", "0.00", "0.00"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("joint_blocks.0.attn.qkv.weight", "joint_blocks.0.attn.qkv.weight"),
        ("Größe 8 × 16 → 2 µs", "Größe 8 × 16 → 2 µs"),
        ("a\x1b[2J\x9b\x07", "a\\x1b[2J\\x9b\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("a\u202eb\u2066\u200b\u2028", "a\\u202eb\\u2066\\u200b\\u2028"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable(text, shown):
    assert display.printable(text) == shown
    assert display.printable_lines(f"{text}") == "\n".join(map(display.printable, text.split("\n")))
