"""Drawings by formulas: what the embedded backbone is pretrained on.

Every class is a random formula, every image a random rendering of it, so no image is anybody's property and none
resembles the data that the backbone is later tuned on. Five families are drawn on one page:

- strokes: a few random cubic Bezier curves (pen-like glyphs);
- contours: closed curves with random Fourier descriptors of the radius, drawn as lines;
- fractals: attractors of random iterated function systems (IFS);
- silhouettes: such closed curves filled with a shade and a pattern of waves;
- objects: some rounded parts, each with a shade and a pattern, most objects mirrored (as clothes and tools are).

All randomness is torch's own, so `torch.manual_seed` fixes formulas and images. Images are generated as they are
needed; none is stored, none repeats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.backbones.embedded import IMAGE_SIZE

CLEAN_SIZE = 16  # side of the clean copies: the same drawings on a plain page
NUM_POINTS = 160  # points that outline one line drawing
NUM_PARTS = 5  # parts that an object has at most
NUM_HARMONICS = 8  # of a closed curve's radius


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Uniform random numbers."""
    return torch.empty(*shape).uniform_(low, high)


def choose(probability: float, *shape: int) -> Tensor:
    """True with this probability."""
    return torch.rand(*shape) < probability


class Family(ABC):
    """Some classes of drawings of one kind."""

    @abstractmethod
    def __init__(self, classes: int) -> None: ...

    @abstractmethod
    def ink(self, index: Tensor, places: Tensor, width: Tensor, softness: Tensor) -> Tensor:
        """Darkness [N, P] in [0, 1] of fresh drawings, one of each class of `index` [N].

        Args:
            index: classes of the drawings.
            places: [N, P, 2], (x, y) in the drawings' own coordinates; a drawing lies about in [-1, 1]^2.
            width: [N, P], of the pen, where there is one.
            softness: [N, P], over how much of the page ink turns into paper.
        """


class Lines(Family):
    """Families that are drawn with a pen: they give points, the rest is common."""

    @abstractmethod
    def points(self, index: Tensor) -> Tensor:
        """Points [N, NUM_POINTS, 2] along the lines of fresh drawings, at any scale."""

    def ink(self, index: Tensor, places: Tensor, width: Tensor, softness: Tensor) -> Tensor:
        """See Family; the drawing is moved and scaled to fill the page."""
        points = self.points(index)
        low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
        extent = (high - low).amax(2, keepdim=True).clamp_min(2e-3) / 2
        distance = torch.cdist(places, (points - (low + high) / 2) / extent).amin(-1)
        return torch.sigmoid((width - distance) / softness)


