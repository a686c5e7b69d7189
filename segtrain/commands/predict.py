"""`segtrain predict`: label images of photographs, in several forms, also those of the official script."""

import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config import InferenceConfig, PredictConfig, checkpoint_line, shared_values
from segtrain.console import Progress, say
from segtrain.data.bands import read_channels
from segtrain.data.images import orientation_of, read_bytes
from segtrain.data.inputs import Input, find_inputs, read_frames
from segtrain.data.labels import LabelTable
from segtrain.data.orientation import AS_STORED, describe_tags
from segtrain.device import describe_device
from segtrain.distributed.group import World, equal_shares, init_distributed
from segtrain.engine.planning.automatic import advising
from segtrain.errors import DataError, UsageError
from segtrain.files import read_side_json, write_atomically
from segtrain.models.execution import require_inference_compile
from segtrain.models.precision import require_precision
from segtrain.scoring import figures
from segtrain.scoring.batches import Given, pixels_to_predict, predictions
from segtrain.scoring.inference import Prediction
from segtrain.scoring.predictor import Predictor, load_predictor
from segtrain.scoring.report import file_hash
from segtrain.threads import Background, cpus, threaded_map

RECORD = "predict.json"  # in the output folder: what made the files there
READERS, READ_AHEAD = 2, 2  # threads that read images, and images of each that may wait for the network
WRITERS = 3  # threads that write, at most; one image more may wait for them
# An input with its image, RGB uint8 (H, W, 3), turned as a viewer shows it, or the reason that there is none, and its
# EXIF tag.
ReadInput = tuple[Input, np.ndarray | DataError, int]


def predict(config: PredictConfig) -> Path:
    """Write a folder for each of `outputs`, with a PNG of every input image at its own size. Returns the output folder.

    What the same network has finished is left as it is, unless overwrite=true. Several processes share the images.
    DataError, after all other images are done, naming those that cannot be read.
    """
    if config.input is None:
        raise UsageError("input is not set: give input=IMAGE, input=FOLDER, a list, a pattern or a video")
    with init_distributed(shared_values(config)) as dist:
        inputs = find_inputs(config.input)
        predictor = networks_of(config)
        require_precision(config.inference.precision, predictor.device)
        if config.inference.compile:
            for one in (predictor, *predictor.others):
                require_inference_compile(one.options, one.device)
        output = Path(config.output or "segtrain-out/predict")
        shares: list[list[int]] = []
        if dist.main:
            start_folder(output, made_by(config, predictor), config.overwrite)
            numbers = [n for n, one in enumerate(inputs) if not is_finished(one, output, config.outputs)]
            shares = shared_inputs(inputs, numbers, config.inference, dist.size)
        shares = dist.all_gather(shares)[0]  # before any process finishes another
        todo = [inputs[n] for share in shares for n in share]
        if len(todo) < len(inputs):
            say(f"finished    {len(inputs) - len(todo)} of {len(inputs)} images before; overwrite=true does them again")
        how = f"{config.inference}, on {describe_device(predictor.device)}"
        say(f"predicting  {len(todo)} images, {how}")
        progress, mine = Progress("predicting", len(todo)), [inputs[n] for n in shares[dist.rank]]
        done, errors, tags = predict_all(mine, predictor, config, output, progress, dist)
        classes = predictor.table.source
        held = [f"{kind}/ holds {text.format(classes)}" for kind, text in HOLDS.items() if kind in config.outputs]
        if tags:
            say(f"exif        {describe_tags(tags)}: turned, the answers fit the images as a viewer shows them")
        say("; ".join([f"{len(inputs) - len(todo) + done} images", *held]))
        say(str(output))
        if errors:
            listed = DataError("\n".join(errors))
            listed.everywhere = True
            raise listed
        return output


def shared_inputs(
    inputs: Sequence[Input], numbers: Sequence[int], inference: InferenceConfig, processes: int
) -> list[list[int]]:
    """These numbers of inputs, divided among the processes by the pixels of the images; frames are of one size."""
    costs = [1] * len(numbers)
    if processes > 1 and all(inputs[n].frame is None for n in numbers):
        costs = pixels_to_predict([inputs[n].path for n in numbers], inference)
    return [[numbers[place] for place in share] for share in equal_shares(costs, processes)]


def networks_of(config: PredictConfig) -> Predictor:
    """The network, or several to be averaged; each checkpoint is printed."""
    files = config.checkpoints()
    mapped = config.checkpoint_weights, config.taxonomy, config.taxonomy_rest
    some = [load_predictor(file, config.device, *mapped) for file in files]
    for file, one in zip(files, some, strict=True):
        say(f"checkpoint  {checkpoint_line(Path(file), config.run, one.metadata)}")
    return some[0].averaged_with(some[1:], files)


