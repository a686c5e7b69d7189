#!/usr/bin/env python
"""Time and memory of segtrain's losses from logits at stride 8, over torch's upsampling and cross-entropy.

    python scripts/bench_loss.py [--loss bootstrapped] [--hardest 0.25] [--classes 19] [--batch 2] [--size 768]
                                 [--rounds 10] [--device cuda]

cross_entropy and bootstrapped are compared with the same loss in plain torch; max_pooling, focal, dice and lovasz with
plain cross-entropy, so their gradients differ. Time: medians of forward + backward, measured alternately. Peak: bytes
of the tensors alive at the same time, without logits and target.
"""

import argparse
import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from segtrain.abn.benchmark import Clock, medians
from segtrain.config import LossConfig
from segtrain.losses import build_loss
from segtrain.models.memory import Allocations


def plain(logits: Tensor, target: Tensor, hardest: float) -> Tensor:
    every = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    if hardest == 1:
        return F.cross_entropy(every, target, ignore_index=255)
    losses = F.cross_entropy(every, target, ignore_index=255, reduction="none").flatten(1)
    counts = [math.ceil(count * hardest) for count in (target != 255).flatten(1).sum(1).tolist()]
    return sum(row.topk(count).values.sum() for row, count in zip(losses, counts, strict=True)) / sum(counts)


def step_loss(loss, logits: Tensor, target: Tensor) -> Tensor:
    """The loss of a training step on this batch alone."""
    return loss(logits, target).sum() / loss.count(target)


def run(loss, logits: Tensor, target: Tensor) -> tuple[float]:
    logits.grad = None
    with Clock(logits.device.type) as clock:
        loss(logits, target).backward()
    return (clock.seconds,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="cross_entropy")
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 171])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--hardest", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = LossConfig(options.loss, options.hardest, p=1.7 if options.loss == "max_pooling" else 1.0)
    config.check()
    hardest = options.hardest if options.loss == "bootstrapped" else 1.0
    for classes in options.classes:
        torch.manual_seed(0)
        shape = options.batch, classes, options.size // 8, options.size // 8
        logits = torch.randn(shape, device=options.device).requires_grad_()
        target = torch.randint(0, classes, (options.batch, options.size, options.size), device=options.device)
        target[:, : options.size // 8] = 255
        losses = {"plain": partial(plain, hardest=hardest), "segtrain": partial(step_loss, build_loss(config, classes))}
        times = medians({name: partial(run, f, logits, target) for name, f in losses.items()}, options.rounds)
        peaks, gradients = {}, {}
        for name, f in losses.items():
            logits.grad = None
            with Allocations() as allocations:
                f(logits, target).backward()
            peaks[name], gradients[name] = allocations.peak, logits.grad.double()
        off = (gradients["segtrain"] - gradients["plain"]).norm() / gradients["plain"].norm()
        ratio, smaller = times["segtrain"][0] / times["plain"][0], peaks["segtrain"] / peaks["plain"]
        print(
            f"{options.loss}, {classes} classes, {options.batch} x {options.size}^2, hardest {options.hardest:g}: "
            f"plain {times['plain'][0]:.3f} s, {peaks['plain'] / 2**20:.0f} MiB | segtrain time {ratio:.2f}, peak "
            f"{smaller:.2f} ({peaks['segtrain'] / 2**20:.0f} MiB), gradients differ by {off:.1e}"
        )


if __name__ == "__main__":
    main()
