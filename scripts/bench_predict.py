"""Images per second of `segtrain predict`, with reading and writing in other threads, against one after another.

    python scripts/bench_predict.py [--images 100] [--rounds 5] [--threads 2] [--size 512 1024] [--device cpu]
                                    [--precision fp32] [--quick-png]

ResNet-18 with DeepLabV3 at output stride 16, random weights, JPEG photographs of noise, the default outputs. Both ways
predict the same images, alternately, a part of the images in each round. The shares are those of one after another,
which compresses PNG by zlib's default unless --quick-png is given, as `segtrain predict` does.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from segtrain.commands.predict import predict_all, read_file
from segtrain.commands.predict_outputs import draw_output, output_place
from segtrain.commands.predict_windows import memory_limit
from segtrain.config import InferenceConfig, ModelConfig, PredictConfig
from segtrain.console import Progress
from segtrain.data.inputs import Input, find_inputs
from segtrain.data.labels import published_table
from segtrain.distributed.group import World
from segtrain.errors import DataError
from segtrain.models import build_model
from segtrain.scoring import figures
from segtrain.scoring.predictor import Predictor


def write_photographs(folder: Path, count: int, size: Sequence[int]) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        blurred = cv2.resize(rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3)).astype(np.uint8), size[::-1])
        noisy = np.clip(blurred + rng.normal(0, 8, blurred.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        (folder / f"{number:04}.jpg").write_bytes(buffer.getvalue())


def one_after_another(
    inputs: Sequence[Input], predictor: Predictor, config: PredictConfig, output: Path, quick: bool
) -> dict[str, float]:
    """Seconds of each part. quick: as of `write_png`."""
    spent = {"decoding": 0.0, "network": 0.0, "writing": 0.0}
    for one in inputs:
        times = [time.perf_counter()]
        _, image, _ = read_file(predictor, memory_limit(None), one)
        assert not isinstance(image, DataError)
        times.append(time.perf_counter())
        found = predictor.segment(image, config.inference)
        times.append(time.perf_counter())
        for kind in config.outputs:
            path = output_place(one, output, kind)
            figures.write_png(path, draw_output(kind, image, found, predictor.table), quick=quick)
        times.append(time.perf_counter())
        for name, begin, end in zip(spent, times, times[1:], strict=False):
            spent[name] += end - begin
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--quick-png", action="store_true", help="one after another writes PNG quickly too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table, device = published_table("cityscapes"), torch.device(arguments.device)
    network = build_model("resnet18", "deeplabv3", table.num_classes, output_stride=16).eval().to(device)
    predictor = Predictor(network, table, ModelConfig(), device)
    config = PredictConfig(inference=InferenceConfig(precision=arguments.precision))
    with tempfile.TemporaryDirectory() as folder:
        photographs, output = Path(folder, "photographs"), Path(folder, "output")
        photographs.mkdir()
        write_photographs(photographs, arguments.images, tuple(arguments.size))
        inputs = find_inputs(str(photographs))
        one_after_another(inputs[:1], predictor, config, output, True)  # compiles what is compiled at first use
        spent: dict[str, float] = {}
        ratios, beside = [], 0.0
        for number in range(arguments.rounds):
            some = inputs[number :: arguments.rounds]
            parts = one_after_another(some, predictor, config, output, arguments.quick_png)
            spent = {name: spent.get(name, 0.0) + seconds for name, seconds in parts.items()}
            began = time.perf_counter()
            predict_all(some, predictor, config, output, Progress("predicting", len(some), True), World())
            seconds = time.perf_counter() - began
            beside += seconds
            ratios.append(sum(parts.values()) / seconds)
    total = sum(spent.values())
    print(f"{len(inputs)} images of {arguments.size[0]}x{arguments.size[1]}, {arguments.precision}, {device}, "
          f"{arguments.threads} threads")  # fmt: skip
    print(f"one after another     {len(inputs) / total:6.2f} images/s: "
          + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in spent.items()))  # fmt: skip
    print(f"in several threads    {len(inputs) / beside:6.2f} images/s")
    print(f"ratio                 {statistics.median(ratios):6.2f} (median of {len(ratios)} rounds, "
          f"{min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
