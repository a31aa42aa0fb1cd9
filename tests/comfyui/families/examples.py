"""One row of the matrix: an example model through file job and graph. Runs inside ComfyUI's process.

What is wrong comes back as sentences: an empty list is a row that holds.
"""

from functools import partial
from math import inf
from pathlib import Path
from types import SimpleNamespace

import comfy.quant_ops
import comfy.utils
import folder_paths
import torch
from comfyui.families import loading
from comfyui.families.building import LINEAR
from comfyui.pack import equal, multiplied_out
from comfyui_version import __version__ as VERSION
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import inspect_file, quantize_file
from stochastic_fp8_pack.kernels.errors import StochasticFP8Error
from stochastic_fp8_pack.kernels.state_dict import compatibility as outcomes
from stochastic_fp8_pack.nodes.save import StochasticFP8Save

RECIPE = {"rounding": "stochastic", "scaling": "absmax", "seed": 7, "layers": "auto"}
LAYOUTS = ("native", "legacy")
OUTPUT = {"diffusion_models": "diffusion_models", "text_encoders": "clip"}
SHOWN = 3
"""Names that a sentence lists."""


class Example:
    """A small file, and how ComfyUI loads, runs, quantizes and saves it. Subclasses: Model, Clip."""

    name: str
    folder: str
    """Where the loader looks, below models."""
    tolerance: float
    """Of a forward pass, relative to its largest value."""
    smallest = 0.0
    """Smaller differences between weights vanish in the type in which the loader holds them."""
    layouts = LAYOUTS
    prefix = ""
    metadata: dict = {}
    cut = False
    """Whether the loader renames or cuts tensors beyond recognition."""
    dropped = ()
    """Names that the loader drops."""
    refused = ""
    """What the error says where this kind is never quantized; "" where it is."""

    def refuses(self, error):
        return bool(self.refused) and self.refused in str(error)

    def path(self, kind):
        return Path(folder_paths.models_dir) / self.folder / f"{kind}.safetensors"

    def write(self, kind, tensors, metadata=None):
        path = self.path(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or None)
        return path

    def save(self, quantized, layout):
        """Save it with the pack's node, then move the file to where the loader looks. Returns its path."""
        StochasticFP8Save.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)
        name = StochasticFP8Save.execute("saved", layout, **self.to_save(quantized)).result[0]
        return Path(folder_paths.get_output_directory(), OUTPUT[self.folder], name).replace(self.path("saved"))

    def multiplied_out(self, path):
        """(what ComfyUI makes of a file's weights when they are multiplied out, the result of its forward pass)

        The last one is kept: layouts and graph give the same weights.
        """
        tensors = multiplied_out(path)
        if self._plain is None or not equal(self._plain[0], tensors):
            loaded = self.load(self.write("multiplied_out", tensors, _config_entry(path)))
            self._plain = tensors, loaded, self.forward(loaded)
        return self._plain[1:]

    _plain = None

    def bare(self, path):
        """The tensors of a file, by name without prefix."""
        return {name.removeprefix(self.prefix): tensor for name, tensor in load_file(path).items()}


