"""Compare Images (A/B): the difference between two images, such as those of a model before and after quantizing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..kernels.figures import image_sheet
from .pictures import draw_image, theme_input
from .progress import JobProgress
from .schema import CATEGORY, newer, rare

SSIM_WINDOW = 11
"""Side of the SSIM window in pixels, as in Wang et al., Image Quality Assessment (2004)."""

NAMES = ("A", "B")
"""The names of images whose label is empty."""


class StochasticFP8ImageCompare(io.ComfyNode):
    """Two IMAGE batches -> a batch of sheets. The node shows both under a slider."""

    @classmethod
    def define_schema(cls):
        return newer(
            io.Schema,
            node_id="StochasticFP8ImageCompare",
            display_name="Compare Images (A/B)",
            category=CATEGORY,
            search_aliases=["image difference", "psnr", "ssim", "slider", "before after"],
            description=(
                "Shows two images side by side with their amplified difference, PSNR and SSIM. Batches are compared "
                "in pairs. A single image is compared with each image of the other batch."
            ),
            inputs=[
                io.Image.Input("image_a", tooltip="The first image or batch, e.g. from the original model."),
                io.Image.Input(
                    "image_b", tooltip="The second image or batch, of the same size, e.g. from the quantized model."
                ),
                io.Int.Input(
                    "amplify",
                    default=8,
                    min=1,
                    max=255,
                    tooltip="How many times brighter the difference is drawn. With 8, a difference of 32 of 255 levels "
                    "is white.",
                ),
                rare(
                    io.Int.Input(
                        "width",
                        default=1536,
                        min=512,
                        max=4096,
                        step=8,
                        optional=True,
                        tooltip="Width of the sheet in pixels. PSNR and SSIM are those of the full-size images.",
                    )
                ),
                *(
                    io.String.Input(
                        f"label_{name.lower()}",
                        default=name,
                        optional=True,
                        tooltip=f"The name of image {name} on the sheet and on the slider.",
                    )
                    for name in NAMES
                ),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(
                    id="IMAGE", display_name="image", tooltip="A, B and their difference: one sheet per pair."
                ),
                io.Float.Output(
                    id="psnr",
                    display_name="psnr",
                    tooltip="PSNR in dB, the mean over the pairs. Infinite for equal images.",
                ),
                io.Float.Output(
                    id="ssim", display_name="ssim", tooltip="SSIM, the mean over the pairs. 1 for equal images."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_a, image_b, amplify, width=1536, label_a="A", label_b="B", theme="dark"):
        a, b = pair_up(image_a, image_b)
        names = tuple(label.strip() or name for label, name in zip((label_a, label_b), NAMES, strict=True))
        scores = [similarity(*pair) for pair in zip(a, b, strict=True)]
        sheet = torch.cat(list(sheets(a, b, scores, theme, amplify=amplify, names=names, width=width)))
        shown = {f"{side}_images": ui.PreviewImage(image, cls=cls).values for side, image in (("a", a), ("b", b))}
        shown["names"] = list(names)
        shown["scores"] = [[psnr if math.isfinite(psnr) else None, ssim] for psnr, ssim in scores]
        psnr, ssim = (mean(values) for values in zip(*scores, strict=True))
        return io.NodeOutput(sheet, psnr, ssim, ui=shown)


def pair_up(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both batches as RGB on the CPU, with equally many images: a single image is repeated.

    Raises ValueError for images of different sizes, and for batches of different lengths unless one has one image.
    """
    if a.shape[1:3] != b.shape[1:3]:
        sizes = [f"{image.shape[2]} × {image.shape[1]}" for image in (a, b)]
        raise ValueError(
            f"image A has {sizes[0]} pixels and image B has {sizes[1]}: resize one of them to the size of the other"
        )
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(
            f"batch A has {len(a)} images and batch B has {len(b)}: give both the same number of images, or one of "
            "them a single image"
        )
    length = max(len(a), len(b))
    rgb_a, rgb_b = (image[..., :3].expand(length, -1, -1, 3) for image in (a.cpu().float(), b.cpu().float()))
    return rgb_a, rgb_b


def sheets(
    a: torch.Tensor, b: torch.Tensor, scores: Sequence[tuple[float, float]], theme: str, **choices: Any
) -> Iterator[torch.Tensor]:
    """One IMAGE per pair. scores: (PSNR, SSIM) of each pair. theme: see draw_image. choices: those of image_sheet."""
    progress = JobProgress()
    for i in range(len(a)):
        progress(i, len(a), "")
        yield _sheet(a[i], b[i], *scores[i], theme, which=f"pair {i + 1} of {len(a)}" if len(a) > 1 else "", **choices)
    progress(len(a), len(a), "")


def _sheet(a: torch.Tensor, b: torch.Tensor, psnr: float, ssim: float, theme: str, **choices: Any) -> torch.Tensor:
    return draw_image(lambda: image_sheet(a.numpy(), b.numpy(), psnr=psnr, ssim=ssim, **choices), theme)


def similarity(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB (infinite for equal images) and mean SSIM of two float images (H, W, 3) in 0..1."""
    import kornia.metrics

    a, b = (image.movedim(-1, 0)[None] for image in (a, b))
    window = min(SSIM_WINDOW, *(side - 1 + side % 2 for side in a.shape[-2:]))
    return float(kornia.metrics.psnr(a, b, 1.0)), float(kornia.metrics.ssim(a, b, window).mean())
