"""Samples as training and evaluation read them."""

import numpy as np
from PIL import Image

from segtrain.config import AugmentationConfig, StreetsConfig
from segtrain.data.augment import Augmentation
from segtrain.data.loader import EvaluationData, TrainingData, training_batches
from segtrain.data.order import MicroBatches
from segtrain.data.registry import label_table, split_samples
from segtrain.data.sample import Sample
from segtrain.errors import DataError


def read_sample(sample, table):
    """Image uint8 (H, W, 3) and train ids uint8 (H, W)."""
    item = EvaluationData([sample], table)[0]
    if isinstance(item, DataError):
        raise item
    return item.image, item.target


def picture(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


def augmentation(**options):
    return Augmentation(AugmentationConfig(**{"crop_size": [48, 48], "scale": [0.5, 2.0], **options}))


def rare(tmp_path):
    """Ten pictures of class 0 (road), one of which has a corner of class 18 (bicycle)."""
    samples = []
    for i in range(10):
        picture(tmp_path / f"i{i}.png", 50, size=(64, 96))
        label = np.full((64, 96), 7, np.uint8)
        if i == 4:
            label[:2, :3] = 33
        Image.fromarray(label).save(tmp_path / f"l{i}.png")
        samples.append(Sample(str(i), tmp_path / f"i{i}.png", tmp_path / f"l{i}.png"))
    return samples


def training_data(scenes, seed=0):
    config = StreetsConfig(name="streets", root=str(scenes), scenes=6, val_scenes=3)
    samples = split_samples(config, "train")
    return TrainingData(samples, label_table(config), augmentation(), seed)


def steps(data, start, stop, workers):
    return [
        (batch.names, batch.images.contiguous().numpy().tobytes(), batch.targets.numpy().tobytes())
        for (batch,) in training_batches(data, MicroBatches(4, start, stop), workers, pin_memory=False)
    ]
