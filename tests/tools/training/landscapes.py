"""Draws the landscapes that the demo model was trained on: sky, sun or moon, three ridges, firs and a lake.

Everything is drawn in batches on one device. Pictures are float (B, 3, 256, 256) in 0..1; a height or position is a
share of the picture's side, counted from the top left.
"""

import math

import torch
import torch.nn.functional as F

SCENES = ("dawn", "day", "dusk", "night")
NIGHT = SCENES.index("night")
SIDE = 256
PIXEL = 1 / SIDE

# For each scene: sky at the top and at the horizon, sun, far and near ridge (RGB each), and the sun's lowest and
# highest place.
PALETTES = (
    (0.38, 0.42, 0.66, 0.98, 0.72, 0.58, 1.0, 0.86, 0.60, 0.62, 0.50, 0.60, 0.16, 0.20, 0.24, 0.50, 0.62),
    (0.20, 0.46, 0.86, 0.74, 0.88, 0.98, 1.0, 0.97, 0.80, 0.48, 0.60, 0.74, 0.12, 0.32, 0.16, 0.10, 0.30),
    (0.24, 0.14, 0.40, 0.98, 0.46, 0.22, 1.0, 0.55, 0.25, 0.44, 0.22, 0.34, 0.10, 0.08, 0.14, 0.46, 0.64),
    (0.02, 0.03, 0.10, 0.10, 0.14, 0.30, 0.92, 0.94, 1.0, 0.12, 0.15, 0.28, 0.03, 0.04, 0.08, 0.10, 0.34),
)
COLOURS = 15
RIDGE_WAVES = (1, 2, 3, 5, 9, 15)
FIRS = 9


