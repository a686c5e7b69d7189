"""`segtrain predict`: label images of photographs, in several forms, also those of the official script."""

from collections import Counter
from pathlib import Path

import numpy as np

from segtrain.config import PredictConfig, checkpoint_line
from segtrain.console import Progress, say
from segtrain.data.folders import files_below
from segtrain.data.images import SUFFIXES, orientation_of, read_bytes, read_image
from segtrain.data.labels import LabelTable
from segtrain.data.orientation import AS_STORED, describe_tags
from segtrain.device import describe_device
from segtrain.engine.planning.automatic import advising
from segtrain.errors import DataError, UsageError
from segtrain.scoring import figures
from segtrain.scoring.inference import Prediction
from segtrain.scoring.predictor import load_predictor, naming_image


def predict(config: PredictConfig) -> Path:
    """Write a folder for each of `outputs`, with a PNG of every input image at its own size. Returns the output folder.

    DataError, after all other images are done, naming those that cannot be read.
    """
    if config.input is None:
        raise UsageError("input is not set: give input=IMAGE or input=FOLDER")
    source = Path(config.input)
    files = find_images(source)
    names = output_names(source, files)
    predictor = load_predictor(
        config.checkpoint or "", config.device, config.checkpoint_weights, config.taxonomy, config.taxonomy_rest
    )
    say(f"checkpoint  {checkpoint_line(Path(config.checkpoint or ''), config.run, predictor.metadata)}")
    say(f"predicting  {len(files)} images, inference {config.inference.name}, on {describe_device(predictor.device)}")
    output = Path(config.output or "segtrain-out/predict")
    errors = []
    tags: Counter[int] = Counter()
    progress = Progress("predicting", len(files))
    for number, (file, name) in enumerate(zip(files, names, strict=True), 1):
        try:
            image = read_image(file, predictor.value_range, exif="apply")
            tag = orientation_of(read_bytes(file), file)
            tags.update([tag] if tag != AS_STORED else [])
        except DataError as error:
            errors.append(str(error))
            continue
        answering = advising(predictor.options, predictor.table.num_classes, config.inference, predictor.device)
        with answering, naming_image(str(file), image):
            found = predictor.segment(image, config.inference, "prob" in config.outputs)
        for kind in config.outputs:
            palette = predictor.table.colors if kind == "palette" else None
            figures.write_png(output / kind / f"{name}.png", draw_output(kind, image, found, predictor.table), palette)
        progress.show(number)
    classes = predictor.table.source
    held = [f"{kind}/ holds {text.format(classes)}" for kind, text in HOLDS.items() if kind in config.outputs]
    if tags:
        say(f"exif        {describe_tags(tags)}: turned, the answers fit the images as a viewer shows them")
    say("; ".join([f"{len(files) - len(errors)} images", *held]))
    say(str(output))
    if errors:
        raise DataError("\n".join(errors))
    return output


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


def find_images(source: Path) -> list[Path]:
    """The image file itself, or all image files below a folder, sorted."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UsageError(f"input={source}: no such file or folder")
    files = sorted(path for path in files_below(source) if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UsageError(f"input={source}: the folder holds no images ({', '.join(SUFFIXES)})")
    return files


def output_names(source: Path, files: list[Path]) -> list[str]:
    """Paths below `source` without the suffix; `a_jpg` and `a_png` where a.jpg and a.png would collide."""
    root = source if source.is_dir() else source.parent
    relative = [path.relative_to(root) for path in files]
    short = [path.with_suffix("").as_posix() for path in relative]
    return [
        name if short.count(name) == 1 else f"{name}_{path.suffix[1:]}"
        for name, path in zip(short, relative, strict=True)
    ]
