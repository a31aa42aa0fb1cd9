"""Rendering with ComfyUI's own sampler inside a node: KSampler's latents, with one progress bar over many renders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

from ..kernels import display
from .networks import ModelError, Network, own_buffers
from .options import LARGEST_SEED
from .progress import TimeLeft

Hook = Callable[[Any, tuple, dict[str, Any], Any], Any]
"""hook(module, arguments, keywords, output): a forward hook. What it returns, unless None, replaces the output."""


@dataclass(frozen=True)
class Sampler:
    """What KSampler takes, but the model and the seed."""

    positive: Any
    negative: Any
    latent_image: dict[str, Any]
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def render(self, model: Any, seed: int, on_step: Callable[[], None]) -> list[torch.Tensor]:
        """The latents that KSampler would give, fp32 on the CPU: one tensor, or the parts of a nested one.

        on_step: called after each step. Raises ModelError for latents with NaN or infinite values.
        """
        latent = self.latent_image
        image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **_downscaling(latent))
        with own_buffers(model):
            samples = comfy.sample.sample(
                model,
                comfy.sample.prepare_noise(image, seed % (LARGEST_SEED + 1), latent.get("batch_index")),
                self.steps,
                self.cfg,
                self.sampler_name,
                self.scheduler,
                self.positive,
                self.negative,
                image,
                denoise=self.denoise,
                noise_mask=latent.get("noise_mask"),
                callback=lambda *_: on_step(),
                disable_pbar=True,
                seed=seed % (LARGEST_SEED + 1),
            )
        parts = [part.float().cpu() for part in (samples.unbind() if samples.is_nested else [samples])]
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ModelError(
                f"the latent of seed {seed} holds NaN or infinite values: the model does not work with these settings "
                "or in this precision; render with KSampler first, and change them"
            )
        return parts

    def __str__(self) -> str:
        return f"{display.count(self.steps, 'step')}, {self.sampler_name}/{self.scheduler}, cfg {self.cfg:g}"


def _downscaling(latent: dict[str, Any]) -> dict[str, Any]:
    """What newer versions know about an empty latent: ComfyUI 0.3.75 does not take it."""
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    names = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return {name: latent.get(name) for name in names if name in known}


@contextmanager
def forward_hooks(network: Network, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Call hooks after layers of a network, by the published name of their weight, until the block ends."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            handle = network.owner(name).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class RenderProgress:
    """One progress bar over the steps of many renders, and the time left as text on the node.

    `step` raises ComfyUI's InterruptProcessingException after a cancel.
    """

    def __init__(self, total: int):
        """total: steps of all renders."""
        self.total, self.done, self.text = total, 0, ""
        self._bar, self._left = ProgressBar(total), TimeLeft()

    def step(self) -> None:
        """One more step is done."""
        throw_exception_if_processing_interrupted()
        self.done += 1
        self._bar.update_absolute(min(self.done, self.total), self.total)
        self._left.show(self.text, self.done, self.total)

    def skip(self, steps: int) -> None:
        """Take `steps` off the total: they are not needed."""
        self.total -= steps

    def finish(self, text: str) -> None:
        """Show a last text: what was done, and how long it took."""
        self._left.finish(text)
