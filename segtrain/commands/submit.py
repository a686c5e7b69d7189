"""`segtrain submit`: write, read back and verify the archive that a benchmark's server expects."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segtrain.commands.score import find_answers, known_encodings
from segtrain.config import IGNORE_INDEX, SubmitConfig
from segtrain.console import Progress, say
from segtrain.data.dataset import dataset_spec, label_table, split_files
from segtrain.data.labels import LabelTable, read_image, read_label
from segtrain.device import describe_device
from segtrain.errors import DataError, UsageError
from segtrain.scoring import figures
from segtrain.scoring.predictor import load_predictor
from segtrain.scoring.report import file_hash
from segtrain.tasks.segmentation import require_same_labels
from segtrain.threads import threaded_map

# Name in the archive of a sample's label image, by dataset.
PLACES = {"cityscapes": "{}.png", "kitti": "semantic/{}.png", "vistas": "{}.png"}
WHERE = {
    "cityscapes": "https://www.cityscapes-dataset.com/submit",
    "kitti": "https://www.cvlibs.net/datasets/kitti/user_submit.php",
    "vistas": "the Vistas challenge's page on CodaLab",
    "cocostuff": "the COCO stuff challenge's page",
}


def submit(config: SubmitConfig) -> Path:
    """Write and verify <output>/<dataset>-<split>.zip. Returns its path."""
    data = config.dataset
    if config.predictions is not None and (config.checkpoint or config.run):
        raise UsageError("give predictions=FOLDER, or checkpoint=FILE or run=FOLDER, not both")
    if data.name not in WHERE:
        raise UsageError(f"dataset={data.name} has no server to submit to: choose {', '.join(WHERE)}")
    table = label_table(data)
    split = config.split or "test"
    images = dict(sorted(split_files(data, split).images.items()))
    if not images:
        raise DataError(
            f"no images of the split {split!r} in {data.folder()}: the server expects one prediction for each"
        )
    output = Path(config.output or "segtrain-out/submit")
    if config.predictions is not None:
        found = find_answers(Path(config.predictions), [dataset_spec(data).answer(name) for name in images])
        answers = dict(zip(images, found, strict=True))
        to_id = accepted(answers, table, config)
    else:
        answers = predicted(config, images, table, output)
        to_id = np.arange(256, dtype=np.uint8)
    archive = output / f"{data.name}-{split}.zip"
    archive.parent.mkdir(parents=True, exist_ok=True)
    unverified = archive.with_name(f".{archive.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(unverified, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in contents(data.name, answers, to_id):
                file.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
        verify(unverified, data.name, images, table)
        unverified.replace(archive)
    finally:
        unverified.unlink(missing_ok=True)
    published = dataset_spec(data).published.get(split)
    if published is not None and published != len(images):
        say(f"warning     {len(images)} images, but {data.name} {split} has {published}: the server will refuse this")
    say(
        f"verified    {len(images)} answers: names, sizes, 8 bits, ids of {table.source}; send it to {WHERE[data.name]}"
    )
    print(archive, flush=True)
    return archive


def predicted(config: SubmitConfig, images: dict[str, Path], table: LabelTable, output: Path) -> dict[str, Path]:
    """Write label images by the network in the checkpoint; the files of an interrupted call are used again."""
    path = Path(config.checkpoint or "")
    predictor = load_predictor(path, config.device, config.checkpoint_weights)
    require_same_labels(predictor.table, table, path, config.dataset.name)
    options = json.dumps([asdict(config.inference), config.checkpoint_weights])
    recipe = f"{config.inference.name}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"
    folder = output / f"labels-{file_hash(path)[:12]}-{recipe}"
    say(f"checkpoint  {path}")
    say(f"predicting  {len(images)} images, inference {config.inference.name}, on {describe_device(predictor.device)}")
    progress = Progress("predicting", len(images))
    answers = {name: folder / f"{name}.png" for name in images}
    for number, (name, image) in enumerate(images.items(), 1):
        if not answers[name].is_file():
            labels = table.decode(predictor.predict(read_image(image), config.inference))
            figures.write_png(answers[name], labels)
        progress.show(number)
    return answers


def accepted(answers: dict[str, Path], table: LabelTable, config: SubmitConfig) -> np.ndarray:
    """uint8 (256,): value in the label images -> id. DataError for train ids and for values that are no ids."""
    encoding = config.predictions_encoding or ("pixelmap" if config.dataset.name == "cocostuff" else "ids")
    histogram = np.zeros(256, np.int64)
    for labels in threaded_map(read_label, answers.values()):
        histogram += np.bincount(labels.ravel(), minlength=256)
    chosen = known_encodings(table, config.dataset.name)[encoding]
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


def contents(name: str, answers: dict[str, Path], to_id: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """(name in the archive, content)"""
    if name == "cocostuff":
        segments = []
        for sample, path in answers.items():
            segments += coco_segments(int(sample.rpartition("_")[2]), to_id[read_label(path)])
        yield "stuff_results.json", json.dumps(segments).encode()
        return
    for sample, path in answers.items():
        buffer = io.BytesIO()
        Image.fromarray(to_id[read_label(path)]).save(buffer, "PNG")
        yield PLACES[name].format(sample), buffer.getvalue()


def verify(archive: Path, name: str, images: dict[str, Path], table: LabelTable) -> None:
    """DataError unless the archive holds exactly one valid label image for every image."""
    known = {int(row["id"]) for row in table.rows}
    with zipfile.ZipFile(archive) as file:
        if name == "cocostuff":
            verify_coco(json.loads(file.read("stuff_results.json")), images)
            return
        expected = {PLACES[name].format(sample): image for sample, image in images.items()}
        if sorted(file.namelist()) != sorted(expected):
            raise DataError(f"the names in {archive} are not those of the images: this is a bug")
        for place, image in expected.items():
            with Image.open(io.BytesIO(file.read(place))) as picture, Image.open(image) as original:
                if picture.mode != "L" or picture.size != original.size:
                    raise DataError(
                        f"{place} is {picture.size[0]}x{picture.size[1]} of mode {picture.mode}, but {image} is "
                        f"{original.size[0]}x{original.size[1]} (width x height): predict at the picture's own size"
                    )
                strange = set(np.unique(np.asarray(picture)).tolist()) - known
                if strange:
                    raise DataError(f"{place} holds {sorted(strange)[:5]}, which are no ids of {table.source}")


# ------------------------------------------------------------------------------------------------------- COCO's JSON


def coco_segments(image_id: int, values: np.ndarray) -> list[dict[str, Any]]:
    """One segment for each class of pixel map values uint8 (H, W): COCO category id 92 to 183, run-length encoded."""
    return [
        {"image_id": image_id, "category_id": int(value) + 1, "segmentation": encode_runs(values == value)}
        for value in np.unique(values)
    ]


def encode_runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a bool (H, W): lengths of runs down the columns, the first one of
    zeros, each less the one but two before it from the fourth on, in groups of 5 bits, lowest first, as characters."""
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]]))
    text = []
    for index, length in enumerate(lengths.tolist()):
        number = length - int(lengths[index - 2]) if index > 2 else length
        while True:
            group = number & 31
            number >>= 5
            more = number != (-1 if group & 16 else 0)
            text.append(chr((group | 32 if more else group) + 48))
            if not more:
                break
    return {"size": list(mask.shape), "counts": "".join(text)}


