"""MoSA as the paper states it, by brute force: what the compact form must equal.

E full copies of every split projection, gradients masked after backward, one separate forward per view. Slow, large
and obvious. It is written against METHOD's definitions and shares nothing with the package but the owner maps and
initial weights that it is given.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class OracleProjection(nn.Module):
    def __init__(self, projection):
        super().__init__()
        self.experts = projection.experts
        self.owner = projection.owner
        start = projection.weight if projection.init is None else projection.init
        copies = []
        for expert in range(self.experts):
            linear = nn.Linear(start.shape[1], start.shape[0], dtype=start.dtype)
            # W_e = W0 + (W - W0) * [owner == e]; W may have been trained already.
            if self.owner is None:
                weight = projection.weight
            else:
                origin = torch.zeros_like(start) if projection.init is None else projection.init
                weight = torch.where(self.owner == expert, projection.weight, origin)
            linear.weight = nn.Parameter(weight.detach().clone())
            linear.bias = nn.Parameter(projection.bias_rows()[expert].detach().clone())
            copies.append(linear)
        self.copies = nn.ModuleList(copies)
        self.bias_owner = projection.bias_owner

    def forward(self, x, expert):
        return self.copies[expert if self.owner is not None else 0](x)

    def mask_gradients(self):
        for expert, linear in enumerate(self.copies):
            for parameter in (linear.weight, linear.bias):
                if parameter.grad is None:  # this expert was not drawn
                    parameter.grad = torch.zeros_like(parameter)
            if self.owner is not None:
                linear.weight.grad *= self.owner == expert
            if self.bias_owner is not None:
                linear.bias.grad *= self.bias_owner == expert

    def gradient(self):
        """In the compact form: (weight [out, in], bias rows [E, out])."""
        return sum(c.weight.grad for c in self.copies), torch.stack([c.bias.grad for c in self.copies])

    def value(self):
        """In the compact form: every weight from the copy that owns it."""
        if self.owner is None:
            return self.copies[0].weight
        return sum(c.weight * (self.owner == e) for e, c in enumerate(self.copies))

    def merged(self, rule):
        if self.owner is None:
            return self.copies[0].weight, self.copies[0].bias
        bias = torch.stack([c.bias for c in self.copies]).mean(0)
        if rule == "joint":
            return self.value() / self.experts, bias
        return torch.stack([c.weight for c in self.copies]).mean(0), bias


class OracleAdapter(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.norm = copy.deepcopy(adapter.norm)
        self.down, self.up = OracleProjection(adapter.down), OracleProjection(adapter.up)
        self.scale = copy.deepcopy(adapter.scale)

    def forward(self, x, expert_pair):
        down_expert, up_expert = expert_pair
        hidden = F.gelu(self.down(self.norm(x), down_expert))
        return self.scale * self.up(hidden, up_expert)

    def forward_merged(self, x, rule="mean"):
        hidden = F.gelu(F.linear(self.norm(x), *self.down.merged(rule)))
        return self.scale * F.linear(hidden, *self.up.merged(rule))


class OracleViT(nn.Module):
    """A plain timm ViT beside a list of oracle adapters (no dropout)."""

    def __init__(self, plain, adapted):
        super().__init__()
        self.backbone = copy.deepcopy(plain).requires_grad_(False)
        self.backbone.head = copy.deepcopy(adapted.head)
        self.adapters = nn.ModuleList(OracleAdapter(block.adapter) for block in adapted.blocks)

    def _forward(self, images, adapter_output):
        vit = self.backbone
        x = vit._pos_embed(vit.patch_embed(images))
        for index, block in enumerate(vit.blocks):
            h = x + block.ls1(block.attn(block.norm1(x)))
            x = h + block.ls2(block.mlp(block.norm2(h))) + adapter_output(index, h)
        return vit.forward_head(vit.norm(x))

    def forward(self, images, experts):
        """One separate pass for each view of experts [blocks, V, 2]; logits view after view."""
        views = experts.tolist()
        passes = [
            self._forward(images, lambda index, h, v=view: self.adapters[index](h, views[index][v]))
            for view in range(experts.shape[1])
        ]
        return torch.cat(passes)

    def forward_merged(self, images, rule="mean"):
        return self._forward(images, lambda index, h: self.adapters[index].forward_merged(h, rule))

    def mask_gradients(self):
        for adapter in self.adapters:
            adapter.down.mask_gradients()
            adapter.up.mask_gradients()
