"""`segtrain predict`: labels, in colour, laid over the picture, as the official script writes them, for photographs."""

from pathlib import Path

import numpy as np

from segtrain.config import PredictConfig
from segtrain.console import Progress, say
from segtrain.data.images import read_image
from segtrain.data.labels import LabelTable
from segtrain.device import describe_device, resolve_device
from segtrain.errors import DataError, UsageError
from segtrain.scoring import figures as pictures
from segtrain.scoring.inference import Answer
from segtrain.tasks.evaluation import restore

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def predict(config: PredictConfig) -> Path:
    """Write a folder of each of `outputs`, a PNG of every input picture at its own size. Returns the output folder.

    A picture that cannot be read is named at the end (DataError) after all others are done.
    """
    if config.input is None:
        raise UsageError("input is not set: give input=IMAGE or input=FOLDER")
    source = Path(config.input)
    files = find_images(source)
    names = output_names(source, files)
    on = resolve_device(config.device)
    trained, content = restore(Path(config.checkpoint or ""), on, config.checkpoint_weights)
    say(f"checkpoint  {config.checkpoint}, step {content['step']}")
    say(f"predicting  {len(files)} pictures, inference {config.inference.name}, on {describe_device(on)}")
    output = Path(config.output or "segtrain-out/predict")
    errors = []
    progress = Progress("predicting", len(files))
    for number, (file, name) in enumerate(zip(files, names, strict=True), 1):
        try:
            image = read_image(file)
        except DataError as error:
            errors.append(str(error))
            continue
        found = trained.answer(image, config.inference, "prob" in config.outputs)
        for kind in config.outputs:
            palette = trained.table.colors if kind == "palette" else None
            pictures.write(output / kind / f"{name}.png", drawn(kind, image, found, trained.table), palette)
        progress.show(number)
    classes = trained.table.source
    held = [f"{kind}/ holds {text.format(classes)}" for kind, text in HOLDS.items() if kind in config.outputs]
    say("; ".join([f"{len(files) - len(errors)} pictures", *held]))
    print(output)
    if errors:
        raise DataError("\n".join(errors))
    return output


# Those that a program reads again.
HOLDS = {
    "labels": "the ids of {}",
    "palette": "train ids in the colours of {}",
    "raw": "train ids, the order of {}",
    "prob": "255 times the probability of the class, cut off",
}


def drawn(kind: str, image: np.ndarray, found: Answer, table: LabelTable) -> np.ndarray:
    """One of PredictConfig.outputs: uint8 (H, W), or (H, W, 3) RGB."""
    if kind == "prob":
        assert found.probability is not None
        return (found.probability * 255).astype(np.uint8)
    if kind == "overlay":
        return pictures.overlay(image, found.train_ids, table)
    if kind == "labels":
        return table.decode(found.train_ids)
    return table.colorize(found.train_ids) if kind == "color" else found.train_ids


def find_images(source: Path) -> list[Path]:
    """The picture itself, or all pictures below a folder, sorted."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UsageError(f"input={source}: no such file or folder")
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UsageError(f"input={source}: the folder holds no pictures ({', '.join(SUFFIXES)})")
    return files


def output_names(source: Path, files: list[Path]) -> list[str]:
    """Path below `source` without the ending; with it where a.jpg and a.png would fall together."""
    root = source if source.is_dir() else source.parent
    relative = [path.relative_to(root) for path in files]
    short = [path.with_suffix("").as_posix() for path in relative]
    return [
        name if short.count(name) == 1 else f"{name}_{path.suffix[1:]}"
        for name, path in zip(short, relative, strict=True)
    ]
