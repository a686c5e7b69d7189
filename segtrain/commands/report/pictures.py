"""The images of a report, predicted again by the run's checkpoint, as data URIs."""

import base64
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from segtrain.commands.report.facts import RunFacts
from segtrain.config import InferenceConfig, TrainConfig, trained
from segtrain.console import Progress
from segtrain.data.labels import LabelTable
from segtrain.data.loader import EvaluationData
from segtrain.data.registry import label_table, split_samples
from segtrain.data.sample import Sample
from segtrain.device import resolve_device
from segtrain.errors import DataError, SegtrainError
from segtrain.scoring import figures
from segtrain.scoring.bootstrap import scores_of
from segtrain.scoring.image_counts import ImageConfusions
from segtrain.scoring.predictor import Predictor, load_network
from segtrain.scoring.scores import Scores

LONGEST = 480  # pixels of a side of an image in the page
BUDGET = 3_500_000  # characters of all images
RIGHT, WRONG, UNLABELLED = (206, 212, 218), (204, 38, 38), (70, 74, 80)  # of an error map


class Shown(NamedTuple):
    """An image, its labels and its prediction, at most LONGEST pixels long. moved: pixels that are predicted otherwise
    than in the evaluation. title: what it is an example of."""

    name: str
    title: str
    image: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    moved: int


class Pictures(NamedTuple):
    """best, worst, confused: images. notes: what is missing, and why."""

    best: list[Shown]
    worst: list[Shown]
    confused: list[Shown]
    table: LabelTable | None
    notes: list[str]


class Pair(NamedTuple):
    """Pixels of a class that were predicted as another one. example: number of the image with most of them."""

    truth: int
    prediction: int
    pixels: int
    share: float
    example: int


def image_scores(images: ImageConfusions) -> np.ndarray:
    """float64 (N,): mIoU of each image over the classes that are labelled or predicted in it; NaN without labels."""
    scores: np.ndarray = scores_of(images.evaluated().parts(), "union")[:, 0]
    return scores


def ranked(images: ImageConfusions) -> np.ndarray:
    """Numbers of the images that have labels, the worst first."""
    scores = image_scores(images)
    order = np.argsort(scores, kind="stable")
    return order[~np.isnan(scores[order])]


def confused_pairs(images: ImageConfusions, most: int) -> list[Pair]:
    """The pairs of classes with the most confused pixels."""
    matrix = images.evaluated().confusion()
    labelled = matrix.sum(1)
    np.fill_diagonal(matrix, 0)
    found = []
    for cell in np.argsort(-matrix, axis=None, kind="stable")[:most]:
        truth, prediction = divmod(int(cell), matrix.shape[1])
        if matrix[truth, prediction]:
            where = (images.truth == truth) & (images.prediction == prediction)
            example = int(images.image[where][np.argmax(images.pixels[where])])
            pixels = int(matrix[truth, prediction])
            found.append(Pair(truth, prediction, pixels, pixels / int(labelled[truth]), example))
    return found


