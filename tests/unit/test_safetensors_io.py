"""Valid safetensors files are read bit for bit, others are refused in one line; written files equal the library's."""

import json
import os
import pickle
from contextlib import contextmanager

import pytest
import torch
from checkpoints import entry, raw_file, sd3, weights
from safetensors.torch import load_file, save, save_file
from stochastic_fp8_pack.kernels import quantize_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.figures.histogram import error_histogram
from stochastic_fp8_pack.kernels.files.bounded_json import MAX_JSON, TooLargeError, count_values, parse_json
from stochastic_fp8_pack.kernels.files.header import MAX_HEADER, MAX_NAME, TensorInfo, parse_header
from stochastic_fp8_pack.kernels.files.reader import open_source, shard, source_files
from stochastic_fp8_pack.kernels.files.writer import writing
from stochastic_fp8_pack.kernels.state_dict.markings import read_markings

DTYPES = [
    *("bool", "uint8", "int8", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *(
        "int16",
        "uint16",
        "float16",
        "bfloat16",
        "int32",
        "uint32",
        "float32",
        "complex64",
        "float64",
        "int64",
        "uint64",
    ),
]
ODD_NAMES = ["", "a b", 'quote"', "back\\slash", "new\nline", "tab\t\x01\x7f", "ünïcödé.重み", "__metadata", "a" * 1000]


def write_tensors(target, tensors, metadata=None, **options):
    """Write a state dict through `writing`, tensor by tensor."""
    infos = {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}
    with writing(target, infos, metadata or {}, **options) as writer:
        for key in writer.order:
            writer.write(key, tensors[key])


def every_dtype():
    """Three random patterns of bits in each dtype."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in DTYPES:
        size = torch.empty(0, dtype=getattr(torch, name)).element_size()
        data = torch.randint(0, 2 if name == "bool" else 256, (3 * size,), dtype=torch.uint8, generator=generator)
        tensors[name] = data.view(getattr(torch, name))
    return tensors


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(a.flatten().view(torch.uint8)) == bytes(b.flatten().view(torch.uint8))
    )


def read_all(path):
    with open_source(path) as source:
        return {name: source.read(name) for name in source.tensors}


@pytest.fixture
def as_nobody():
    """as_nobody(folder): a context without root's permissions, in which `folder` is reachable."""

    @contextmanager
    def change_user(folder):
        if os.geteuid():
            yield
            return
        for parent in [folder, *folder.parents][:-2]:  # pytest's own folders are closed to others
            parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return change_user


# Reading


def test_every_dtype_is_read_bit_for_bit(tmp_path):
    save_file(every_dtype(), tmp_path / "a.safetensors")
    read = read_all(tmp_path / "a.safetensors")
    assert all(same_bits(read[name], tensor) for name, tensor in every_dtype().items())


def test_scalars_empty_tensors_and_odd_names_are_read(tmp_path):
    tensors = {name: torch.full((), float(i)) for i, name in enumerate(ODD_NAMES)} | {"empty": torch.ones(0, 5)}
    save_file(tensors, tmp_path / "a.safetensors", {"key": "välue\n"})
    with open_source(tmp_path / "a.safetensors") as source:
        assert source.metadata == {"key": "välue\n"}
        assert source.name == "a.safetensors"
        assert source.tensors["empty"].shape == (0, 5)
    read = read_all(tmp_path / "a.safetensors")
    assert [read[name].item() for name in ODD_NAMES] == list(map(float, range(len(ODD_NAMES))))


def test_reading_into_scratch_memory_gives_a_view_of_it(tmp_path):
    save_file({"a": torch.arange(6, dtype=torch.float32).reshape(2, 3)}, tmp_path / "a.safetensors")
    scratch = torch.zeros(100, dtype=torch.uint8)
    with open_source(tmp_path / "a.safetensors") as source:
        a = source.read("a", scratch)
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert a.data_ptr() == scratch.data_ptr()


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, b""),
        ({"__metadata__": {}}, b""),
        ({"a": entry("U8", [0], 0, 0)}, b""),
        ({"b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}, b"xy"),
        ({"a": entry("F4", [4], 0, 2)}, b"xy"),
        ({"a": entry("F6_E2M3", [4], 0, 3)}, b"xyz"),
        ({"a": {**entry("U8", [1], 0, 1), "unknown": "ignored"}}, b"x"),
        (b'{\n "a" : {"dtype":"U8","shape":[1],"data_offsets":[0,1]} } \n ', b"x"),
    ],
)
def test_unusual_valid_headers_are_read(tmp_path, header, data):
    with open_source(raw_file(tmp_path / "a.safetensors", header, data)) as source:
        assert b"".join(source.read_bytes(name) for name in sorted(source.tensors)) == data


