"""A small network whose blocks can be rebuilt in backward, and its steps; a plugin with the backbone `chained`."""

import torch
from torch import nn

from segtrain.models import BACKBONES
from segtrain.models.blocks import Backbone, IdentityResidualBlock, Norm, conv, interception, stage
from segtrain.models.pooling import MaxPool2d
from segtrain.models.rebuilding import rebuilding_of

MODES = ("grouped", "identity_input", "both")


class Blocks(nn.Module):
    """Two stages of bottlenecks, the second behind max-pooling if `pooled`; a norm and a classifier at the end.

    widths: of the convolutions of a block; two make a basic block.
    """

    def __init__(
        self, recompute="none", norm="inplace_abn", blocks=(3, 4), pooled=False, groups=2, widths=(8, 8, 16),
        kind=IdentityResidualBlock, **options,
    ):  # fmt: skip
        super().__init__()
        layers, channels, stages = Norm(norm, **options), 8, []
        for i, count in enumerate(blocks):
            made = []
            for block in range(count):
                stride = 2 if i and not block and not pooled else 1
                made.append(kind(channels, widths, layers, stride, groups=groups))
                channels = 16
            stages += [MaxPool2d(3, 2, 1)] * (pooled and i > 0) + [stage(*made)]
        end = layers(16) if kind is IdentityResidualBlock else nn.Identity()
        self.body = nn.Sequential(conv(3, 8, 3), layers(8), *stages, end)
        self.cls = nn.Conv2d(16, 2, 1)
        self.recompute = recompute
        self.rebuilding = rebuilding_of(self.body, recompute)

    def forward(self, x):
        with interception(self.recompute, "exact", self.rebuilding):
            return self.cls(self.body(x))


class Chained(Backbone):
    """(N, 3, H, W) -> (N, 16, H / output_stride, W / output_stride), of three blocks."""

    def __init__(self, norm, output_stride):
        super().__init__(
            conv(3, 8, 3, output_stride), norm(8),
            stage(*(IdentityResidualBlock(8 * (1 + (i > 0)), (8, 8, 16), norm, groups=2) for i in range(3))), norm(16),
        )  # fmt: skip
        self.out_channels = 16


if not __name__.startswith("tests."):  # loaded as a plugin, after which tests restore the names
    BACKBONES["chained"] = Chained


def made(recompute, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Blocks(recompute, **options)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
        elif hasattr(module, "running_mean"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.to(dtype)


def images(dtype=torch.float64, seed=1, count=2, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator).to(dtype)


def step(model, x=None, autocast=None):
    """(output, gradient, buffers) of one training step."""
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(images(model.cls.weight.dtype) if x is None else x)
    out.double().pow(2).sum().backward()
    return out.detach(), gradient(model), torch.cat([b.flatten().double() for b in model.buffers()])


def gradient(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def away(found, true):
    """Relative distance in the Euclidean norm."""
    return float((found - true).norm() / true.norm())
