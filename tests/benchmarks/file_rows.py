"""Whole files: time compared with cp and convert-to-quant, memory, and how both grow."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import peers
import torch
from measure import ROOT, WORKSPACE, Absent, Row, costs, duration, environment, faster, in_child, interleaved

DATA = WORKSPACE / "data"
HIDDEN = 3072
MEMORY_BASE, MEMORY_TENSORS = 500e6, 3
"""Peak resident memory may be this many bytes and this many times the largest tensor."""


def rows(rounds):
    DATA.mkdir(parents=True, exist_ok=True)
    yield from flux_rows(rounds)
    yield from growth_rows([10e6, 100e6, 1e9])
    yield from many_tensors_rows()


def big_rows(rounds):
    """Files of 10 and 12 GB. The sources are sparse, the results are not."""
    DATA.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(DATA).free
    if free < 8e9:
        yield Row("files of 10 and 12 GB", "absent", f"they need 8 GB of disk, {free / 1e9:.1f} GB are free")
        return
    yield from growth_rows([1e9, 10e9])
    source = sparse_file(12e9)
    with scratch("big.safetensors") as target:
        result = in_child("quantize", source, target)
    yield memory_row(f"{source.stat().st_size / 1e9:.1f} GB file", result["peak"], source)
    yield Row("12 GB file", duration(result["seconds"]), "", f"{12 / result['seconds']:.2f} GB/s")


def flux_rows(rounds):
    """A file like Flux's, with random bf16 weights. Medians, because `cp` itself can be seven times slower from one run
    to the next, depending on whether the system has free pages for a new file.
    """
    source = flux_file()
    size = f"{source.stat().st_size / 1e9:.2f} GB file"
    results = []
    with scratch("ours.safetensors") as ours, scratch("copy") as copy, scratch("theirs.safetensors") as theirs:

        def run_ours():
            ours.unlink(missing_ok=True)
            results.append(in_child("quantize", source, ours))
            ours.unlink()  # every contestant starts with the pages of one result free
            return results[-1]["seconds"]

        def run_our_command():
            ours.unlink(missing_ok=True)
            command = [sys.executable, "-m", "kernels", source, ours]
            subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)

        def run_theirs():
            theirs.unlink(missing_ok=True)
            peers.convert_to_quant(source, theirs)

        cp(source, copy)  # brings the source into the page cache for every contestant
        contestants = {
            "ours": run_ours,
            "cp": lambda: cp(source, copy),
            "cp, sync": lambda: cp(source, copy, sync=True),
        }
        seconds = interleaved(contestants, rounds, median)
        commands = interleaved({"ours": run_our_command, "theirs": run_theirs}, max(1, rounds // 2), median)
    yield costs(size, seconds["ours"], "cp", seconds["cp"], at_most=3)
    yield costs(size, seconds["ours"], "cp and sync, as ours does", seconds["cp, sync"])
    what = f"{size}: python -m kernels, including Python's start"
    yield faster(what, commands["ours"], "convert-to-quant --simple", commands["theirs"], at_least=8)
    yield memory_row(size, max(result["peak"] for result in results), source)


def cp(source, target, sync=False):
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    if sync:
        subprocess.run(["sync", target], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def memory_row(what, peak, source):
    largest = max(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in header_of(source).values())
    limit = MEMORY_BASE + MEMORY_TENSORS * largest
    other = f"500 MB + 3 x the largest tensor ({largest / 1e6:.0f} MB)"
    bar = f"<= {limit / 1e6:.0f} MB"
    return Row(f"{what}: peak resident", f"{peak / 1e6:.0f} MB", other, f"{peak / limit:.2f} x", bar, peak <= limit)


def growth_rows(sizes):
    """Seconds per GB must not rise with the size. Sparse files of equal tensors."""
    files = [sparse_file(size) for size in sizes]
    seconds = in_child("several", *files)["seconds"]
    rates = [seconds[str(file)] / file.stat().st_size * 1e9 for file in files]
    for i, (size, rate, file) in enumerate(zip(sizes, rates, files, strict=True)):
        what, ours = f"a file of {size / 1e6:,.0f} MB", f"{duration(seconds[str(file)])}, {rate:.2f} s/GB"
        if i == 0:
            yield Row(what, ours, "")
        else:
            ratio = rate / rates[i - 1]
            other = f"the smaller file's s/GB, {rates[i - 1]:.2f}"
            yield Row(what, ours, other, f"{ratio:.2f} x", "<= 1.3 x: linear", ratio <= 1.3)


def many_tensors_rows():
    small = repeating_file("many.safetensors", 10_000, (128, 256))
    large = repeating_file("few.safetensors", 100, (1280, 2560))
    seconds = in_child("several", small, large)["seconds"]
    what, other = "10,000 tensors of 64 KB", "the same bytes in 100 tensors"
    yield costs(what, seconds[str(small)], other, seconds[str(large)], at_most=6)


# --- the files


def flux_shapes():
    """One double and three single blocks of Flux, including its largest tensors: 777 M weights."""
    shapes = {"img_in.weight": (HIDDEN, 64), "txt_in.weight": (HIDDEN, 4096)}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}_"
        shapes[f"{block}attn.norm.key_norm.scale"] = (128,)
        shapes[f"{block}attn.qkv.bias"] = (3 * HIDDEN,)
        parts = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "mod.lin": (6, 1)}
        for part, (rows_, columns) in parts.items():
            shapes[f"{block}{part}.weight"] = (rows_ * HIDDEN, columns * HIDDEN)
    for i in range(3):
        for part, (rows_, columns) in {"linear1": (7, 1), "linear2": (1, 5), "modulation.lin": (3, 1)}.items():
            shapes[f"single_blocks.{i}.{part}.weight"] = (rows_ * HIDDEN, columns * HIDDEN)
    return shapes


def flux_file():
    path = DATA / "flux.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        shapes = flux_shapes()
        chunks = (
            torch.randn(shape, generator=generator).mul_(0.02).bfloat16().view(torch.uint8).numpy()
            for shape in shapes.values()
        )
        write_file(path, shapes, chunks)
    return path


def repeating_file(name, count, shape):
    """`count` equal tensors of normal random values."""
    path = DATA / name
    if not path.exists():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        data = values.view(torch.uint8).numpy()
        write_file(path, {f"blocks.{i}.linear.weight": shape for i in range(count)}, (data for _ in range(count)))
    return path


def sparse_file(size):
    """A sparse file of zeros: tensors of Flux's single blocks for files above 10 GB, smaller ones below."""
    path = DATA / f"sparse_{size / 1e6:.0f}_MB.safetensors"
    shape = (7 * HIDDEN, HIDDEN) if size > 10e9 else (1024, 1024)
    count = round(size / (2 * shape[0] * shape[1]))
    if not path.exists():
        write_file(path, {f"blocks.{i}.linear.weight": shape for i in range(count)}, ())
    return path


def write_file(path, shapes, chunks):
    """Write a safetensors file of bf16 tensors. What `chunks` do not fill stays sparse."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for chunk in chunks:
            file.write(chunk)
    os.truncate(partial, 8 + len(text) + end)
    partial.rename(path)


def header_of(path):
    with path.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


@contextlib.contextmanager
def scratch(name):
    """A path for a result, which is deleted afterwards."""
    path = Path(DATA / name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


__all__ = ["Absent", "big_rows", "rows"]