class Painter:
    """Draws batches of one size on one device."""

    def __init__(self, batch, device="cpu"):
        self.batch = batch
        self.device = device
        centres = (torch.arange(SIDE, device=device) + 0.5) * PIXEL
        self.y, self.x = torch.meshgrid(centres, centres, indexing="ij")

    def paint(self, scene=None):
        """(pictures, scenes): of the given scenes (int64 (B,), indices into SCENES) or of random ones."""
        if scene is None:
            scene = torch.randint(len(SCENES), (self.batch,), device=self.device)
        palette = torch.tensor(PALETTES, device=self.device)[scene]
        palette = palette + 0.035 * torch.randn(self.batch, palette.shape[1], device=self.device)
        top, horizon, sun, far, near = palette[:, :COLOURS].clamp(0, 1).split(3, dim=1)
        night = (scene == NIGHT).float()[:, None, None]
        sky = (self.y[None] / 0.7).clamp(0, 1)[:, None] ** 0.9
        picture = _colour(top) * (1 - sky) + _colour(horizon) * sky
        centre = self._random(1, 1, low=0.15, high=0.85), self._between(palette[:, 15], palette[:, 16])
        picture = self._sun(picture, centre, sun, top, night)
        picture, shore = self._ridges(picture, centre, horizon, far, near, night)
        picture = self._firs(picture, shore, near)
        return self._lake(picture, centre, top).clamp(0, 1), scene

    def _sun(self, picture, centre, colour, sky, night):
        """A glowing disc; at night a crescent, cut out of it with the sky's colour."""
        x, y = centre
        radius = self._random(1, 1, low=0.045, high=0.085)
        distance = ((self.x - x) ** 2 + (self.y - y) ** 2).sqrt()
        picture = _over(picture, colour, 0.55 * torch.exp(-((distance / (radius * 3)) ** 1.3)))
        picture = _over(picture, colour, _edge(radius - distance))
        shadow = ((self.x - x - radius * 0.5) ** 2 + (self.y - y + radius * 0.25) ** 2).sqrt()
        return _over(picture, sky, 0.92 * night * _edge(radius * 0.9 - shadow))

    def _ridges(self, picture, centre, horizon, far, near, night):
        """Paint three ridges from far to near, the first with snow. Returns the line of the last, (B, SIDE)."""
        base = self._random(1, low=0.46, high=0.54)
        for index, (height, jaggedness) in enumerate(((0.075, 0.95), (0.055, 0.75), (0.04, 0.4))):
            nearness = index / 2
            line = self._ridge_line(base + 0.11 * index, height, jaggedness)[:, None, :]
            ground = _edge(self.y[None] - line)
            picture = _over(picture, far * (1 - nearness) + near * nearness, ground)
            if index == 0:
                snow = line + 0.045 + 0.02 * torch.sin(self.x[None] * 60 + centre[0] * 40)
                white = (horizon * 0.35 + 0.62).clamp(0, 1) * (1 - 0.55 * night[:, 0])
                picture = _over(picture, white, _edge(snow - self.y[None]) * ground)
            mist = ground * 0.22 * (1 - nearness) * ((self.y[None] - line) / 0.12).clamp(0, 1)
            picture = _over(picture, horizon, mist)
        return picture, line[:, 0]

    def _ridge_line(self, base, height, jaggedness):
        """Waves of falling size, between sines (jaggedness 0) and triangles (1): (B, SIDE)."""
        line = torch.zeros(self.batch, SIDE, device=self.device)
        for order, frequency in enumerate(RIDGE_WAVES, start=1):
            shifted = self.x[0][None] + self._random(1, high=0.05)
            phase = self._random(1, high=2 * math.pi) + 2 * math.pi * frequency * shifted
            triangle = 2 / math.pi * torch.asin(torch.sin(phase) * 0.999)
            wave = jaggedness * triangle + (1 - jaggedness) * torch.sin(phase)
            line = line + self._random(1, low=0.5) / order**1.1 * wave
        return base + height * line

    def _firs(self, picture, shore, colour):
        for _ in range(FIRS):
            x, height = self._random(low=0.02, high=0.98), self._random(low=0.07, high=0.15)
            foot = shore.gather(1, (x * SIDE).long().clamp(0, SIDE - 1)[:, None])[:, 0] + 0.015
            x, height, top = (value[:, None, None] for value in (x, height, foot - height))
            share = (self.y[None] - top) / height
            branches = 0.62 + 0.38 * ((share * 4) % 1)
            width = height * 0.24 * share * branches
            inside = ((share > 0) & (share < 1)).float()
            picture = _over(picture, colour * 0.62, _edge(width - (self.x[None] - x).abs()) * inside)
        return picture

    def _lake(self, picture, centre, sky):
        """Mirror everything above the water line below it, with ripples."""
        line = self._random(1, 1, low=0.80, high=0.86)
        water = _edge(self.y[None] - line)
        y = (2 * line - self.y[None] + 0.004 * torch.sin(self.y[None] * 260 + centre[0] * 9) * water).clamp(0, 1)
        x = (self.x[None] + 0.006 * torch.sin(self.y[None] * 190 + centre[1] * 11) * water).expand_as(y)
        grid = torch.stack([x * 2 - 1, y * 2 - 1], dim=-1)
        mirrored = F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)
        water = water[:, None]
        return picture * (1 - water) + (mirrored * 0.78 + _colour(sky) * 0.14) * water

    def _random(self, *shape, low=0.0, high=1.0):
        return torch.rand(self.batch, *shape, device=self.device) * (high - low) + low

    def _between(self, low, high):
        return (low + (high - low) * self._random())[:, None, None]


def _over(picture, colour, opacity):
    """Paint a colour (B, 3) over the picture with opacity (B, H, W)."""
    return picture + (_colour(colour) - picture) * opacity[:, None]


def _edge(inside):
    """1 where a signed distance is positive, 0 where it is negative, smooth over one pixel."""
    return (inside / PIXEL + 0.5).clamp(0, 1)


def _colour(values):
    return values[:, :, None, None]
