#!/usr/bin/env python
"""Outputs kept in 8 or 4 bits (model.keep): how far a trained network's gradient moves, and what a step costs.

    python scripts/bench_keep.py RUN [--batch 4] [--rounds 0] [--threads 2]

RUN: a finished run of `segtrain train` with model.norm=inplace_abn. The gradient is that of the run's own loss on its
own training images, all parameters as one vector; the distance is relative to the same network in float64, and dropout
is off. Time (with --rounds): medians of forward + backward, taken in turns, over that of keep=exact.
"""

import argparse
import contextlib
import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segtrain.abn import InPlaceABN
from segtrain.abn.benchmark import Clock, medians
from segtrain.config.stored import trained
from segtrain.models import Segmenter, from_config
from segtrain.models.preprocess import normalise_images
from segtrain.tasks.segmentation import Segmentation
from segtrain.weights.network_file import run_content

WAYS = {
    "float32": ("exact", None), "float32, 8 bits": ("8bit", None), "float32, 4 bits": ("4bit", None),
    "bf16 autocast": ("exact", torch.bfloat16), "bf16 autocast, 8 bits": ("8bit", torch.bfloat16),
    "bf16 autocast, 4 bits": ("4bit", torch.bfloat16),
}  # fmt: skip


def with_keep(network: Segmenter, keep: str) -> Segmenter:
    """A copy of the network whose layers keep their outputs so."""
    network = copy.deepcopy(network)
    network.keep = keep
    for module in network.modules():
        if isinstance(module, InPlaceABN):
            module.keep = keep
    return network


def gradient(network: Segmenter, loss, images: Tensor, target: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The whole gradient as a float64 vector."""
    network.zero_grad()
    with torch.autocast(images.device.type, dtype) if dtype else contextlib.nullcontext():
        logits = network(images, upsample=False)
    (loss(logits, target).sum() / loss.count(target)).backward()
    return torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=0, help="rounds of timing (default: none)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    content = run_content(options.run / "last.pt")
    config = trained(content["config"])
    task = Segmentation(config)
    network, loss, data = from_config(config.model, task.table.num_classes), task.loss(), task.data()
    network.load_state_dict(content["model"])
    for module in network.train().modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0
    items = [data[i] for i in range(options.batch)]
    images = torch.from_numpy(np.stack([item[0] for item in items]).transpose(0, 3, 1, 2).copy())
    target = torch.from_numpy(np.stack([item[1] for item in items])).long()
    images = normalise_images(images, config.model.mean, config.model.std)
    wanted = gradient(copy.deepcopy(network).double(), loss, images.double(), target, None)
    networks = {keep: with_keep(network, keep) for keep in ("exact", "8bit", "4bit")}
    print(f"{options.run}: {config.model.backbone}, {tuple(images.shape)}, {options.threads} threads")
    for name, (keep, dtype) in WAYS.items():
        found = gradient(networks[keep], loss, images, target, dtype)
        print(f"{name:24} distance from float64 {((found - wanted).norm() / wanted.norm()).item():.2e}", flush=True)
    if not options.rounds:
        return

    def timed(keep: str):
        def run() -> tuple[float]:
            with Clock(images.device.type) as clock:
                gradient(networks[keep], loss, images, target, None)
            return (clock.seconds,)

        return run

    found = medians({keep: timed(keep) for keep in networks}, options.rounds)
    for keep, (seconds,) in found.items():
        print(f"{keep:6} {seconds * 1000:.0f} ms a step, {seconds / found['exact'][0]:.3f} of exact")


if __name__ == "__main__":
    main()
