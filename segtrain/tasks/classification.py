"""The task of naming whole pictures: its data, its loss and its scores, as the training loop (training.py) wants them.

segmentation.py is the same for pixels.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segtrain.config import DatasetConfig, EvaluateConfig, InferenceConfig, ModelConfig, TrainConfig, refuse_other_task
from segtrain.console import Progress, say
from segtrain.data.classify.loader import TrainingPictures, Views, batches_of
from segtrain.data.classify.samples import Pictures
from segtrain.data.classify.views import crop_views
from segtrain.data.dataset import classification_spec, list_pictures
from segtrain.data.images import read_image
from segtrain.data.labels import read_json_table
from segtrain.device import describe_device, resolve_device
from segtrain.distributed.group import World, all_reduce_arrays
from segtrain.errors import DataError
from segtrain.files import write_atomically
from segtrain.losses import Loss
from segtrain.scoring import figures as pictures
from segtrain.scoring.inference import normalise
from segtrain.scoring.report import code_version, file_hash, fingerprints, names_hash, print_table
from segtrain.tasks.evaluation import Found, Watch, describe, restored, result_folder

BATCH = 32  # views of pictures that are looked at together


class PictureCrossEntropy(Loss):
    """Cross-entropy of whole pictures, all alike."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def count(self, target: Tensor) -> float:
        return len(target)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits: (N, C); target: int64 (N,) -> (N,)."""
        return F.cross_entropy(logits.float(), target, reduction="none", label_smoothing=self.label_smoothing)


class Answer(NamedTuple):
    """numbers: of the pictures. best: int64 (N, min(5, C)), the classes of the highest scores, the highest first."""

    numbers: list[int]
    targets: np.ndarray
    best: np.ndarray


class Classification:
    """What a training of `config` learns from and is judged by. DataError where the data are not there."""

    measure = "top1"
    finals = ("top1", "top5")
    shown = "pictures of"
    panels = "val/pictures"
    table = None

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.samples = list_pictures(config.dataset, config.dataset.train_split)
        self.val_samples = list_pictures(config.dataset, config.dataset.val_split)
        refuse_other_classes(self.val_samples, self.samples.classes, f"those of {self.samples.folder}")
        if config.trainer.overfit is not None:
            self.samples = self.val_samples = self.samples.first(config.trainer.overfit)
        self.num_classes = len(self.samples.classes)

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """Nothing that config.py does not know."""

    @property
    def pictures(self) -> list[str]:
        return classification_spec(self.config.dataset).identity(self.samples)

    @property
    def classes(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        return {"names": self.samples.classes, "of": "pictures"}

    def loss(self) -> Loss:
        return PictureCrossEntropy(self.config.loss.label_smoothing)

    def check(self) -> None:
        """Nothing: reading 1.28 million pictures takes hours, and a damaged one is named when its turn comes."""

    def data(self) -> TrainingPictures:
        return TrainingPictures(self.samples, self.config.augmentation, self.config.trainer.seed)

    def drawn(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, str]:
        name = self.samples.classes[int(target)]
        return titled(np.clip(image, 0, 255).astype(np.uint8), name), f"class {name}"

    def sheet(self, rows: list[np.ndarray]) -> np.ndarray:
        return grid(rows)

    def told(self, result: Mapping[str, Any]) -> str:
        return f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %"

    def write(self, folder: Path, result: dict[str, Any], confusion: Any) -> None:
        write_result(folder, result, [])

    def validate(
        self, network: nn.Module, on: torch.device, world: World, workers: int, watch: Watch, kept: int
    ) -> Found:
        """Accuracies over the pictures of all processes. Every process calls it. kept: pictures to draw."""
        config, some = self.config, self.val_samples
        network.eval()
        mine = list(range(world.rank, len(some), world.size))
        answers = named(network, config.model, on, some, mine, config.inference, min(workers, len(mine)))
        rounds = -(-len(range(0, len(some), world.size)) // batch_size(config.inference))
        result, panels = accuracies(watch(answers, rounds), some, len(mine), config.inference, kept)
        drawings = {self.panels: grid(panels)} if panels else {}
        split = "train" if config.trainer.overfit is not None else config.dataset.val_split

        def card(trained_on: torch.Tensor, how: dict[str, Any]) -> dict[str, Any]:
            return protocol(config.dataset, split, some, seen_in_training(trained_on, config.dataset, some), how)

        return Found(result, {"val/top1": result["top1"], "val/top5": result["top5"]}, drawings, card)


# ---------------------------------------------------------------------------------------------------- counting


def batch_size(options: InferenceConfig) -> int:
    return max(1, BATCH // 10) if options.crops == "ten" else BATCH


@torch.inference_mode()
def named(
    network: nn.Module, model: ModelConfig, on: torch.device, some: Pictures, numbers: list[int],
    options: InferenceConfig, workers: int,
) -> Iterator[Answer]:  # fmt: skip
    """The network's answers, in batches. Several views of a picture: the mean of their logits, as published."""
    batch: Views
    for batch in batches_of(some, numbers, options, batch_size(options), workers):
        images = batch.images.flatten(0, 1).to(on)
        logits = network(normalise(images, model.mean, model.std)).float()
        logits = logits.unflatten(0, batch.images.shape[:2]).mean(1)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu().numpy()
        yield Answer(batch.numbers, batch.targets.numpy(), best)


