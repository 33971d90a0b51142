"""MoSA as the paper states it, by brute force: what the compact form must equal.

E full copies of every split projection, gradients masked after backward, one separate forward per view. Slow, large
and obvious. It is written after docs/method.md and has nothing of the package but the owner maps and
initial weights that it is given.
"""

import copy
import itertools
from types import SimpleNamespace

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
            has_bias = projection.bias is not None
            linear.bias = nn.Parameter(projection.bias_rows()[expert].detach().clone()) if has_bias else None
            copies.append(linear)
        self.copies = nn.ModuleList(copies)
        self.bias_owner = projection.bias_owner

    def forward(self, x, expert):
        return self.copies[expert if self.owner is not None else 0](x)

    def mask_gradients(self):
        for expert, linear in enumerate(self.copies):
            for parameter in linear.parameters():
                if parameter.grad is None:  # this expert was not drawn
                    parameter.grad = torch.zeros_like(parameter)
            if self.owner is not None:
                linear.weight.grad *= self.owner == expert
            if self.bias_owner is not None:
                linear.bias.grad *= self.bias_owner == expert

    def gradient(self):
        """In the compact form: (weight [out, in], bias rows [E, out]), or without a bias (weight, None)."""
        biases = None if self.copies[0].bias is None else torch.stack([c.bias.grad for c in self.copies])
        return sum(c.weight.grad for c in self.copies), biases

    def value(self):
        """In the compact form: every weight from the copy that owns it."""
        if self.owner is None:
            return self.copies[0].weight
        return sum(c.weight * (self.owner == e) for e, c in enumerate(self.copies))

    def merged(self, rule):
        if self.owner is None:
            return self.copies[0].weight, self.copies[0].bias
        bias = None if self.copies[0].bias is None else torch.stack([c.bias for c in self.copies]).mean(0)
        if rule == "joint":
            return self.value() / self.experts, bias
        return torch.stack([c.weight for c in self.copies]).mean(0), bias


