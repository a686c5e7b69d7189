"""`segtrain submit`: write, read back and verify the archive that a benchmark's server expects."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.commands.score import expect_encoding, find_answers, known_encodings
from segtrain.config import IGNORE_INDEX, SubmitConfig, checkpoint_line
from segtrain.console import Progress, say
from segtrain.data.bands import read_channels
from segtrain.data.class_mapping import require_same_labels
from segtrain.data.images import read_header
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable
from segtrain.data.registry import dataset_spec, label_table, pixel_labelled, split_files, submission
from segtrain.data.sample import SplitFiles, Submission
from segtrain.device import describe_device
from segtrain.errors import DataError, UsageError
from segtrain.files import as_component, temporary_beside
from segtrain.models.execution import require_inference_compile
from segtrain.models.precision import require_precision
from segtrain.scoring import figures
from segtrain.scoring.batches import Given, predictions
from segtrain.scoring.predictor import load_predictor
from segtrain.scoring.report import file_hash
from segtrain.threads import threaded_map


def submit(config: SubmitConfig) -> Path:
    """Write and verify <output>/<dataset>-<split>.zip. Returns its path."""
    data = config.dataset
    if config.predictions is not None and (config.checkpoint or config.run):
        raise UsageError("give predictions=FOLDER, or checkpoint=FILE or run=FOLDER, not both")
    server = submission(data)
    if server is None:
        names = [name for name, spec in pixel_labelled().items() if spec.submission]
        raise UsageError(f"dataset={data.name} has no server to submit to: choose {', '.join(names)}")
    table = label_table(data)
    split = config.split or "test"
    files = split_files(data, split)
    images = dict(sorted(files.images.items()))
    if not images:
        raise DataError(
            f"no images of the split {split!r} in {data.folder()}: the server expects one prediction for each"
        )
    output = Path(config.output or "segtrain-out/submit")
    if config.predictions is not None:
        found = find_answers(Path(config.predictions), [dataset_spec(data).answer(name) for name in images])
        answers = dict(zip(images, found, strict=True))
        to_id = check_predictions(answers, table, config)
    else:
        answers = predict_labels(config, files._replace(images=images), table, output)
        to_id = np.arange(256, dtype=np.uint8)
    archive = output / f"{as_component(data.name)}-{as_component(split)}.zip"
    archive.parent.mkdir(parents=True, exist_ok=True)
    unverified = temporary_beside(archive)
    try:
        with zipfile.ZipFile(unverified, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in contents(server, answers, to_id):
                file.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
        verify_archive(unverified, server, images, table)
        unverified.replace(archive)
    finally:
        unverified.unlink(missing_ok=True)
    published = dataset_spec(data).published.get(split)
    if published is not None and published != len(images):
        say(f"warning     {len(images)} images, but {data.name} {split} has {published}: the server will refuse this")
    say(f"verified    {len(images)} answers: names, sizes, 8 bits, ids of {table.source}; send it to {server.page}")
    say(str(archive))
    return archive


def predict_labels(config: SubmitConfig, files: SplitFiles, table: LabelTable, output: Path) -> dict[str, Path]:
    """Write label images by the network in the checkpoint; the files of an interrupted call are used again."""
    path = Path(config.checkpoint or "")
    predictor = load_predictor(
        path, config.device, config.checkpoint_weights, config.taxonomy, config.taxonomy_rest, table
    )
    require_precision(config.inference.precision, predictor.device)
    if config.inference.compile:
        require_inference_compile(predictor.options, predictor.device)
    if predictor.mapping is None:
        require_same_labels(predictor.table, table, path, config.dataset.name)
    mapped = [] if predictor.mapping is None else [predictor.mapping.card()]
    options = json.dumps([config.inference.stated(), config.checkpoint_weights, *mapped])
    recipe = f"{as_component(config.inference.name)}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"
    folder = output / f"labels-{file_hash(path)[:12]}-{recipe}"
    say(f"checkpoint  {checkpoint_line(path, config.run, predictor.metadata)}")
    images = files.images
    say(f"predicting  {len(images)} images, {config.inference}, on {describe_device(predictor.device)}")
    progress = Progress("predicting", len(images))
    answers = {name: folder / f"{name}.png" for name in images}
    todo = {name: image for name, image in images.items() if not answers[name].is_file()}
    reading = (read_channels(image, files.channels, files.value_range, files.exif) for image in todo.values())
    given = (Given(name, str(todo[name]), pixels) for name, pixels in zip(todo, reading, strict=True))
    found = predictions(predictor, given, config.inference)
    for number, (name, answer) in enumerate(found, len(images) - len(todo) + 1):
        figures.write_png(answers[name], table.decode(answer.train_ids))
        progress.show(number)
    return answers


def check_predictions(answers: dict[str, Path], table: LabelTable, config: SubmitConfig) -> np.ndarray:
    """uint8 (256,): value in the label images -> id. DataError for train ids and for values that are no ids."""
    dataset = dataset_spec(config.dataset)
    encoding, encodings = config.predictions_encoding or dataset.encoding, known_encodings(table, dataset)
    expect_encoding(encoding, encodings, config.dataset.name)
    histogram = np.zeros(256, np.int64)
    for labels in threaded_map(read_label, answers.values()):
        histogram += np.bincount(labels.ravel(), minlength=256)
    chosen = encodings[encoding]
    values, classes = set(np.flatnonzero(histogram).tolist()), set(table.ids.tolist())
    if (
        config.predictions_encoding is None
        and encoding == "ids"
        and values <= {*range(table.num_classes), IGNORE_INDEX}
        and not values <= classes
    ):
        raise DataError(
            f"{config.predictions} holds train ids (0 to {table.num_classes - 1}), the server expects label ids: "
            "set predictions_encoding=train_ids to convert them, or predictions_encoding=ids if they are ids"
        )
    allowed = chosen.values if encoding != "train_ids" else chosen.values - {255}
    strange = sorted(values - allowed)
    if strange:
        raise DataError(
            f"{config.predictions} holds the values {strange[:8]}, which are no {encoding} of {table.source}"
        )
    return chosen.to_id


def contents(server: Submission, answers: dict[str, Path], to_id: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """(name in the archive, content)"""
    if server.contents is not None:
        yield from server.contents(answers, to_id)
        return
    for sample, path in answers.items():
        buffer = io.BytesIO()
        Image.fromarray(to_id[read_label(path)]).save(buffer, "PNG")
        yield server.place.format(sample), buffer.getvalue()


def verify_archive(archive: Path, server: Submission, images: dict[str, Path], table: LabelTable) -> None:
    """DataError unless the archive holds exactly one valid label image for every image."""
    known = {int(row["id"]) for row in table.rows}
    with zipfile.ZipFile(archive) as file:
        if server.verify is not None:
            server.verify(file, images)
            return
        expected = {server.place.format(sample): image for sample, image in images.items()}
        if sorted(file.namelist()) != sorted(expected):
            raise DataError(f"the names in {archive} are not those of the images: this is a bug")
        for place, image in expected.items():
            height, width, _ = read_header(image)
            with Image.open(io.BytesIO(file.read(place))) as labels:
                if labels.mode != "L" or labels.size != (width, height):
                    raise DataError(
                        f"{place} is {labels.size[0]}x{labels.size[1]} of mode {labels.mode}, but {image} is "
                        f"{width}x{height} (width x height): predict at the image's own size"
                    )
                strange = set(np.unique(np.asarray(labels)).tolist()) - known
                if strange:
                    raise DataError(f"{place} holds {sorted(strange)[:5]}, which are no ids of {table.source}")