def accuracies(
    answers: Iterable[Answer], some: Pictures, total: int, options: InferenceConfig, kept: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Counts of all processes as fractions, and `kept` pictures of this one with what was said of them."""
    classes = len(some.classes)
    right, in_five, seen = np.zeros(classes, np.int64), np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    shown = {round(i * (total - 1) / max(kept - 1, 1)) for i in range(kept)}
    panels: list[np.ndarray] = []
    progress, done = Progress("evaluating", total), 0
    for answer in answers:
        hits = answer.best == answer.targets[:, None]
        np.add.at(seen, answer.targets, 1)
        np.add.at(right, answer.targets, hits[:, 0])
        np.add.at(in_five, answer.targets, hits.any(1))
        for place, number in enumerate(answer.numbers):
            if done + place in shown:
                panels.append(captioned(some, number, int(answer.best[place, 0]), options))
        done += len(answer.numbers)
        progress.show(done)
    all_reduce_arrays(right, in_five, seen)
    each = {name: float(right[i] / seen[i]) if seen[i] else None for i, name in enumerate(some.classes)}
    images = int(seen.sum())
    result = {"top1": int(right.sum()) / images, "top5": int(in_five.sum()) / images, "images": images}
    return result | {"per_class_top1": each}, panels


def protocol(
    data: DatasetConfig, split: str, some: Pictures, warnings: list[str], how: dict[str, Any]
) -> dict[str, Any]:
    """The card in evaluation.json."""
    top, wanted = min(5, len(some.classes)), classification_spec(data).published.get(split)
    if wanted is not None and wanted != len(some):
        warnings = [*warnings, f"{len(some)} pictures, but {data.name} {split} has {wanted} as published: "
                               "the figure is not comparable with published ones"]  # fmt: skip
    return {
        "dataset": data.name,
        "split": split,
        "split_sha256": names_hash(some.names),
        "images": {"expected": len(some), "seen": len(some), "published": wanted},
        "rules": f"top-1 and top-{top}: the class is the first, or one of the first {top}, by its logit; several views "
        "of a picture: by the mean of their logits (inplace_abn v0.1.1, test_imagenet)",
        "classes": len(some.classes),
        **how,
        "code": code_version(),
        "warnings": warnings,
    }


def seen_in_training(trained_on: torch.Tensor | None, data: DatasetConfig, some: Pictures) -> list[str]:
    if trained_on is None:
        return []
    twice = int(torch.isin(fingerprints(classification_spec(data).identity(some)), trained_on).sum())
    text = f"{twice} of the {len(some)} pictures were in this checkpoint's training: the score is too high"
    return [text] if twice else []


# ---------------------------------------------------------------------------------------------------- pictures


def captioned(some: Pictures, number: int, said: int, options: InferenceConfig) -> np.ndarray:
    """A picture with its class and what the network took it for."""
    target = int(some.targets[number])
    word = some.classes[target] if said == target else f"{some.classes[said]} (is {some.classes[target]})"
    return titled(crop_views(read_image(some.folder / some.names[number]), options)[0], word)


def titled(image: np.ndarray, text: str) -> np.ndarray:
    """uint8 (h, w, 3) with a line of text below."""
    line = np.full((18, image.shape[1], 3), 255, np.uint8)
    cv2.putText(line, text[: image.shape[1] // 7], (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([image, line])


def grid(panels: list[np.ndarray], columns: int = 6) -> np.ndarray:
    """Panels of one size in rows."""
    blank = np.full_like(panels[0], 255)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = min(columns, len(panels))
    return np.concatenate([np.concatenate(row + [blank] * (width - len(row)), axis=1) for row in rows])


# ---------------------------------------------------------------------------------------------------- the command


def evaluate_share(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """`segtrain evaluate dataset=imagenet`: top-1 and top-5 of a checkpoint beside what is published for it."""
    on = resolve_device(config.device)
    path = Path(config.checkpoint or "")
    data, options = config.dataset, config.inference
    split = config.split or data.val_split
    network, model, content = restored(path, on, config.checkpoint_weights, config.activation)
    refuse_other_task(path, model.head, type(data), data.name)
    some = list_pictures(data, split)
    say(f"checkpoint  {path}, step {content['step']}")
    say(f"evaluating  {data.name} {split}, inference {options.name}, on {describe_device(on)}")
    known = content["classes"]["names"]
    if content["classes"].get("numbered") and len(known) == len(some.classes):
        say("classes     numbered in the order of the folders' names, as ImageNet's published networks have them")
        known = some.classes
    refuse_other_classes(some, known, f"the classes of {path}")
    warnings = seen_in_training(content.get("trained_on"), data, some)
    mine = list(range(world.rank, len(some), world.size))
    answers = named(network, model, on, some, mine, options, min(config.loader.count(), len(mine)))
    result, panels = accuracies(answers, some, len(mine), options, config.pictures)
    result |= describe(data.name, split, options, str(path), content["step"])
    how = {"inference": result["inference"], "precision": "float32", "processes": world.size,
           "weights": "averaged" if "ema" in content and config.checkpoint_weights != "raw" else "raw",
           "activation": model.activation, "checkpoint_sha256": file_hash(path), "step": content["step"]}  # fmt: skip
    figures = published(content, options, model.activation) if split == data.val_split else None
    result["protocol"] = protocol(data, split, some, warnings, how) | {"published": figures}
    if world.rank == 0:
        print_table(result)
        if figures is not None:
            say(f"published       top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %  {figures['of']}\n")
        folder = result_folder(config, path, content, split)
        write_result(folder, result, panels)
        print(folder / "evaluation.json")
    return result


def published(content: Mapping[str, Any], options: InferenceConfig, activation: str) -> dict[str, Any] | None:
    """What was published of a recipe's network, or of a published file, evaluated in this way: percent."""
    tables = read_json_table("paper")
    way = {"resize": options.resize, "crop": options.crop, "crops": options.crops}
    inference = next((name for name, known in tables["protocols"].items() if known == way), "")
    recipe, known = content["config"].get("experiment"), content.get("known")
    trained = content["config"]["model"]["activation"]
    for row in tables["rows"]:
        backbone = content["config"]["model"]["backbone"].removesuffix("_pooled")
        this = (row["recipe"] == recipe and f"_{backbone}" in recipe) or (known and row.get("weights") == known)
        figures = row.get("top1_top5", {})
        if this and row.get("activation", trained) == activation and inference in figures:
            where = f"Table {row['table']} of the paper" if isinstance(row["table"], int) else "official README"
            top1, top5 = figures[inference]
            return {"top1": top1, "top5": top5, "of": f"{row['row']} ({where})"}
    return None


def refuse_other_classes(some: Pictures, known: list[str], whose: str) -> None:
    """DataError unless the folders of classes are the known ones."""
    if some.classes != known:
        strange = sorted(set(some.classes) - set(known)) or sorted(set(known) - set(some.classes))
        raise DataError(
            f"{some.folder} has {len(some.classes)} folders of classes, and {whose} are {len(known)} "
            f"({', '.join(strange[:3])} on one side only): both must have the same ones"
        )


def write_result(folder: Path, result: dict[str, Any], panels: list[np.ndarray]) -> None:
    """evaluation.json and, where there are panels, predictions.png."""
    if panels:
        pictures.write(folder / "predictions.png", grid(panels))
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=2).encode() + b"\n")