class OracleAdapter(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.norm = copy.deepcopy(adapter.norm)
        self.down, self.up = OracleProjection(adapter.down), OracleProjection(adapter.up)
        self.scale = copy.deepcopy(adapter.scale)
        self.activation = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[adapter.activation]

    def normed(self, x):
        return x if self.norm is None else self.norm(x)

    def forward(self, x, expert_pair):
        down_expert, up_expert = expert_pair
        hidden = self.activation(self.down(self.normed(x), down_expert))
        return self.scale * self.up(hidden, up_expert)

    def forward_merged(self, x, rule="mean"):
        hidden = self.activation(F.linear(self.normed(x), *self.down.merged(rule)))
        return self.scale * F.linear(hidden, *self.up.merged(rule))


class OracleLoRA(nn.Module):
    """Low-rank pairs of the targets of one linear, each with copies of its matrices for every expert."""

    def __init__(self, lora):
        super().__init__()
        self.columns, self.scale = lora.columns, copy.deepcopy(lora.scale)
        self.pairs = nn.ModuleList(
            nn.ModuleList(OracleProjection(part) for part in pair)
            for pair in zip(
                split_projection(lora.down, [lora.config.rank] * len(lora.columns)),
                split_projection(lora.up, [stop - start for start, stop in lora.columns]),
                strict=True,
            )
        )

    def add(self, y, x, project):
        """y with each target's part, where project(index, x) is the product with both matrices of a target."""
        parts = [project(index, x) for index in range(len(self.columns))]
        out = y.clone()
        for (start, stop), part in zip(self.columns, parts, strict=True):
            out[..., start:stop] = out[..., start:stop] + self.scale * part
        return out

    def forward(self, y, x, experts):
        def project(index, x):
            (down, up), (down_expert, up_expert) = self.pairs[index], experts[index]
            return up(down(x, down_expert), up_expert)

        return self.add(y, x, project)

    def forward_merged(self, y, x, rule="mean"):
        def project(index, x):
            (down, _), (up, _) = (part.merged(rule) for part in self.pairs[index])
            return F.linear(F.linear(x, down), up)

        return self.add(y, x, project)


def split_projection(projection, rows):
    """A projection of several matrices as one for each."""
    ends = [sum(rows[:index]) for index in range(len(rows) + 1)]
    for start, stop in itertools.pairwise(ends):
        part = SimpleNamespace(experts=projection.experts, bias=None, bias_owner=None)
        part.weight = projection.weight[start:stop]
        part.owner = None if projection.owner is None else projection.owner[start:stop]
        part.init = None if projection.init is None else projection.init[start:stop]
        yield part


# Blocks that normalise the output of the MLP, and those whose adaptformer adapter sits inside the MLP.
POST_NORM = (
    "ResPostBlock",
    "ResPostRelPosBlock",
    "EvaBlockPostNorm",
    "SwinTransformerV2Block",
    "SwinTransformerV2CrBlock",
)
INSIDE = (*POST_NORM, "SwinTransformerBlock")


class OracleModel(nn.Module):
    """A plain timm model with oracle adapters (no dropout), put in by hooks around timm's own blocks.

    Nothing of the package's way of taking blocks apart is used: h is what norm2 is given (the MLP, where norm2 comes
    after it), and a block's output less h is the MLP's branch.
    """

    def __init__(self, plain, blocks, placement, adapters):
        """blocks: names of those that have adapters; adapters: all of the adapted model, in order."""
        super().__init__()
        self.backbone = copy.deepcopy(plain).requires_grad_(False)
        heads = self.backbone.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.requires_grad_(True)
        adapters = list(adapters)
        if placement == "qkvo":
            self.put_pairs(adapters)
            return
        self.adapters = nn.ModuleList(OracleAdapter(adapter) for adapter in adapters)
        self.route = lambda index, x: self.adapters[index](x, self.experts[index])
        count = 2 if placement == "houlsby" else 1
        for number, name in enumerate(blocks):
            self._hook(self.backbone.get_submodule(name), placement, number * count)

    def put_pairs(self, loras):
        """Hooks on the linears; loras: (name of the linear, layer) of all, in order."""
        self.adapters = nn.ModuleList(OracleLoRA(lora) for _, lora in loras)
        self.route = lambda index, y, x: self.adapters[index](y, x, self.experts[first[index] :])
        first = [sum(len(lora.columns) for _, lora in loras[:index]) for index in range(len(loras))]
        for index, (name, _) in enumerate(loras):
            linear = self.backbone.get_submodule(name)
            linear.register_forward_hook(lambda _module, args, y, index=index: self.route(index, y, args[0]))
            attention = self.backbone.get_submodule(name.rpartition(".")[0])
            if getattr(attention, "q_bias", None) is not None:
                attention.qkv_bias_separate = True  # timm multiplies with the weight itself otherwise

    def _hook(self, block, placement, first):
        state = {}

        def before_mlp_branch(_module, args):
            state["h"] = state["sum"] = args[0]
            if placement == "houlsby":
                state["sum"] = args[0] + self.route(first, args[0])
            return (state["sum"],)

        def before_mlp(_module, args):
            state["n"] = args[0]

        def changed(total):
            # Swin's MLP and SAM's are given the tokens of an image in one row.
            h, n, first_sum = (state[key].reshape(total.shape) for key in ("h", "n", "sum"))
            if placement == "pfeiffer":
                return total + self.route(first, total - h)
            if placement == "houlsby":
                total = total - h + first_sum
                return total + self.route(first + 1, total)
            return total + self.route(first, n if type(block).__name__ in INSIDE else h)

        post_norm = type(block).__name__ in POST_NORM
        (block.mlp if post_norm else block.norm2).register_forward_pre_hook(before_mlp_branch)
        block.mlp.register_forward_pre_hook(before_mlp)
        if type(block).__name__ == "SwinTransformerV2CrBlock":  # norm3 is applied to the sum
            block.norm3.register_forward_pre_hook(lambda _module, args: (changed(args[0]),))
        else:
            block.register_forward_hook(lambda _module, _args, out: changed(out))

    def forward(self, images, experts):
        """One separate pass for each view of experts [adapters, V, 2]; logits view after view."""
        passes = []
        for view in range(experts.shape[1]):
            self.experts = experts[:, view].tolist()
            passes.append(self.backbone(images))
        return torch.cat(passes)

    def forward_merged(self, images, rule="mean"):
        routed, self.route = self.route, lambda index, *x: self.adapters[index].forward_merged(*x, rule)
        try:
            return self.backbone(images)
        finally:
            self.route = routed

    def mask_gradients(self):
        for module in self.adapters.modules():
            if isinstance(module, OracleProjection):
                module.mask_gradients()
