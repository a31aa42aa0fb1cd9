"""Draws the pack's icon and banner: rounding to FP8 as a landscape. ``make pictures`` calls this.

The stairs are values rounded to nearest in E5M2; the sparks are stochastic draws of the same values that differ. The
colours are those of the demo model's dusk, and the banner shows one of its pictures.
"""

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from PIL import Image
from stochastic_fp8_pack.kernels import dequantize_tensor, quantize_tensor
from tools.training.landscapes import PALETTES, SCENES

ICON = (400, 400)
BANNER = (1260, 540)  # 21:9
SCALE = 3
"""Everything is drawn this much larger, then reduced."""

TOP, HORIZON, SUN, FAR, NEAR = np.reshape(PALETTES[SCENES.index("dusk")][:15], (5, 3))
SNOW = (1.0, 0.85, 0.76)
LARGEST = 4.0
"""The stairs end at this value."""


def rounded(values, rounding, seed=0):
    """float64 values after rounding to E5M2 without a scale, and back."""
    quantized = quantize_tensor(
        torch.tensor(values, dtype=torch.float32), format="float8_e5m2", rounding=rounding, scaling="none", seed=seed
    )
    return dequantize_tensor(quantized.codes, quantized.scale).double().numpy()


class Canvas:
    """A drawing of so many pixels whose coordinates are pixels, counted from the bottom left."""

    def __init__(self, size):
        self.size = size
        self._figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100 * SCALE)
        self.axes = self._figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
        self.axes.set_axis_off()

    def save(self, path):
        canvas = FigureCanvasAgg(self._figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        picture.resize(self.size, Image.Resampling.LANCZOS).save(path, optimize=True)

    def sky(self, sun=None, glow=0.0):
        """The dusk sky, and a sun: (x, y, radius). glow: how far it shines, in radii."""
        width, height = self.size
        rows, columns = np.mgrid[0:height, 0:width] + 0.5
        colours = HORIZON + (TOP - HORIZON) * (rows[..., None] / height) ** 1.2
        if sun:
            x, y, radius = sun
            distance = np.hypot(columns - x, rows - y)[..., None]
            colours = colours + (SUN - colours) * 0.75 * np.exp(-distance / (glow * radius))
            self.axes.add_patch(Circle((x, y), radius, linewidth=0, facecolor=(SUN + SNOW) / 2, zorder=2))
        self._image(colours[::-1], (0, width, 0, height), zorder=1)

    def picture(self, picture, left, fade):
        """A picture as high as the canvas, opaque from `left + fade` pixels on."""
        side = self.size[1]
        pixels = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)) / 255
        alpha = np.clip((np.arange(side) + 0.5) / fade, 0, 1)
        alpha = alpha**2 * (3 - 2 * alpha)
        pixels = np.dstack([pixels, np.broadcast_to(alpha, (side, side))])
        self._image(pixels, (left, left + side, 0, side), zorder=6)

    def text(self, x, y, text, size, **style):
        self.axes.text(x, y, text, fontsize=size * 0.72, color=SNOW, zorder=7, **style)

    def _image(self, pixels, extent, zorder):
        self.axes.imshow(pixels, extent=extent, aspect="auto", interpolation="bilinear", zorder=zorder)

    def stairs(self, left, right, bottom, top, dots, size):
        """E5M2's values from 0 to LARGEST: nearest as stairs, and `dots` stochastic draws."""
        values = np.linspace(0, LARGEST, 8001)[1:]
        x = left + (right - left) * values / LARGEST
        y = bottom + (top - bottom) * rounded(values, "nearest") / LARGEST
        gradient = LinearSegmentedColormap.from_list("ridge", [NEAR * 0.7, FAR * 0.9])
        picture = self.axes.imshow(
            np.linspace(0, 1, 256)[:, None],
            extent=(left, right, 0, top),
            origin="lower",
            cmap=gradient,
            aspect="auto",
            zorder=3,
        )
        outline = np.column_stack([[left, *x, right], [0, *y, 0]])
        picture.set_clip_path(Polygon(outline, transform=self.axes.transData))
        self.axes.plot(x, y, color=SNOW, linewidth=1.6 * size, zorder=4, solid_joinstyle="miter")
        draws = (np.arange(dots) + 0.5) / dots * LARGEST
        drawn = rounded(draws, "stochastic", seed=4)
        differ = drawn != rounded(draws, "nearest")
        self.axes.scatter(
            left + (right - left) * draws[differ] / LARGEST,
            bottom + (top - bottom) * drawn[differ] / LARGEST,
            s=6 * size**2,
            color=SNOW,
            linewidths=0,
            zorder=5,
        )


def draw_icon(path):
    canvas = Canvas(ICON)
    canvas.sky(sun=(112, 284, 46), glow=2.2)
    canvas.stairs(left=0, right=400, bottom=26, top=352, dots=400, size=1.3)
    canvas.save(path)


def draw_banner(path, landscape):
    """landscape: a square picture of the demo model at dusk. It fades into the sky on the left."""
    width, height = BANNER
    canvas = Canvas(BANNER)
    canvas.sky()
    canvas.stairs(left=0, right=1000, bottom=12, top=250, dots=500, size=1.3)
    canvas.picture(landscape, left=width - height, fade=300)
    canvas.text(64, 404, "Stochastic FP8", 52, weight="bold")
    canvas.text(66, 344, "Diffusion models in half the memory", 24)
    canvas.save(path)
