"""The fuzzer: damaged files through the library, in this process.

Any exception but a StochasticFP8Error is a fault. Each execution has its own random numbers, so that its target, seed
and number repeat it: see `python -m hostile --help`.
"""

import json
import math
import os
import random
import struct
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoints import entry, weights
from hostile.damage import VALUES, WORDS, Document, damaged_bytes, split
from safetensors.torch import save_file
from stochastic_fp8_pack import kernels
from stochastic_fp8_pack.kernels.calibration.file import save_calibration
from stochastic_fp8_pack.kernels.calibration.recorder import ActivationRecorder
from stochastic_fp8_pack.kernels.files.reader import open_source

QKV = "joint_blocks.0.x_block.attn.qkv.weight"
FC1 = "joint_blocks.0.x_block.mlp.fc1.weight"

LENGTHS = (0, 1, 7, 8, 1 << 20, 32_000_000, 100_000_000, 100_000_001, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)
"""Lengths of a header that a file may state wrongly."""

PREFIXES = ("", "", "model.diffusion_model.", "model.", "text_encoders.t5xxl.transformer.", "vae.", ".", "..")
BLOCKS = (
    *split("joint_blocks.0.x_block.attn.qkv joint_blocks.1.x_block.mlp.fc1 context_embedder norm img_in"),
    *split("double_blocks.0.img_attn.qkv transformer_blocks.0.attn.to_q blocks.99999999999999999999.ffn.0"),
    *split("single_transformer_blocks.0.attn.to_q encoder.block.0.layer.0.SelfAttention.k decoder.conv_in"),
    *("lora_unet_a.lora_down", "a" * 1100),
)
ENDINGS = (
    *("", ".", ".weight", ".weight", ".weight", ".weight", ".weight", ".bias", ".scale"),
    *split(".weight_scale .scale_weight .input_scale .scale_input .comfy_quant .weight_scale_inv"),
    *split(".weight_scale_2 .scaled_fp8 .absmax .quant_map .weight.weight_scale"),
)
NAMES = ("scaled_fp8", "model.diffusion_model.scaled_fp8", "weight_scale", ".comfy_quant", *WORDS)

BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "U8": 8, "I8": 8, "BOOL": 8, "I64": 64}
RARE_BITS = {"F4": 4, "F6_E2M3": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "C64": 64, "U64": 64, "U16": 16}
SHAPES = ([16, 16], [16, 16], [32, 16], [], [], [1], [16], [16, 1], [1, 1, 1, 1], [2, 2, 2, 2], [0], [0, 16], [16, 17])
REWRITTEN = 1 / 8
"""Share of the files that are quantized and repaired as well."""
MOMENTS = (0.0, -1.0, 1.0, 64.0, 1e-45, 1e38, math.nan, math.inf, -0.0)
SCALES = (1.0, 0.5, 0.0, -1.0, math.nan, math.inf, 1e-45, 3e38)


@dataclass
class Outcome:
    """What a number of executions came to."""

    counts: Counter = field(default_factory=Counter)
    """"done", "refused" and "uncaught" -> executions."""
    faults: dict = field(default_factory=dict)
    """(exception, file and line that raised it) -> the line that repeats the first such execution."""
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def executions(self):
        return self.counts.total()

    def add(self, other):
        """Add an outcome that another process reached at the same time."""
        self.counts += other.counts
        self.faults = other.faults | self.faults
        self.seconds, self.slowest = max(self.seconds, other.seconds), max(self.slowest, other.slowest)

    def __str__(self):
        counts = ", ".join(f"{self.counts[kind]:,} {kind}" for kind in ("done", "refused", "uncaught"))
        speed = f"{self.executions / max(self.seconds, 1e-9):,.0f} per second, slowest {self.slowest:.3f} s"
        faults = (f"\n  {' in '.join(fault)}\n    {repeat}" for fault, repeat in self.faults.items())
        return f"{self.executions:,} executions: {counts}; {speed}{''.join(faults)}"


