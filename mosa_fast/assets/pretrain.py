"""Make the weights of the embedded backbone: a small ViT pretrained on generated line drawings.

Formula-driven pretraining: every class is a random formula, every image a random rendering of it, so no image is
anybody's property and none resembles the data it is later tuned on. Three families have one renderer:

- strokes: a few random cubic Bezier curves (pen-like glyphs);
- contours: closed curves with random Fourier descriptors of the radius;
- fractals: attractors of random iterated function systems (IFS).

The network names the class and redraws the clean drawing; page and pen vary more and more over the first quarter of
the run (without both, a ViT this small stays at chance for long). Images are generated as they are needed and never
repeat. `python -m mosa_fast.assets.pretrain --out DIR` writes `backbone.safetensors` (float16) and `pretrain.log`; the
shipped files were made by the defaults below.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from mosa_fast.backbones.embedded import IMAGE_SIZE, create_embedded

NUM_POINTS = 160  # points that outline one drawing
CLEAN_SIZE = 16  # side of the clean copies that the auxiliary head redraws
CLEAN_WEIGHT = 10.0  # weight of the auxiliary loss, which is small but gets a ViT off its first plateau
FAMILIES = ("strokes", "contours", "fractals")


class Formulas:
    """Random formulas, one per class, and random point sets drawn from them.

    Args:
        classes: number of classes of each family.
        seed: fixes the formulas; the drawings come from the generator given to `draw`.
    """

    def __init__(self, classes: dict[str, int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.empty(*shape).uniform_(low, high, generator=generator)

        self.classes = classes
        strokes, contours, fractals = (classes[family] for family in FAMILIES)
        # Cubic Bezier control points [class, stroke, 4, 2]; a class uses its first 1 to 4 strokes.
        self.controls = uniform(-1.0, 1.0, strokes, 4, 4, 2)
        # Half of the strokes begin where the stroke before them ended, as a pen does.
        joined = uniform(0, 1, strokes, 4) < 0.5
        for stroke in range(1, 4):
            previous_end = self.controls[:, stroke - 1, 3]
            self.controls[:, stroke, 0] = torch.where(
                joined[:, stroke, None], previous_end, self.controls[:, stroke, 0]
            )
        self.stroke_count = torch.randint(1, 5, (strokes,), generator=generator)
        # Radius r(t) = 1 + sum_k a_k cos(k t + phase_k), drawn at one to three concentric sizes.
        harmonics = torch.arange(1, 9).float()
        self.amplitude = uniform(-0.6, 0.6, contours, 8) / harmonics.sqrt()
        self.phase = uniform(0, 2 * math.pi, contours, 8)
        self.rings = torch.randint(1, 4, (contours,), generator=generator)
        # Affine maps [class, map, 2, 3] with singular values below one, so that every system contracts.
        maps = uniform(-1.0, 1.0, fractals, 4, 2, 3)
        norm = torch.linalg.matrix_norm(maps[..., :2], ord=2)
        maps[..., :2] *= (uniform(0.35, 0.85, fractals, 4) / norm)[..., None, None]
        self.maps = maps
        self.map_count = torch.randint(2, 5, (fractals,), generator=generator)

    def draw(self, family: str, index: Tensor, generator: torch.Generator) -> Tensor:
        """Points [N, NUM_POINTS, 2] of one fresh drawing for each class of `index` [N], roughly in [-1, 1]."""
        n = len(index)

        def noise(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        if family == "strokes":
            controls = self.controls[index] + noise(n, 4, 4, 2, std=0.09)
            t = torch.linspace(0, 1, NUM_POINTS // 4)[:, None]
            basis = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
            curves = basis @ controls  # [N, 4, points, 2]
            last = self.stroke_count[index]
            # A stroke that the class does not use repeats the first one.
            used = torch.arange(4) < last[:, None]
            curves = torch.where(used[..., None, None], curves, curves[:, :1])
            points = curves.flatten(1, 2)
        elif family == "contours":
            t = torch.linspace(0, 2 * math.pi, NUM_POINTS + 1)[:-1]
            amplitude = self.amplitude[index] + noise(n, 8, std=0.04)
            phase = self.phase[index] + noise(n, 8, std=0.15)
            angle = t * torch.arange(1, 9)[:, None]
            radius = 1 + (amplitude[..., None] * torch.cos(angle + phase[..., None])).sum(1)
            ring = torch.arange(NUM_POINTS) % self.rings[index][:, None]
            radius = radius * (1 - ring / (self.rings[index][:, None] + 0.5))
            points = radius[..., None] * torch.stack([t.cos(), t.sin()], dim=-1)
        else:
            maps = self.maps[index] + noise(n, 4, 2, 3, std=0.03)
            points = torch.zeros(n, NUM_POINTS, 2)
            for _ in range(14):
                choice = torch.rand(n, NUM_POINTS, generator=generator) * self.map_count[index][:, None]
                chosen = maps[torch.arange(n)[:, None], choice.long()]
                points = (chosen[..., :2] @ points[..., None]).squeeze(-1) + chosen[..., 2]
        centre = (points.amax(1, keepdim=True) + points.amin(1, keepdim=True)) / 2
        extent = (points - centre).abs().amax((1, 2), keepdim=True).clamp_min(1e-3)
        return (points - centre) / extent


def render(points: Tensor, generator: torch.Generator, difficulty: float) -> Tensor:
    """Ink point sets [N, P, 2] on a random page: images [N, 3, IMAGE_SIZE, IMAGE_SIZE], about in [-1, 1].

    Rotation, shear, scale, shift, pen width, sharpness, resolution, colours and noise are drawn per image;
    `difficulty` in [0, 1] widens their ranges from none (centred, light ink on a dark page) to all.
    """
    n = len(points)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    def happens(probability: float) -> Tensor:
        return uniform(0, 1, 1, 1, 1) < probability

    angle, shear = uniform(-0.35, 0.35) * difficulty, uniform(-0.3, 0.3) * difficulty
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(n, 2, 2)
    stretch = torch.zeros(n, 2, 2)
    stretch[:, 0, 0] = 0.9 + uniform(-0.35, 0.05) * difficulty
    stretch[:, 1, 1] = 0.9 + uniform(-0.35, 0.05) * difficulty
    stretch[:, 0, 1] = shear
    points = points @ (rotation @ stretch).mT + uniform(-0.12, 0.12, 1, 2) * difficulty

    distance = torch.cdist(pixel_grid(IMAGE_SIZE).expand(n, -1, 2), points).amin(-1)
    width = 0.09 + uniform(-0.06, 0.07, 1) * difficulty
    ink = torch.sigmoid((width - distance) / uniform(0.02, 0.08, 1)).view(n, 1, IMAGE_SIZE, IMAGE_SIZE)

    # A third of the batch goes through a coarser grid, as a low-resolution scan would.
    coarse = int(torch.randint(8, 17, (), generator=generator))
    third = n // 3
    small = F.interpolate(ink[:third], size=(coarse, coarse), mode="area")
    ink = torch.cat([F.interpolate(small, size=ink.shape[-2:], mode="bilinear"), ink[third:]])

    plain = (2 * ink - 1) * torch.where(happens(0.3 * difficulty), -1.0, 1.0)
    coloured = happens(0.3)
    paper, pen = uniform(-1.0, 1.0, 3, 1, 1), uniform(-1.0, 1.0, 3, 1, 1)
    paper = torch.where(coloured, paper, paper[:, :1])
    pen = torch.where(coloured, pen, pen[:, :1])
    # Push ink and paper apart where they came out nearly equal.
    gap = (pen - paper).mean((1, 2, 3), keepdim=True)
    pen = pen + torch.sign(gap) * (0.7 - gap.abs()).clamp_min(0)
    images = torch.where(happens(0.4 * difficulty), paper + (pen - paper) * ink, plain)
    noise = torch.randn(images.shape, generator=generator) * uniform(0.0, 0.12, 1, 1, 1)
    return images + noise * difficulty


def pixel_grid(size: int) -> Tensor:
    """Centres of the pixels of a size x size image over [-1, 1]^2, as [size^2, 2]."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.cartesian_prod(axis, axis)