class Strokes(Lines):
    """Pen strokes. Cubic Bezier control points are [class, stroke, 4, 2]; a class uses its first 1 to 4 strokes."""

    def __init__(self, classes: int) -> None:
        self.controls = uniform(-1.0, 1.0, classes, 4, 4, 2)
        # Half of the strokes begin where the stroke before them ended, as a pen does.
        joined = choose(0.5, classes, 4)
        for stroke in range(1, 4):
            begin, end_before = self.controls[:, stroke, 0], self.controls[:, stroke - 1, 3]
            self.controls[:, stroke, 0] = torch.where(joined[:, stroke, None], end_before, begin)
        self.count = torch.randint(1, 5, (classes,))

    def points(self, index: Tensor) -> Tensor:
        """See Lines."""
        controls = self.controls[index] + 0.09 * torch.randn(len(index), 4, 4, 2)
        t = torch.linspace(0, 1, NUM_POINTS // 4)[:, None]
        basis = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
        curves = basis @ controls  # [N, 4, points, 2]
        used = torch.arange(4) < self.count[index][:, None]
        # A stroke that the class does not use repeats the first one.
        return torch.where(used[..., None, None], curves, curves[:, :1]).flatten(1, 2)


class Radius:
    """Radii r(t) = 1 + sum_k a_k cos(k t + phase_k) of closed curves around the origin."""

    def __init__(self, classes: int) -> None:
        self.harmonics = torch.arange(1, NUM_HARMONICS + 1).float()
        self.amplitude = uniform(-0.6, 0.6, classes, NUM_HARMONICS) / self.harmonics.sqrt()
        self.phase = uniform(0, 2 * math.pi, classes, NUM_HARMONICS)

    def draw(self, index: Tensor, angle: Tensor) -> Tensor:
        """Radii [N, A] at angles [N or 1, A] of a fresh variant of each class of `index` [N]."""
        amplitude = self.amplitude[index] + 0.04 * torch.randn(len(index), NUM_HARMONICS)
        phase = self.phase[index] + 0.15 * torch.randn(len(index), NUM_HARMONICS)
        waves = torch.cos(angle[:, None] * self.harmonics[:, None] + phase[..., None])
        return 1 + (amplitude[:, None] @ waves).squeeze(1)


class Contours(Lines):
    """Closed curves, drawn at one to three concentric sizes."""

    def __init__(self, classes: int) -> None:
        self.radius = Radius(classes)
        self.rings = torch.randint(1, 4, (classes,))

    def points(self, index: Tensor) -> Tensor:
        """See Lines."""
        angle = torch.linspace(0, 2 * math.pi, NUM_POINTS + 1)[:-1]
        ring = torch.arange(NUM_POINTS) % self.rings[index][:, None]
        radius = self.radius.draw(index, angle[None]) * (1 - ring / (self.rings[index][:, None] + 0.5))
        return radius[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)


class Fractals(Lines):
    """Attractors of 2 to 4 affine maps [class, map, 2, 3] with singular values below one, so that all contract."""

    def __init__(self, classes: int) -> None:
        self.maps = uniform(-1.0, 1.0, classes, 4, 2, 3)
        norm = torch.linalg.matrix_norm(self.maps[..., :2], ord=2)
        self.maps[..., :2] *= (uniform(0.35, 0.85, classes, 4) / norm)[..., None, None]
        self.count = torch.randint(2, 5, (classes,))

    def points(self, index: Tensor) -> Tensor:
        """See Lines."""
        n = len(index)
        maps = self.maps[index] + 0.03 * torch.randn(n, 4, 2, 3)
        points = torch.zeros(n, NUM_POINTS, 2)
        for _ in range(14):
            choice = (torch.rand(n, NUM_POINTS) * self.count[index][:, None]).long()
            chosen = maps[torch.arange(n)[:, None], choice]
            points = (chosen[..., :2] @ points[..., None]).squeeze(-1) + chosen[..., 2]
        return points


class Pattern:
    """Shades in [0.35, 1] and, for half of the classes, up to two plane waves on them: stripes, checks, folds."""

    def __init__(self, classes: int) -> None:
        self.shade = uniform(0.35, 1.0, classes, 1)
        self.strength = uniform(0.2, 0.9, classes, 2, 1) * choose(0.5, classes, 1, 1) * choose(0.7, classes, 2, 1)
        self.frequency = 7 * torch.randn(classes, 2, 2)  # of both waves, in radians over half a page

    def draw(self, index: Tensor, places: Tensor) -> Tensor:
        """Darkness [N, P] in [0.08, 1] at `places` [N, P, 2] of a fresh variant of each class of `index` [N]."""
        n = len(index)
        frequency = self.frequency[index] * (1 + 0.08 * torch.randn(n, 2, 1))
        waves = torch.sin(places @ frequency.mT + uniform(0, 2 * math.pi, n, 1, 2))
        relief = 1 + (waves @ self.strength[index]).squeeze(-1) / 2
        return ((self.shade[index] + 0.1 * torch.randn(n, 1)) * relief).clamp(0.08, 1)


class Silhouettes(Family):
    """Closed curves filled with a pattern."""

    def __init__(self, classes: int) -> None:
        self.radius = Radius(classes)
        self.pattern = Pattern(classes)

    def ink(self, index: Tensor, places: Tensor, width: Tensor, softness: Tensor) -> Tensor:
        """See Family."""
        radius = 0.55 * self.radius.draw(index, torch.atan2(places[..., 1], places[..., 0]))
        inside = torch.sigmoid((radius - places.norm(dim=-1)) / softness)
        return inside * self.pattern.draw(index, places)


class Objects(Family):
    """Parts painted over one another, one in six a hole; three objects in four are mirrored left to right.

    A part is a superellipse |u / a|^e + |v / b|^e < 1 in coordinates turned by an angle; its width a tapers along v.
    """

    def __init__(self, classes: int) -> None:
        shape = (classes, NUM_PARTS)
        self.mirrored = choose(0.75, classes, 1, 1)
        self.count = torch.randint(1, NUM_PARTS + 1, (classes,))
        self.centre = uniform(-0.75, 0.75, *shape, 2)
        self.size = uniform(0.1, 0.5, *shape, 2)
        self.angle = uniform(-math.pi / 2, math.pi / 2, *shape)
        self.taper = uniform(-0.6, 0.6, *shape)
        self.exponent = 2 + 8 * uniform(0, 1, *shape) ** 2  # from ellipses to boxes
        self.hole = choose(1 / 6, *shape)
        # The first part is the body: upright, large and near the middle.
        self.centre[:, 0] *= 0.2
        self.size[:, 0] = uniform(0.2, 0.8, classes, 2)
        self.angle[:, 0] = 0
        self.hole[:, 0] = False
        # Half of the objects are of one material, which is the body's.
        self.material = torch.arange(classes * NUM_PARTS).view(shape)
        self.material = torch.where(choose(0.5, classes, 1), self.material[:, :1], self.material)
        self.pattern = Pattern(classes * NUM_PARTS)

    def ink(self, index: Tensor, places: Tensor, width: Tensor, softness: Tensor) -> Tensor:
        """See Family."""
        folded = torch.stack([places[..., 0].abs(), places[..., 1]], dim=-1)
        places = torch.where(self.mirrored[index], folded, places)
        ink = torch.zeros(places.shape[:2])
        for part in range(NUM_PARTS):
            drawn = (part < self.count[index]).nonzero().squeeze(1)
            cls, m = index[drawn], len(drawn)
            centre = self.centre[cls, part] + 0.04 * torch.randn(m, 2)
            size = self.size[cls, part] * torch.exp(0.12 * torch.randn(m, 2))
            angle = self.angle[cls, part] + 0.08 * torch.randn(m)
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(m, 2, 2)
            u, v = ((places[drawn] - centre[:, None]) @ turn / size[:, None]).unbind(-1)
            u = u / (1 + self.taper[cls, part, None] * v.clamp(-1, 1))
            exponent = self.exponent[cls, part, None]
            level = (u.abs() ** exponent + v.abs() ** exponent + 1e-6) ** (1 / exponent)
            inside = torch.sigmoid((1 - level) * size.amin(1, keepdim=True) / softness[drawn])
            shade = self.pattern.draw(self.material[cls, part], places[drawn]) * ~self.hole[cls, part, None]
            ink[drawn] += inside * (shade - ink[drawn])
        return ink


CLASSES: dict[type[Family], int] = {Strokes: 600, Contours: 200, Fractals: 200, Silhouettes: 400, Objects: 600}
NUM_CLASSES = sum(CLASSES.values())


def pixel_grid(size: int) -> Tensor:
    """Centres of the pixels of a size x size image over [-1, 1]^2, as [size^2, 2]."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.cartesian_prod(axis, axis).flip(1)  # x first


class Drawings:
    """The formulas of all families."""

    def __init__(self) -> None:
        self.families = [family(classes) for family, classes in CLASSES.items()]

    def batch(self, size: int, difficulty: float) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh images [size, 3, H, W], about in [-1, 1], labels [size] and clean copies [size, CLEAN_SIZE^2].

        Rotation, shear, scale, shift, pen, sharpness, resolution, colours and noise are drawn per image; `difficulty`
        in [0, 1] widens their ranges from none (centred, light ink on a dark page) to all.
        """
        labels = torch.randint(NUM_CLASSES, (size,))
        places, width, softness = draw_pages(size, difficulty)
        ink = torch.empty(width.shape)
        first = 0
        for family, classes in zip(self.families, CLASSES.values(), strict=True):
            member = ((labels >= first) & (labels < first + classes)).nonzero().squeeze(1)
            ink[member] = family.ink(labels[member] - first, places[member], width[member], softness[member])
            first += classes
        varied, clean = ink.split([IMAGE_SIZE**2, CLEAN_SIZE**2], dim=1)
        return print_images(varied.view(size, 1, IMAGE_SIZE, IMAGE_SIZE), difficulty), labels, clean


def draw_pages(n: int, difficulty: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pixels of n varied pages, then those of clean pages, lie in the drawings, and the pens.

    Returns:
        places [n, P, 2], and pen width and softness [n, P], with P = IMAGE_SIZE^2 + CLEAN_SIZE^2.
    """
    angle, shear = uniform(-0.35, 0.35, n) * difficulty, uniform(-0.3, 0.3, n) * difficulty
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(n, 2, 2)
    stretch = torch.zeros(n, 2, 2)
    stretch[:, 0, 0] = 0.9 + uniform(-0.35, 0.1, n) * difficulty
    stretch[:, 1, 1] = 0.9 + uniform(-0.35, 0.1, n) * difficulty
    stretch[:, 0, 1] = shear
    shift = uniform(-0.12, 0.12, n, 1, 2) * difficulty
    varied = (pixel_grid(IMAGE_SIZE) - shift) @ torch.linalg.inv(rotation @ stretch).mT
    clean = pixel_grid(CLEAN_SIZE).expand(n, -1, 2)

    def both(varied: Tensor, clean: float) -> Tensor:
        return torch.cat([varied.expand(n, IMAGE_SIZE**2), torch.full((n, CLEAN_SIZE**2), clean)], dim=1)

    width = 0.1 + uniform(-0.06, 0.09, n, 1) * difficulty
    return torch.cat([varied, clean], dim=1), both(width, 0.12), both(uniform(0.02, 0.09, n, 1), 0.04)


def print_images(ink: Tensor, difficulty: float) -> Tensor:
    """Images [N, 3, H, W] of inks [N, 1, H, W]: at some resolution, in some colours, with some noise."""
    n = len(ink)
    # A third of the batch goes through a coarser grid, as a low-resolution scan would.
    coarse, third = int(torch.randint(8, 17, ())), n // 3
    small = F.interpolate(ink[:third], size=(coarse, coarse), mode="area")
    ink = torch.cat([F.interpolate(small, size=ink.shape[-2:], mode="bilinear"), ink[third:]])

    plain = (2 * ink - 1) * torch.where(choose(0.3 * difficulty, n, 1, 1, 1), -1.0, 1.0)
    coloured = choose(0.3, n, 1, 1, 1)
    paper, pen = uniform(-1.0, 1.0, n, 3, 1, 1), uniform(-1.0, 1.0, n, 3, 1, 1)
    paper = torch.where(coloured, paper, paper[:, :1])
    pen = torch.where(coloured, pen, pen[:, :1])
    # Push ink and paper apart where they came out nearly equal.
    gap = (pen - paper).mean((1, 2, 3), keepdim=True)
    pen = pen + torch.sign(gap) * (0.7 - gap.abs()).clamp_min(0)
    images = torch.where(choose(0.4 * difficulty, n, 1, 1, 1), paper + (pen - paper) * ink, plain)
    return images + torch.randn(images.shape) * uniform(0.0, 0.12, n, 1, 1, 1) * difficulty
