"""Scores an engine that `segtrain export` wrote, beside the network that it was made of."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segtrain.config import EvaluateConfig, InferenceConfig, ModelConfig, check_channels
from segtrain.data.class_mapping import require_same_labels
from segtrain.data.loader import EvaluationItem, evaluation_samples
from segtrain.data.registry import dataset_spec, label_table, split_samples
from segtrain.distributed.group import all_reduce_arrays
from segtrain.errors import DataError
from segtrain.models import Segmenter
from segtrain.scoring.engine import CHANGED, Engine
from segtrain.scoring.predictor import LoadedNetwork, Predictor, naming_image
from segtrain.scoring.report import Evaluation, summarise
from segtrain.scoring.scores import Scores
from segtrain.tasks.segmentation import LabelledImage, SegmentationCounts, SegmentationEvaluator

BATCHES = 4  # images that the engine also predicts in a batch of two


class EngineAnswer(NamedTuple):
    """item, prediction: as of LabelledImage. beside: the network's prediction, uint8 (H, W). batched: the engine's
    in a batch of two. Both None where they are not asked for."""

    item: EvaluationItem
    prediction: np.ndarray
    beside: np.ndarray | None
    batched: np.ndarray | None


class EngineCounts:
    """What an evaluation counts, and the pixels that the network of the checkpoint predicts otherwise."""

    def __init__(self, counts: SegmentationCounts, network: Scores | None) -> None:
        self.counts, self.network = counts, network
        # Pixels compared, and changed from the network; compared, and changed by a batch of two.
        self.pixels = np.zeros(4, np.int64)

    def add_answer(self, answer: EngineAnswer) -> None:
        item, prediction = answer.item, answer.prediction
        self.counts.add_answer(LabelledImage(item, prediction))
        for at, other in ((0, answer.beside), (2, answer.batched)):
            if other is not None:
                self.pixels[at] += prediction.size
                self.pixels[at + 1] += int((prediction != other).sum())
        if self.network is not None and answer.beside is not None:
            self.network.add(item.ids, self.network.table.decode(answer.beside), item.instances)

    def all_reduce(self) -> None:
        self.counts.all_reduce()
        all_reduce_arrays(self.pixels)
        if self.network is not None:
            self.network.all_reduce()


class EngineEvaluator(SegmentationEvaluator):
    """`network` of `run` is the checkpoint's, which is computed beside the engine, or nn.Identity for the engine alone.

    DataError, after all images, if more than `CHANGED` of the pixels differ.
    """

    engine: Engine

    @classmethod
    def of_engine(cls, config: EvaluateConfig, engine: Engine, loaded: LoadedNetwork | None) -> "EngineEvaluator":
        """The evaluator that `segtrain evaluate engine=` asks for. UsageError if the classes are not the dataset's."""
        engine.refuse(config.inference)
        data, table = config.dataset, label_table(config.dataset)
        require_same_labels(engine.table, table, engine.path, data.name, has_taxonomy=False)
        if loaded is not None:
            made = cls.of_checkpoint(config, engine.path, loaded)
        else:
            model = ModelConfig(in_channels=len(engine.metadata["mean"]))
            check_channels(model, data)
            split = config.split or data.val_split
            prior = split_samples(data, data.train_split) if config.position_prior else None
            made = cls(data, split, split_samples(data, split), table, model, config.inference, prior)
        assert isinstance(made, EngineEvaluator)
        made.engine = engine
        return made

    def predict(  # type: ignore[override]
        self, network: nn.Module, device: torch.device, numbers: Sequence[int], workers: int,
        stopped: Callable[[], bool],
    ) -> Generator[EngineAnswer, None, None]:  # fmt: skip
        beside = None
        if isinstance(network, Segmenter):
            beside = Predictor(network, self.table, self.model, device)
        samples = [self.samples[number] for number in numbers]
        with closing(evaluation_samples(samples, self.table, workers, stopped)) as items:
            for number, item in enumerate(items):
                with naming_image(str(item.sample.image), item.image.shape):
                    prediction = self.engine.segment(item.image, self.inference).train_ids
                    other = None if beside is None else beside.segment(item.image, self.inference).train_ids
                    batched = in_a_batch(self.engine, item.image, self.inference) if number < BATCHES else None
                yield EngineAnswer(item, prediction, other, batched)

    def counts(self) -> EngineCounts:  # type: ignore[override]
        return EngineCounts(super().counts(), Scores(self.table, dataset_spec(self.data).rules))

    def protocol(self, counts: EngineCounts, trained_on: Tensor | None, how: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        made_of = {key: self.engine.metadata.get(key) for key in ("format", "include", "checkpoint_sha256", "torch")}
        return super().protocol(counts.counts, trained_on, {"engine": made_of, **how})

    def evaluation(  # type: ignore[override]
        self, counts: EngineCounts, panels: list[np.ndarray], described: dict[str, Any], protocol: dict[str, Any]
    ) -> Evaluation:
        compared, changed, batched, by_batch = counts.pixels.tolist()
        found: dict[str, Any] = {"batched_pixels": batched, "changed_by_batch": by_batch}
        if compared and counts.network is not None:
            theirs = summarise(counts.network, None)
            found |= {"pixels": compared, "changed_pixels": changed, "miou_of_checkpoint": theirs["miou"]}
        for part, of, what in (
            (changed, compared, "the checkpoint"), (by_batch, batched, "itself in a batch of two"),
        ):  # fmt: skip
            if part > CHANGED * of:
                raise DataError(
                    f"{self.engine.path} predicts {part} of {of} pixels otherwise than {what} ({part / of:.2%}, "
                    f"allowed {CHANGED:.1%}), so it is not scored: export it again, or give the checkpoint it is of"
                )
        return super().evaluation(counts.counts, panels, described | {"engine": found}, protocol)


def in_a_batch(engine: Engine, image: np.ndarray, inference: InferenceConfig) -> np.ndarray:
    """The prediction of `image` RGB uint8 (H, W, 3) as the second of two: train ids uint8 (H, W)."""

    def second(images: Tensor) -> Tensor:
        return engine.run(torch.cat([images.flip(3), images]))[1:]

    return engine._replace(run=second).segment(image, inference).train_ids
