"""Scoring a network on a split. The validation inside training and `segtrain evaluate` are this same code."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from segtrain.commands.convert import published_figure, run_content
from segtrain.config import (
    DatasetConfig,
    EvaluateConfig,
    InferenceConfig,
    ModelConfig,
    classifies,
    names_pictures,
    with_defaults,
)
from segtrain.console import Progress, say
from segtrain.data.dataset import dataset_spec, label_table, split_samples
from segtrain.data.labels import LabelTable, read_label
from segtrain.data.loader import EvaluationItem, evaluation_samples
from segtrain.data.sample import Sample
from segtrain.device import describe_device, resolve_device
from segtrain.distributed.group import init_distributed
from segtrain.errors import DataError, UsageError
from segtrain.models import BACKBONES, HEADS, Classifier, Segmenter, from_config
from segtrain.models.preprocess import normalise_images
from segtrain.scoring import figures as pictures
from segtrain.scoring.inference import Answer, answer, fitted, nearest
from segtrain.scoring.report import file_hash, print_table, protocol, seen_in_training, summarised, write_result
from segtrain.scoring.scores import PositionPrior, Scores
from segtrain.weights import checkpoint

PRIOR_SAMPLES = 300  # training labels that the position prior is counted from


class Trained(NamedTuple):
    """A network with what is needed to use it. The network is in eval mode on `device`."""

    network: Segmenter
    table: LabelTable
    options: ModelConfig
    device: torch.device

    def predict(self, image: np.ndarray, inference: InferenceConfig | None = None) -> np.ndarray:
        """RGB uint8 (H, W, 3) -> train ids uint8 (H, W)."""
        return self.answer(image, inference).train_ids

    def answer(self, image: np.ndarray, inference: InferenceConfig | None = None, probability: bool = False) -> Answer:
        """RGB uint8 (H, W, 3) -> train ids uint8 (H, W) and, if asked for, their probabilities float32 (H, W)."""
        options = inference or InferenceConfig()
        seen = image if options.longest_side is None else fitted(image, options.longest_side)
        tensor = torch.from_numpy(np.ascontiguousarray(seen.transpose(2, 0, 1)))[None].to(self.device)

        def network(window: torch.Tensor) -> torch.Tensor:
            ready = normalise_images(window, self.options.mean, self.options.std)
            logits: torch.Tensor = self.network(ready, upsample=False)
            return logits

        found = answer(network, tensor, options, probability)
        if options.longest_side is None:
            return found
        size, certain = (image.shape[0], image.shape[1]), found.probability
        return Answer(nearest(found.train_ids, size), None if certain is None else nearest(certain, size))


# (items, most of them that any process has) -> the items; it may end a validation between two of them.
Watch = Callable[[Iterator[Any], int], Iterator[Any]]


class Found(NamedTuple):
    """What a validation of a training found.

    result: for evaluation.json. scalars, drawings: for the log, by name; RGB uint8 (H, W, 3). card(trained_on, how):
    what the scores say of themselves. confusion: int64 (C, C + 1) of a segmentation.
    """

    result: dict[str, Any]
    scalars: dict[str, float | None]
    drawings: dict[str, np.ndarray]
    card: Callable[[torch.Tensor, dict[str, Any]], dict[str, Any]]
    confusion: np.ndarray | None = None


class Prediction(NamedTuple):
    """What was labelled, and the network's answer: uint8 (H, W) train ids."""

    item: EvaluationItem
    prediction: np.ndarray


def load(path: Path | str, device: str = "auto") -> Trained:
    """The network in a checkpoint or other file of weights, ready for `.predict(image)`; device: auto, cuda or cpu."""
    return restore(Path(path), resolve_device(device))[0]


def restore(
    path: Path, on: torch.device, weights: str = "auto", activation: str | None = None
) -> tuple[Trained, dict[str, Any]]:
    """The segmentation network in a checkpoint file, and all that the file holds; UsageError for a classifier."""
    network, options, content = restored(path, on, weights, activation)
    if not isinstance(network, Segmenter):
        raise UsageError(names_pictures(path))
    return Trained(network, LabelTable.from_dict(content["classes"]), options, on), content


def restored(
    path: Path, on: torch.device, weights: str = "auto", activation: str | None = None
) -> tuple[Segmenter | Classifier, ModelConfig, dict[str, Any]]:
    """The network in a checkpoint file, in eval mode, its options, and all that the file holds; a published file of
    weights will do, as it is.

    weights: the averaged ones where there are any (auto), those or none (ema), or those of the last step (raw). Says
    which, where there is a choice. activation: instead of the one that the network was trained with.
    """
    content = run_content(path)
    if "report" in content:
        say(content["report"])
    if weights == "ema" and "ema" not in content:
        raise UsageError(f"checkpoint_weights=ema: {path} has no averaged weights; train with trainer.ema_decay=0.999")
    averaged = "ema" in content and weights != "raw"
    if "ema" in content:
        say(f"weights     {'averaged weights' if averaged else 'raw weights of the last step'} (checkpoint_weights=)")
    options = ModelConfig(**with_defaults(content["config"])["model"])
    if activation is not None and activation != options.activation:
        in_place = options.norm.startswith("inplace_abn")
        norm = f"; norm abn, as {options.norm} but for the inverse, which only training needs" if in_place else ""
        say(f"activation  {activation}, where {options.activation} was trained with{norm}")
        options.activation = activation
        if in_place:
            options.norm, options.norm_variant = "abn", "one"
        options.check()
    for part, name, known in (("backbone", options.backbone, BACKBONES), ("head", options.head, HEADS)):
        if name not in known and name != "classifier":
            raise UsageError(
                f"{path} was trained with model.{part}={name}, which is not known here: "
                "give plugins=[FILE] with the file that defines it"
            )
    network = from_config(options, len(content["classes"]["names"]))
    checkpoint.load_weights(network, content["ema" if averaged else "model"], path)
    return network.eval().to(on), options, content


