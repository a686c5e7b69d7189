#!/usr/bin/env python
"""model.keep and model.recompute: how far a trained network's gradient moves, and what a step costs.

    python scripts/bench_keep.py RUN [--batch 4] [--crop 144] [--scale 0.5 1] [--rounds 0] [--threads 2]

RUN: a finished run of `segtrain train` with model.norm=inplace_abn. The gradient is that of the run's own loss on its
own training images, all parameters as one vector; the distance is relative to the same network in float64, and dropout
is off. Time (with --rounds): medians of forward + backward, taken in turns, over that of keep=exact. Rebuilding
(model.recompute) is measured for backbones that have such blocks.
"""

import argparse
import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segtrain.abn.benchmark import Clock, medians
from segtrain.config import ModelConfig
from segtrain.config.stored import trained
from segtrain.errors import UsageError
from segtrain.models import Segmenter, from_config
from segtrain.models.preprocess import normalise_images
from segtrain.tasks.segmentation import Segmentation
from segtrain.weights.network_file import run_content

FORMS = {
    "exact": {}, "8 bits": {"keep": "8bit"}, "4 bits": {"keep": "4bit"}, "grouped": {"recompute": "grouped"},
    "identity_input": {"recompute": "identity_input"}, "both": {"recompute": "both"},
}  # fmt: skip


def networks_of(options: ModelConfig, classes: int, weights: dict[str, Tensor]) -> dict[str, Segmenter]:
    """The trained network in each of the forms that its backbone has, without dropout."""
    found = {}
    for name, form in FORMS.items():
        with contextlib.suppress(UsageError):
            network = from_config(replace(options, **{"keep": "exact", "recompute": "none", **form}), classes)
            network.load_state_dict(weights)
            for module in network.train().modules():
                if isinstance(module, nn.Dropout | nn.Dropout2d):
                    module.p = 0
            found[name] = network
    return found


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
    parser.add_argument("--crop", type=int, help="height and width of the crops in pixels (default: the run's)")
    parser.add_argument("--scale", type=float, nargs=2, help="scales of the images (default: the run's)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    content = run_content(options.run / "last.pt")
    config = trained(content["config"])
    if options.crop:
        config.augmentation.crop_size = [options.crop, options.crop]
    if options.scale:
        config.augmentation.scale = list(options.scale)
    task = Segmentation(config)
    loss, data = task.loss(), task.data()
    networks = networks_of(config.model, task.table.num_classes, content["model"])
    items = [data[i] for i in range(options.batch)]
    images = torch.from_numpy(np.stack([item[0] for item in items]).transpose(0, 3, 1, 2).copy())
    target = torch.from_numpy(np.stack([item[1] for item in items])).long()
    images = normalise_images(images, config.model.mean, config.model.std)
    exact = copy.deepcopy(networks["exact"]).double()
    wanted = gradient(exact, loss, images.double(), target, None)
    print(f"{options.run}: {config.model.backbone}, {tuple(images.shape)}, {options.threads} threads")
    for dtype, precision in ((None, "float32"), (torch.bfloat16, "bf16 autocast")):
        for form, network in networks.items():
            away = (gradient(network, loss, images, target, dtype) - wanted).norm() / wanted.norm()
            print(f"{precision + ', ' + form:30} distance from float64 {away.item():.2e}", flush=True)
    if not options.rounds:
        return

    def timed(form: str):
        def run() -> tuple[float, float]:
            with Clock(images.device.type) as clock:
                gradient(networks[form], loss, images, target, None)
            return clock.seconds, clock.processor

        return run

    found = medians({form: timed(form) for form in networks}, options.rounds)
    for form, times in found.items():
        wall, cpu = (one / base for one, base in zip(times, found["exact"], strict=True))
        print(f"{form:14} {times[0] * 1000:.0f} ms a step, {wall:.3f} of exact, {cpu:.3f} in seconds of the processor")


if __name__ == "__main__":
    main()
