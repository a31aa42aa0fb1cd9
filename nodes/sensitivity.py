"""Layer Sensitivity: how much each layer of a MODEL changes the picture when it is rounded."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io

from ..kernels import Recipe, dequantize_tensor, display
from ..kernels.calibration.moments import Calibration
from ..kernels.calibration.sensitivity import LayerEffect, RoundingErrors, Sensitivity, rounding_errors
from ..kernels.engine.quantization import select
from ..kernels.engine.quantize_weight import quantize_weight
from ..kernels.errors import CalibrationError
from ..kernels.numerics.formats import E4M3FN
from ..kernels.numerics.rounding import CALIBRATED
from .devices import compute_device, make_room
from .models import diffusion_network
from .networks import ModelError, Network
from .options import calibration_input, sampler_inputs, scene_inputs, seed_input
from .sampling import RenderProgress, Sampler, forward_hooks
from .schema import CATEGORY, FP8Calibration, newer

log = logging.getLogger("stochastic_fp8")

LONG_STEPS = 20
"""Steps, at least, of the renders that tell how large the errors of short ones become."""

LONG_BLOCKS = 3
"""Blocks, at most, that such renders are made for: those that change the most."""

LARGE = 0.1
"""The change of such a block, at least, relative to the largest. Blocks that hardly change anything only add noise."""

NEGLIGIBLE = 1e-3
"""Share of the whole change below which the layers of blocks are not measured one by one: no choice depends on them."""

Latents = list[list[torch.Tensor]]
"""The latents of each seed, (images, ...) each; several tensors per seed where a latent is nested."""


class StochasticFP8Sensitivity(io.ComfyNode):
    """Renders with one layer rounded at a time, and measures how much the latents change."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8Sensitivity",
            display_name="Layer Sensitivity",
            category=CATEGORY,
            search_aliases=["fp8 sensitivity", "fit my memory", "mixed precision", "which layers"],
            description=(
                "Measures how much each layer of your model changes the picture when it is rounded to FP8. Connect it "
                "to a quantize node with layers measured and a size limit: the layers that matter most then stay in 16 "
                "bits. A few short renders per layer are enough."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that will be quantized, in 16 bits, with its LoRAs."),
                *scene_inputs(" A smaller size than you render at is faster and still finds nearly the same layers."),
                seed_input("The noise of the first render of each layer. Each further one uses the next seed."),
                io.Int.Input(
                    "seeds",
                    default=2,
                    min=1,
                    max=16,
                    tooltip="How many renders per layer, each with other noise. More seeds take longer and give a "
                    "slightly better choice.",
                ),
                *sampler_inputs(
                    steps=4,
                    steps_tooltip="Steps of each render. 4 are enough to tell which layers matter. More take longer.",
                ),
                calibration_input(
                    "What FP8 Calibration recorded for this model. With it, the choice also holds for rounding "
                    "calibrated. Earlier measurements in it are added to."
                ),
            ],
            outputs=[
                FP8Calibration.Output(
                    id="FP8_CALIBRATION",
                    display_name="calibration",
                    tooltip="The calibration with the effect of each layer. Connect it to a quantize node with layers "
                    "measured, to Size and Quality, or to Save Calibration.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        seed,
        seeds,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        calibration=None,
    ):
        sampler = Sampler(positive, negative, latent_image, steps, cfg, sampler_name, scheduler, denoise)
        measurement = Measurement(model, sampler, range(seed, seed + seeds), calibration)
        measured = Calibration({}, type(model.model).__name__, measurement.run())
        return io.NodeOutput(calibration + Calibration({}, "", measured.sensitivity) if calibration else measured)


class Measurement:
    """The measurement of one MODEL: whole blocks first, then the layers of the blocks that matter."""

    def __init__(self, model: Any, sampler: Sampler, seeds: Sequence[int], calibration: Calibration | None = None):
        """Raises ModelError for a model that is not in 16 bits, and CalibrationError for one of another model."""
        self._model, self._calibration = model, calibration
        self._short = Renders(sampler, seeds, mean_square)
        self._long = Renders(replace(sampler, steps=max(sampler.steps, LONG_STEPS)), seeds, typical_share)
        self._network = network = diffusion_network(model)
        if network.scaled:
            raise ModelError(f"{network.name} is already quantized: measure the 16-bit model that you will quantize")
        names = select(network, Recipe(layers="all_linear")).quantize
        network.check(names, Recipe())
        if not names:
            raise ModelError(f"{network.name} has no layer that FP8 can hold: there is nothing to measure")
        _check_same_model(network, names, calibration)
        self._device = compute_device("auto", network.patcher.load_device)
        self._errors = _known_errors(calibration)
        self._progress = RenderProgress(0)
        self._names = list(names)
        recorded = calibration is not None and any(name in calibration.layers for name in names)
        self._roundings = ["nearest", CALIBRATED.name] if recorded else ["nearest"]

    def run(self) -> Sensitivity:
        """The effect of every layer that is used. Raises ModelError where no layer has any."""
        most = self._steps_of(_blocks(self._names))
        long = self._long.steps * (1 + len(self._roundings) * LONG_BLOCKS)
        self._progress = RenderProgress(self._short.steps + most + long)
        used = self._render_originals()
        groups = _blocks([name for name in self._names if name in used])
        self._progress.skip(most - self._steps_of(groups))
        changes = {tuple(group): self._change(self._short, group) for group in groups}
        if not any(changes.values()):
            raise ModelError(
                f"rounding the layers of {self._network.name} does not change the latent at all: set denoise above 0, "
                "and take steps and a sampler that really render"
            )
        layers: dict[str, LayerEffect] = {}
        for group in self._that_matter(changes):
            layers |= {name: LayerEffect(self._change(self._short, [name]), self._errors[name]) for name in group}
        for group, change in changes.items():
            layers |= self._shared(group, change, layers)
        largest = _largest(changes)
        self._progress.skip(self._long.steps * len(self._roundings) * (LONG_BLOCKS - len(largest)))
        self._long.render_originals(self._model, self._progress)
        gains = {rounding: self._gain(rounding, largest, layers) for rounding in self._roundings}
        self._progress.finish(f"{display.count(len(layers), 'layer')} measured")
        sensitivity = Sensitivity(
            layers,
            self._short.power,
            len(self._short.seeds),
            self._how(),
            gain=gains["nearest"] or 1.0,
            calibrated_gain=gains.get(CALIBRATED.name),
        )
        self._log(changes, sensitivity)
        return sensitivity

    def _steps_of(self, groups: Sequence[Sequence[str]]) -> int:
        """Steps to measure these blocks, and each of their layers, in short renders."""
        return self._short.steps * (len(groups) + sum(len(group) for group in groups if len(group) > 1))

    def _gain(self, rounding: str, groups: Sequence[tuple[str, ...]], layers: dict[str, LayerEffect]) -> float | None:
        """What a block changes in long renders, over the sum of its layers' effects, both relative to the power: the
        geometric mean over these blocks. None where none of them changes anything.

        Errors grow over the steps of a render, and those of the layers of a block point the same way.
        """
        ratios = []
        for group in groups:
            together = self._change(self._long, group, rounding) * self._short.power
            apart = math.fsum(layers[name].with_rounding(E4M3FN.name, rounding) for name in group)
            if together and apart:
                ratios.append(together / apart)
        return statistics.geometric_mean(ratios) if ratios else None

    def _that_matter(self, changes: dict[tuple[str, ...], float]) -> list[tuple[str, ...]]:
        """The blocks whose layers are measured one by one: those without which too much of the change is missing."""
        order = sorted(changes, key=lambda group: changes[group])
        several, small = [group for group in order if len(group) > 1], 0.0
        while several and small + changes[several[0]] <= NEGLIGIBLE * math.fsum(changes.values()):
            small += changes[several[0]]
            self._progress.skip(self._short.steps * len(several.pop(0)))
        return several

    def _shared(self, group: tuple[str, ...], change: float, known: dict[str, LayerEffect]) -> dict[str, LayerEffect]:
        """Effects of the layers of a group that was measured as a whole only, in proportion to their squared errors."""
        if group[0] in known:
            return {}
        weights = [self._total_error(name) for name in group]
        whole = sum(weights) or 1
        shares = zip(group, weights, strict=True)
        return {
            name: LayerEffect(change * weight / whole, self._errors[name], alone=len(group) == 1)
            for name, weight in shares
        }

    def _total_error(self, name: str) -> float:
        """The squared relative error of a weight, times its elements."""
        return self._network.tensors[name].elements * self._errors[name].nearest["float8_e4m3fn"] ** 2

    def _render_originals(self) -> set[str]:
        """Render with the unchanged model. Returns the names of the layers that it uses."""
        used: set[str] = set()

        def hook_of(name):
            return lambda *_: used.add(name)

        self._progress.text = "the unchanged model"
        with forward_hooks(self._network, {name: hook_of(name) for name in self._names}):
            self._short.render_originals(self._model, self._progress)
        return used

    def _change(self, renders: Renders, group: Sequence[str], rounding: str = "nearest") -> float:
        """What `renders` measures when these layers are rounded."""
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        self._progress.text = group[0].removesuffix(".weight") + more
        with self._rounded(group, rounding):
            return renders.change(self._model, self._progress)

    @contextmanager
    def _rounded(self, group: Sequence[str], rounding: str) -> Iterator[None]:
        """Let these layers multiply by their rounded weights: each adds the product with its weight's error.

        The model's own weights are not touched, wherever ComfyUI keeps them.
        """
        has_room = make_room(self._device, [sum(self._network.tensors[name].nbytes for name in group)])
        hooks = {}
        for name in group:
            throw_exception_if_processing_interrupted()
            error = self._rounding_error(name, rounding)
            hooks[name] = _AddProduct(error if has_room else error.cpu())
        with ExitStack() as stack:
            stack.enter_context(forward_hooks(self._network, hooks))
            yield

    def _rounding_error(self, name: str, rounding: str) -> torch.Tensor:
        """Rounded minus original weight (out, in), on the device where the model computes, in its dtype there."""
        weight = self._network.value(name, self._device)
        if name not in self._errors:
            layer = self._calibration.layer_of(name, weight) if self._calibration else None
            self._errors[name] = rounding_errors(weight, layer)
        q = quantize_weight(weight, name, Recipe(rounding=rounding), self._calibration, statistics=False)
        return (dequantize_tensor(q.codes, q.scale) - weight.float()).to(self._network.tensor(name).dtype)

    def _how(self) -> str:
        shapes = " and ".join("×".join(map(str, part.shape)) for part in self._short.originals[0])
        return f"{display.count(len(self._short.seeds), 'seed')}, {self._short.sampler}, latent {shapes}"

    def _log(self, changes: dict[tuple[str, ...], float], sensitivity: Sensitivity) -> None:
        apart = math.fsum(layer.change for layer in sensitivity.layers.values())
        log.info(
            "sensitivity of %s (%s): %d layers, %d of them measured alone, %d not used; the layers add up to %s of "
            "what their blocks change together",
            self._network.name,
            sensitivity.how,
            len(sensitivity.layers),
            sum(layer.alone for layer in sensitivity.layers.values()),
            len(self._names) - len(sensitivity.layers),
            display.share(apart / math.fsum(changes.values())),
        )


class Renders:
    """Renders of some seeds, by the unchanged model and by changed ones."""

    def __init__(self, sampler: Sampler, seeds: Sequence[int], measure: Callable[[Latents, Latents], float]):
        """measure(latents of the unchanged model, their changes) -> what `change` returns."""
        self.sampler, self.seeds, self._measure = sampler, seeds, measure
        self.originals: Latents = []

    @property
    def steps(self) -> int:
        """Steps of one set of renders."""
        return self.sampler.steps * len(self.seeds)

    @property
    def power(self) -> float:
        """Mean square of the latents of the unchanged model."""
        return mean_square(self.originals, self.originals)

    def render_originals(self, model: Any, progress: RenderProgress) -> None:
        """Render with the unchanged model."""
        self.originals = self._render(model, progress)

    def change(self, model: Any, progress: RenderProgress) -> float:
        """Measure how far a changed model's latents are from those of the unchanged one."""
        changes = [
            [one - other for one, other in zip(ones, others, strict=True)]
            for ones, others in zip(self._render(model, progress), self.originals, strict=True)
        ]
        return self._measure(self.originals, changes)

    def _render(self, model: Any, progress: RenderProgress) -> Latents:
        return [self.sampler.render(model, seed, progress.step) for seed in self.seeds]


class _AddProduct:
    """A forward hook that adds the product of a layer's inputs with a matrix to the layer's output."""

    def __init__(self, matrix: torch.Tensor):
        self._matrix = matrix

    def __call__(self, module: Any, arguments: tuple, keywords: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        x = arguments[0] if arguments else keywords["input"]
        if self._matrix.dtype != x.dtype:
            self._matrix = self._matrix.to(x.dtype)
        return output + torch.nn.functional.linear(x, self._matrix.to(x.device)).to(output.dtype)


def _known_errors(calibration: Calibration | None) -> dict[str, RoundingErrors]:
    """Those of an earlier measurement, as far as nothing was recorded since then."""
    if calibration is None or calibration.sensitivity is None:
        return {}
    errors = {name: layer.errors for name, layer in calibration.sensitivity.layers.items()}
    return {name: each for name, each in errors.items() if each.output or name not in calibration.layers}


def _largest(changes: Mapping[tuple[str, ...], float]) -> list[tuple[str, ...]]:
    """The blocks for long renders."""
    order = sorted(changes, key=lambda group: -changes[group])[:LONG_BLOCKS]
    return [group for group in order if changes[group] >= LARGE * changes[order[0]]]


def _check_same_model(network: Network, names: Sequence[str], calibration: Calibration | None) -> None:
    """Raises CalibrationError for a calibration of another model. One without any layer fits every model."""
    if calibration is None:
        return
    recorded = {name: layer.width for name, layer in calibration.layers.items()}
    measured = calibration.sensitivity.layers if calibration.sensitivity else {}
    wrong = [name for name in names if name in recorded and recorded[name] != network.tensors[name].shape[1]]
    foreign = (recorded or measured) and not {*recorded, *measured} & set(names)
    if wrong or foreign:
        raise CalibrationError(
            f"the calibration is of another model than {network.name}: calibrate this model, or disconnect it"
        )


def _blocks(names: Sequence[str]) -> list[list[str]]:
    """The weights by block: by the parts of their names up to the first number. Others are on their own."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit() and i + 2 < len(parts)), None)
        groups.setdefault(name if number is None else ".".join(parts[: number + 1]), []).append(name)
    return list(groups.values())


def mean_square(originals: Latents, changes: Latents) -> float:
    """The mean square of the changes, over all values of all latents."""
    parts = [part for latent in changes for part in latent]
    return math.fsum(_square(part) for part in parts) / sum(part.numel() for part in parts)


def typical_share(originals: Latents, changes: Latents) -> float:
    """The square of the change of an image over that of the image: the geometric mean over the images.

    In a long render, an image can become another one in places. Such an image would outweigh all others in a mean.
    """
    shares = [
        sum(_square(part[i]) for part in latent) / sum(_square(part[i]) for part in original)
        for original, latent in zip(originals, changes, strict=True)
        for i in range(len(latent[0]))
    ]
    return math.exp(math.fsum(math.log(share) for share in shares) / len(shares)) if all(shares) else 0.0


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())
