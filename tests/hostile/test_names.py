"""Names of tensors and files come from other people: on a terminal and in Markdown they are nothing but text."""

import subprocess
import sys

import pytest
from checkpoints import sd3, weights
from conftest import PACK_ROOT
from hostile.amounts import amount
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from stochastic_fp8_pack.kernels import compare_roundings, quantize_file
from stochastic_fp8_pack.kernels.engine.file_job import read_weights
from stochastic_fp8_pack.kernels.report.table import to_markdown
from stochastic_fp8_pack.kernels.studies.table import to_markdown as comparison_to_markdown

NAMES = {
    "image": "<img src=http://a.example/x.png>",
    "Markdown image": "![x](http://a.example/x.png)",
    "link": "[x](javascript:alert(1))",
    "reference": "[x]: http://a.example",
    "script": "<script>alert(1)</script>",
    "comment": "<!-- x",
    "entity": "&lt;img src=x&gt;",
    "autolink": "<http://a.example>",
    "bare address": "http://a.example/x",
    "columns": "a|b|c",
    "code": "`a`",
    "fence": "```",
    "emphasis": "**a** __b__ ~~c~~",
    "escapes": "\\*a\\* \\`b\\` \\| \\",
    "clear the screen": "\x1b[2J\x1b[H",
    "window title": "\x1b]0;x\x07",
    "one byte CSI": "\x9b31m",
    "backspaces": "abc\b\b\b",
    "lines": "a\nb\r\nc",
    "line separators": "a\u2028b\u2029c\x85d",
    "right to left": "a\u202eb",
    "zero width": "a\u200bb\ufeffc",
    "NUL": "a\x00b",
}


def layer(name):
    """The name of a layer that is quantized."""
    return f"joint_blocks.0.x_block.{name}.weight"


def structure(markdown):
    """The kinds of everything in a Markdown text, in order, and its table rows as texts of their cells."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    kinds = []
    for token in tokens:
        kinds.append(token.type)
        kinds += [child.type for child in token.children or () if child.type != "text"]
    return kinds


def has_address(markdown):
    """Whether a page that turns bare addresses into links finds one."""
    return "://" in markdown


@pytest.mark.parametrize("name", NAMES)
def test_markdown_holds_a_tensors_name_as_text(tmp_path, name):
    found = []
    for number, key in enumerate(("plain", NAMES[name])):
        source = tmp_path / f"{number}.safetensors"
        save_file(weights(layer(key), shape=(16, 16)), source)
        found.append(to_markdown(quantize_file(source, tmp_path / f"out{number}.safetensors")))
    assert structure(found[1]) == structure(found[0]), found[1]
    assert not has_address(found[1])


@pytest.mark.parametrize("name", NAMES)
def test_markdown_holds_a_files_name_as_text(tmp_path, name):
    found = []
    for number, file in enumerate(("plain", NAMES[name].replace("/", "").replace("\0", ""))):
        source = tmp_path / f"{file}.safetensors"
        save_file(sd3(blocks=1), source)
        report = quantize_file(source, tmp_path / f"out{number}.safetensors")
        comparison = compare_roundings(read_weights(source, only=["qkv"]), source=source.name)
        found.append(to_markdown(report) + "\n" + comparison_to_markdown(comparison))
    assert structure(found[1]) == structure(found[0]), found[1]
    assert not has_address(found[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file in whose name and tensors all these names stand."""
    path = tmp_path_factory.mktemp("names") / "\x1b[31m\u202e\x9b.safetensors"
    save_file(sd3(blocks=1) | weights(*map(layer, NAMES.values()), shape=(16, 16)), path)
    return path


@pytest.mark.parametrize(
    "command",
    amount(
        ["quantize --debug", "inspect"],
        ["quantize", "quantize --debug", "plan", "inspect", "compare", "a wrong pattern"],
    ),
)
def test_a_terminal_gets_printable_characters_only(source, command):
    arguments = {
        "quantize": [source, source.with_name("\x1b[32mout.safetensors"), "--overwrite"],
        "quantize --debug": [source, source.with_name("out.safetensors"), "--overwrite", "--debug"],
        "plan": [source, source.with_name("out.safetensors"), "--dry-run"],
        "inspect": ["inspect", source],
        "compare": ["compare", source],
        "a wrong pattern": [source, source.with_name("out.safetensors"), "--keep", "\x1b[31mqk"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", "kernels", *map(str, arguments)],
        cwd=PACK_ROOT,
        capture_output=True,
        timeout=300,
        check=False,
    )
    text = (done.stdout + done.stderr).decode()
    assert len(text) > 50
    assert {character for character in text if not character.isprintable()} <= {"\n", "\r"}, text[-2000:]
