"""Losses as training computes them, inputs for them, and the plain versions that they are compared with."""

import math

import torch
from torch.nn import functional as F

from segtrain.config import IGNORE_INDEX


def step_loss(loss, logits, target):
    """The loss of a training step whose global batch is this one: the sum over its images over their count."""
    return loss(logits, target).sum() / (loss.count(target) or 1)


C = 5
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0]


def drawn(classes, small, large, dtype=torch.float64, ignored=0.2, batch=2):
    generator = torch.Generator().manual_seed(classes + sum(small) + sum(large))
    logits = torch.randn(batch, classes, *small, generator=generator, dtype=torch.float64) * 3
    target = torch.randint(0, classes, (batch, *large), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE_INDEX
    return logits.to(dtype), target


def three(small=(3, 4), large=(7, 10)):
    """A batch of three pictures, the second without any label, the third with two classes."""
    logits, target = drawn(C, small, large, batch=3)
    target[1] = IGNORE_INDEX
    target[2][target[2] == 3] = 1
    target[2][target[2] == 0] = 1
    return logits, target


def enlarged(logits, target):
    return F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)


def plain(logits, target, hardest=1.0, weight=None):
    """The usual way in torch: upsample everything, then compute the loss of every pixel."""
    every = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(every, target, weight, ignore_index=IGNORE_INDEX, reduction="none").flatten(1)
    shares = [math.ceil(n * hardest) for n in (target != IGNORE_INDEX).flatten(1).sum(1).tolist()]
    return sum(row.topk(share).values.sum() for row, share in zip(loss, shares, strict=True)) / max(sum(shares), 1)


def gradient(loss, logits, *args):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, *args)
    value.backward()
    return value.detach(), logits.grad


def off(got, want):
    """Norm-wise relative error."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