def decode_runs(segment: dict[str, Any]) -> np.ndarray:
    """The bool (H, W) that `encode_runs` was given."""
    lengths: list[int] = []
    number = shift = 0
    for character in segment["counts"]:
        group = ord(character) - 48
        number |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            number -= 1 << shift
        lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
        number = shift = 0
    height, width = segment["size"]
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape((width, height)).T


def verify_coco(segments: list[dict[str, Any]], images: dict[str, Path]) -> None:
    """DataError unless every pixel of every picture has exactly one of the categories 92 to 183."""
    covered: dict[int, np.ndarray] = {}
    for segment in segments:
        mask = decode_runs(segment["segmentation"])
        if not 92 <= segment["category_id"] <= 183:
            raise DataError(
                f"category {segment['category_id']} is a thing: the stuff challenge takes 92 to 183; predict with a "
                "network of dataset.classes=stuff91"
            )
        covered[segment["image_id"]] = covered.get(segment["image_id"], np.zeros(mask.shape, np.uint8)) + mask
    for name, path in images.items():
        with Image.open(path) as picture:
            size = (picture.height, picture.width)
        count = covered.pop(int(name.rpartition("_")[2]), None)
        if count is None or count.shape != size or (count != 1).any():
            raise DataError(f"the segments of {name} do not cover its {size[1]}x{size[0]} pixels once each")
    if covered:
        raise DataError(f"segments of pictures that are not in the split: {sorted(covered)[:3]}")
