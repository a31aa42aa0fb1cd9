"""Compare Images (A/B): what a quantized model's picture lost against the original's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

import torch
from comfy_api.latest import io, ui

from ..kernels.figures import image_sheet, to_image
from .progress import Progress
from .schema import CATEGORY, fit

SSIM_WINDOW = 11
"""Side of the window in pixels, as in Wang et al., Image Quality Assessment (2004)."""

NAMES = ("A", "B")
"""What images are called that a user gave no name."""

_AMPLIFY_TOOLTIP = "How much brighter the difference is shown. 8 makes a difference of 32 levels of 255 white."


class StochasticFP8ImageCompare(io.ComfyNode):
    """Two IMAGE batches -> a batch of sheets; the node shows a slider over the two."""

    @classmethod
    def define_schema(cls):
        return fit(
            io.Schema,
            node_id="StochasticFP8ImageCompare",
            display_name="Compare Images (A/B)",
            category=CATEGORY,
            search_aliases=["image difference", "psnr", "ssim", "slider", "before after"],
            description=(
                "Puts two images side by side with their amplified difference, PSNR and SSIM. Batches are compared in "
                "pairs; a single image is compared with each of the other batch."
            ),
            inputs=[
                fit(io.Image.Input, "image_a", tooltip="The first image or batch, e.g. of the original model."),
                fit(io.Image.Input, "image_b", tooltip="The second, of the same size, e.g. of the quantized model."),
                fit(io.Int.Input, "amplify", default=8, min=1, max=255, tooltip=_AMPLIFY_TOOLTIP),
                fit(
                    io.Int.Input,
                    "width",
                    default=1536,
                    min=512,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="Pixels of the sheet. The numbers are those of the full images, whatever the width.",
                ),
                *(
                    fit(
                        io.String.Input,
                        f"label_{name.lower()}",
                        default=name,
                        optional=True,
                        tooltip=f"What to call image {name}, on the sheet and on the slider.",
                    )
                    for name in NAMES
                ),
            ],
            outputs=[
                io.Image.Output(id="IMAGE", display_name="image", tooltip="A, B and the difference; one a pair."),
                io.Float.Output(
                    id="psnr", display_name="psnr", tooltip="PSNR in dB, mean over the pairs; infinite if equal."
                ),
                io.Float.Output(
                    id="ssim", display_name="ssim", tooltip="SSIM, the mean over the pairs; 1 for equal images."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_a, image_b, amplify, width=1536, label_a="A", label_b="B"):
        a, b = pair_up(image_a, image_b)
        names = tuple(label.strip() or name for label, name in zip((label_a, label_b), NAMES, strict=True))
        scores = [similarity(*pair) for pair in zip(a, b, strict=True)]
        sheet = torch.cat(list(sheets(a, b, scores, amplify=amplify, names=names, width=width)))
        shown = {f"{side}_images": ui.PreviewImage(image, cls=cls).values for side, image in (("a", a), ("b", b))}
        shown["names"] = list(names)
        psnr, ssim = (mean(values) for values in zip(*scores, strict=True))
        return io.NodeOutput(sheet, psnr, ssim, ui=shown)


def pair_up(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both batches as RGB and of one length, a single image repeated.

    Raises ValueError for images of different sizes, and for batches of different lengths unless one holds one image.
    """
    if a.shape[1:3] != b.shape[1:3]:
        sizes = [f"{image.shape[2]} × {image.shape[1]}" for image in (a, b)]
        raise ValueError(f"image A is {sizes[0]} pixels and image B {sizes[1]}: compare images of one size")
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(
            f"batch A holds {len(a)} images and batch B {len(b)}: compare as many with as many, or with one"
        )
    length = max(len(a), len(b))
    return tuple(image[..., :3].expand(length, -1, -1, 3) for image in (a.cpu().float(), b.cpu().float()))


def sheets(
    a: torch.Tensor, b: torch.Tensor, scores: Sequence[tuple[float, float]], **choices
) -> Iterator[torch.Tensor]:
    """An IMAGE of each pair. scores: (PSNR, SSIM) of each. choices: those of image_sheet."""
    progress = Progress()
    for i, (psnr, ssim) in enumerate(scores):
        progress(i, len(a), "")
        which = f"pair {i + 1} of {len(a)}" if len(a) > 1 else ""
        yield to_image(image_sheet(a[i].numpy(), b[i].numpy(), psnr=psnr, ssim=ssim, which=which, **choices))
    progress(len(a), len(a), "")


def similarity(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB (infinite for equal images) and mean SSIM of two float images (H, W, 3) in 0..1."""
    import kornia.metrics

    a, b = (image.movedim(-1, 0)[None] for image in (a, b))
    window = min(SSIM_WINDOW, *(side - 1 + side % 2 for side in a.shape[-2:]))
    return float(kornia.metrics.psnr(a, b, 1.0)), float(kornia.metrics.ssim(a, b, window).mean())
