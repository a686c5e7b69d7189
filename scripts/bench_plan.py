#!/usr/bin/env python
"""Check `segtrain plan` against the paper and against measured memory.

    python scripts/bench_plan.py --paper     the paper's batches and crops on four GPUs of 12 GB: reserves they allow
    python scripts/bench_plan.py --reality   predicted and measured peak of six training steps on the CPU

--paper: every row of the paper's Tables 3 and 4 is traced with its batch, and with one more image on each GPU where
the row is the largest batch for its crop. The reserve is what context, workspace and fragments of memory take. A row
that fits allows reserves up to one size; a next batch that does not fit asks for more than another.

--reality: every step runs in a process of its own, whose resident memory is measured by the kernel (Linux).
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import segtrain
from segtrain.config import TrainConfig
from segtrain.config.plan import RESERVE, parse_bytes
from segtrain.data.loader import Batch
from segtrain.distributed.group import World
from segtrain.engine.learner import Learner
from segtrain.engine.planning.advice import number_of_classes
from segtrain.engine.planning.solve import Question, solve_all
from segtrain.engine.planning.trace import StepTracer, loss_of
from segtrain.models import from_config

GPUS, MEMORY = 4, 12 * 10**9


class Row(NamedTuple):
    """A row of the paper: its recipe, and whether its batch is the largest for its crop."""

    recipe: str
    largest: bool

    @property
    def config(self) -> TrainConfig:
        return segtrain.compose(f"experiment={self.recipe}")


ROWS = (
    Row("cityscapes_resnext101_std_16x512", True),
    Row("cityscapes_resnext101_inplace_28x512", True),
    Row("cityscapes_resnext101_inplace_16x672", False),
    Row("cityscapes_wider_resnet38_std_20x512", True),
    Row("cityscapes_wider_resnet38_inplace_28x512", True),
    Row("cityscapes_wider_resnet38_inplace_20x640", False),
    Row("cocostuff_resnext101_std_16x480", True),
    Row("cocostuff_resnext101_inplace_24x480", True),
    Row("cocostuff_resnext101_inplace_16x600", False),
    Row("cocostuff_wider_resnet38_std_20x496", True),
    Row("cocostuff_wider_resnet38_inplace_28x496", True),
    Row("cocostuff_wider_resnet38_inplace_20x576", False),
    Row("cityscapes_resnext152_sync_12x680", False),
    Row("cityscapes_wider_resnet38_sync_16x712", False),
    Row("cityscapes_wider_resnet38_sync_12x872", False),
    Row("vistas_wider_resnet38_sync_class_uniform_12x776", False),
)


def paper_table() -> None:
    reserve = parse_bytes(RESERVE, "reserve")
    print(f"{GPUS} GPUs of {MEMORY / 1e9:.0f} GB; sizes in GB on one of them; plan.reserve is {reserve / 1e9:.2f}")
    print(f"{'recipe':<50} {'step':>6} {'next':>6}  reserves allowed   with plan.reserve")
    low, high = 0.0, float(MEMORY)
    for row in ROWS:
        config = row.config
        images, crop = config.trainer.images // GPUS, (config.augmentation.crop_size[0],) * 2
        tracer = StepTracer(config, number_of_classes(config), GPUS)
        peak = tracer.trace(images, crop).peak
        more = tracer.trace(images + 1, crop).peak if row.largest else None
        least = 0 if more is None else max(0, MEMORY - more)
        fits, fails = peak + reserve <= MEMORY, more is None or more + reserve > MEMORY
        verdict = "as the paper" if fits and fails else "does not fit" if not fits else "one more fits"
        low, high = max(low, least), min(high, MEMORY - peak)
        print(
            f"{row.recipe:<50} {peak / 1e9:6.2f} {'' if more is None else f'{more / 1e9:.2f}':>6}  "
            f"{least / 1e9:5.2f} to {(MEMORY - peak) / 1e9:5.2f}    {verdict}", flush=True,
        )  # fmt: skip
    meet = f"all rows meet from {low / 1e9:.2f} to {high / 1e9:.2f}" if low < high else (
        f"the rows do not meet: one asks for more than {low / 1e9:.2f}, another for at most {high / 1e9:.2f}"
    )  # fmt: skip
    print(meet)
    print(f"\nlargest batch of ResNeXt-101 with crops of 512 x 512 on {GPUS} such GPUs")
    plain = ["experiment=cityscapes_resnext101_inplace_28x512"]
    forms = {"in place": [], "8 bits": ["model.keep=8bit"], "4 bits": ["model.keep=4bit"]}
    forms |= {
        name: [f"model.recompute={name}"] for name in ("blocks", "grouped", "identity_input", "both") if possible(name)
    }
    questions = [
        Question(name, segtrain.compose(*plain, *words), 19, GPUS, MEMORY - reserve) for name, words in forms.items()
    ]
    for name, answer in solve_all(questions).items():
        print(f"{name:<20} {answer.batch:>4} crops, or 28 of {answer.crop}")


def possible(recompute: str) -> bool:
    from segtrain.errors import UsageError

    try:
        segtrain.compose(f"model.recompute={recompute}", "model.norm=inplace_abn")
    except UsageError:
        return False
    return True


# name -> words, images of the step, side of the crop
STEPS = {
    "ResNet-50, BatchNorm": (["model=resnet50", "model.norm=batch_norm"], 4, 256),
    "ResNet-50, in place": (["model=resnet50"], 4, 256),
    "ResNet-50, in place, 8 bits": (["model=resnet50", "model.keep=8bit"], 4, 256),
    "ResNet-50, blocks": (["model=resnet50", "model.recompute=blocks"], 4, 256),
    "ResNeXt-101, in place": (["model=resnext101"], 2, 256),
    "WideResNet-38, BatchNorm": (["model=wider_resnet38", "model.norm=batch_norm"], 2, 256),
}


def step_config(name: str) -> TrainConfig:
    words, _, side = STEPS[name]
    crop = f"augmentation.crop_size=[{side},{side}]"
    return segtrain.compose(*words, "dataset=cityscapes", "device=cpu", "trainer.max_steps=9", crop)


def resident(field: str) -> int:
    """Resident bytes now (VmRSS), or their peak since the last reset (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


class RandomStep:
    """One training step after another, of a configured network with 19 classes on the CPU, on random images."""

    def __init__(self, config: TrainConfig) -> None:
        network = from_config(config.model, 19)
        self.learner = Learner(network, loss_of(config, 19), config, World(), torch.device("cpu"))

    def __call__(self, images: int, side: int) -> None:
        pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
        target = torch.randint(0, 19, (images, side, side), dtype=torch.uint8)
        self.learner.step([Batch(pixels, target, [], [], [])], float(images * side**2), 0, 0.0)
        self.learner.optimizer.zero_grad(set_to_none=True)


def peak_of_step(config: TrainConfig, images: int, side: int, warm: tuple[int, int] = (2, 64)) -> int:
    """Peak bytes of one step above what is there before it, without gradients. For a process of its own.

    warm: images and side of the steps before it, which make the momentum and what else is made once, such as code.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    step = RandomStep(config)
    step(*warm)
    step(*warm)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak resident size
    before = resident("VmRSS")
    step(images, side)
    return resident("VmHWM") - before


def reality_table() -> None:
    print(f"{'one training step on the CPU, MiB above weights and momentum':<62} {'predicted':>9} {'measured':>9}")
    for name, (_, images, side) in STEPS.items():
        config = step_config(name)
        tracer = StepTracer(config, 19)
        predicted = tracer.trace(images, (side, side)).peak - sum(tracer.static.values())
        command = [sys.executable, __file__, "--one-step", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        measured = json.loads(output.splitlines()[-1])
        label = f"{name}, {images} x {side} x {side}"
        error = predicted / measured - 1
        print(f"{label:<62} {predicted / 2**20:9.0f} {measured / 2**20:9.0f}  {error:+.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--reality", action="store_true")
    parser.add_argument("--one-step", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_step:
        _, images, side = STEPS[options.one_step]
        print(json.dumps(peak_of_step(step_config(options.one_step), images, side)))
    if options.paper:
        paper_table()
    if options.reality:
        reality_table()


if __name__ == "__main__":
    main()
