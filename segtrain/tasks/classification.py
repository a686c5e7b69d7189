"""Image classification, one class per image: its data and loss for training, and its evaluator.

segmentation.py is the same for one class per pixel.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segtrain.config import DatasetConfig, EvaluateConfig, InferenceConfig, ModelConfig, TrainConfig
from segtrain.console import say
from segtrain.data.classify.loader import TrainingImages, batches_of
from segtrain.data.classify.samples import ClassImages
from segtrain.data.classify.views import crop_views
from segtrain.data.images import read_image
from segtrain.data.labels import read_json_table
from segtrain.data.registry import classification_spec, list_images
from segtrain.errors import DataError
from segtrain.losses import Loss
from segtrain.models.execution import compiled_answer, require_inference_compile
from segtrain.models.precision import answer_in
from segtrain.models.preprocess import normalise_images
from segtrain.scoring import figures
from segtrain.scoring.accuracies import Accuracies
from segtrain.scoring.extra_metrics import metric_scalars
from segtrain.scoring.mean_loss import MeanLoss, loss_entry
from segtrain.scoring.predictor import LoadedNetwork
from segtrain.scoring.report import (
    Evaluation,
    code_version,
    count_seen,
    names_hash,
    seen_images,
)
from segtrain.tasks.base import Evaluator, Task

EXAMPLES = "val/pictures"  # name of the example predictions in the log


class ImageCrossEntropy(Loss):
    """Cross-entropy over images, all with the same weight."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def count(self, target: Tensor) -> float:
        return len(target)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits: (N, C); target: int64 (N,) -> (N,)."""
        return F.cross_entropy(logits.float(), target, reduction="none", label_smoothing=self.label_smoothing)


class Classification(Task):
    """The task of a training on images with one class each."""

    metric = "top1"
    final_scores = ("top1", "top5")
    batch_of = "images of"
    table = None

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.samples = list_images(config.dataset, config.dataset.train_split)
        self.val_samples = list_images(config.dataset, config.dataset.val_split)
        refuse_other_classes(self.val_samples, self.samples.classes, f"those of {self.samples.folder}")
        if config.trainer.overfit is not None:
            self.samples = self.val_samples = self.samples.first(config.trainer.overfit)
        self.num_classes = len(self.samples.classes)
        self.image_ids = classification_spec(config.dataset).identity(self.samples)
        self.num_train, self.num_val = len(self.samples), len(self.val_samples)
        self.num_shared = self.num_val if self.samples.folder == self.val_samples.folder else 0

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """Check nothing: composing has checked everything."""

    @property
    def classes(self) -> dict[str, Any]:
        return {"names": self.samples.classes, "of": "pictures"}

    def loss(self) -> Loss:
        return ImageCrossEntropy(self.config.loss.label_smoothing)

    def check(self) -> None:
        """Check nothing: reading 1.28 million images takes hours, and a damaged one is named when it is read."""

    def data(self) -> TrainingImages:
        return TrainingImages(self.samples, self.config.augmentation, self.config.trainer.seed)

    def evaluator(
        self, split: str | None = None, inference: InferenceConfig | None = None
    ) -> "ClassificationEvaluator":
        config = self.config
        images = self.val_samples if split is None else list_images(config.dataset, split)
        if split is None:
            split = "train" if config.trainer.overfit is not None else config.dataset.val_split
        return ClassificationEvaluator(config.dataset, split, images, config.model, inference or config.inference)

    def training_sample(self, most: int) -> "ClassificationEvaluator | None":
        config, count = self.config, min(most, self.num_val)
        if count == 0 or config.trainer.overfit is not None:
            return None
        some = self.samples.first(count)
        return ClassificationEvaluator(config.dataset, config.dataset.train_split, some, config.model, config.inference)

    def draw(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, str]:
        """The image with its class below, and the class in words."""
        name = self.samples.classes[int(target)]
        return figures.captioned(np.clip(image, 0, 255).astype(np.uint8), name), f"class {name}"

    def sheet(self, rows: list[np.ndarray]) -> np.ndarray:
        return figures.grid(rows)

    def describe(self, result: Mapping[str, Any]) -> str:
        return f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %"


class TopK(NamedTuple):
    """The network's answer for N images of these numbers. targets: int64 (N,). best: int64 (N, min(5, C)), the
    classes of the highest logits, the highest first. loss: the sum of the cross-entropy."""

    numbers: list[int]
    targets: np.ndarray
    best: np.ndarray
    loss: float = 0.0


class TopKCounts(Accuracies):
    """loss: the cross-entropy, if it is counted."""

    def __init__(self, classes: list[str], with_loss: bool = False) -> None:
        super().__init__(classes)
        self.loss = MeanLoss() if with_loss else None

    def add_answer(self, answer: TopK) -> None:
        self.add(answer.targets, answer.best)
        if self.loss is not None:
            self.loss.add(answer.loss, len(answer.targets))

    def all_reduce(self) -> None:
        super().all_reduce()
        if self.loss is not None:
            self.loss.all_reduce()


class ClassificationEvaluator(Evaluator[TopK]):
    """Top-1 and top-5 accuracies."""

    def __init__(
        self, data: DatasetConfig, split: str, images: ClassImages, model: ModelConfig, inference: InferenceConfig
    ) -> None:
        super().__init__(data.name, split, len(images), model, inference)
        self.samples = images
        self.spec = classification_spec(data)
        self.batch_size = max(1, inference.together() // 10) if inference.crops == "ten" else inference.together()
        self.is_validation = split == data.val_split

    @classmethod
    def of_checkpoint(cls, config: EvaluateConfig, path: Path, loaded: LoadedNetwork) -> "ClassificationEvaluator":
        """The evaluator that `segtrain evaluate` asks for. DataError if the network has other classes."""
        split = config.split or config.dataset.val_split
        images, classes = list_images(config.dataset, split), loaded.metadata["classes"]
        known = classes["names"]
        if classes.get("numbered") and len(known) == len(images.classes):
            say("classes     numbered in the order of the folders' names, as ImageNet's published networks have them")
            known = images.classes
        refuse_other_classes(images, known, f"the classes of {path}")
        return cls(config.dataset, split, images, loaded.options, config.inference)

    @torch.inference_mode()
    def predict(
        self, network: nn.Module, device: torch.device, numbers: Sequence[int], workers: int,
        stopped: Callable[[], bool],
    ) -> Generator[TopK, None, None]:  # fmt: skip
        """Several views of an image: the mean of their logits, as published."""
        answer: Callable[[Tensor], Tensor] = network
        if self.inference.compile:
            require_inference_compile(self.model, device)
            answer = partial(compiled_answer, network)
        read = batches_of(self.samples, list(numbers), self.inference, self.batch_size, workers, stopped)
        with closing(read) as batches:
            for batch in batches:
                seen = normalise_images(batch.images.flatten(0, 1).to(device), self.model.mean, self.model.std)
                views = answer_in(self.inference.precision, answer, seen).float()
                logits = views.unflatten(0, batch.images.shape[:2]).mean(1)
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu().numpy()
                loss = F.cross_entropy(logits, batch.targets.to(logits.device), reduction="sum")
                yield TopK(batch.numbers, batch.targets.numpy(), best, float(loss) if self.with_loss else 0.0)

    def counts(self) -> TopKCounts:
        return TopKCounts(self.samples.classes, self.with_loss)

    def main_scores(self, counts: TopKCounts) -> dict[str, float | None]:
        result = counts.result()
        return {"top1": result["top1"], "top5": result["top5"], **loss_entry(counts)}

    def draw_answer(self, answer: TopK, place: int) -> np.ndarray:
        """The first view with its class, and with the prediction where it is another one."""
        number, classes = answer.numbers[place], self.samples.classes
        target, predicted = int(answer.targets[place]), int(answer.best[place, 0])
        text = classes[target] if predicted == target else f"{classes[predicted]} (is {classes[target]})"
        image = read_image(self.samples.folder / self.samples.names[number])
        return figures.captioned(crop_views(image, self.inference)[0], text)

    def warnings(self, trained_on: Tensor | None) -> list[str]:
        return seen_images(count_seen(trained_on, self.spec.identity(self.samples)), len(self.samples))

    def published(self, loaded: LoadedNetwork) -> dict[str, Any]:
        accuracy = None
        if self.is_validation:
            accuracy = published_accuracy(loaded.metadata, self.inference, loaded.options.activation)
        return {"published": accuracy}

    def protocol(self, counts: TopKCounts, trained_on: Tensor | None, how: dict[str, Any]) -> dict[str, Any]:
        images, total = self.samples, len(self.samples)
        top, wanted = min(5, len(images.classes)), self.spec.published.get(self.split)
        warnings = self.warnings(trained_on)
        if wanted is not None and wanted != total:
            warnings.append(
                f"{total} images, but {self.dataset} {self.split} has {wanted} as published: the figure is not "
                "comparable with published ones"
            )
        result = {
            "dataset": self.dataset,
            "split": self.split,
            "split_sha256": names_hash(images.names),
            "images": {"expected": total, "seen": total, "published": wanted},
            "rules": f"top-1 and top-{top}: the class is the first, or one of the first {top}, by its logit; several "
            "views of an image: by the mean of their logits (inplace_abn v0.1.1, test_imagenet)",
            "classes": len(images.classes),
            **how,
            "code": code_version(),
            "warnings": warnings,
        }
        if "published" in result:
            result["published"] = result.pop("published")  # to the end
        return result

    def evaluation(
        self, counts: TopKCounts, panels: list[np.ndarray], described: dict[str, Any], protocol: dict[str, Any]
    ) -> Evaluation:
        result = counts.result() | described | {"protocol": protocol}
        scalars = {"val/top1": result["top1"], "val/top5": result["top5"]} | metric_scalars(result)
        scalars |= {f"val/{name}": value for name, value in loss_entry(counts).items()}
        examples = figures.grid(panels) if panels else None
        return Evaluation(result, scalars, {} if examples is None else {EXAMPLES: examples}, None, examples)


# ------------------------------------------------------------------------------------------------- images and classes


def refuse_other_classes(images: ClassImages, known: list[str], whose: str) -> None:
    """DataError unless the folders of classes are the known ones."""
    if images.classes != known:
        strange = sorted(set(images.classes) - set(known)) or sorted(set(known) - set(images.classes))
        raise DataError(
            f"{images.folder} has {len(images.classes)} folders of classes, and {whose} are {len(known)} "
            f"({', '.join(strange[:3])} on one side only): both must have the same ones"
        )


def published_accuracy(
    content: Mapping[str, Any], inference: InferenceConfig, activation: str
) -> dict[str, Any] | None:
    """Published accuracies in percent of a recipe's network, or of a published file, under the same inference."""
    tables = read_json_table("paper")
    options = {"resize": inference.resize, "crop": inference.crop, "crops": inference.crops}
    name = next((name for name, known in tables["protocols"].items() if known == options), "")
    recipe, known = content["config"].get("experiment"), content.get("known")
    trained = content["config"]["model"]["activation"]
    for row in tables["rows"]:
        backbone = content["config"]["model"]["backbone"].removesuffix("_pooled")
        same = (row["recipe"] == recipe and f"_{backbone}" in recipe) or (known and row.get("weights") == known)
        accuracies = row.get("top1_top5", {})
        if same and row.get("activation", trained) == activation and name in accuracies:
            where = f"Table {row['table']} of the paper" if isinstance(row["table"], int) else "official README"
            top1, top5 = accuracies[name]
            return {"top1": top1, "top5": top5, "of": f"{row['row']} ({where})"}
    return None
