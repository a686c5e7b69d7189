"""`segtrain show`: training samples exactly as the network sees them."""

from pathlib import Path

import numpy as np

from segtrain.config import IGNORE_INDEX, ShowConfig, TrainConfig
from segtrain.console import Progress, say
from segtrain.engine.start import chosen_options
from segtrain.scoring import figures
from segtrain.tasks.segmentation import Segmentation

HEIGHT, COLUMNS = 192, 2  # of a panel on the sheet [pixels], and panels in a row
SHOWN = 12  # classes whose shares are printed


def show(config: ShowConfig) -> Path:
    """Write samples.png: crops after augmentation, their labels, both, and each class's share of the pixels.

    They are the first `count` samples of a training with these options and this seed. Returns the file.
    """
    split = config.split or config.dataset.train_split
    config.dataset.train_split = config.dataset.val_split = split
    trained = TrainConfig(dataset=config.dataset, augmentation=config.augmentation, sampling=config.sampling)
    trained.trainer.seed = config.seed
    task = Segmentation(trained)
    table, data = task.table, task.data()
    say(
        f"showing     {config.count} samples of {config.dataset.name} {split}, {task.num_train} images, seed "
        f"{config.seed}: augmentation {chosen_options(config.augmentation, 'scale', 'flip')}"
    )
    pixels = np.zeros(IGNORE_INDEX + 1, np.int64)
    panels, progress = [], Progress("drawing", config.count)
    for position in range(config.count):
        item = data[position]
        if isinstance(item, Exception):
            raise item
        image, target, name, _, window = item
        pixels += np.bincount(target.ravel(), minlength=len(pixels))
        parts = figures.as_rgb(image), table.colorize(target), figures.overlay(image, target, table)
        panels.append(figures.captioned(figures.beside(*parts, HEIGHT), f"{position}  {name}  {window}"))
        progress.show(position + 1)
    shares = pixels / pixels.sum()
    named = [f"{100 * share:.1f} % {name}" for name, share in zip(table.names, shares, strict=False)]
    drawn = figures.grid(panels, COLUMNS)
    void = f"{100 * shares[table.num_classes :].sum():.1f} % ignored"
    path = Path(config.output or "segtrain-out/show") / "samples.png"
    legend = figures.legend(table, drawn.shape[1], named)
    figures.write_png(path, np.concatenate([drawn, figures.captioned(legend, f"share of the pixels; {void}")]))
    order = np.argsort(-shares[: table.num_classes], kind="stable")
    largest = ", ".join(named[n] for n in order[:SHOWN] if shares[n] > 0)
    absent = [table.names[n] for n in order if shares[n] == 0]
    say(f"pixels      {largest}, {void}")
    if absent:
        say(f"absent      {len(absent)} classes are in none of these samples: {', '.join(absent[:SHOWN])}")
    say(str(path))
    return path
