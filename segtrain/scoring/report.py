"""An evaluation: its scores, the protocol that says how they were measured, its printed table and its files."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import segtrain
from segtrain.config import DatasetConfig
from segtrain.console import printable, say
from segtrain.data.registry import dataset_spec
from segtrain.data.sample import Sample
from segtrain.errors import DataError
from segtrain.files import write_atomically
from segtrain.scoring import figures
from segtrain.scoring.extra_metrics import apply_metrics, metric_lines
from segtrain.scoring.image_counts import ImageConfusions
from segtrain.scoring.scores import Scores

ABSENT = {
    "union": "left out: neither labelled, nor predicted on an evaluated pixel",
    "ground truth": "left out: not labelled, predicted or not",
}
IGNORED = {
    "miss": "an evaluated pixel predicted as an id outside the classes is a miss of its class",
    "dropped": "an evaluated pixel predicted as an id outside the classes does not count",
}
CONFUSION = "val/confusion"  # name of the confusion matrix's drawing in the log


class Evaluation(NamedTuple):
    """Scores of a split.

    result: content of evaluation.json, fractions. scalars, figures: for the log, by name; figures are RGB uint8
    (H, W, 3). confusion: int64 (C, C + 1), None for image classification. examples: the figure of example predictions.
    images: the same counts image by image.
    """

    result: dict[str, Any]
    scalars: dict[str, float | None] = {}
    figures: dict[str, np.ndarray] = {}
    confusion: np.ndarray | None = None
    examples: np.ndarray | None = None
    images: ImageConfusions | None = None

    def lines(self) -> list[str]:
        """The printed table."""
        return table_lines(self.result)

    def write(self, folder: Path, examples: bool = False) -> Path:
        """Write evaluation.json, confusion.png and images.npz if there is a confusion matrix, and, if asked for and
        there are any, predictions.png. Returns the path of evaluation.json."""
        if examples and self.examples is not None:
            figures.write_png(folder / "predictions.png", self.examples)
        if CONFUSION in self.figures:
            figures.write_png(folder / "confusion.png", self.figures[CONFUSION])
        if self.images is not None:
            self.images.write(folder)
        matrix = {} if self.confusion is None else {"confusion_matrix": self.confusion.tolist()}
        text = json.dumps(self.result | matrix, indent=2)
        if matrix:  # a row a line
            rows = r"\[\s+-?\d+(?:,\s+-?\d+)*\s+\]"
            text = re.sub(rows, lambda found: re.sub(r"\s+", " ", found[0]), text)
        path = folder / "evaluation.json"
        write_atomically(path, text.encode() + b"\n")
        return path


# ------------------------------------------------------------------------------------------------------- protocol


def protocol(
    counts: Scores, data: DatasetConfig, split: str, samples: list[Sample], warnings: list[str], how: dict[str, Any]
) -> dict[str, Any]:
    """The protocol of a segmentation in evaluation.json. how: entries about what made the predictions.

    DataError unless each sample was counted once.
    """
    if counts.images != len(samples):
        raise DataError(f"{counts.images} images were scored, but the split has {len(samples)}: this is a bug")
    published = dataset_spec(data).published.get(split)
    rules, table = counts.rules, counts.table
    if published is not None and published != len(samples):
        warnings = [*warnings, f"{len(samples)} images, but {data.name} {split} has {published} as published: "
                               "the figure is not comparable with published ones"]  # fmt: skip
    some = counts.images_with_instances
    if 0 < some < counts.images:
        warnings = [*warnings, f"{some} of {counts.images} images have an instance map: no iIoU"]
    elif counts.instances_disagree():
        warnings = [*warnings, "the instance maps contradict the labels (are they of another dataset?): no iIoU"]
    named = {int(row["id"]): str(row["name"]) for row in table.rows}
    return {
        "dataset": data.name,
        "split": split,
        "split_sha256": names_hash(sample.name for sample in samples),
        "images": {"expected": len(samples), "seen": counts.images, "published": published},
        "resolution": "every label picture's own",
        "averaging": "one int64 count over all pictures",
        "rules": rules.source,
        "absent_classes": ABSENT[rules.absent],
        "ignored_predictions": IGNORED[rules.ignored_prediction],
        "classes": table.num_classes,
        "labels_from": table.source,
        "ignored_labels": [named[label] for label in table.ignored_ids if named[label] != "ignored"],
        "images_with_instances": counts.images_with_instances,
        **how,
        "code": code_version(),
        "miou_under_other_rules": counts.under_other_rules(),
        "warnings": warnings,
    }


def code_version() -> str:
    return f"segtrain {segtrain.__version__}, torch {metadata.version('torch')}"


def names_hash(names: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(sorted(names)))).hexdigest()


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprints(image_ids: list[str]) -> Any:
    """int64 (n,) tensor of hashes, for a checkpoint: the images that it was trained on."""
    import torch

    hashes = [hashlib.sha256(os.fsencode(name)).digest()[:8] for name in image_ids]
    return torch.tensor([int.from_bytes(h, "big", signed=True) for h in hashes])


def count_seen(trained_on: Any, image_ids: list[str]) -> int:
    """How many of the images are among those that a checkpoint was trained on.

    trained_on: `fingerprints` of the training images; None: not known.
    """
    import torch

    return 0 if trained_on is None else int(torch.isin(fingerprints(image_ids), trained_on).sum())


def seen_images(seen: int, images: int) -> list[str]:
    """The warning about `seen` of the images, in a list; [] if there are none."""
    warning = f"{seen} of the {images} images were in this checkpoint's training: the score is too high"
    return [warning] if seen else []


# ------------------------------------------------------------------------------------------------------- scores


def summarise(counts: Scores, prior: Scores | None) -> dict[str, Any]:
    """All scores. prior: those of the position prior. DataError if there is nothing to score."""
    result = counts.result()
    if result["miou"] is None:
        raise DataError("these images have not one labelled pixel: there is nothing to score")
    result["images"] = counts.images
    if prior is not None:
        result["position_prior_miou"] = prior.result()["miou"]
    return result | apply_metrics(counts.evaluated())


def print_table(result: dict[str, Any]) -> None:
    """Print the table of an evaluation.json."""
    say("\n".join(table_lines(result)))


def table_lines(result: dict[str, Any]) -> list[str]:
    """The printed table of an evaluation.json: per-class IoU in percent, the averages, the warnings."""
    if "top1" in result:
        return accuracy_lines(result)
    width = max(len(name) for name in result["per_class"])
    objects = result.get("per_class_iiou") or {}
    lines = ["", f"{'class':<{width}}   IoU %{'  iIoU %' if objects else ''}"]
    for name, value in result["per_class"].items():
        shown = printable(name, inline=True)
        lines.append(f"{shown:<{width}}   {percent(value)}{f'   {percent(objects[name])}' if name in objects else ''}")
    classes = f"{result['classes_averaged']} classes ({result['classes_in_ground_truth']} occur in the ground truth)"
    lines += ["", f"mIoU            {percent(result['miou'])} %  over {classes}, {result['images']} images"]
    if result["classes_in_ground_truth"] == 1:
        lines.append("WARNING         one class occurs in the ground truth: predicting nothing else scores 100 %")
    published = result.get("protocol", {}).get("published")
    if published:
        lines.append(
            f"published       {published}; measured above: {result['dataset']} {result['split']}, "
            f"inference {result['inference']['name']} ({describe_inference(result['inference'])})"
        )
    for key, name in (
        ("iiou", "iIoU"), ("category_miou", "category mIoU"), ("category_iiou", "category iIoU"),
        ("pixel_accuracy", "pixel accuracy"), ("mean_accuracy", "mean accuracy"), ("boundary_miou", "boundary mIoU"),
    ):  # fmt: skip
        if result.get(key) is not None:
            lines.append(f"{name:<14}  {percent(result[key])} %")
    prior = result.get("position_prior_miou")
    if prior:
        ratio = f"the model has {result['miou'] / prior:.2f} times that"
        lines.append(
            f"position prior  {percent(prior)} %  mIoU of a predictor that knows a pixel's place only; {ratio}"
        )
    lines += [*metric_lines(result), *warning_lines(result), ""]
    return lines


def warning_lines(result: dict[str, Any]) -> list[str]:
    return [f"warning         {text}" for text in result.get("protocol", {}).get("warnings", [])]


def describe_inference(inference: Mapping[str, Any]) -> str:
    """The views of an image that the network sees: 'scale 1, with flip, longest side 2048'."""
    scales = ", ".join(f"{scale:g}" for scale in inference["scales"])
    longest = inference.get("longest_side")
    return (
        f"scale{'s' if len(inference['scales']) > 1 else ''} {scales}, {'with' if inference['flip'] else 'no'} flip, "
        + (f"longest side {longest}" if longest else "the images' own size")
        + (f", windows {inference['tile']}" if inference["tile"] else "")
        + (f", in {inference['precision']}" if inference.get("precision", "fp32") != "fp32" else "")
    )


def accuracy_lines(result: dict[str, Any]) -> list[str]:
    """The printed table of an image classification."""
    lines = ["", f"top-1           {100 * result['top1']:5.2f} %  {result['images']} images"]
    lines += [f"top-5           {100 * result['top5']:5.2f} %"]
    lines += [*metric_lines(result), *warning_lines(result), ""]
    published = result.get("protocol", {}).get("published")
    if published is not None:
        known = f"top-1 {published['top1']:.2f} %, top-5 {published['top5']:.2f} %"
        lines += [f"published       {known}  {published['of']}", ""]
    return lines


def percent(value: float | None) -> str:
    return "  -  " if value is None else f"{100 * value:5.1f}"
