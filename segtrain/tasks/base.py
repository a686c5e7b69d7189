"""What a task offers to training, and the one evaluator that training, `segtrain evaluate` and the API use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from segtrain.config import InferenceConfig, ModelConfig, TrainConfig
from segtrain.console import Progress
from segtrain.data.labels import LabelTable
from segtrain.data.workers import never
from segtrain.distributed.group import World, equal_shares
from segtrain.losses import Loss
from segtrain.models.precision import dtype_name
from segtrain.scoring.predictor import LoadedNetwork
from segtrain.scoring.report import Evaluation

Counted = TypeVar("Counted", contravariant=True)  # the same where it is only taken
Answer = TypeVar("Answer")  # of the network, for one image or a batch of images
# (answers, rounds) -> the answers; it may end an evaluation between two of them. rounds: at least the number of
# answers, and the same in all processes.
Guard = Callable[[Iterator[Any], int], Iterator[Any]]


class NetworkFacts(NamedTuple):
    """What evaluation.json says of the network that was evaluated.

    checkpoint: its file. step: how long it was trained. trained_on: `fingerprints` of its training images, None: not
    known. protocol: further entries of the protocol.
    """

    checkpoint: str
    step: int
    trained_on: Tensor | None
    protocol: dict[str, Any]


class Counts(Protocol[Counted]):
    """What an evaluation counts; counts add up over answers and processes."""

    def add_answer(self, answer: Counted) -> None: ...

    def all_reduce(self) -> None: ...


class Evaluator(ABC, Generic[Answer]):
    """Scores networks on the images of a split.

    Each of several processes predicts and counts a part of the images, of about as many pixels as the others' parts,
    and the counts are added up, so that each image counts once. The evaluator knows neither the command nor the
    training loop around it.
    """

    batch_size = 1  # images of an answer

    def __init__(self, dataset: str, split: str, images: int, model: ModelConfig, inference: InferenceConfig) -> None:
        """dataset, split: their names in evaluation.json. images: how many. model: for mean and std of the input."""
        self.dataset = dataset
        self.split = split
        self.images = images
        self.model = model
        self.inference = inference
        self.costs: list[int] | None = None  # of each image; only several processes need them
        self.with_loss = False  # whether the cross-entropy of the predictions is counted too

    def run(
        self, network: nn.Module, device: torch.device, dist: World, workers: int, guard: Guard | None = None,
        figures: int = 0, *, facts: NetworkFacts, stopped: Callable[[], bool] = never,
    ) -> Evaluation:  # fmt: skip
        """Evaluate `network`, which is on `device`. A collective call.

        workers: loader processes of this process, at most. figures: number of example predictions to draw. stopped:
        whether the guard is about to end the evaluation; then no image is waited for. DataError for an image that
        cannot be read, or if there is nothing to score.
        """
        counts, panels = self.counted(network, device, dist, workers, guard, figures, stopped)
        described = {
            "dataset": self.dataset, "split": self.split, "inference": self.inference.stated(),
            "checkpoint": facts.checkpoint, "step": facts.step,
        }  # fmt: skip
        how = {
            "inference": described["inference"], "precision": dtype_name(self.inference.precision),
            **self.inference.execution(), **facts.protocol,
        }  # fmt: skip
        return self.evaluation(counts, panels, described, self.protocol(counts, facts.trained_on, how))

    def brief(
        self, network: nn.Module, device: torch.device, dist: World, workers: int, guard: Guard | None = None,
        stopped: Callable[[], bool] = never,
    ) -> dict[str, float | None]:  # fmt: skip
        """As `run`, but only the main scores and, `with_loss`, the loss; None where nothing is labelled."""
        counts, _ = self.counted(network, device, dist, workers, guard, 0, stopped)
        return self.main_scores(counts)

    def counted(
        self, network: nn.Module, device: torch.device, dist: World, workers: int, guard: Guard | None, figures: int,
        stopped: Callable[[], bool],
    ) -> tuple[Any, list[np.ndarray]]:  # fmt: skip
        """The counts of all processes, and this one's figures. A collective call."""
        network.eval()
        shares = self.shares(dist)
        own = shares[dist.rank]
        rounds = -(-max(map(len, shares)) // self.batch_size)
        with closing(self.predict(network, device, own, min(workers, len(own)), stopped)) as answers:
            guarded = answers if guard is None else guard(answers, rounds)
            counts, panels = self.count(guarded, len(own), figures)
        counts.all_reduce()
        return counts, panels

    def shares(self, dist: World) -> list[list[int]]:
        """The numbers of the images of each process, the same in all processes. A collective call."""
        if dist.size == 1:
            return [list(range(self.images))]
        if self.costs is None:  # only one process reads the files' sizes: what two read could differ
            self.costs = dist.all_gather(self.image_costs() if dist.main else [])[0]
        return equal_shares(self.costs, dist.size)

    def image_costs(self) -> list[int]:
        """What each image costs in relation to others."""
        return [1] * self.images

    def count(self, answers: Iterator[Answer], images: int, figures: int) -> tuple[Any, list[np.ndarray]]:
        """Count the answers for `images` images, and draw `figures` of them, evenly spread."""
        counts, panels = self.counts(), []
        drawn = {round(i * (images - 1) / max(figures - 1, 1)) for i in range(figures)}
        progress, done = Progress("evaluating", images), 0
        for answer in answers:
            counts.add_answer(answer)
            end = min(done + self.batch_size, images)
            panels += [self.draw_answer(answer, place - done) for place in range(done, end) if place in drawn]
            done = end
            progress.show(done)
        return counts, panels

    @abstractmethod
    def predict(
        self, network: nn.Module, device: torch.device, numbers: Sequence[int], workers: int,
        stopped: Callable[[], bool],
    ) -> Generator[Answer, None, None]:  # fmt: skip
        """The network's answers for the images of these numbers, each image once, in order.

        They end early if `stopped` while an image is waited for. Closing ends the loader processes.
        """

    @abstractmethod
    def counts(self) -> Counts[Answer]:
        """Nothing counted yet."""

    @abstractmethod
    def draw_answer(self, answer: Answer, place: int) -> np.ndarray:
        """RGB uint8 (h, w, 3): the image at that place of an answer, its label and its prediction."""

    @abstractmethod
    def protocol(self, counts: Any, trained_on: Tensor | None, how: dict[str, Any]) -> dict[str, Any]:
        """The protocol in evaluation.json: whose rules, which images, what made the predictions, warnings."""

    @abstractmethod
    def evaluation(
        self, counts: Any, panels: list[np.ndarray], described: dict[str, Any], protocol: dict[str, Any]
    ) -> Evaluation:
        """The scores and figures of these counts."""

    @abstractmethod
    def main_scores(self, counts: Any) -> dict[str, float | None]:
        """The scores that a task describes, as fractions, and "loss"; None where nothing is labelled."""

    @abstractmethod
    def warnings(self, trained_on: Tensor | None) -> list[str]:
        """Reasons not to trust the scores of a network that was trained on these images."""

    @abstractmethod
    def published(self, loaded: LoadedNetwork) -> dict[str, Any]:
        """{"published": published scores of this network} for the protocol, or {}."""


class Task(ABC):
    """What a training of `config` learns: segmentation or image classification. DataError if the data are missing."""

    metric: str  # the score that best.pt is selected by
    final_scores: tuple[str, ...]  # shown with the hyper-parameters of a finished run
    batch_of: str  # what a batch holds, for a line of the log
    table: LabelTable | None  # None: the classes are of images
    num_classes: int
    num_train: int  # images
    num_val: int
    num_shared: int  # images of the validation that are trained on
    contents: list[int] | None = None  # `content_hashes` of the training images, once they are checked
    image_ids: list[str]  # the training images, under names that are the same whatever split they were read from

    @abstractmethod
    def __init__(self, config: TrainConfig) -> None: ...

    @staticmethod
    @abstractmethod
    def check_options(config: TrainConfig) -> None:
        """UsageError for what is known to be wrong before any data are touched."""

    @property
    @abstractmethod
    def classes(self) -> dict[str, Any]:
        """The classes as a checkpoint stores them."""

    def count_classes(self) -> None:  # noqa: B027 - not every task has them
        """Put weights in the place of loss.class_weights=auto; a resumed run has them already."""

    @abstractmethod
    def loss(self) -> Loss: ...

    def prepare(self, dist: World) -> Dataset[Any]:
        """Check the files, fill the cache, and return the training data; in the main process first."""
        with dist.main_process_first():
            self.check()
            return self.data()

    @abstractmethod
    def check(self) -> None:
        """DataError or UsageError for files that cannot be trained on."""

    @abstractmethod
    def data(self) -> Dataset[Any]:
        """The training data, with the cache that the options ask for."""

    @abstractmethod
    def evaluator(self, split: str | None = None, inference: InferenceConfig | None = None) -> Evaluator[Any]:
        """An evaluator for a split, to be used for any number of evaluations.

        Default: the images and the inference of this training's validations.
        """

    @abstractmethod
    def training_sample(self, most: int) -> Evaluator[Any] | None:
        """An evaluator for `most` training images, evenly spread and always the same, no more than validate.

        None if there are none, or if they validate themselves (trainer.overfit).
        """

    @abstractmethod
    def draw(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, str]:
        """A training sample as an image, RGB uint8 (h, w, 3), and its label in words."""

    @abstractmethod
    def sheet(self, rows: list[np.ndarray]) -> np.ndarray:
        """Several of these images as one."""

    @abstractmethod
    def describe(self, result: Mapping[str, Any]) -> str:
        """The scores of a validation in a few words."""
