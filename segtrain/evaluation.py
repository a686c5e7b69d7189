"""Scoring a network on a split. The validation inside training and `segtrain evaluate` are this same code."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from segtrain import checkpoint, pictures
from segtrain.config import DatasetConfig, EvaluateConfig, InferenceConfig, ModelConfig
from segtrain.data.datasets import label_table, split_samples
from segtrain.data.labels import LabelTable, read_label
from segtrain.data.loader import evaluation_samples
from segtrain.data.sample import Sample
from segtrain.device import describe_device, resolve
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.inference import normalise, predict
from segtrain.log import Progress, say
from segtrain.metrics import ConfusionMatrix, PositionPrior
from segtrain.models import Segmenter, from_config

PRIOR_SAMPLES = 300  # training labels that the position prior is counted from


class Trained(NamedTuple):
    """A network with what is needed to use it. The network is in eval mode on `device`."""

    network: Segmenter
    table: LabelTable
    options: ModelConfig
    device: torch.device

    def predict(self, image: np.ndarray, inference: InferenceConfig | None = None) -> np.ndarray:
        """RGB uint8 (H, W, 3) -> train ids uint8 (H, W)."""
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(self.device)
        ready = normalise(tensor, self.options.mean, self.options.std)
        return predict(self.network, ready, inference or InferenceConfig())


class Prediction(NamedTuple):
    """image uint8 (H, W, 3), target and prediction uint8 (H, W) train ids."""

    sample: Sample
    image: np.ndarray
    target: np.ndarray
    prediction: np.ndarray


def load(path: Path | str, device: str = "auto") -> Trained:
    """The network in a checkpoint file, ready for `.predict(image)`; device: auto, cuda or cpu."""
    return restore(Path(path), resolve(device))[0]


def restore(path: Path, on: torch.device) -> tuple[Trained, dict[str, Any]]:
    """The network in a checkpoint file, and all that the file holds."""
    content = checkpoint.load(path)
    table = LabelTable.from_dict(content["classes"])
    options = ModelConfig(**content["config"]["model"])
    network = from_config(options, table.num_classes)
    checkpoint.load_weights(network, content["model"], path)
    return Trained(network.eval().to(on), table, options, on), content


def predictions(
    trained: Trained, samples: list[Sample], inference: InferenceConfig, workers: int
) -> Iterator[Prediction]:
    """The network's answer for every sample, each once, in order."""
    trained.network.eval()
    for sample, image, target in evaluation_samples(samples, trained.table, workers):
        yield Prediction(sample, image, target, trained.predict(image, inference))


def score(
    answers: Iterable[Prediction], total: int, table: LabelTable, prior: PositionPrior | None, kept: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Scores at the pictures' own resolution, and `kept` panels image | target | prediction, evenly spread."""
    matrix, prior_matrix = ConfusionMatrix(table.num_classes), ConfusionMatrix(table.num_classes)
    shown = {round(i * (total - 1) / max(kept - 1, 1)) for i in range(kept)}
    panels, seen = [], 0
    progress = Progress("evaluating", total)
    for answer in answers:
        matrix.add(answer.target, answer.prediction)
        if prior is not None:
            prior_matrix.add(answer.target, prior.predict(answer.target.shape))
        if seen in shown:
            panels.append(pictures.triple(answer.image, answer.target, answer.prediction, table))
        seen += 1
        progress.show(seen)
    if not matrix.counts.any():
        raise DataError("not one labelled pixel in these pictures: there is nothing to score")
    result = matrix.scores(table.names)
    result["images"] = seen
    if prior is not None:
        result["position_prior_miou"] = prior_matrix.scores(table.names)["miou"]
    return result, panels


def prior_samples(data: DatasetConfig) -> list[Sample]:
    """The training samples; DataError saying how to do without them."""
    try:
        return split_samples(data, data.train_split)
    except DataError as error:
        raise DataError(f"{error}\n(the position prior is counted there; position_prior=false does without)") from error


def position_prior(samples: list[Sample], table: LabelTable) -> PositionPrior:
    """Counted from at most PRIOR_SAMPLES training labels, evenly spread."""
    prior = PositionPrior(table.num_classes)
    for sample in samples[:: max(1, -(-len(samples) // PRIOR_SAMPLES))]:
        if sample.label is not None:
            prior.add(table.encode(read_label(sample.label), sample.label))
    return prior


def print_table(result: dict[str, Any]) -> None:
    """Per-class IoU in percent, then the summary lines."""
    width = max(len(name) for name in result["per_class"])
    print(f"\n{'class':<{width}}   IoU %")
    for name, value in result["per_class"].items():
        print(f"{name:<{width}}   {'  -  ' if value is None else f'{100 * value:5.1f}'}")
    classes = f"{result['classes_averaged']} classes ({result['classes_in_ground_truth']} occur in the ground truth)"
    print(f"\nmIoU            {100 * result['miou']:5.1f} %  over {classes}, {result['images']} images")
    print(f"pixel accuracy  {100 * result['pixel_accuracy']:5.1f} %")
    prior = result.get("position_prior_miou")
    if prior:
        ratio = f"the model has {result['miou'] / prior:.2f} times that"
        print(f"position prior  {100 * prior:5.1f} %  mIoU of a predictor that knows a pixel's place only; {ratio}")
    print(flush=True)


def write_result(folder: Path, result: dict[str, Any], panels: list[np.ndarray], table: LabelTable) -> None:
    """evaluation.json and predictions.png (image | target | prediction)."""
    if panels:
        pictures.write(folder / "predictions.png", pictures.sheet(panels, table))
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=2).encode() + b"\n")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """`segtrain evaluate`: score a checkpoint, print the table, write evaluation.json. Returns its content."""
    on = resolve(config.device)
    path = Path(config.checkpoint or "")
    trained, content = restore(path, on)
    data = config.dataset
    split = config.split or data.val_split
    say(f"checkpoint  {path}, step {content['step']}")
    say(f"evaluating  {data.name} {split}, inference {config.inference.name}, on {describe_device(on)}")
    table = label_table(data)
    if table.names != trained.table.names:
        raise UsageError(
            f"{path} predicts {trained.table.num_classes} classes ({', '.join(trained.table.names[:4])}, ...), "
            f"dataset={data.name} has {table.num_classes} ({', '.join(table.names[:4])}, ...): "
            "evaluate on a data set with the same classes"
        )
    samples = split_samples(data, split)
    if all(sample.label is None for sample in samples):
        raise DataError(
            f"the split {split!r} of dataset={data.name} has no labels: segtrain predict writes predictions"
        )
    prior = position_prior(prior_samples(data), table) if config.position_prior else None
    workers = min(config.loader.count(), len(samples))
    answers = predictions(trained._replace(table=table), samples, config.inference, workers)
    result, panels = score(answers, len(samples), table, prior, config.pictures)
    result |= describe(data.name, split, config.inference, str(path), content["step"])
    print_table(result)
    name = f"{data.name}-{split}-{config.inference.name}"
    folder = Path(config.output) if config.output else path.parent / "evaluations" / name
    write_result(folder, result, panels, table)
    print(folder / "evaluation.json")
    return result


def describe(dataset: str, split: str, inference: InferenceConfig, weights: str, step: int) -> dict[str, Any]:
    """What was evaluated and how, for evaluation.json."""
    return {
        "dataset": dataset,
        "split": split,
        "inference": {
            "name": inference.name,
            "scales": list(inference.scales),
            "flip": inference.flip,
            "tile": inference.tile,
        },
        "checkpoint": weights,
        "step": step,
    }