def pictures(facts: RunFacts, count: int, root: str | None, device: str) -> Pictures:
    """The best, the worst and examples of the most confused pairs. Nothing that is missing is an error: it is noted."""
    nothing = Pictures([], [], [], None, [])
    if facts.result is None or facts.images is None or count == 0:
        return nothing
    try:
        renewed = Renewed(facts, root, device)
    except SegtrainError as error:
        return nothing._replace(notes=[f"No images: they could not be predicted again. {error}"])
    images, order = facts.images, ranked(facts.images)
    worst = order[: min(count, (len(order) + 1) // 2)]
    best = order[::-1][: min(count, len(order) // 2)]
    pairs = confused_pairs(images, count)
    progress = Progress("predicting", len(best) + len(worst) + len(pairs))
    done = 0
    groups: list[list[Shown]] = [[], [], []]
    notes = []
    wanted: list[list[tuple[int, Pair | None]]] = [
        [(int(i), None) for i in best],
        [(int(i), None) for i in worst],
        [(pair.example, pair) for pair in pairs],
    ]
    for group, numbers in zip(groups, wanted, strict=True):
        for number, pair in numbers:
            try:
                group.append(renewed.shown(number, pair))
            except SegtrainError as error:
                notes.append(f"{images.names[number]} is left out: {error}")
            done += 1
            progress.show(done)
    return Pictures(groups[0], groups[1], groups[2], renewed.table, notes)


class Renewed:
    """The run's data and network, for predicting single images of its evaluation again."""

    def __init__(self, facts: RunFacts, root: str | None, device: str) -> None:
        """DataError if the checkpoint is not that of the evaluation, or the data are not there."""
        assert facts.result is not None and facts.images is not None
        config: TrainConfig = trained(facts.config)
        if root is not None:
            config.dataset.root = root
        self.images = facts.images
        path = facts.folder / "last.pt"
        if facts.saved.get("step") != facts.result.get("step") or not path.is_file():
            raise DataError(
                f"{path} is of step {facts.saved.get('step')}, the evaluation of step {facts.result.get('step')}; "
                f"`segtrain train run={facts.folder}` finishes the run"
            )
        self.table = label_table(config.dataset)
        split = "train" if config.trainer.overfit is not None else str(facts.result["split"])
        wanted = config.dataset.train_split if split == "train" else split
        self.samples = {sample.name: sample for sample in split_samples(config.dataset, wanted)}
        loaded = load_network(path, resolve_device(device))
        self.inference = InferenceConfig(**facts.result["inference"])
        self.predictor = Predictor(loaded.network, self.table, loaded.options, resolve_device(device))  # type: ignore[arg-type]

    def shown(self, number: int, pair: Pair | None) -> Shown:
        """Predict an image of the evaluation. pair: show the largest region of it only."""
        name = self.images.names[number]
        sample: Sample | None = self.samples.get(name)
        if sample is None or sample.label is None:
            raise DataError("the data no longer have it")
        item = EvaluationData([sample], self.table)[0]
        if isinstance(item, SegtrainError):
            raise item
        image, target = item.image, item.target
        if tuple(self.images.sizes[number]) != target.shape:
            raise DataError("the data have changed: it has another size")
        prediction = self.predictor.predict(image, self.inference)
        scores = Scores(self.table)
        scores.add(item.ids, self.table.decode(prediction))
        moved = int(np.abs(scores.confusion() - self.images.of_image(number)).sum()) // 2
        if pair is None:
            title = f"mIoU {100 * image_scores(self.images)[number]:.1f} %"
        else:
            names = [*self.table.names, "(other)"]
            title = f"{names[pair.truth]} predicted as {names[pair.prediction]}"
            window = region_window((target == pair.truth) & (np.minimum(prediction, len(names) - 1) == pair.prediction))
            image, target, prediction = image[window], target[window], prediction[window]
        return Shown(name, title, *reduced(figures.as_rgb(image), target, prediction), moved)


def region_window(mask: np.ndarray) -> tuple[slice, slice]:
    """The window around the largest connected region of bool (H, W), with half its size, at least 32 pixels, around."""
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count < 2:
        return slice(None), slice(None)
    x, y, w, h = (int(v) for v in stats[1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])), :4])
    across, down = max(w // 2, 32), max(h // 2, 32)
    return slice(max(0, y - down), y + h + down), slice(max(0, x - across), x + w + across)


def reduced(
    image: np.ndarray, target: np.ndarray, prediction: np.ndarray, longest: int = LONGEST
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three, at most `longest` pixels long."""
    height, width = target.shape
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return (
        cv2.resize(image, size, interpolation=cv2.INTER_AREA),
        cv2.resize(target, size, interpolation=cv2.INTER_NEAREST_EXACT),
        cv2.resize(prediction, size, interpolation=cv2.INTER_NEAREST_EXACT),
    )


# ------------------------------------------------------------------------------------------------------ data URIs


class Uris(NamedTuple):
    """The parts of an image as data URIs, and its size in pixels."""

    image: str
    target: str
    prediction: str
    errors: str
    width: int
    height: int


def as_uris(groups: Iterable[list[Shown]], table: LabelTable) -> list[list[Uris]]:
    """All images as data URIs of at most BUDGET characters, made smaller until they fit."""
    groups, longest = list(groups), LONGEST
    while True:
        made = [[uris_of(one, table, longest) for one in group] for group in groups]
        total = sum(len(text) for group in made for one in group for text in one[:4])
        if total <= BUDGET or longest < 64:
            return made
        longest = int(longest * 0.75)


def uris_of(one: Shown, table: LabelTable, longest: int) -> Uris:
    image, target, prediction = reduced(one.image, one.target, one.prediction, longest)
    unlabelled = target >= table.num_classes
    errors = np.where(unlabelled, 2, target != prediction).astype(np.uint8)
    colors = np.zeros((256, 3), np.uint8)
    colors[: table.num_classes] = table.colors
    kinds = np.array([RIGHT, WRONG, UNLABELLED], np.uint8)
    return Uris(
        jpeg_uri(image), png_uri(target, colors), png_uri(prediction, colors), png_uri(errors, kinds), image.shape[1],
        image.shape[0],
    )  # fmt: skip


def jpeg_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def png_uri(plane: np.ndarray, colors: np.ndarray) -> str:
    """uint8 (H, W), whose values index colors uint8 (n, 3)."""
    buffer = io.BytesIO()
    image = Image.fromarray(plane)
    image.putpalette(colors.tobytes())
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def checkpoint_facts(facts: RunFacts) -> dict[str, Any]:
    """The provenance in the checkpoint; {} if it has none."""
    found: dict[str, Any] = facts.saved.get("provenance") or {}
    return found
