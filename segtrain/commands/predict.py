"""`segtrain predict`: label images of photographs, in several forms, also those of the official script."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from segtrain.commands.predict_outputs import EVERY, HOLDS, is_finished, made_by, start_folder, write_outputs
from segtrain.commands.predict_windows import (
    Limit,
    large_images,
    memory_limit,
    predict_large,
    require_fitting,
    require_windows,
)
from segtrain.config import InferenceConfig, PredictConfig, checkpoint_line, shared_values
from segtrain.console import Progress, say
from segtrain.data.bands import read_channels
from segtrain.data.images import orientation_of, read_bytes
from segtrain.data.inputs import Input, find_inputs, read_frames
from segtrain.data.orientation import AS_STORED, describe_tags
from segtrain.device import describe_device
from segtrain.distributed.group import World, equal_shares, init_distributed
from segtrain.engine.planning.automatic import advising
from segtrain.errors import DataError, UsageError
from segtrain.models.execution import require_inference_compile
from segtrain.models.precision import require_precision
from segtrain.scoring.batches import Given, pixels_to_predict, predictions
from segtrain.scoring.predictor import Predictor, load_predictor
from segtrain.threads import Background, cpus, threaded_map

READERS, READ_AHEAD = 2, 2  # threads that read images, and images of each that may wait for the network
WRITERS = 3  # threads that write, at most; one image more may wait for them
# An input with its image, RGB uint8 (H, W, 3), turned as a viewer shows it, or the reason that there is none, and its
# EXIF tag.
ReadInput = tuple[Input, np.ndarray | DataError, int]
# How many images were predicted, what could not be read, and how many images have which EXIF tag.
Share = tuple[int, list[str], Counter[int]]


def predict(config: PredictConfig) -> Path:
    """Write a folder for each of `outputs`, with a file of every image at its own size. Returns the output folder.

    PNG files, and .npz of all probabilities; of images larger than memory TIFF files, row by row of tiles. What the
    same network has finished is left as it is, unless overwrite=true. Several processes share the images. DataError,
    after all other images are done, naming those that cannot be read.
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
        output, limit = Path(config.output or "segtrain-out/predict"), memory_limit(config.in_memory)
        parts: list[list[list[int]]] = []
        if dist.main:
            large = set(large_images(inputs, limit))
            if large:
                require_windows(config, inputs[min(large)])
            start_folder(output, made_by(config, predictor), config.overwrite)
            left = [n for n, one in enumerate(inputs) if not is_finished(one, output, config.outputs, n in large)]
            both = [n for n in left if n not in large], [n for n in left if n in large]
            parts = [shared_inputs(inputs, some, config.inference, dist.size) for some in both]
        small, windowed = dist.all_gather(parts)[0]  # before any process finishes another
        count, todo = sum(map(len, small)), sum(map(len, small + windowed))
        if todo < len(inputs):
            say(f"finished    {len(inputs) - todo} of {len(inputs)} images before; overwrite=true does them again")
        how = f"{config.inference}, on {describe_device(predictor.device)}"
        say(f"predicting  {todo} images, {how}")
        progress, mine = Progress("predicting", count), [inputs[n] for n in small[dist.rank]]
        shares = [predict_all(mine, predictor, config, output, progress, dist, limit)]
        shares.append(predict_large([inputs[n] for n in windowed[dist.rank]], predictor, config, output))
        done, errors, tags = of_all_processes(shares, dist)
        classes = predictor.table.source
        held = [f"{kind}/ holds {text.format(classes)}" for kind, text in HOLDS.items() if kind in config.outputs]
        if tags:
            say(f"exif        {describe_tags(tags)}: turned, the answers fit the images as a viewer shows them")
        say("; ".join([f"{len(inputs) - todo + done} images", *held]))
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
    inputs: Sequence[Input], predictor: Predictor, config: PredictConfig, output: Path, progress: Progress, dist: World,
    limit: Limit | None = None,
) -> Share:  # fmt: skip
    """Predict this process's share of the images that fit into memory; limit: how large they may be."""
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

    reading = closing(read_inputs(inputs, predictor, limit or memory_limit(config.in_memory)))
    advice = advising(predictor.options, predictor.table.num_classes, config.inference, predictor.device)
    wanted, every = "prob" in config.outputs, EVERY in config.outputs
    with reading as images, Background(min(WRITERS, cpus())) as writing, advice:
        found = predictions(predictor, readable(images), config.inference, wanted, every=every)
        with closing(found) as answers:
            for (one, image), answer in answers:
                writing.call(write_outputs, one, image, answer, predictor.table, config.outputs, output)
                done += 1
    return done, errors, tags


def of_all_processes(shares: Sequence[Share], dist: World) -> Share:
    """The sum over the shares of all processes."""
    total, errors, tags = 0, list[str](), Counter[int]()
    ours = [[done, some, dict(found)] for done, some, found in shares]
    for theirs in dist.all_gather(ours):
        for done, some, found in theirs:
            total += done
            errors += some
            tags.update({int(tag): count for tag, count in found.items()})
    return total, errors, tags


def read_inputs(inputs: Sequence[Input], predictor: Predictor, limit: Limit) -> Generator[ReadInput, None, None]:
    """All inputs in order, files first, read ahead in other threads. Closing waits for the reading that has begun."""
    files = [one for one in inputs if one.frame is None]
    with closing(threaded_map(partial(read_file, predictor, limit), files, READ_AHEAD, threads=READERS)) as images:
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


def read_file(predictor: Predictor, limit: Limit, one: Input) -> ReadInput:
    try:
        require_fitting(one.path, limit)
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
