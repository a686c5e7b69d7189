"""Peak memory and time of `segtrain predict` on tiled TIFF images, in windows and in memory, a process each.

    python scripts/bench_windows.py [--sides 8192 24576] [--way windows|memory] [--outputs raw color]

The network is one convolution of stride 16, with random weights and four classes; tiles are 1024 x 1024 and overlap by
a quarter (inference=tiled). The images are noise in patches, square, written window by window into a temporary folder.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from segtrain.commands import predict as predicting
from segtrain.config import InferenceConfig, ModelConfig, PredictConfig
from segtrain.data.labels import LabelTable
from segtrain.data.tiff_writer import TILE, TiledWriter
from segtrain.device import peak_memory
from segtrain.scoring.predictor import Predictor


class Cells(torch.nn.Module):
    """(N, 3, H, W) -> logits (N, 4, H / 16, W / 16)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 4, 17, 16, 8)

    def forward(self, x: torch.Tensor, upsample: bool = False) -> torch.Tensor:
        found: torch.Tensor = self.convolution(x)
        return found


def write_image(path: Path, side: int) -> None:
    rng = np.random.default_rng(0)
    with TiledWriter(path, (side, side), 3, {}) as file:
        for top in range(0, side, TILE):
            rows = min(TILE, side - top)
            patches = rng.integers(0, 256, (-(-rows // 32), -(-side // 32), 3), np.uint8)
            file.write(patches.repeat(32, 0).repeat(32, 1)[:rows, :side])
        file.finish()


def predict_in_this_process(path: Path, way: str, outputs: list[str]) -> None:
    rows = [{"id": i, "name": str(i), "color": [60 * i, 9, 80], "train_id": i} for i in range(4)]
    network = Predictor(Cells(), LabelTable(rows, "noise"), ModelConfig(), torch.device("cpu"), {"config": {}})
    predicting.networks_of = lambda config: network  # type: ignore[assignment]
    weights = path.with_suffix(".pt")
    weights.touch()
    config = PredictConfig(
        input=str(path), checkpoint=str(weights), output=str(path.parent / "answers"), outputs=outputs, overwrite=True,
        inference=InferenceConfig(name="tiled", tile=[1024, 1024]), in_memory=0 if way == "windows" else 1e6,
    )  # fmt: skip
    before, began = peak_memory(), time.perf_counter()
    predicting.predict(config)
    peak = peak_memory()
    assert peak is not None and before is not None
    print(f"measured {peak / 2**20:.0f} {before / 2**20:.0f} {time.perf_counter() - began:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[8192, 24576], help="of the square images [pixels]")
    parser.add_argument("--way", nargs="+", choices=("windows", "memory"), default=["windows"])
    parser.add_argument("--outputs", nargs="+", default=["raw", "color"])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the image that a process of this script predicts
    arguments = parser.parse_args()
    if arguments.one is not None:
        predict_in_this_process(arguments.one, arguments.way[0], arguments.outputs)
        return
    for side in arguments.sides:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image.tif")
            write_image(path, side)
            for way in arguments.way:
                words = [sys.executable, __file__, "--one", str(path), "--way", way, "--outputs", *arguments.outputs]
                printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                peak, before, seconds = printed.rpartition("measured ")[2].split()
                print(f"{side} x {side}, {way}: peak {peak} MiB, {before} MiB before it; decoded "
                      f"{3 * side * side / 2**20:.0f} MiB; {seconds} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
