"""From the answers of the solver to the words that a user types."""

from collections.abc import Mapping
from typing import NamedTuple

from segtrain.config import TrainConfig, classifies
from segtrain.data.labels import published_table
from segtrain.data.registry import dataset_spec, label_table, list_images, target_of
from segtrain.engine.planning.solve import LEAST, Answer, micro_batch
from segtrain.errors import DataError

IMAGENET_CLASSES = 1000


class Advice(NamedTuple):
    """Words that make a training fit, and what they do. exact: whether the gradient stays as it is."""

    overrides: list[str]
    effect: str
    exact: bool = True


def number_of_classes(config: TrainConfig) -> int:
    """Classes that the network distinguishes. Where the data are not there, as published: those of the default version,
    or ImageNet's 1000; DataError for a dataset of the user's own."""
    try:
        if not classifies(config.dataset):
            return label_table(config.dataset).num_classes
        return len(list_images(config.dataset, config.dataset.train_split).classes)
    except DataError:
        published = () if classifies(config.dataset) else dataset_spec(config.dataset).tables
        if not published and not classifies(config.dataset):
            raise
        return published_table(published[0]).num_classes if published else IMAGENET_CLASSES


def image_size_of(config: TrainConfig, given: list[int] | None = None) -> tuple[int, int] | None:
    """[height, width] of a large validation image; None where nothing says it."""
    if given is not None:
        return given[0], given[1]
    if classifies(config.dataset):
        return None
    own = getattr(target_of(config.dataset), "size", None)  # of the built-in street scenes
    return dataset_spec(config.dataset).image_size if own is None else (own[0], own[1])


def model_words(config: TrainConfig, way: TrainConfig) -> list[str]:
    """The words that turn the configured model into that of another way."""
    return [
        f"model.{key}={getattr(way.model, key)}"
        for key in ("norm", "recompute", "keep", "norm_variant", "scale")
        if getattr(way.model, key) != getattr(config.model, key)
    ]


def advise(
    config: TrainConfig, ways: Mapping[str, TrainConfig], answers: Mapping[str, Answer], configured: str, devices: int,
    memory: int,
) -> list[Advice]:  # fmt: skip
    """What to type: as configured where that fits, else other ways that hold the batch; then larger or smaller ones.

    Ways with the configured norm come first, then those that keep more: they cost less time.
    """
    own, wanted = answers[configured], micro_batch(config, devices) * devices * config.trainer.accumulation
    found: list[Advice] = []
    if own.now.peak > memory:
        fitting = [name for name, answer in answers.items() if answer.now.peak <= memory]
        fitting.sort(
            key=lambda name: (
                ways[name].model.norm != config.model.norm, ways[name].model.keep != "exact", -answers[name].now.peak
            )
        )  # fmt: skip
        for name in fitting[:4]:
            words = model_words(config, ways[name])
            found.append(Advice(words, f"{wanted} images fit", ways[name].model.keep == "exact"))
        parts = divided(config, own, devices, memory)
        if parts is not None:
            found.append(Advice([f"trainer.accumulation={parts}"], f"{wanted} images a step in {parts} micro-batches"))
    if own.batch and own.batch != config.trainer.batch_size:
        found.append(Advice([f"trainer.batch_size={own.batch}"], "the largest batch for this crop"))
    if own.crop is not None and list(own.crop) != config.augmentation.crop_size:
        word = f"augmentation.crop_size=[{own.crop[0]},{own.crop[1]}]"
        found.append(Advice([word], "the largest crop for this batch"))
    return found


def divided(config: TrainConfig, answer: Answer, devices: int, memory: int) -> int | None:
    """The smallest trainer.accumulation with which the configured batch fits, None where none does."""
    batch, area = config.trainer.batch_size, answer.now.crop[0] * answer.now.crop[1]
    more = 0 if devices > 1 else answer.now.static["gradients"]  # of earlier micro-batches; DDP's buckets hold them
    if isinstance(batch, str):
        return None
    for parts in range(config.trainer.accumulation + 1, batch // (LEAST * devices) + 1):
        if answer.line.at(-(-batch // (devices * parts)) * area) + more <= memory:
            return parts
    return None