def test_a_dtype_that_torch_lacks_is_copied_but_not_read(tmp_path):
    raw = raw_file(tmp_path / "a.safetensors", {"a": entry("F6_E3M2", [4], 0, 3)}, b"xyz")
    with open_source(raw) as source:
        assert source.read_bytes("a") == b"xyz"
        with pytest.raises(CheckpointError, match="'a' has dtype float6_e3m2fn, which torch .* lacks"):
            source.read("a")


U8 = entry("U8", [1], 0, 1)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "does not begin with a header|truncated"),
        (b"{", b"", "invalid header"),
        (b"{}x", b"", "there is more text after its end"),
        (b'{"a"}', b"", "':' is missing"),
        (b'{"a":1}', b"", "lacks its dtype|invalid header"),
        (b'{"a":{"b":{}}}', b"", "invalid header"),
        (b'{"a":' + b"[" * 10000 + b"]" * 10000 + b"}", b"", "invalid header"),
        (b'{"\xff":{}}', b"", "utf-8"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "surrogates"),
        (b'{"__metadata__":{"a":1}}', b"", "no string"),
        (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "'a' occurs twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', b"", "'__metadata__' occurs twice"),
        (b'{"__metadata__":"text"}', b"", "'{' is missing"),
        (
            b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"xy",
            "'w' occurs twice",
        ),
        (b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x", "'dtype' occurs twice"),
        ({"w": {**U8, "dtype": "F128"}}, b"x", "unknown dtype 'F128'; known dtypes: BOOL"),
        ({"w": {**U8, "dtype": ["U8"]}}, b"x", "unknown dtype"),
        ({"w": {"dtype": "U8", "shape": [1]}}, b"x", "'w' lacks its dtype, shape or data_offsets"),
        ({"w": {**U8, "shape": [-1]}}, b"x", "invalid shape"),
        ({"w": {**U8, "shape": [1.0]}}, b"x", "invalid shape"),
        ({"w": {**U8, "shape": [True]}}, b"x", "invalid shape"),
        ({"w": {**U8, "shape": "1"}}, b"x", "invalid shape"),
        ({"w": {**U8, "shape": [1] * 65}}, b"x", "invalid shape"),
        ({"w": {**U8, "shape": [2**62, 2**62]}}, b"x", "but 1 bytes by data_offsets"),
        ({"w": {**U8, "shape": [2**80]}}, b"x", "invalid shape"),
        ({"w": {**U8, "shape": [2]}}, b"x", "but 1 bytes by data_offsets"),
        ({"w": entry("F4", [3], 0, 2)}, b"xy", "but 2 bytes by data_offsets"),
        ({"w": {**U8, "data_offsets": [0]}}, b"x", "invalid data_offsets"),
        ({"w": {**U8, "data_offsets": [1, 0]}}, b"x", "but -1 bytes by data_offsets"),
        ({"w": {**U8, "data_offsets": [-1, 0]}}, b"x", "invalid data_offsets"),
        ({"w": {**U8, "data_offsets": [0, 10**300]}}, b"x", "invalid data_offsets"),
        ({"w": U8, "v": U8}, b"xy", "tensors '.' and '.' overlap"),
        ({"w": entry("U8", [3], 0, 3), "v": entry("U8", [1], 1, 2)}, b"xyz", "tensors 'w' and 'v' overlap"),
        ({"w": U8, "v": entry("U8", [1], 3, 4)}, b"wxyz", "there is a gap of 2 bytes before tensor 'v'"),
        ({"w": entry("U8", [1], 5, 6)}, b"x", "there is a gap of 5 bytes before tensor 'w'"),
        ({"w": entry("U8", [9], 0, 9)}, b"x", "truncated: 8 of [0-9,]+ bytes are missing"),
        ({"w": U8}, b"xy", "1 bytes after the last tensor"),
        ({"w": {**U8, "dtype": "U8" + "x" * 5000}}, b"x", "the entry at character 6 has more than 4,096 characters"),
    ],
)
def test_an_invalid_header_is_refused_in_one_line_that_names_the_file(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(raw_file(tmp_path / "bad.safetensors", header, data))
    assert str(caught.value).startswith("bad.safetensors: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x10\0\0", "truncated"),
        (b"\x10\0\0\0\0\0\0\0{}", "truncated: it ends inside its header"),
        (b"\xff" * 8 + b"{}", "not a safetensors file"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (b"PK\x03\x04" + b"\0" * 100, "PyTorch pickle"),
        (pickle.dumps({"a": 1}), "Python pickle"),
        (b"GGUF" + b"\0" * 100, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"some text that is no model at all", "not a safetensors file"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_source(path)


def test_32_mb_of_brackets_do_not_take_gigabytes(tmp_path):
    """Decoded, they would be 11 million lists. The parser stops at the first."""
    text = b'{"a":[' + b"[]," * ((MAX_HEADER - 20) // 3) + b"[]]}"
    with pytest.raises(CheckpointError, match="invalid header"):
        open_source(raw_file(tmp_path / "a.safetensors", text))


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.reader.parse_header", None)
    path = raw_file(tmp_path / "a.safetensors", b"{", length=MAX_HEADER + 1)
    os.truncate(path, MAX_HEADER + 100)
    message = "has a header of 33,554,433 bytes; at most 33,554,432 are read, and headers of published models have less"
    with pytest.raises(CheckpointError, match=message):
        open_source(path)


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("MAX_TENSORS", 2, "more than 2 tensors"), ("MAX_METADATA", 1, "metadata has more than 1 entries")],
)
def test_too_many_entries_are_refused(monkeypatch, limit, value, message):
    monkeypatch.setattr(f"stochastic_fp8_pack.kernels.files.header.{limit}", value)
    header = {"__metadata__": {"a": "", "b": ""}} | {str(i): entry("U8", [0], 0, 0) for i in range(3)}
    with pytest.raises(ValueError, match=message):
        parse_header(json.dumps(header).encode())


def test_names_have_at_most_1024_characters(tmp_path):
    longest = "名" * MAX_NAME
    write_tensors(tmp_path / "a.safetensors", {longest: torch.ones(1)})
    assert read_all(tmp_path / "a.safetensors").keys() == {longest}
    message = "has a name of 1,025 characters; at most 1,024 are read"
    with pytest.raises(CheckpointError, match=message):
        open_source(raw_file(tmp_path / "b.safetensors", {longest + "a": entry("U8", [0], 0, 0)}))
    with pytest.raises(CheckpointError, match="cannot be written: tensor .* has a name of 1,025 characters"):
        write_tensors(tmp_path / "c.safetensors", {longest + "a": torch.ones(1)})


def test_a_file_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.header.MAX_TENSORS", 2)
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.header.MAX_METADATA", 2)
    write_tensors(tmp_path / "a.safetensors", weights("a", "b"), {"c": "", "d": ""})
    for tensors, metadata in ((weights("a", "b", "c"), {}), ({}, {"a": "", "b": "", "c": ""})):
        with pytest.raises(CheckpointError, match="at most 2 can be read again"):
            write_tensors(tmp_path / "b.safetensors", tensors, metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


JSON_TEXTS = ["[]", "[[]]", '{"a": 1, "b": [2, 3]}', '"a, b"', '{"a": {"b": {}}}', "[[1, 2], [3, 4]]"]


def values_in(value):
    """The number of values in decoded JSON."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(values_in, inner))


@pytest.mark.parametrize("text", JSON_TEXTS)
@pytest.mark.parametrize("encode", [str, str.encode, lambda text: bytearray(text.encode("utf-16"))])
def test_json_within_the_limits_is_decoded(text, encode):
    assert parse_json(encode(text)) == json.loads(text)
    assert count_values(encode(text)) >= values_in(json.loads(text))


def test_json_beyond_the_limits_is_not_decoded(monkeypatch):
    monkeypatch.setattr(json, "loads", None)
    for text in ("[" * 2_000_000, b"[]," * 800_000, "{" * 1_000_000):
        with pytest.raises(TooLargeError, match="more than 800,000 values"):
            parse_json(text)
    with pytest.raises(TooLargeError, match="33,554,433 bytes; at most 33,554,432 are read"):
        parse_json(b" " * (MAX_JSON + 1))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([b"[" + b"[]," * 20_000 + b"[]]"] * 21, "inline entries of more than 800,000 values together"),
        ([b" " * 65_536] * 257, "has 16,842,752 bytes of inline entries; at most 16,777,216 are read"),
    ],
)
def test_inline_entries_are_limited_together(tmp_path, members, message):
    header, end = {}, 0
    for i, text in enumerate(members):
        header[f"{i}.comfy_quant"] = entry("U8", [len(text)], end, end + len(text))
        end += len(text)
    path = raw_file(tmp_path / "a.safetensors", header, b"".join(members))
    with open_source(path) as source, pytest.raises(CheckpointError, match=message):
        read_markings(source)


def test_a_header_entry_of_too_many_values_is_refused(tmp_path):
    metadata = {"_quantization_metadata": "[" + "[]," * 800_000 + "[]]"}
    save_file(weights("a"), tmp_path / "a.safetensors", metadata)
    message = "has a _quantization_metadata beyond the limits: it has more than 800,000 values"
    with open_source(tmp_path / "a.safetensors") as source, pytest.raises(CheckpointError, match=message):
        read_markings(source)


@pytest.mark.posix
def test_a_missing_file_a_folder_a_pipe_and_another_suffix_are_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, message in [
        ("none.safetensors", "cannot be opened: No such file"),
        ("folder.safetensors", "is not a regular file"),
        ("pipe.safetensors", "is not a regular file"),
        ("model.ckpt", "is not a .safetensors file"),
        ("", "is not a .safetensors file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.SafeTensors", "a.sft", "a.SFT"])
def test_endings_that_comfyui_reads_as_safetensors(tmp_path, name):
    (tmp_path / name).write_bytes(save(weights("a")))
    with open_source(tmp_path / name) as source:
        assert same_bits(source.read("a"), weights("a")["a"])
    write_tensors(tmp_path / name, weights("b"), overwrite=True)
    with open_source(tmp_path / name) as source:
        assert list(source.tensors) == ["b"]


@pytest.mark.posix
def test_a_file_without_permission_is_refused(tmp_path, as_nobody):
    save_file(weights("a"), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0)
    with as_nobody(tmp_path), pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        open_source(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    save_file(weights("a"), tmp_path / "a.safetensors")
    with open_source(tmp_path / "a.safetensors") as source:
        os.truncate(tmp_path / "a.safetensors", 200)
        with pytest.raises(CheckpointError, match="shrank while it was read"):
            source.read("a")


# Sharded files


def write_shards(folder, weight_map=None, **shards):
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt", "from": name})
    weight_map = weight_map or {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "model.safetensors.index.json"


def test_the_files_of_an_index_are_one_source(tmp_path):
    path = write_shards(tmp_path, one=weights("a", "b"), two=weights("c", seed=1))
    with open_source(path) as source:
        assert list(source.tensors) == ["a", "b", "c"]
        assert source.metadata == {"format": "pt", "from": "one"}
        assert same_bits(source.read("c"), weights("c", seed=1)["c"])


def test_an_index_in_upper_case(tmp_path):
    path = write_shards(tmp_path, one=weights("a"), two=weights("b"))
    path = path.rename(tmp_path / "M.SAFETENSORS.INDEX.JSON")
    with open_source(path) as source:
        assert sorted(source.tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m-00001-of-00003.safetensors", (1, 3, "m.safetensors.index.json")),
        ("sub/m-00002-OF-00003.SAFETENSORS", (2, 3, "sub/m.safetensors.index.json")),
        ("m.fp16-00003-of-00003.sft", (3, 3, "m.safetensors.index.fp16.json")),
        ("m-00003-of-00003.fp16.sft", (3, 3, "m.safetensors.index.fp16.json")),
        ("m_1_of_2.safetensors", None),
        ("m-00001-of-00002.json", None),
        ("-00001-of-00002.safetensors", None),
    ],
)
def test_the_name_of_a_file_of_a_set(name, expected):
    part = shard(name)
    assert part is None if expected is None else (part.number, part.of) == expected[:2] and expected[2] in part.indices


def test_a_set_of_a_variant_with_other_endings(tmp_path):
    (tmp_path / "one.sft").write_bytes(save(weights("a")))
    (tmp_path / "two.SAFETENSORS").write_bytes(save(weights("b")))
    index = tmp_path / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.sft", "b": "two.SAFETENSORS"}}))
    with open_source(index) as source:
        assert same_bits(source.read("b"), weights("b")["b"])
    assert source_files(index) == [tmp_path / "one.sft", tmp_path / "two.SAFETENSORS"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "one.safetensors", "x": "one.safetensors"},
            "lists tensor 'x' in 'one.safetensors', which does not hold it",
        ),
        ({"a": "one.safetensors", "c": "one.safetensors", "d": "two.safetensors"}, "lists tensor"),
        ({"a": "missing.safetensors"}, "missing.safetensors: cannot be opened"),
        ({"a": "../one.safetensors"}, "is not a .safetensors file in the same folder"),
        ({"a": "/etc/one.safetensors"}, "is not a .safetensors file in the same folder"),
        ({"a": "..\\one.safetensors"}, "is not a .safetensors file in the same folder"),
        ({"a": "one.bin"}, "is not a .safetensors file in the same folder"),
        ({"a": 1}, "is not a .safetensors file in the same folder"),
        ({"a": "one\0.safetensors"}, r"names 'one\\x00.safetensors', which is not a .safetensors file"),
        ({"a": "one\ud800.safetensors"}, r"names 'one\\ud800.safetensors', which is not a .safetensors file"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path, weight_map, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(write_shards(tmp_path, weight_map, one=weights("a"), two=weights("c")))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map":{}}', '{"weight_map":[]}', "[" * 100000, "{\n"])
def test_a_file_that_is_not_an_index_is_refused(tmp_path, text):
    (tmp_path / "a.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="no weight_map|not a valid index"):
        open_source(tmp_path / "a.safetensors.index.json")


def test_an_index_too_large_is_refused(tmp_path):
    path = tmp_path / "a.safetensors.index.json"
    path.touch()
    os.truncate(path, MAX_HEADER + 1)
    with pytest.raises(CheckpointError, match="too many for an index"):
        open_source(path)


def test_two_files_with_the_same_tensor_are_refused(tmp_path):
    path = write_shards(
        tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=weights("a"), two=weights("a", "b")
    )
    with pytest.raises(CheckpointError, match="both hold tensor 'a'"):
        open_source(path)


def test_the_files_of_an_index_have_no_more_tensors_than_one_may(tmp_path, monkeypatch):
    path = write_shards(tmp_path, one=weights("a", "b"), two=weights("c"))
    open_source(path).close()
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.reader.MAX_TENSORS", 2)
    with pytest.raises(CheckpointError, match=r"^model.safetensors.index.json: lists .*more than 2 tensors"):
        open_source(path)


# Writing


def test_a_written_file_equals_the_librarys_byte_for_byte(tmp_path):
    tensors = every_dtype() | {name: torch.ones(2, 3) for name in ODD_NAMES} | {"empty": torch.ones(0, 5)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"one": "entry"})
    assert (tmp_path / "a.safetensors").read_bytes() == save(tensors, {"one": "entry"})
    assert load_file(tmp_path / "a.safetensors").keys() == tensors.keys()


def test_strided_tensors_are_written_in_order(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.arange(6).reshape(2, 3).T})
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_tensor_copied_in_chunks_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.reader.COPY_CHUNK", 100)
    save_file(weights("a"), tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    with source, writing(tmp_path / "b.safetensors", {"b": source.tensors["a"]}, {}) as writer:
        writer.copy("b", source, "a")
    assert same_bits(load_file(tmp_path / "b.safetensors")["b"], weights("a")["a"])


def test_metadata_is_written_in_one_order(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {}, {"b": "2", "a": "1"})
    write_tensors(tmp_path / "b.safetensors", {}, {"a": "1", "b": "2"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_header_too_large_for_any_reader_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="at most 33,554,432 can be read again"):
        write_tensors(tmp_path / "a.safetensors", {}, {"a": "x" * MAX_HEADER})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.bin", "must end in .safetensors"),
        ("none/a.safetensors", "there is no folder"),
        ("d.safetensors", "a folder"),
    ],
)
def test_an_impossible_target_is_refused(tmp_path, name, message):
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=message):
        write_tensors(tmp_path / name, weights("a"), overwrite=True)


def test_a_folder_without_permission_is_refused(tmp_path, as_nobody):
    (tmp_path / "read-only").mkdir(mode=0o555)
    (tmp_path / "closed").mkdir(mode=0o000)
    for folder in ("read-only", "closed"):
        with as_nobody(tmp_path), pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            write_tensors(tmp_path / folder / "a.safetensors", weights("a"))


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    announced = {"a": TensorInfo("float32", (2,))}
    with (
        pytest.raises(ValueError, match="but was announced as"),
        writing(tmp_path / "a.safetensors", announced, {}) as writer,
    ):
        writer.write("a", torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_never_written_is_an_error(tmp_path):
    announced = {"a": TensorInfo("float32", (2,))}
    with pytest.raises(ValueError, match="never written: a"), writing(tmp_path / "a.safetensors", announced, {}):
        pass
    assert list(tmp_path.iterdir()) == []


# Many layers


def test_a_model_with_too_many_layers_for_one_file_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.files.header.MAX_TENSORS", 20)
    save_file(sd3(), tmp_path / "a.safetensors")
    calls = []
    with pytest.raises(
        CheckpointError, match="b.safetensors: it would hold .* tensors or more; at most 20 can be read"
    ):
        quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=lambda *call: calls.append(call))
    assert not calls


@pytest.mark.parametrize(("most", "samples"), [(8, 128), (7, 0)])
def test_models_of_more_layers_than_any_real_one_are_reported_without_samples(tmp_path, monkeypatch, most, samples):
    monkeypatch.setattr("stochastic_fp8_pack.kernels.engine.quantization.MOST_SAMPLED", most)
    save_file(sd3(), tmp_path / "a.safetensors")
    report = quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert {len(layer.error.samples) for layer in report.layers} == {samples}
    assert report.error.count == sum(layer.elements for layer in report.layers)
    error_histogram(report)
