"""The files that `segtrain predict` writes: their names, their content, and which are finished."""

import io
import json
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config import PredictConfig
from segtrain.console import say
from segtrain.data.inputs import Input
from segtrain.data.labels import LabelTable
from segtrain.files import read_side_json, write_atomically
from segtrain.scoring import figures
from segtrain.scoring.inference import Prediction
from segtrain.scoring.predictor import Predictor
from segtrain.scoring.report import file_hash

RECORD = "predict.json"  # in the output folder: what made the files there
EVERY = "probabilities"  # the output that holds those of all classes
# Outputs that are made for programs to read.
HOLDS = {
    "labels": "the ids of {}",
    "palette": "train ids in the colours of {}",
    "raw": "train ids, the order of {}",
    "prob": "255 times the probability of the class, truncated",
    EVERY: "float16 of every class (C, H, W), in the order of {}",
}


def write_outputs(
    one: Input, image: np.ndarray, found: Prediction, table: LabelTable, kinds: Sequence[str], output: Path
) -> None:
    for kind in kinds:
        place = output_place(one, output, kind)
        if kind == EVERY:
            assert found.probabilities is not None
            write_atomically(place, packed_probabilities(found.probabilities, table))
            continue
        palette = table.colors if kind == "palette" else None
        figures.write_png(place, draw_output(kind, image, found, table), palette, quick=True)


def packed_probabilities(probabilities: np.ndarray, table: LabelTable) -> memoryview:
    """An .npz file of float16 (C, H, W) `probabilities` and of their `classes`, the last one void if it is predicted.

    It is compressed quickly: most probabilities of a trained network are nearly 0 or 1.
    """
    names = [*table.names, "void"][: len(probabilities)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in (("probabilities", probabilities), ("classes", np.array(names))):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getbuffer()


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


def output_place(one: Input, output: Path, kind: str, is_large: bool = False) -> Path:
    """is_large: whether the image is larger than memory, so that its answers are TIFF files."""
    return output / kind / f"{one.name}{'.tif' if is_large else '.npz' if kind == EVERY else '.png'}"


def is_finished(one: Input, output: Path, kinds: Collection[str], is_large: bool = False) -> bool:
    """Whether all its files are there, and younger than the image and the record."""
    try:
        begun = max((output / RECORD).stat().st_mtime_ns, one.path.stat().st_mtime_ns)
        return all(output_place(one, output, kind, is_large).stat().st_mtime_ns >= begun for kind in kinds)
    except OSError:
        return False


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
