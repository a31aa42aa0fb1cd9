"""Sources under other names, with tensors joined from rows of the stored ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import Recipe
from stochastic_fp8_pack.kernels.engine.file_job import plan_file, quantize_file
from stochastic_fp8_pack.kernels.files.reader import open_source
from stochastic_fp8_pack.kernels.files.renamed import Rows, renamed
from stochastic_fp8_pack.kernels.files.writer import writing

TENSORS = {
    "q": torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "k": torch.randn(32, 16, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "v": torch.randn(64, 16, generator=torch.Generator().manual_seed(3)).bfloat16(),
    "wide": torch.ones(32, 32, dtype=torch.bfloat16),
    "full": torch.ones(32, 16),
    "number": torch.tensor(3.0),
    "fours": torch.arange(12, dtype=torch.uint8).reshape(4, 3),
}
QKV = [Rows("q", 0, 32), Rows("k", 0, 32), Rows("v", 0, 64)]
JOINED = torch.cat([TENSORS["q"], TENSORS["k"], TENSORS["v"]])


@pytest.fixture
def stored(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as source:
        yield source


def test_rows_are_joined_in_their_order(stored):
    swapped = [Rows("v", 32, 64), Rows("v", 0, 32)]
    source = renamed(stored, {"qkv": QKV, "halves": swapped, "some": [Rows("q", 5, 6)], "n": [Rows("number", 0, 1)]})
    assert list(source.tensors) == ["qkv", "halves", "some", "n"]
    assert source.tensors["qkv"].shape == (128, 16)
    assert torch.equal(source.read("qkv"), JOINED)
    assert torch.equal(source.read("qkv", torch.empty(8192, dtype=torch.uint8)), JOINED)
    assert torch.equal(source.read("halves"), TENSORS["v"].roll(32, 0))
    assert torch.equal(source.read("some"), TENSORS["q"][5:6])
    assert torch.equal(source.read("n"), torch.tensor(3.0))
    assert source.read_bytes("qkv") == JOINED.view(torch.uint8).numpy().tobytes()


def test_joined_rows_are_copied(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.reader.COPY_CHUNK", 100)
    source = renamed(stored, {"qkv": QKV})
    with writing(tmp_path / "b.safetensors", {"x": source.tensors["qkv"]}, {}, source=source) as writer:
        writer.copy("x", source, "qkv")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["x"], JOINED)


@pytest.mark.parametrize(
    "rows",
    [
        [Rows("q", 0, 32), Rows("wide", 0, 32)],
        [Rows("q", 0, 32), Rows("full", 0, 32)],
        [Rows("q", 0, 33)],
        [Rows("q", -1, 4)],
        [Rows("q", 4, 4)],
    ],
)
def test_rows_that_do_not_fit_are_refused(stored, rows):
    with pytest.raises(ValueError, match="'x' cannot be joined"):
        renamed(stored, {"x": rows})


def test_unknown_names_are_refused(stored):
    with pytest.raises(KeyError):
        renamed(stored, {"x": [Rows("none", 0, 1)]})


def test_a_renamed_source_is_quantized_like_its_file(tmp_path):
    """Random words depend on the new names. Nothing but an open source says that it is renamed."""
    native = {"blocks.0.qkv.weight": JOINED, "blocks.0.qkv.bias": TENSORS["number"].reshape(1)}
    save_file(native, tmp_path / "native.safetensors")
    save_file(TENSORS, tmp_path / "a.safetensors")
    recipe = Recipe(layers="all_linear")
    quantize_file(tmp_path / "native.safetensors", tmp_path / "one.safetensors", recipe)
    with open_source(tmp_path / "a.safetensors") as opened:
        names = {"blocks.0.qkv.weight": QKV, "blocks.0.qkv.bias": [Rows("number", 0, 1)]}
        source = renamed(opened, names, ["names were changed"])
        assert "names were changed" in plan_file(source, recipe).notes
        report = quantize_file(source, tmp_path / "two.safetensors", recipe)
        assert torch.equal(source.read("blocks.0.qkv.weight"), JOINED), "the caller closes the source"
    assert "names were changed" in report.notes
    assert [layer.key for layer in report.layers] == ["blocks.0.qkv.weight"]
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    codes = "blocks.0.qkv.weight"
    assert torch.equal(one[codes].view(torch.uint8), two[codes].view(torch.uint8))
    assert torch.equal(one[f"{codes}_scale"], two[f"{codes}_scale"])
