"""Make the weights of the embedded backbone: a small ViT pretrained on drawings by formulas (see drawings.py).

The network sees a random half of the patches, names the class and redraws the whole clean drawing from them. From
random weights, page and pen vary more and more over the first steps (without that and the redrawing, a ViT this small
stays at chance for long). The learning rate is constant and falls to zero over the last steps; at the end of those
the network sees all patches.

`python -m mosa_fast.assets.pretrain --out DIR` writes `backbone.safetensors` (float16) and `pretrain.log`. It keeps
its state in DIR and goes on from there when it is called again; to cut a run short, go on with fewer `--steps`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from timm.models import VisionTransformer

from mosa_fast.assets.drawings import CLEAN_SIZE, NUM_CLASSES, Drawings
from mosa_fast.backbones.embedded import create_embedded

CLEAN_WEIGHT = 10.0  # weight of the redrawing's loss, which is small but gets a ViT off its first plateau
PATCHES_DROPPED = 0.5  # fraction of the patches that are hidden: a harder task at half the time
WHOLE = 0.25  # fraction of the last steps in which no patch is hidden
RAMP_STEPS = 1500  # steps over which page and pen grow from plain to fully varied
WARMUP_STEPS = 50  # of the learning rate
LOG_EVERY, SAVE_EVERY = 50, 100  # steps


def create_model(num_outputs: int) -> VisionTransformer:
    """The embedded backbone with weights from which it learns fast."""
    set_fused_attn(False)  # a step takes a third less time on a CPU with so few tokens
    model = create_embedded(num_outputs, patch_drop_rate=PATCHES_DROPPED)
    with torch.no_grad():
        # Positions loud enough to be used from the first step.
        positions = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim, temperature=20.0)
        model.get_parameter("pos_embed").copy_(positions[None])
        for module in model.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)
    return model


def create_optimizers(model: VisionTransformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (it needs half of AdamW's steps here), AdamW for all other weights."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    tables = [p for name, p in model.named_parameters() if not name.startswith("blocks.") and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.98),
        ),
    ]


def main() -> None:
    """Pretrain and write the weights; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files, and for the state to go on from")
    parser.add_argument("--steps", type=int, default=3720, help="optimizer steps, the last ones included")
    parser.add_argument("--last-steps", type=int, default=120, help="steps over which the rate falls to zero")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--start", type=Path, help="weights to start from (.safetensors); default: random ones")
    parser.add_argument("--seed", type=int, default=3407, help="seed of formulas, drawings and initial weights")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "state.pt"

    torch.manual_seed(args.seed)
    drawings = Drawings()
    model = create_model(NUM_CLASSES + CLEAN_SIZE**2)
    if args.start:
        model.load_state_dict({name: weight.float() for name, weight in load_file(args.start).items()}, strict=False)
    optimizers = create_optimizers(model, args.lr)
    done, seconds = 0, 0.0
    log = (args.out / "pretrain.log").open("a", buffering=1, encoding="utf-8")
    settings = vars(args) | {"start": args.start and args.start.name}
    del settings["out"]
    log.write(f"# {settings}, torch {torch.__version__}\n")
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, seconds = state["step"], state["seconds"]
        log.write(f"# goes on after step {done}\n")
    else:
        log.write("step\tloss\taccuracy\tredrawn\tseconds of CPU time\n")
    began = time.process_time() - seconds
    sums = torch.zeros(3)
    for step in range(done + 1, args.steps + 1):
        torch.manual_seed(args.seed + step)
        remaining = (args.steps - step + 1) / args.last_steps  # at most 1 within the last steps
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.lr * min(step / WARMUP_STEPS, remaining, 1)
        if remaining <= WHOLE:
            model.patch_drop.prob = 0.0
        images, labels, clean = drawings.batch(args.batch, 1.0 if args.start else min(1.0, step / RAMP_STEPS))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images).float()
        logits, redrawn = outputs.split([NUM_CLASSES, CLEAN_SIZE**2], dim=1)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        clean_loss = F.binary_cross_entropy_with_logits(redrawn, clean)
        model.zero_grad()
        (loss + CLEAN_WEIGHT * clean_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        sums += torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean(), clean_loss.detach()])
        if step % LOG_EVERY == 0:
            loss, accuracy, redrawn = (sums / LOG_EVERY).tolist()
            log.write(f"{step}\t{loss:.4f}\t{accuracy:.4f}\t{redrawn:.4f}\t{time.process_time() - began:.0f}\n")
            sums.zero_()
        if step % SAVE_EVERY == 0 or step == args.steps:
            weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
            save_file(weights, args.out / "backbone.safetensors")
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(state | {"step": step, "seconds": time.process_time() - began}, state_file)


if __name__ == "__main__":
    main()