def clean_copy(points: Tensor) -> Tensor:
    """The same drawings before page and pen were varied, as ink in [0, 1]: [N, CLEAN_SIZE^2]."""
    distance = torch.cdist(pixel_grid(CLEAN_SIZE).expand(len(points), -1, 2), points).amin(-1)
    return torch.sigmoid((0.12 - distance) / 0.04)


def make_batch(
    formulas: Formulas, size: int, generator: torch.Generator, difficulty: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Images [size, 3, H, W], labels [size] and clean copies [size, CLEAN_SIZE^2]; families by their classes."""
    labels = torch.randint(sum(formulas.classes.values()), (size,), generator=generator)
    points = torch.empty(size, NUM_POINTS, 2)
    first = 0
    for family in FAMILIES:
        member = (labels >= first) & (labels < first + formulas.classes[family])
        points[member] = formulas.draw(family, labels[member] - first, generator)
        first += formulas.classes[family]
    return render(points, generator, difficulty), labels, clean_copy(points)


def main() -> None:
    """Pretrain and write the weights; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for backbone.safetensors and pretrain.log")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=3407, help="seed of formulas, drawings and initial weights")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    formulas = Formulas({"strokes": 600, "contours": 150, "fractals": 150}, args.seed)
    generator = torch.Generator().manual_seed(args.seed + 1)
    num_classes = sum(formulas.classes.values())
    model = create_embedded(num_classes=num_classes + CLEAN_SIZE**2)
    grid, width = model.patch_embed.grid_size, model.embed_dim
    with torch.no_grad():
        # Positions loud enough to be used from the first step.
        model.get_parameter("pos_embed").copy_(build_sincos2d_pos_embed(list(grid), width, temperature=20.0)[None])
        for linear in model.blocks.modules():
            if isinstance(linear, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(linear.weight)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warmup = args.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    log = (args.out / "pretrain.log").open("w", buffering=1)
    start, running_loss, running_accuracy = time.time(), 0.0, 0.0
    log.write(f"# {vars(args) | {'out': '.'}}, torch {torch.__version__}\n")
    log.write("step\tloss\taccuracy\tseconds\n")
    for step in range(1, args.steps + 1):
        difficulty = min(1.0, 4 * step / args.steps)
        images, labels, clean = make_batch(formulas, args.batch, generator, difficulty)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images).float()
        logits, redrawn = outputs.split([num_classes, CLEAN_SIZE**2], dim=1)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        clean_loss = F.binary_cross_entropy_with_logits(redrawn, clean)
        optimizer.zero_grad()
        (loss + CLEAN_WEIGHT * clean_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running_loss += loss.item() / 50
        running_accuracy += (logits.argmax(1) == labels).float().mean().item() / 50
        if step % 50 == 0:
            log.write(f"{step}\t{running_loss:.4f}\t{running_accuracy:.4f}\t{time.time() - start:.0f}\n")
            running_loss = running_accuracy = 0.0
        if step % 400 == 0 or step == args.steps:
            weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
            save_file(weights, args.out / "backbone.safetensors")


if __name__ == "__main__":
    main()
