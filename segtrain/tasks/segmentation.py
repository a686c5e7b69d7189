"""Segmentation, one class per pixel: its data and loss for training, and its evaluator.

classification.py is the same for one class per image.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from segtrain.config import (
    IGNORE_INDEX,
    DatasetConfig,
    EvaluateConfig,
    InferenceConfig,
    ModelConfig,
    TrainConfig,
    check_channels,
)
from segtrain.console import say
from segtrain.data.augment import Augmentation
from segtrain.data.cache import Decoded
from segtrain.data.class_mapping import ClassMapping, class_mapping, require_same_labels
from segtrain.data.class_weights import automatic_weights, describe_weights
from segtrain.data.labels import LabelTable
from segtrain.data.loader import EvaluationItem, TrainingData, evaluation_samples, read_pixels
from segtrain.data.registry import dataset_spec, identities, label_table, parts_of, split_samples, training_mixture
from segtrain.data.sample import Sample, spread
from segtrain.data.sampling import class_index
from segtrain.data.verify.file_facts import FileFacts
from segtrain.data.verify.files import check_samples, content_hashes
from segtrain.errors import DataError, UsageError
from segtrain.losses import Loss, build_loss
from segtrain.models import Segmenter
from segtrain.scoring import figures
from segtrain.scoring.batches import Given, pixels_to_predict, predictions
from segtrain.scoring.extra_metrics import metric_scalars
from segtrain.scoring.image_counts import ImageCounts
from segtrain.scoring.mean_loss import MeanLoss, loss_entry
from segtrain.scoring.position_prior import PositionPrior
from segtrain.scoring.predictor import LoadedNetwork, Predictor
from segtrain.scoring.report import CONFUSION, Evaluation, count_seen, protocol, seen_images, summarise
from segtrain.scoring.scores import Scores
from segtrain.tasks.base import Evaluator, Task
from segtrain.weights.network_file import published_figure

EXAMPLES = "val/image-target-prediction"  # name of the example predictions in the log


class Segmentation(Task):
    """The task of a training on images with labelled pixels."""

    metric = "miou"
    final_scores = ("miou", "pixel_accuracy")
    batch_of = "crops"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.table: LabelTable = label_table(config.dataset)
        self.num_classes = self.table.num_classes
        mixture = training_mixture(config.dataset)  # draws the street scenes where they are missing
        self.val_samples = split_samples(config.dataset, config.dataset.val_split)
        if (few := config.trainer.overfit) is not None:
            mixture = mixture.first(few)
            self.val_samples = mixture.samples
        self.mixture = mixture
        self.samples = mixture.samples
        self.image_ids = mixture.identities
        self.num_train, self.num_val = len(self.samples), len(self.val_samples)
        trained_on = {sample.image for sample in self.samples}
        self.num_shared = sum(sample.image in trained_on for sample in self.val_samples)

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """UsageError for a transform that does not exist."""
        Augmentation(config.augmentation)

    @property
    def classes(self) -> dict[str, Any]:
        return self.table.as_dict()

    def count_classes(self) -> None:
        options, cache = self.config.loss, self.config.dataset.cache_folder()
        if options.class_weights == "auto":
            options.class_weights = automatic_weights(self.mixture, self.table, cache)
            listed = describe_weights(options.class_weights, self.table.names)
            say(f"weights    of the classes, inverse to their pixels in {self.num_train} labels: {listed}")
            drawn = self.config.sampling.class_uniform
            if drawn > 0:
                both = f"loss.class_weights=auto and sampling.class_uniform={drawn:g}"
                say(f"WARNING    {both} both favour rare classes, which so count twice: leave one of the two out")

    def loss(self) -> Loss:
        return build_loss(self.config.loss, self.num_classes, self.mixture.groups)

    def check(self) -> None:
        """DataError for damaged files, wrong sizes or ids, images without labels, and a crop that none can fill."""
        config = self.config
        named = ((config.dataset.train_split, self.samples), (config.dataset.val_split, self.val_samples))
        for split, some in named:
            unlabelled = [sample for sample in some if sample.label is None]
            if unlabelled:
                raise DataError(f"the split {split!r} has images without labels, such as {unlabelled[0].image}")
        if not config.trainer.check_data:
            return
        cache = config.dataset.cache_folder()
        sizes = [
            check_samples(samples, label_table(data), cache, say, dataset_spec(data).expected)
            for data, samples in self.mixture.parts  # each part by its own table
        ]
        largest = max(height for height, _ in sizes), max(width for _, width in sizes)
        check_samples(self.val_samples, self.table, cache, say, dataset_spec(config.dataset).expected, training=False)
        self.compare_contents()
        enlarged = [math.ceil(extent * config.augmentation.scale[1]) for extent in largest]
        crop = config.augmentation.crop_size
        if crop[0] > enlarged[0] or crop[1] > enlarged[1]:
            raise UsageError(
                f"augmentation.crop_size={crop} is not possible: the largest image is {list(largest)} [height,width] "
                f"and is enlarged at most {config.augmentation.scale[1]} times, so at most {enlarged} can be filled"
            )

    def compare_contents(self) -> None:
        """Note what is in the training images, and how many of the validation images are among them."""
        cache = self.config.dataset.cache_folder()
        parts = [some for _, some in self.mixture.parts] if self.config.trainer.overfit is None else [self.samples]
        self.contents = [one for some in parts for one in content_hashes(some, cache)]
        known = set(self.contents)
        self.num_shared = sum(one in known for one in content_hashes(self.val_samples, cache))

    def data(self) -> TrainingData:
        config, samples = self.config, self.samples
        folder, share = config.dataset.cache_folder(), config.sampling.class_uniform
        facts = FileFacts(folder, samples)
        read: Callable[[Sample], tuple[np.ndarray, np.ndarray]] = read_pixels
        if config.dataset.cache == "decoded":
            read = Decoded(folder / "decoded")
            read.build(samples, facts, say)
        index = class_index(samples, self.table, facts) if share > 0 else None
        augmentation = Augmentation(config.augmentation)
        seed, weights = config.trainer.seed, self.mixture.weights
        return TrainingData(samples, self.table, augmentation, seed, read, index, share, weights)

    def evaluator(self, split: str | None = None, inference: InferenceConfig | None = None) -> "SegmentationEvaluator":
        config = self.config
        samples = self.val_samples if split is None else split_samples(config.dataset, split)
        if split is None:
            split = "train" if config.trainer.overfit is not None else config.dataset.val_split
        made = SegmentationEvaluator(
            config.dataset, split, samples, self.table, config.model, inference or config.inference, self.samples
        )
        made.num_shared = self.num_shared if samples is self.val_samples else 0
        return made

    def training_sample(self, most: int) -> "SegmentationEvaluator | None":
        """Of a mixture those of its target: the others' labels have other ids."""
        config, parts = self.config, parts_of(self.config.dataset)
        own = [part.config for part in parts if part.is_target]
        mixed = (sample for data, some in self.mixture.parts if data in own for sample in some)
        samples = spread(list(mixed) if parts else self.samples, min(most, self.num_val))
        if not samples or config.trainer.overfit is not None:
            return None
        split = config.dataset.train_split
        return SegmentationEvaluator(config.dataset, split, samples, self.table, config.model, config.inference, None)

    def draw(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, str]:
        """image | labels | both, and the classes and the fraction of ignored pixels in words."""
        ignored = 100 * float((target >= self.num_classes).mean())
        found = [str(value) for value in np.unique(target) if value < self.num_classes]
        panel = figures.beside(image, self.table.colorize(target), figures.overlay(image, target, self.table))
        return panel, f"classes {','.join(found) or 'none'}  {ignored:.0f} % ignored"

    def sheet(self, rows: list[np.ndarray]) -> np.ndarray:
        return figures.sheet(rows, self.table)

    def describe(self, result: Mapping[str, Any]) -> str:
        return f"mIoU {100 * result['miou']:.1f} %"


