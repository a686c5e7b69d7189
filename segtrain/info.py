"""`segtrain info`: what this machine can do, or what a checkpoint holds."""

import os
import platform
from pathlib import Path

import torch
import torchvision

import segtrain
from segtrain import abn, checkpoint, device
from segtrain.config import InfoConfig
from segtrain.errors import UsageError
from segtrain.log import say


def info(config: InfoConfig) -> None:
    if config.checkpoint is not None:
        describe_checkpoint(Path(config.checkpoint))
        return
    say(f"segtrain     {segtrain.__version__}, Python {platform.python_version()}, {platform.platform()}")
    say(
        f"torch        {torch.__version__} (CUDA {torch.version.cuda or 'none'}), torchvision {torchvision.__version__}"
    )
    say(f"CPU          {os.cpu_count()} cores, {torch.get_num_threads()} threads used")
    cards = device.nvidia_cards()
    for card in cards:
        say(f"card         {card}")
        say(f"             {device.advice(card)}")
    if not cards:
        say(
            f"card         none found. For an NVIDIA card, Turing or newer, driver r{device.CUDA13_DRIVER} or newer: "
            "pip install '.[cuda13]'; an older one: torch<2.15 from https://download.pytorch.org/whl/cu126 "
            "first, then pip install '.[cuda12]'"
        )
    try:
        say(f"used         {device.resolve('auto')}")
    except UsageError as error:
        say(f"used         none: {error}")
    say(f"kernels      In-Place ABN on the CPU: {abn.describe_backend('cpu')}; on CUDA: {abn.describe_backend('cuda')}")


def describe_checkpoint(path: Path) -> None:
    content = checkpoint.load(path)
    model, data = content["config"]["model"], content["config"]["dataset"]
    parameters = sum(tensor.numel() for tensor in content["model"].values())
    say(f"{path}: step {content['step']}, best validation mIoU {100 * content['best']['miou']:.1f} %")
    say(f"model   {model['backbone']} + {model['head']}, norm {model['norm']}, {parameters} numbers")
    say(f"data    {data['name']}, classes: {', '.join(content['classes']['names'])}")