def predictions(
    trained: Trained, samples: list[Sample], inference: InferenceConfig, workers: int
) -> Iterator[Prediction]:
    """The network's answer for every sample, each once, in order."""
    trained.network.eval()
    for item in evaluation_samples(samples, trained.table, workers):
        yield Prediction(item, trained.predict(item.image, inference))


def score(
    answers: Iterable[Prediction], total: int, counted: Scores, prior: PositionPrior | None, kept: int
) -> tuple[Scores | None, list[np.ndarray]]:
    """Counts at the pictures' own resolution into `counted`. Returns the prior's counts, and `kept` panels image |
    target | prediction, evenly spread. total: how many answers there will be."""
    table = counted.table
    of_prior = Scores(table) if prior is not None else None
    shown = {round(i * (total - 1) / max(kept - 1, 1)) for i in range(kept)}
    panels = []
    progress = Progress("evaluating", total)
    for number, (item, prediction) in enumerate(answers):
        counted.add(item.ids, table.decode(prediction), item.instances)
        if of_prior is not None and prior is not None:
            of_prior.add(item.ids, table.decode(prior.predict(item.target.shape)))
        if number in shown:
            panels.append(pictures.triple(item.image, item.target, prediction, table))
        progress.show(number + 1)
    return of_prior, panels


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
            prior.add((sample.table or table).encode(read_label(sample.label), sample.label))
    return prior


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """`segtrain evaluate`: score a checkpoint, print the table, write evaluation.json. Returns its content."""
    with init_distributed() as world:
        if classifies(config.dataset):
            from segtrain.tasks import classification  # which imports this file

            return classification.evaluate_share(config, world)
        return evaluate_share(config, world.rank, world.size)


def evaluate_share(config: EvaluateConfig, rank: int, processes: int) -> dict[str, Any]:
    """Each of several processes counts every n-th picture; the counts are added up, so that each counts once."""
    on = resolve_device(config.device)
    path = Path(config.checkpoint or "")
    trained, content = restore(path, on, config.checkpoint_weights, config.activation)
    data = config.dataset
    split = config.split or data.val_split
    say(f"checkpoint  {path}, step {content['step']}")
    say(f"evaluating  {data.name} {split}, inference {config.inference.name}, on {describe_device(on)}")
    table = label_table(data)
    refuse_other_classes(trained, table, path, data.name)
    samples = split_samples(data, split)
    if all(sample.label is None for sample in samples):
        raise DataError(
            f"the split {split!r} of dataset={data.name} has no labels: segtrain predict writes predictions"
        )
    warnings = seen_in_training(content.get("trained_on"), data, samples)
    for text in warnings:
        say(f"warning     {text}")
    prior = position_prior(prior_samples(data), table) if config.position_prior else None
    mine = samples[rank::processes]
    answers = predictions(trained._replace(table=table), mine, config.inference, min(config.loader.count(), len(mine)))
    counted = Scores(table, dataset_spec(data).rules, config.boundary)
    of_prior, panels = score(answers, len(mine), counted, prior, config.pictures)
    for scores in (counted, of_prior):
        if scores is not None:
            scores.all_reduce()
    result = summarised(counted, of_prior) | describe(data.name, split, config.inference, str(path), content["step"])
    averaged = "ema" in content and config.checkpoint_weights != "raw"
    how = {"inference": result["inference"], "precision": "float32", "processes": processes,
           "weights": "averaged" if averaged else "raw", "activation": trained.options.activation,
           "checkpoint_sha256": file_hash(path),
           "step": content["step"]}  # fmt: skip
    if (figure := published_figure(content)) is not None:
        how["published"] = figure
    result["protocol"] = protocol(counted, data, split, samples, warnings, how)
    if rank == 0:
        print_table(result)
        folder = result_folder(config, path, content, split)
        write_result(folder, result, panels, table, counted.evaluated())
        print(folder / "evaluation.json")
    return result


def result_folder(config: EvaluateConfig, path: Path, content: dict[str, Any], split: str) -> Path:
    """output=, or one in the run of that checkpoint, named by what was evaluated and how."""
    if config.output:
        return Path(config.output)
    name = "-".join(
        [config.dataset.name, split, config.inference.name, *([config.activation] if config.activation else [])]
    )
    published = "report" in content
    return (Path("segtrain-out/evaluate") / path.name if published else path.parent / "evaluations") / name


def refuse_other_classes(trained: Trained, table: LabelTable, path: Path, dataset: str) -> None:
    if table.names != trained.table.names:
        raise UsageError(
            f"{path} predicts {trained.table.num_classes} classes ({', '.join(trained.table.names[:4])}, ...), "
            f"dataset={dataset} has {table.num_classes} ({', '.join(table.names[:4])}, ...): "
            "take a data set with the same classes"
        )


def describe(dataset: str, split: str, inference: InferenceConfig, weights: str, step: int) -> dict[str, Any]:
    """What was evaluated and how, for evaluation.json."""
    return {
        "dataset": dataset,
        "split": split,
        "inference": asdict(inference),
        "checkpoint": weights,
        "step": step,
    }