class LabelledImage(NamedTuple):
    """An image with its label, and the network's prediction: train ids uint8 (H, W). loss: its sum over the pixels."""

    item: EvaluationItem
    prediction: np.ndarray
    loss: float | None = None


class SegmentationCounts(NamedTuple):
    """The pixels of a network's predictions, over all images and of each, and of the position prior's; its loss."""

    table: LabelTable
    network: Scores
    prior: PositionPrior | None
    of_prior: Scores | None
    images: ImageCounts
    loss: MeanLoss | None = None

    def add_answer(self, answer: LabelledImage) -> None:
        item = answer.item
        pixels = self.network.add(item.ids, self.table.decode(answer.prediction), item.instances)
        self.images.add(item.sample.name, item.ids.shape, pixels, self.network.class_of)
        if self.prior is not None and self.of_prior is not None:
            self.of_prior.add(item.ids, self.table.decode(self.prior.predict(item.target.shape)))
        if self.loss is not None and answer.loss is not None:
            self.loss.add(answer.loss, int((item.target != IGNORE_INDEX).sum()))

    def all_reduce(self) -> None:
        self.network.all_reduce()
        self.images.all_gather()
        if self.of_prior is not None:
            self.of_prior.all_reduce()
        if self.loss is not None:
            self.loss.all_reduce()