class Quantized:
    """A scaled FP8 file, what the pack says about it, and what loading shows."""

    def __init__(self, example, path, settings):
        self.example, self.path = example, path
        self.verdict = outcomes.verdict_of(VERSION, inspect_file(path).verdicts)
        self.loaded, self.why = None, ""
        self.outcome = self._load(settings)

    def _load(self, settings):
        example = self.example
        try:
            self.loaded = example.load(self.path)
        except Exception as error:  # whatever ComfyUI's loader raises
            self.why = f"{type(error).__name__}: {error}"
            return outcomes.NOT_RECOGNISED if "Could not detect" in str(error) else outcomes.FAILS
        try:
            self.result = example.forward(self.loaded)
        except Exception as error:
            self.why = f"{type(error).__name__}: {error}"
            return outcomes.FAILS_LATER
        if example.settings(self.loaded) != settings:
            self.why = f"loaded with other settings: {_changes(settings, example.settings(self.loaded))}"
            return outcomes.WRONG
        plain, result = example.multiplied_out(self.path)
        network, expected = example.network(self.loaded), example.network(plain)
        different = loading.different(network, expected, example.smallest)
        if not different:
            if loading.close(self.result, result, example.tolerance):
                return outcomes.EXACT
            self.why = "the weights are right, the forward pass is not"
            return outcomes.WRONG
        self.why = f"other values: {_few(different)}"
        (float8,) = {tensor.dtype for tensor in load_file(self.path).values() if tensor.dtype in loading.FLOAT8}
        return outcomes.DEGRADED if loading.only_cast(network, expected, float8, example.smallest) else outcomes.WRONG

    @property
    def exact(self):
        return self.outcome == outcomes.EXACT

    def faults(self):
        if self.verdict.outcome != self.outcome:
            yield f"the pack says {self.verdict.outcome}, loading shows {self.outcome} ({self.why})"


def examine(example, format):
    """Every fault of a row in one format."""
    source = example.write(
        "source", {example.prefix + name: tensor for name, tensor in example.tensors().items()}, example.metadata
    )
    original = example.load(source)
    misfit = example.misfit(original)
    if misfit:
        return [misfit]
    if not 0 < float(example.forward(original).std()) < inf:
        return ["the forward pass of the original gives no finite numbers: the row is wrong"]
    faults, files = [], {}
    for layout in example.layouts:
        files[layout], found = _file_job(example, source, original, format, layout)
        faults += [f"file, {layout}: {fault}" for fault in found]
    faults += [f"graph: {fault}" for fault in _graph(example, original, format, files)]
    return faults


# --- the file job


def _file_job(example, source, original, format, layout):
    """(Quantized, faults)"""
    target = example.path(layout)
    job = partial(
        quantize_file, source, target, format=format, layout=layout, overwrite=True, statistics=False, **RECIPE
    )
    try:
        report = job()
    except StochasticFP8Error as error:
        return None, _refusal(error, [], example.refuses(error))
    file, faults = Quantized(example, target, example.settings(original)), []
    if report.family == outcomes.UNKNOWN:
        faults.append("the family is unknown")
    kinds = example.kinds(original)
    other = [layer.key for layer in report.layers if kinds.get(layer.key, LINEAR) != LINEAR]
    if other:
        faults.append(f"quantized, but not Linear: {_few(other)}")
    before, after = example.bare(source), example.bare(target)
    changed = [name for name, tensor in before.items() if _touched(name, tensor, after)]
    if changed:
        faults.append(f"changed, but not quantized: {_few(changed)}")
    faults += file.faults()
    if not file.verdict.usable:
        faults += _told(job)
    return file, faults


def _touched(name, tensor, after):
    got = after.get(name)
    if got is None or got.dtype in loading.FLOAT8:
        return got is None
    return got.dtype != tensor.dtype or not torch.equal(got, tensor)


def _told(job):
    """Faults of the error by which a job refuses to write a file that the running ComfyUI cannot use."""
    steps = []
    try:
        job(for_comfyui=VERSION, progress=lambda done, *rest: steps.append(done))
    except StochasticFP8Error as error:
        return _refusal(error, steps, expected=True)
    return ["the running ComfyUI cannot use it, but for_comfyui does not refuse"]


def _refusal(error, steps, expected):
    """Faults of an error: it must be expected, of one line, and come before the work. steps: the progress shown."""
    if not expected:
        yield f"refused: {type(error).__name__}: {error}"
    elif "\n" in str(error) or not isinstance(error, StochasticFP8Error):
        yield f"the error is not one clear line: {type(error).__name__}: {error}"
    elif any(steps):
        yield f"refused only after the work: {error}"


# --- the graph