def predict_all(
    inputs: Sequence[Input], predictor: Predictor, config: PredictConfig, output: Path, progress: Progress, dist: World
) -> tuple[int, list[str], Counter[int]]:
    """Predict this process's share. Returns how many images were predicted, what could not be read, and the EXIF tags
    found, of all processes."""
    done, errors = 0, list[str]()
    tags: Counter[int] = Counter()

    def readable(images: Iterable[ReadInput]) -> Iterator[Given]:
        for number, (one, image, tag) in enumerate(images, 1):
            progress.show(min(number * dist.size, progress.total))
            if isinstance(image, DataError):
                errors.append(str(image))
                continue
            tags.update([tag] if tag != AS_STORED else [])
            yield Given((one, image), str(one), image)

    reading = closing(read_inputs(inputs, predictor))
    advice = advising(predictor.options, predictor.table.num_classes, config.inference, predictor.device)
    with reading as images, Background(min(WRITERS, cpus())) as writing, advice:
        found = predictions(predictor, readable(images), config.inference, "prob" in config.outputs)
        with closing(found) as answers:
            for (one, image), answer in answers:
                writing.call(write_outputs, one, image, answer, predictor.table, config.outputs, output)
                done += 1
    everyone = dist.all_gather([done, errors, dict(tags)])
    for _, _, theirs in everyone[: dist.rank] + everyone[dist.rank + 1 :]:
        tags.update({int(tag): count for tag, count in theirs.items()})
    return sum(number for number, _, _ in everyone), [error for _, some, _ in everyone for error in some], tags


def write_outputs(
    one: Input, image: np.ndarray, found: Prediction, table: LabelTable, kinds: Sequence[str], output: Path
) -> None:
    for kind in kinds:
        palette = table.colors if kind == "palette" else None
        figures.write_png(output_place(one, output, kind), draw_output(kind, image, found, table), palette, quick=True)


def read_inputs(inputs: Sequence[Input], predictor: Predictor) -> Generator[ReadInput, None, None]:
    """All inputs in order, files first, read ahead in other threads. Closing waits for the reading that has begun."""
    files = [one for one in inputs if one.frame is None]
    with closing(threaded_map(partial(read_file, predictor), files, READ_AHEAD, threads=READERS)) as images:
        yield from images
    frames = {one.frame: one for one in inputs if one.frame is not None}
    if frames and predictor.channels is not None:
        raise UsageError(
            f"{inputs[0].path} is a video of red, green and blue, and the network takes the bands dataset.channels="
            f"{list(predictor.channels)}: give images"
        )
    if frames:
        found = frames_of(inputs[0], frames)
        following = closing(threaded_map(lambda _: next(found, None), frames, READERS * READ_AHEAD, threads=1))
        with closing(found), following as read:  # one thread, as a video is read in order
            yield from (one for one in read if one is not None)


def read_file(predictor: Predictor, one: Input) -> ReadInput:
    try:
        image = read_channels(one.path, predictor.channels, predictor.value_range, exif="apply")
        return one, image, orientation_of(read_bytes(one.path), one.path)
    except DataError as error:
        return one, error, AS_STORED


def frames_of(first: Input, frames: Mapping[int, Input]) -> Generator[ReadInput, None, None]:
    """The frames of the video until one cannot be read; first: the input that the reason is named with."""
    try:
        for number, image in read_frames(first.path, frames):
            yield frames[number], image, AS_STORED
    except DataError as error:
        yield first, error, AS_STORED


# ------------------------------------------------------------------------------------------------- finished images


def made_by(config: PredictConfig, predictor: Predictor) -> dict[str, Any]:
    """What all files of an output folder have in common. Images of another network or inference are no answers."""
    files, mapping = config.checkpoints(), predictor.mapping
    own_taxonomy = {"taxonomy_sha256": mapping.sha256} if mapping is not None and mapping.sha256 else {}
    return {
        "checkpoint": ", ".join(files), "sha256": [file_hash(Path(file)) for file in files],
        "weights": config.checkpoint_weights,
        "taxonomy": config.taxonomy, "taxonomy_rest": config.taxonomy_rest,
        **own_taxonomy, "inference": config.inference.stated(),
    }  # fmt: skip


def start_folder(output: Path, made: dict[str, Any], overwrite: bool) -> None:
    """Keep the record in the folder if it says the same, else begin anew: what is older than it is not finished."""
    record = output / RECORD
    found = read_side_json(record, dict)
    same = found is not None and {**found, "checkpoint": ""} == {**made, "checkpoint": ""}
    if same and not overwrite:
        return
    if found is not None and not same:
        say(f"replaced    {output} holds the answers of {found.get('checkpoint')}, or of another inference: all anew")
    write_atomically(record, json.dumps(made, indent=1).encode())


def output_place(one: Input, output: Path, kind: str) -> Path:
    return output / kind / f"{one.name}.png"


def is_finished(one: Input, output: Path, kinds: list[str]) -> bool:
    """Whether all its files are there, and younger than the image and the record."""
    try:
        begun = max((output / RECORD).stat().st_mtime_ns, one.path.stat().st_mtime_ns)
        return all(output_place(one, output, kind).stat().st_mtime_ns >= begun for kind in kinds)
    except OSError:
        return False


# Outputs that are made for programs to read.
HOLDS = {
    "labels": "the ids of {}",
    "palette": "train ids in the colours of {}",
    "raw": "train ids, the order of {}",
    "prob": "255 times the probability of the class, truncated",
}


def draw_output(kind: str, image: np.ndarray, found: Prediction, table: LabelTable) -> np.ndarray:
    """Draw one of PredictConfig.outputs: uint8 (H, W), or RGB uint8 (H, W, 3)."""
    if kind == "prob":
        assert found.probability is not None
        return (found.probability * 255).astype(np.uint8)
    if kind == "overlay":
        return figures.overlay(image, found.train_ids, table)
    if kind == "labels":
        return table.decode(found.train_ids)
    return table.colorize(found.train_ids) if kind == "color" else found.train_ids
