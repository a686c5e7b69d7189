"""What a score says of itself: whose rules, which pictures, what was warned of. And how it is shown and written."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import segtrain
from segtrain.config import DatasetConfig
from segtrain.data.dataset import dataset_spec, identities
from segtrain.data.labels import LabelTable
from segtrain.data.sample import Sample
from segtrain.errors import DataError
from segtrain.files import write_atomically
from segtrain.scoring import figures as pictures
from segtrain.scoring.scores import Scores

ABSENT = {
    "union": "left out: neither labelled, nor predicted on an evaluated pixel",
    "ground truth": "left out: not labelled, predicted or not",
}
IGNORED = {
    "miss": "an evaluated pixel predicted as an id outside the classes is a miss of its class",
    "dropped": "an evaluated pixel predicted as an id outside the classes does not count",
}


def protocol(
    counted: Scores, data: DatasetConfig, split: str, samples: list[Sample], warnings: list[str], how: dict[str, Any]
) -> dict[str, Any]:
    """The card in evaluation.json. how: what made the predictions. DataError unless each sample was counted once."""
    if counted.images != len(samples):
        raise DataError(
            f"{counted.images} pictures were scored, {len(samples)} are in the split: this is a fault of ours"
        )
    published = dataset_spec(data).published.get(split)
    rules, table = counted.rules, counted.table
    if published is not None and published != len(samples):
        warnings = [*warnings, f"{len(samples)} pictures, but {data.name} {split} has {published} as published: "
                               "the figure is not comparable with published ones"]  # fmt: skip
    some = counted.images_with_instances
    if 0 < some < counted.images:
        warnings = [*warnings, f"{some} of {counted.images} pictures have an instance map: no iIoU"]
    elif counted.instances_disagree():
        warnings = [*warnings, "the instance maps contradict the labels (those of another data set?): no iIoU"]
    named = {int(row["id"]): str(row["name"]) for row in table.rows}
    return {
        "dataset": data.name,
        "split": split,
        "split_sha256": names_hash(sample.name for sample in samples),
        "images": {"expected": len(samples), "seen": counted.images, "published": published},
        "resolution": "every label picture's own",
        "averaging": "one int64 count over all pictures",
        "rules": rules.source,
        "absent_classes": ABSENT[rules.absent],
        "ignored_predictions": IGNORED[rules.ignored_prediction],
        "classes": table.num_classes,
        "labels_from": table.source,
        "ignored_labels": [named[label] for label in table.ignored_ids if named[label] != "ignored"],
        "images_with_instances": counted.images_with_instances,
        **how,
        "code": code_version(),
        "miou_under_other_rules": counted.under_other_rules(),
        "warnings": warnings,
    }


def code_version() -> str:
    return f"segtrain {segtrain.__version__}, torch {metadata.version('torch')}"


def names_hash(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprints(pictures: list[str]) -> Any:
    """int64 (n,) tensor, for a checkpoint: which pictures it was trained on."""
    import torch

    hashes = [hashlib.sha256(picture.encode()).digest()[:8] for picture in pictures]
    return torch.tensor([int.from_bytes(h, "big", signed=True) for h in hashes])


def seen_in_training(trained_on: Any, data: DatasetConfig, samples: list[Sample]) -> list[str]:
    """A warning if pictures to be scored are among those a checkpoint was trained on."""
    import torch

    if trained_on is None or not dataset_spec(data).family:
        return []
    twice = int(torch.isin(fingerprints(identities(data, samples)), trained_on).sum())
    if not twice:
        return []
    return [f"{twice} of the {len(samples)} pictures were in this checkpoint's training: the score is too high"]


def summarised(counted: Scores, of_prior: Scores | None) -> dict[str, Any]:
    """All scores; DataError if there is nothing to score."""
    result = counted.result()
    if result["miou"] is None:
        raise DataError("not one labelled pixel in these pictures: there is nothing to score")
    result["images"] = counted.images
    if of_prior is not None:
        result["position_prior_miou"] = of_prior.result()["miou"]
    return result


def print_table(result: dict[str, Any]) -> None:
    """Per-class IoU in percent, then the summary lines and the warnings."""
    print("\n".join(table_lines(result)), flush=True)


def table_lines(result: dict[str, Any]) -> list[str]:
    """What `print_table` prints."""
    if "top1" in result:
        return accuracy_lines(result)
    width = max(len(name) for name in result["per_class"])
    objects = result.get("per_class_iiou") or {}
    lines = ["", f"{'class':<{width}}   IoU %{'  iIoU %' if objects else ''}"]
    for name, value in result["per_class"].items():
        lines.append(f"{name:<{width}}   {percent(value)}{f'   {percent(objects[name])}' if name in objects else ''}")
    classes = f"{result['classes_averaged']} classes ({result['classes_in_ground_truth']} occur in the ground truth)"
    lines += ["", f"mIoU            {percent(result['miou'])} %  over {classes}, {result['images']} images"]
    published = result.get("protocol", {}).get("published")
    if published:
        lines.append(
            f"published       {published}; measured above: {result['dataset']} {result['split']}, "
            f"inference {result['inference']['name']} ({views(result['inference'])})"
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
    lines += [f"warning         {text}" for text in result.get("protocol", {}).get("warnings", [])]
    return [*lines, ""]


def views(inference: Mapping[str, Any]) -> str:
    """What the network saw of each picture: 'scale 1, with flip, longest side 2048'."""
    scales = ", ".join(f"{scale:g}" for scale in inference["scales"])
    longest = inference.get("longest_side")
    return (
        f"scale{'s' if len(inference['scales']) > 1 else ''} {scales}, {'with' if inference['flip'] else 'no'} flip, "
        + (f"longest side {longest}" if longest else "pictures' own size")
        + (f", windows {inference['tile']}" if inference["tile"] else "")
    )


def accuracy_lines(result: dict[str, Any]) -> list[str]:
    """Of whole pictures."""
    lines = ["", f"top-1           {100 * result['top1']:5.2f} %  {result['images']} pictures"]
    lines += [f"top-5           {100 * result['top5']:5.2f} %"]
    lines += [f"warning         {text}" for text in result.get("protocol", {}).get("warnings", [])]
    return [*lines, ""]


def percent(value: float | None) -> str:
    return "  -  " if value is None else f"{100 * value:5.1f}"


def write_result(
    folder: Path, result: dict[str, Any], panels: list[np.ndarray], table: LabelTable, confusion: np.ndarray
) -> None:
    """evaluation.json, confusion.png and, where there are panels, predictions.png (image | target | prediction)."""
    if panels:
        pictures.write(folder / "predictions.png", pictures.sheet(panels, table))
    pictures.write(folder / "confusion.png", pictures.confusion(confusion, table))
    text = json.dumps(result | {"confusion_matrix": confusion.tolist()}, indent=2)
    text = re.sub(r"\[\s+-?\d+(?:,\s+-?\d+)*\s+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)  # a row a line
    write_atomically(folder / "evaluation.json", text.encode() + b"\n")
