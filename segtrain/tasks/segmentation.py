"""The task of labelling every pixel: its data, its loss and its scores, as the training loop (training.py) wants them.

classification.py is the same for whole pictures.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from segtrain.config import TrainConfig
from segtrain.console import say
from segtrain.data.augment import Augmentation
from segtrain.data.cache import Decoded
from segtrain.data.dataset import dataset_spec, label_table, split_samples, training_mixture
from segtrain.data.loader import TrainingData, read_pixels
from segtrain.data.sample import Sample
from segtrain.data.sampling import class_index
from segtrain.data.verify.files import FileFacts, check_samples
from segtrain.distributed.group import World
from segtrain.errors import DataError, UsageError
from segtrain.losses import Loss, build_loss
from segtrain.models import Segmenter
from segtrain.scoring import figures as pictures
from segtrain.scoring.report import protocol, seen_in_training, summarised, write_result
from segtrain.scoring.scores import Scores
from segtrain.tasks.evaluation import Found, Trained, Watch, position_prior, predictions, score


class Segmentation:
    """What a training of `config` learns from and is judged by. DataError where the data are not there.

    samples, val_samples: of this training. pictures: which ones they are, whatever split they were read from.
    """

    measure = "miou"  # of a validation's scores, the one that best.pt is chosen by
    finals = ("miou", "pixel_accuracy")  # what a finished run is shown with
    shown = "crops"  # what a batch is of
    panels = "val/image-target-prediction"  # what a validation draws

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.table = label_table(config.dataset)
        self.num_classes = self.table.num_classes
        mixture = training_mixture(config.dataset)  # draws the street scenes where they are missing
        self.val_samples = split_samples(config.dataset, config.dataset.val_split)
        if (few := config.trainer.overfit) is not None:
            mixture = mixture.first(few)
            self.val_samples = mixture.samples
        self.mixture = mixture
        self.samples = mixture.samples
        self.pictures = mixture.identities

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """UsageError for a transform that does not exist, before any data is touched."""
        Augmentation(config.augmentation)

    @property
    def classes(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        return self.table.as_dict()

    def loss(self) -> Loss:
        return build_loss(self.config.loss, self.num_classes, self.mixture.groups)

    def check(self) -> None:
        """DataError for damaged files, wrong sizes or ids, pictures without labels, and a crop that none can fill."""
        config = self.config
        named = ((config.dataset.train_split, self.samples), (config.dataset.val_split, self.val_samples))
        for split, some in named:
            unlabelled = [sample for sample in some if sample.label is None]
            if unlabelled:
                raise DataError(f"the split {split!r} has pictures without labels, such as {unlabelled[0].image}")
        if not config.trainer.check_data:
            return
        cache = config.dataset.cache_folder()
        sizes = [
            check_samples(samples, label_table(data), cache, say, dataset_spec(data).expected)
            for data, samples in self.mixture.parts  # each part by its own table
        ]
        largest = max(height for height, _ in sizes), max(width for _, width in sizes)
        check_samples(self.val_samples, self.table, cache, say, dataset_spec(config.dataset).expected)
        enlarged = [math.ceil(extent * config.augmentation.scale[1]) for extent in largest]
        crop = config.augmentation.crop_size
        if crop[0] > enlarged[0] or crop[1] > enlarged[1]:
            raise UsageError(
                f"augmentation.crop_size={crop} is not possible: the largest picture is {list(largest)} [height,width] "
                f"and is enlarged at most {config.augmentation.scale[1]} times, so at most {enlarged} can be filled"
            )

    def data(self) -> TrainingData:
        """What the loader reads, with the cache and the index of classes that the options ask for."""
        config, samples = self.config, self.samples
        folder, share = config.dataset.cache_folder(), config.sampling.class_uniform
        seen = FileFacts(folder, samples)
        read: Callable[[Sample], tuple[np.ndarray, np.ndarray]] = read_pixels
        if config.dataset.cache == "decoded":
            read = Decoded(folder / "decoded")
            read.build(samples, seen, say)
        index = class_index(samples, self.table, seen) if share > 0 else None
        augmentation = Augmentation(config.augmentation)
        seed, weights = config.trainer.seed, self.mixture.weights
        return TrainingData(samples, self.table, augmentation, seed, read, index, share, weights)

    def drawn(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, str]:
        """A training sample as a picture (image | labels | both), and its labels in words."""
        ignored = 100 * float((target >= self.num_classes).mean())
        found = [str(value) for value in np.unique(target) if value < self.num_classes]
        picture = pictures.beside(image, self.table.colorize(target), pictures.overlay(image, target, self.table))
        return picture, f"classes {','.join(found) or 'none'}  {ignored:.0f} % ignored"

    def sheet(self, rows: list[np.ndarray]) -> np.ndarray:
        return pictures.sheet(rows, self.table)

    @cached_property
    def prior(self) -> Any:
        return position_prior(self.samples, self.table)

    def told(self, result: Mapping[str, Any]) -> str:
        return f"mIoU {100 * result['miou']:.1f} %"

    def write(self, folder: Path, result: dict[str, Any], confusion: Any) -> None:
        write_result(folder, result, [], self.table, confusion)

    def validate(
        self, network: nn.Module, on: torch.device, world: World, workers: int, watch: Watch, kept: int
    ) -> Found:
        """Scores over the pictures of all processes. Every process calls it. kept: pictures to draw."""
        config = self.config
        used = Trained(cast(Segmenter, network), self.table, config.model, on)
        mine = self.val_samples[world.rank :: world.size]
        answers = predictions(used, mine, config.inference, min(workers, len(mine)))
        counted = Scores(self.table, dataset_spec(config.dataset).rules)
        of_prior, panels = score(
            watch(answers, -(-len(self.val_samples) // world.size)), len(mine), counted, self.prior, kept
        )
        for scores in (counted, of_prior):
            if scores is not None:
                scores.all_reduce()
        result = summarised(counted, of_prior)
        per_class = {f"val_iou/{name}": value for name, value in result["per_class"].items()}
        scalars = {"val/miou": result["miou"], "val/pixel_accuracy": result["pixel_accuracy"], **per_class}
        confusion = counted.evaluated()
        drawings = {"val/confusion": pictures.confusion(confusion, self.table)}
        if panels:
            drawings[self.panels] = pictures.sheet(panels, self.table)
        split = "train" if config.trainer.overfit is not None else config.dataset.val_split

        def card(trained_on: torch.Tensor, how: dict[str, Any]) -> dict[str, Any]:
            warnings = seen_in_training(trained_on, config.dataset, self.val_samples)
            return protocol(counted, config.dataset, split, self.val_samples, warnings, how)

        return Found(result, scalars, drawings, card, confusion)
