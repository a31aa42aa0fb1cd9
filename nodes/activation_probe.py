"""Activation Probe: where along its depth, and at which step, a quantized MODEL differs from the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..kernels import display
from ..kernels.figures import activation_probe_figure
from ..kernels.studies.activation_probe import INPUT, OUTPUT, Probe, list_layers, to_markdown
from .models import diffusion_network
from .networks import ModelError, Network
from .options import sampler_inputs, scene_inputs, seed_input, size_inputs
from .pictures import draw_image, theme_input
from .sampling import RenderProgress, Sampler
from .schema import CATEGORY, newer

MOST_VALUES = 1 << 14
"""Values of one output that are compared, evenly spaced."""

Outputs = dict[str, list[torch.Tensor]]
"""Block -> samples of its outputs in one step, one per call and tensor; fp32 on the CPU."""


class StochasticFP8ActivationProbe(io.ComfyNode):
    """Two MODELs -> IMAGE and texts: how far the outputs of their blocks are apart while they render."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8ActivationProbe",
            display_name="Activation Probe",
            category=CATEGORY,
            search_aliases=["block difference", "layer difference", "where quantization hurts"],
            description=(
                "Renders the same noise with two versions of a model, such as the original and the quantized one, and "
                "shows where along the depth and at which step they differ. Also lists the blocks and layers of the "
                "model, to write patterns for keep and only."
            ),
            inputs=[
                io.Model.Input("model_a", tooltip="The model to compare with, such as the one in 16 bits."),
                io.Model.Input("model_b", tooltip="The other version of it, such as the quantized one."),
                *scene_inputs(),
                seed_input("The noise that both models start from."),
                *sampler_inputs(),
                *size_inputs(1024, 768),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(
                    id="IMAGE", display_name="image", tooltip="Relative difference along the depth, a line per step."
                ),
                io.String.Output(id="markdown", display_name="markdown", tooltip="A table with one row per block."),
                io.String.Output(
                    id="layers",
                    display_name="layers",
                    tooltip="The blocks and Linear layers of the model, one per line.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model_a,
        model_b,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        width=1024,
        height=768,
        theme="dark",
    ):
        sampler = Sampler(positive, negative, latent_image, steps, cfg, sampler_name, scheduler, denoise)
        probe, layers = probe_models(model_a, model_b, sampler, seed)
        image = draw_image(lambda: activation_probe_figure(probe, width=width, height=height), theme)
        return io.NodeOutput(image, to_markdown(probe), layers, ui=ui.PreviewImage(image, cls=cls))


def probe_models(model_a: Any, model_b: Any, sampler: Sampler, seed: int) -> tuple[Probe, str]:
    """The differences, and the list of blocks and layers.

    Raises ModelError for models of different classes, without blocks, or with NaN or infinite values.
    """
    a, b = diffusion_network(model_a, "model_a"), diffusion_network(model_b, "model_b")
    classes = [type(model.model) for model in (model_a, model_b)]
    if classes[0] is not classes[1]:
        raise ModelError(
            f"model_a is {classes[0].__name__} and model_b is {classes[1].__name__}: connect two versions of the same "
            "model, such as the original and the quantized one"
        )
    progress = RenderProgress(2 * sampler.steps)
    rendered = []
    for network, model, which in ((a, model_a, "model_a"), (b, model_b, "model_b")):
        progress.text = which
        recorder = OutputRecorder(which)
        with recorder.recording(network):
            sampler.render(model, seed, _both(progress.step, recorder.next_step))
        rendered.append(recorder.steps)
    progress.finish(f"{display.count(sampler.steps, 'step')} compared")
    if len(rendered[0]) != len(rendered[1]):
        raise ModelError(f"{sampler.sampler_name} took other steps with model_b: choose a sampler with fixed steps")
    blocks = list(rendered[0][0]) if rendered[0] else []
    if len(blocks) < 3:
        raise ModelError(f"{a.name} has no list of blocks that its sampler runs: there is nothing to compare")
    differences = tuple(
        tuple(_difference(ones, others, block) for block in blocks) for ones, others in zip(*rendered, strict=True)
    )
    how = f"{sampler}, seed {seed}"
    shapes = {name: a.tensors[f"{name}.weight"].shape for name in _in_module_order(a)}
    return Probe(a.name, how, tuple(blocks), differences), list_layers(blocks[1:-1], shapes)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


class OutputRecorder:
    """Samples the outputs of the blocks of a network, step by step, and what the whole network receives and returns."""

    def __init__(self, which: str):
        """which: what errors call the model."""
        self.steps: list[Outputs] = []
        self._which, self._now, self._inside = which, Outputs(), 0

    def next_step(self) -> None:
        """What is recorded from now on belongs to the next step."""
        self.steps.append(self._now)
        self._now = Outputs()

    @contextmanager
    def recording(self, network: Network) -> Iterator[None]:
        """Record until the block ends. Of nested blocks, the outermost one that is called counts."""
        handles = []
        try:
            handles.append(network.module.register_forward_pre_hook(self._receive))
            handles.append(network.module.register_forward_hook(self._hook_of(OUTPUT)))
            for name in numbered_modules(network.module):
                module = network.module.get_submodule(name)
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave(self._hook_of(name))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _receive(self, module: Any, arguments: tuple) -> None:
        self._add(INPUT, arguments[:1])

    def _hook_of(self, name: str) -> Any:
        return lambda module, arguments, output: self._add(name, output)

    def _enter(self, module: Any, arguments: tuple) -> None:
        self._inside += 1

    def _leave(self, hook: Any) -> Any:
        def leave(module: Any, arguments: tuple, output: Any) -> None:
            self._inside -= 1
            if not self._inside:
                hook(module, arguments, output)

        return leave

    def _add(self, name: str, output: Any) -> None:
        for tensor in _tensors(output):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: -(-len(flat) // MOST_VALUES)].float().cpu()
            if not bool(sample.isfinite().all()):
                raise ModelError(
                    f"the outputs of '{name}' of {self._which} hold NaN or infinite values at step "
                    f"{len(self.steps) + 1}: the model does not work with these settings or in this precision"
                )
            self._now.setdefault(name, []).append(sample)


def numbered_modules(module: torch.nn.Module) -> list[str]:
    """Names of the modules in lists of blocks, and of the numbered ones inside of these.

    A plain Sequential, such as the MLP of an embedder, is not a list of blocks.
    """
    lists: list[str] = []
    names = []
    for name, each in module.named_modules():
        if isinstance(each, (torch.nn.ModuleList, torch.nn.Sequential)) and type(each) is not torch.nn.Sequential:
            lists.append(f"{name}.")
        if name.rpartition(".")[2].isdigit() and name.startswith(tuple(lists)):
            names.append(name)
    return names


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
        yield output
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _tensors(each)


def _difference(ones: Outputs, others: Outputs, block: str) -> float:
    """RMS difference over the RMS of the first, of all calls in a step."""
    first, second = ones.get(block, []), others.get(block, [])
    if [len(one) for one in first] != [len(other) for other in second]:
        raise ModelError(
            f"the two models ran '{block}' with other batches, because of the memory that was free: render fewer "
            "images at once, or smaller ones"
        )
    noise = math.fsum(float((one - other).double().square().sum()) for one, other in zip(first, second, strict=True))
    signal = math.fsum(float(one.double().square().sum()) for one in first)
    return math.sqrt(noise / signal) if signal else 0.0


def _in_module_order(network: Network) -> list[str]:
    return [
        name.removesuffix(".weight") for name in network.tensors if name.removesuffix(".weight") in network.linear_names
    ]