class Fuzzer:
    """Damages small valid files in a folder and has the library read them. A context manager."""

    def __init__(self, seed=0):
        self.seed = seed
        memory = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        self.folder = Path(self._folder.name)
        self.file = self.folder / "hostile.safetensors"
        self.result = self.folder / "result.safetensors"
        self._make_valid_files()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._folder.cleanup()

    def run(self, target, numbers):
        """The outcome of these executions of a target."""
        outcome = Outcome()
        began = time.perf_counter()
        for number in numbers:
            start = time.perf_counter()
            try:
                kind = self.execute(target, number)
            except Exception as error:
                kind = "uncaught"
                place = traceback.extract_tb(error.__traceback__)[-1]
                fault = f"{target}: {type(error).__name__}: {error}"[:300], f"{place.filename}:{place.lineno}"
                if fault[1] not in {known[1] for known in outcome.faults}:
                    outcome.faults[fault] = f"python -m hostile --target {target} --seed {self.seed} --only {number}"
            outcome.counts[kind] += 1
            outcome.slowest = max(outcome.slowest, time.perf_counter() - start)
        outcome.seconds = time.perf_counter() - began
        return outcome

    def execute(self, target, number):
        """One execution: "done" or "refused". Raises what the library did not catch."""
        rng = random.Random(f"{target} {self.seed} {number}")
        try:
            TARGETS[target](self, rng)
        except kernels.StochasticFP8Error as error:
            assert "\n" not in str(error), f"an error of more than one line: {str(error)!r}"
            return "refused"
        return "done"

    # The targets

    def header(self, rng):
        """Damage to the header's JSON, its bytes, its length, and the data."""
        document, data = rng.choice(self.parts)
        text = document.damaged(rng).encode()
        if rng.random() < 0.3:
            text = damaged_bytes(rng, text)
        length = len(text) if rng.random() < 0.9 else rng.choice((*LENGTHS, len(text) - 1, len(text) + 1))
        if rng.random() < 0.1:
            data = damaged_bytes(rng, data)
        self.file.write_bytes(struct.pack("<Q", max(length, 0)) + text + data)
        open_source(self.file).close()
        self._examine(rng)

    def contents(self, rng):
        """Well-formed files with hostile names, dtypes, shapes, scales, markers and entries."""
        header, data = json.loads(self.parts[0][0].text), self.parts[0][1]
        if rng.random() < 0.3:
            header, data = {}, b""
        for name in {self._name(rng) for _ in range(rng.randrange(8))} - header.keys():
            dtype, shape, content = self._tensor(rng, name)
            header[name] = entry(dtype, shape, len(data), len(data) + len(content))
            data += content
        if rng.random() < 0.5:
            header["__metadata__"] = {
                rng.choice(("_quantization_metadata", "stochastic_fp8", *WORDS)): self._entry(rng) for _ in range(2)
            }
        text = json.dumps(header).encode()
        self.file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        if rng.random() < REWRITTEN:
            kernels.repair_file(self.file, self.result, overwrite=True)
        self._examine(rng)
        if rng.random() < REWRITTEN:
            nonfinite = rng.choice(("error", "keep"))
            kernels.quantize_file(self.file, self.result, requantize=True, overwrite=True, nonfinite=nonfinite)

    def entries(self, rng):
        """Damage to the JSON of the header's metadata entries and of the inline entries."""
        header, data = json.loads(self.parts[0][0].text), self.parts[0][1]
        at = self._entry(rng).encode()
        if rng.random() < 0.2:
            at = damaged_bytes(rng, at)
        if rng.random() < 0.5:
            header[QKV.replace(".weight", ".comfy_quant")] = entry("U8", [len(at)], len(data), len(data) + len(at))
            data += at
        else:
            name = rng.choice(("_quantization_metadata", "_quantization_metadata", "stochastic_fp8"))
            header["__metadata__"] = {name: at.decode(errors="replace")}
        text = json.dumps(header).encode()
        self.file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        self._examine(rng)

    def index(self, rng):
        """Damage to the index of two files."""
        text = self.index_document.damaged(rng).encode()
        if rng.random() < 0.3:
            text = damaged_bytes(rng, text)
        path = self.folder / "model.safetensors.index.json"
        path.write_bytes(text)
        open_source(path).close()
        kernels.plan_file(path, requantize=True)

    def calibration(self, rng):
        """Damage to a calibration file: its metadata, header and moments. Where it is accepted, it gives no NaN."""
        header, data = self.calibration_parts
        (name,) = header["__metadata__"]
        metadata = rng.choice(self.calibration_documents)
        damage = rng.randrange(3)
        text = json.dumps(header | {"__metadata__": {name: metadata.text if damage else metadata.damaged(rng)}})
        if damage == 1:
            text = Document(json.loads(text)).damaged(rng)
        elif damage == 2:
            at = 4 * rng.randrange(len(data) // 4)
            data = data[:at] + struct.pack("<f", rng.choice(MOMENTS)) + data[at + 4 :]
        self.file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
        calibration = kernels.load_calibration(self.file)
        for layer in calibration.layers.values():
            layer.moment()
        if rng.random() < REWRITTEN:
            choices = {"rounding": "calibrated", "matmul": "fp8", "overwrite": True}
            kernels.quantize_file(self.plain, self.result, calibration=self.file, **choices)
            codes = {finding.code for finding in kernels.inspect_file(self.result, deep=True).findings}
            assert not codes & {"nan_codes", "scale_value"}, f"an accepted calibration gives {codes}"

    # What they share

    def _make_valid_files(self):
        self.plain = self.folder / "plain.safetensors"
        save_file(weights(QKV, FC1, shape=(16, 16)) | weights("norm.bias", shape=(16,)), self.plain, {"format": "pt"})
        files = [self.plain]
        for layout in ("native", "legacy"):
            files.append(self.folder / f"{layout}.safetensors")
            kernels.quantize_file(self.plain, files[-1], layout=layout)
        recorder = ActivationRecorder()
        generator = torch.Generator().manual_seed(0)
        for key in (QKV, FC1):
            recorder.observe(key, torch.randn(64, 16, generator=generator))
        files.append(self.folder / "calibration.safetensors")
        save_calibration(recorder.result("a model"), files[-1])
        parts = [_parts(path) for path in files]
        self.parts = [(Document(header), data) for header, data in parts]
        self.calibration_parts = parts[-1]
        (metadata,) = (json.loads(text) for text in parts[-1][0]["__metadata__"].values())
        layers = kernels.load_calibration(files[-1]).layers.items()
        plain = {key: {"width": layer.width, "rows": layer.rows, "amax": layer.amax} for key, layer in layers}
        version_1 = {"version": 1, "source": "a model", "layers": plain}  # has no digests, so damage gets further
        self.calibration_documents = [Document(metadata), Document(version_1)]
        self.entry_documents = [
            Document({"format_version": "1.0", "layers": {QKV.removesuffix(".weight"): {"format": "float8_e4m3fn"}}}),
            Document({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
        ]
        for shard, key in (("one", QKV), ("two", FC1)):
            save_file(weights(key, shape=(16, 16)), self.folder / f"{shard}.safetensors")
        weight_map = {QKV: "one.safetensors", FC1: "two.safetensors"}
        self.index_document = Document({"metadata": {"total_size": 1024}, "weight_map": weight_map})

    def _name(self, rng):
        if rng.random() < 0.1:
            return rng.choice(NAMES)
        return rng.choice(PREFIXES) + rng.choice(BLOCKS) + rng.choice(ENDINGS)

    def _tensor(self, rng, name):
        """(dtype, shape, bytes) that suit the name more often than not."""
        if name.endswith("comfy_quant") and rng.random() < 0.8:
            content = self._entry(rng).encode()
            return "U8", [len(content)], content
        if name.endswith(("scale", "scale_weight")) and rng.random() < 0.8:
            return "F32", rng.choice(([], [1], [1, 1])), struct.pack("<f", rng.choice(SCALES))
        dtype, shape = rng.choice(list(rng.choice((BITS, BITS, BITS, RARE_BITS)))), rng.choice(SHAPES)
        size, rest = divmod(math.prod(shape) * (BITS | RARE_BITS)[dtype], 8)
        if rest:
            return "U8", [1], b"\0"
        return dtype, shape, rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))

    def _entry(self, rng):
        if rng.random() < 0.1:
            return rng.choice(VALUES)
        return rng.choice(self.entry_documents).damaged(rng)

    def _examine(self, rng):
        kernels.inspect_file(self.file, deep=True)
        layout, format = rng.choice(("native", "legacy")), rng.choice(("float8_e4m3fn", "float8_e5m2"))
        kernels.plan_file(self.file, requantize=rng.random() < 0.8, layout=layout, format=format)


TARGETS = {
    "header": Fuzzer.header,
    "contents": Fuzzer.contents,
    "entries": Fuzzer.entries,
    "index": Fuzzer.index,
    "calibration": Fuzzer.calibration,
}


def _parts(path):
    """(header, data) of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]
