"""Hostile files of up to 100 MB, each made to cost memory or time. `GIANTS[name](folder)` writes one; its path."""

import json
import struct

from checkpoints import entry, raw_file

MB = 1_000_000
HUGE = 100 * MB
ALLOWED = 319 * MB // 10
"""Just within the limit of 32 MB for a header, an index and the metadata."""

LAYER = "blocks.{}.attn.to_q"
ENTRY = '{"format":"float8_e4m3fn"}'


def brackets(size):
    """A JSON list of empty lists: decoded, it takes twenty times its size."""
    return "[" + "[]," * ((size - 4) // 3) + "[]]"


def tensor(name, dtype, shape, start, end):
    """One member of a header."""
    return f'"{name}":{json.dumps(entry(dtype, shape, start, end), separators=(",", ":"))}'


def write(path, members, data=b"", metadata=None):
    """A file of these members of its header; metadata: JSON text."""
    members = [f'"__metadata__":{metadata}'] * (metadata is not None) + members
    return raw_file(path, ("{" + ",".join(members) + "}").encode(), data)


def weight():
    """One layer to quantize, so that the rest of the file is looked at as well."""
    return [tensor("joint_blocks.0.x_block.attn.qkv.weight", "BF16", [16, 16], 0, 512)], bytes(512)


def header_of_brackets(size):
    return lambda folder: raw_file(folder / "a.safetensors", ('{"a":' + brackets(size) + "}").encode())


def header_of_spaces(size):
    return lambda folder: raw_file(folder / "a.safetensors", b"{" + b" " * size + b"}")


def one_long_name(size):
    return lambda folder: write(folder / "a.safetensors", [tensor("a." * (size // 2), "U8", [0], 0, 0)])


def many_empty_tensors(count, name="{}"):
    return lambda folder: write(
        folder / "a.safetensors", [tensor(name.format(i), "U8", [0], 0, 0) for i in range(count)]
    )


def names_of_many_parts(count):
    """Names of 1,000 characters in 333 different parts."""
    path = "a.safetensors"
    return lambda folder: write(
        folder / path,
        [tensor(".".join(f"{(i + j) % 90 + 10}" for j in range(331)) + f".{i}", "U8", [0], 0, 0) for i in range(count)],
    )


def metadata_entry(name, text):
    """A metadata entry of any length; text: of the entry."""
    return lambda folder: write(folder / "a.safetensors", *weight(), json.dumps({name: text}))


def many_metadata_entries(size):
    entries = ",".join(f'"{i}":""' for i in range(size // 12))
    return lambda folder: write(folder / "a.safetensors", *weight(), "{" + entries + "}")


def metadata_of_layers(size):
    """A header entry of as many layers as fit."""
    layers = ",".join(f'"{i}":{ENTRY}' for i in range(size // (len(ENTRY) + 24)))
    return metadata_entry("_quantization_metadata", '{"layers":{' + layers + "}}")


def inline_entries(count, size):
    """Inline entries of brackets."""
    text = brackets(size).encode()

    def build(folder):
        members, data = weight()
        for i in range(count):
            members.append(
                tensor(f"{LAYER.format(i)}.comfy_quant", "U8", [len(text)], len(data), len(data) + len(text))
            )
            data += text
        return write(folder / "a.safetensors", members, data)

    return build


def tiny_layers(count):
    """Layers of the smallest side that is quantized."""
    return lambda folder: write(
        folder / "a.safetensors",
        [tensor(f"{LAYER.format(i)}.weight", "BF16", [16, 16], 512 * i, 512 * i + 512) for i in range(count)],
        bytes(512 * count),
    )


def tiny_scaled_layers(count):
    """Scaled FP8 layers with inline entries."""
    sizes = 256 + 4 + len(ENTRY)

    def build(folder):
        members = []
        for i in range(count):
            layer, at = LAYER.format(i), i * sizes
            members.append(tensor(f"{layer}.weight", "F8_E4M3", [16, 16], at, at + 256))
            members.append(tensor(f"{layer}.weight_scale", "F32", [], at + 256, at + 260))
            members.append(tensor(f"{layer}.comfy_quant", "U8", [len(ENTRY)], at + 260, at + sizes))
        data = (bytes(256) + struct.pack("<f", 1.0) + ENTRY.encode()) * count
        return write(folder / "a.safetensors", members, data)

    return build


def index(text):
    """A set of one small file, with this JSON text as its index."""

    def build(folder):
        write(folder / "one.safetensors", *weight())
        path = folder / "model.safetensors.index.json"
        path.write_text(text)
        return path

    return build


def index_of_names(size):
    names = ",".join(f'"{i}":"one.safetensors"' for i in range(size // 26))
    return index('{"weight_map":{' + names + "}}")


def set_of_files(files, tensors):
    """A set whose files together hold more than any one may."""

    def build(folder):
        weight_map = {}
        for file in range(files):
            name = f"{file}.safetensors"
            write(folder / name, [tensor(f"{file}.{i}", "U8", [0], 0, 0) for i in range(tensors)])
            weight_map[f"{file}.0"] = name
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        return path

    return build


def calibration(text):
    """A file of a calibration with this JSON text as its metadata."""
    return lambda folder: write(
        folder / "a.safetensors",
        [tensor("a.weight", "F32", [256], 0, 1024)],
        bytes(1024),
        json.dumps({"stochastic_fp8_calibration": text}),
    )


def calibration_of_layers(size):
    layers = ",".join(f'"{i}":{{"width":16,"rows":9,"amax":1.0}}' for i in range(size // 60))
    return calibration('{"version":1,"source":"a","layers":{' + layers + "}}")


GIANTS = {
    "header of brackets": header_of_brackets(HUGE),
    "header of spaces": header_of_spaces(HUGE - 100),
    "header of spaces within the limit": header_of_spaces(ALLOWED),
    "one long name": one_long_name(HUGE - 200),
    "one long name within the limit": one_long_name(ALLOWED),
    "a million tensors": many_empty_tensors(1_000_000),
    "200,000 tensors": many_empty_tensors(200_000),
    "names of many parts": names_of_many_parts(30_000),
    "header entry of brackets": metadata_entry("_quantization_metadata", brackets(HUGE - 1000)),
    "header entry of brackets within the limit": metadata_entry("_quantization_metadata", brackets(ALLOWED)),
    "header entry of layers": metadata_of_layers(HUGE),
    "header entry of layers within the limit": metadata_of_layers(ALLOWED),
    "recipe entry of brackets": metadata_entry("stochastic_fp8", brackets(ALLOWED)),
    "many metadata entries": many_metadata_entries(ALLOWED),
    "1,500 inline entries": inline_entries(1_500, 65_536),
    "inline entries within the limit": inline_entries(240, 65_536),
    "200,000 tiny layers": tiny_layers(200_000),
    "66,000 tiny scaled layers": tiny_scaled_layers(66_000),
    "index of brackets": index(brackets(HUGE)),
    "index of brackets within the limit": index('{"metadata":' + brackets(ALLOWED) + ',"weight_map":{"a":"b"}}'),
    "index of names": index_of_names(HUGE),
    "index of names within the limit": index_of_names(ALLOWED),
    "set of large headers": set_of_files(3, 200_000),
    "set of many files": set_of_files(2_000, 1),
    "calibration of brackets": calibration(brackets(HUGE - 1000)),
    "calibration of brackets within the limit": calibration(brackets(ALLOWED)),
    "calibration of layers": calibration_of_layers(HUGE),
    "calibration of layers within the limit": calibration_of_layers(ALLOWED),
}