def _graph(example, original, format, files):
    steps, native = [], files["native"]
    comfy.utils.set_progress_bar_global_hook(lambda done, *rest, **more: steps.append(done))
    runs = format in comfy.quant_ops.QUANT_ALGOS
    try:
        quantized, report = example.quantize(original, format)
    except Exception as error:
        yield from _refusal(error, steps, not runs or example.refuses(error))
        return
    if not report.layers and quantized is original and example.refused:
        return  # passed through
    if not runs or example.refused:
        yield "quantized what cannot work"
        return
    if not any(steps):
        yield "no progress was shown"
    if example.settings(quantized) != example.settings(original):
        yield f"other settings: {_changes(example.settings(original), example.settings(quantized))}"
    try:
        result = example.forward(quantized)
    except Exception as error:
        yield f"fails in the sampler: {type(error).__name__}: {error}"
        return
    if native is not None:
        yield from _as_by_file(example, quantized, result, native)
    yield from _saved(example, quantized, result, files, example.settings(original))


def _saved(example, quantized, result, files, settings):
    """Saved in the layout that the running ComfyUI reads, and loaded again."""
    network = example.network(quantized)
    for layout, file in files.items():
        steps = []
        comfy.utils.set_progress_bar_global_hook(lambda done, *rest, steps=steps, **more: steps.append(done))
        try:
            saved = example.save(quantized, layout)
        except Exception as error:
            expected = file is not None and not file.verdict.usable and not example.prefix
            yield from (f"save, {layout}: {fault}" for fault in _refusal(error, steps, expected))
            continue
        again = Quantized(example, saved, settings)
        yield from (f"saved, {layout}: {fault}" for fault in again.faults())
        if not example.cut and file is not None:
            yield from (f"saved, {layout}: {fault}" for fault in _same_file(example, file.path, saved))
        if again.exact and loading.different(example.network(again.loaded), network):
            yield f"saved, {layout}: reloaded with other values than in the graph"
        elif again.exact and not loading.close(again.result, result, example.tolerance):
            yield f"saved, {layout}: the forward pass differs from the graph's"
        return


def _as_by_file(example, quantized, result, native):
    """The same layers, values and forward pass as the file's. Where the loader cuts tensors, they are rounded apart."""
    network = example.network(quantized)
    if native.exact:
        one, other = loading.codes(network), loading.codes(example.network(native.loaded))
        if one.keys() != other.keys():
            yield f"other layers than by file: {_few(one.keys() - other.keys())} / {_few(other.keys() - one.keys())}"
    if not example.cut:
        plain, expected = example.multiplied_out(native.path)
        different = loading.different(network, example.network(plain), example.smallest)
        if different:
            yield f"other values than by file: {_few(different)}"
        elif not loading.close(result, expected, example.tolerance):
            yield "another forward pass than by file"


def _same_file(example, by_job, saved):
    """Names, codes and scales are equal; so are the values of all other tensors, whose types may be narrower."""
    wanted, got = example.bare(by_job), load_file(saved)
    missing = wanted.keys() - got.keys() - {*example.dropped}
    if missing or got.keys() - wanted.keys():
        yield f"lacks {_few(missing)}, has {_few(got.keys() - wanted.keys())}"
    different = [name for name in wanted.keys() & got.keys() if not _same_tensor(wanted[name], got[name])]
    if different:
        yield f"differs from the file's: {_few(different)}"


def _same_tensor(one, two):
    if {one.dtype, two.dtype} & {*loading.FLOAT8}:
        return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    return torch.equal(one.float(), two.float())


# --- small things


def _config_entry(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return {key: value for key, value in metadata.items() if key == "config"}


def _few(names):
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") or "none"


def _changes(wanted, got):
    keys = [key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)]
    return ", ".join(f"{key} {wanted.get(key)} -> {got.get(key)}" for key in sorted(keys)[:SHOWN])