class SegmentationEvaluator(Evaluator[LabelledImage]):
    """Scores by the rules of the dataset's benchmark, counted at the images' own resolution."""

    def __init__(
        self, data: DatasetConfig, split: str, samples: Sequence[Sample], table: LabelTable, model: ModelConfig,
        inference: InferenceConfig, prior_samples: Sequence[Sample] | None, boundary: bool = False,
    ) -> None:  # fmt: skip
        """prior_samples: training samples that the position prior is counted from; None: no position prior.
        boundary: compute Boundary IoU too. DataError if no sample has a label."""
        super().__init__(data.name, split, len(samples), model, inference)
        if all(sample.label is None for sample in samples):
            raise DataError(
                f"the split {split!r} of dataset={data.name} has no labels: segtrain predict writes predictions"
            )
        self.data = data
        self.samples = list(samples)
        self.table = table
        self.prior_samples = prior_samples
        self.num_shared = 0  # images that were trained on, by their content or path
        self.boundary = boundary
        self.mapping: ClassMapping | None = None  # of a network that has other classes

    @classmethod
    def of_checkpoint(cls, config: EvaluateConfig, path: Path, loaded: LoadedNetwork) -> "SegmentationEvaluator":
        """The evaluator that `segtrain evaluate` asks for. UsageError if the network has other classes."""
        data, table = config.dataset, label_table(config.dataset)
        network = LabelTable.from_dict(loaded.metadata["classes"])
        mapping = class_mapping(network, table, config.taxonomy, config.taxonomy_rest)
        if mapping is None:
            require_same_labels(network, table, path, data.name)
        else:
            say("\n".join(mapping.lines()))
        split = config.split or data.val_split
        check_channels(loaded.options, data)
        samples = split_samples(data, split)
        made = cls(data, split, samples, table, loaded.options, config.inference, None, config.boundary)
        made.mapping = mapping
        stored = loaded.metadata["config"]["dataset"]
        if [stored.get(key) for key in ("name", "root", "train_split")] == [data.name, data.root, split]:
            made.num_shared = len(samples)
        elif (contents := loaded.metadata.get("contents")) is not None:
            known = set(contents.tolist())
            made.num_shared = sum(one in known for one in content_hashes(samples, data.cache_folder()))
        for text in made.warnings(loaded.metadata.get("trained_on")):
            say(f"warning     {text}")
        if config.position_prior:
            try:
                made.prior_samples = split_samples(data, data.train_split)
            except DataError as error:
                text = "the position prior is counted there; position_prior=false does without"
                raise DataError(f"{error}\n({text})") from error
        return made

    @cached_property
    def prior(self) -> PositionPrior | None:
        return None if self.prior_samples is None else PositionPrior.from_labels(self.prior_samples, self.table)

    def predict(
        self, network: nn.Module, device: torch.device, numbers: Sequence[int], workers: int,
        stopped: Callable[[], bool],
    ) -> Generator[LabelledImage, None, None]:  # fmt: skip
        predictor = Predictor(cast(Segmenter, network), self.table, self.model, device, mapping=self.mapping)
        samples = [self.samples[number] for number in numbers]
        with closing(evaluation_samples(samples, self.table, workers, stopped)) as items:
            given = (
                Given(item, str(item.sample.image), item.image, item.target if self.with_loss else None)
                for item in items
            )
            with closing(predictions(predictor, given, self.inference)) as answers:
                for item, found in answers:
                    yield LabelledImage(item, found.train_ids, found.loss)

    def image_costs(self) -> list[int]:
        return pixels_to_predict([sample.image for sample in self.samples], self.inference)

    def counts(self) -> SegmentationCounts:
        rules = dataset_spec(self.data).rules
        if self.mapping is not None and self.mapping.has_void:
            rules = rules._replace(ignored_prediction="miss")  # dropping them would score only what is not void
        scores = Scores(self.table, rules, self.boundary)
        loss = MeanLoss() if self.with_loss else None
        of_prior, images = None if self.prior is None else Scores(self.table), ImageCounts(self.table.num_classes)
        return SegmentationCounts(self.table, scores, self.prior, of_prior, images, loss)

    def main_scores(self, counts: SegmentationCounts) -> dict[str, float | None]:
        return {"miou": counts.network.result()["miou"], **loss_entry(counts)}

    def draw_answer(self, answer: LabelledImage, place: int) -> np.ndarray:
        """With the file's name below."""
        item = answer.item
        panel = figures.triple(item.image, item.target, answer.prediction, self.table)
        return figures.captioned(panel, item.sample.image.name)

    def warnings(self, trained_on: Tensor | None) -> list[str]:
        seen = 0 if trained_on is None else self.num_shared
        if dataset_spec(self.data).family:  # else the names say nothing
            seen = max(seen, count_seen(trained_on, identities(self.data, self.samples)))
        return seen_images(seen, len(self.samples))

    def published(self, loaded: LoadedNetwork) -> dict[str, Any]:
        figure = published_figure(loaded.metadata)
        return {} if figure is None else {"published": figure}

    def protocol(self, counts: SegmentationCounts, trained_on: Tensor | None, how: dict[str, Any]) -> dict[str, Any]:
        if self.mapping is not None:
            how = {"taxonomy": self.mapping.card(), **how}
        return protocol(counts.network, self.data, self.split, self.samples, self.warnings(trained_on), how)

    def evaluation(
        self, counts: SegmentationCounts, panels: list[np.ndarray], described: dict[str, Any], protocol: dict[str, Any]
    ) -> Evaluation:
        result = summarise(counts.network, counts.of_prior) | described | {"protocol": protocol}
        per_class = {f"val_iou/{name}": value for name, value in result["per_class"].items()}
        scalars = {"val/miou": result["miou"], "val/pixel_accuracy": result["pixel_accuracy"], **per_class}
        scalars |= {f"val/{name}": value for name, value in loss_entry(counts).items()}
        confusion = counts.network.evaluated()
        drawn = {CONFUSION: figures.confusion(confusion, self.table)}
        examples = figures.sheet(panels, self.table) if panels else None
        if examples is not None:
            drawn[EXAMPLES] = examples
        images = counts.images.in_order(
            (sample.name for sample in self.samples), identities(self.data, self.samples), self.table.names,
            counts.network.rules, {"dataset": self.dataset, "split": self.split},
        )  # fmt: skip
        return Evaluation(result, scalars | metric_scalars(result), drawn, confusion, examples, images)
