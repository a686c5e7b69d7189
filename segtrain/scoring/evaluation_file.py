"""Evaluations as `segtrain evaluate`, `segtrain score` and trainings have written them, read again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.config.user_files import read_json
from segtrain.errors import DataError, UsageError
from segtrain.scoring.image_counts import FILE, ImageConfusions, read_image_counts

MOST_NAMED = 3


class StoredEvaluation(NamedTuple):
    """path: of its evaluation.json. result: its content. images: of its images.npz."""

    path: Path
    result: dict[str, Any]
    images: ImageConfusions

    @property
    def absent(self) -> str:
        """Which classes are left out, as of `Rules`."""
        return self.images.about["absent_classes"]


def evaluation_path(given: Path) -> Path:
    """The evaluation.json of a run folder, of an evaluation folder, or the file itself.

    UsageError if there is no such file or folder; DataError for a folder without an evaluation, naming those inside.
    """
    if given.is_file():
        return given
    if not given.is_dir():
        raise UsageError(f"{given}: no such file or folder; give a run folder, or the folder of an evaluation")
    if (given / "evaluation.json").is_file():
        return given / "evaluation.json"
    inside = sorted(path.parent for path in given.glob("evaluations/*/evaluation.json"))
    others = f"; there is {', '.join(map(str, inside[:MOST_NAMED]))}" if inside else ""
    unfinished = " (the run is not finished)" if (given / "config.yaml").is_file() else ""
    raise DataError(
        f"{given} has no evaluation.json{unfinished}: `segtrain evaluate run={given}` writes one into "
        f"{given / 'evaluations'}{others}"
    )


def read_result(path: Path) -> dict[str, Any]:
    """The content of an evaluation.json of a segmentation. DataError for anything else."""
    result = read_json(path)
    if isinstance(result, dict) and "top1" in result:
        raise DataError(f"{path} is of an image classification, which has no pixels to count")
    if not isinstance(result, dict) or not isinstance(result.get("per_class"), dict) or "miou" not in result:
        raise DataError(f"{path} is no evaluation: give a run folder, or what `segtrain evaluate` has written")
    return result


def read_evaluation(given: Path) -> StoredEvaluation:
    """Read an evaluation with the counts of its images. given: as of `evaluation_path`. DataError if they are missing,
    or not those of the evaluation."""
    path = evaluation_path(given)
    result, images = read_result(path), read_image_counts(path.with_name(FILE))
    found = images.evaluated().confusion()
    if not np.array_equal(found, np.array(result.get("confusion_matrix"))) or images.classes != list(
        result["per_class"]
    ):
        raise DataError(
            f"{path.with_name(FILE)} is not of {path.name} beside it (their counts differ): evaluate again, with "
            "`segtrain evaluate`"
        )
    return StoredEvaluation(path, result, images)


# ----------------------------------------------------------------------------------------------------- comparability


def aligned(first: ImageConfusions, second: ImageConfusions) -> tuple[np.ndarray, np.ndarray]:
    """int64 (3, N, C) of both, evaluated, in the order of the first one's images. They are comparable."""
    place = {name: number for number, name in enumerate(second.keys())}
    order = [place[name] for name in first.keys()]  # noqa: SIM118
    return first.evaluated().parts(), second.evaluated().parts()[:, order]


def differences(first: StoredEvaluation, second: StoredEvaluation) -> Iterator[str]:
    """Reasons why two evaluations cannot be compared, in words."""
    one, other = first.images, second.images
    if one.classes != other.classes:
        yield f"other classes: {len(one.classes)} and {len(other.classes)}{some_names(one.classes, other.classes)}"
        return
    for key, what in (("absent_classes", "classes left out of the mean"), ("ignored_predictions", "predicted ids "
                      "outside the classes")):  # fmt: skip
        if one.about[key] != other.about[key]:
            yield f"other rules: {what}: {one.about[key]!r} and {other.about[key]!r}"
    if set(one.keys()) != set(other.keys()):
        yield (
            f"other images: {len(one.identities)} of {one.about['dataset']} {one.about['split']} and "
            f"{len(other.identities)} of {other.about['dataset']} {other.about['split']}"
            f"{some_names(one.keys(), other.keys())}"
        )
        return
    place = {name: number for number, name in enumerate(other.keys())}
    order = [place[name] for name in one.keys()]  # noqa: SIM118
    sizes = (one.sizes != other.sizes[order]).any(1)
    labels = (one.labelled() != other.labelled()[order]).any(1)
    for what, wrong in (("other sizes", sizes), ("other labels", labels & ~sizes)):
        if wrong.any():
            named = ", ".join(one.names[i] for i in np.flatnonzero(wrong)[:MOST_NAMED])
            yield f"{what} of {int(wrong.sum())} of {len(wrong)} images: {named}"


def some_names(first: list[str], second: list[str]) -> str:
    """'; only in the first: a, b; only in the second: c'"""
    text = ""
    for where, names in (("first", set(first) - set(second)), ("second", set(second) - set(first))):
        if names:
            listed = ", ".join(sorted(names)[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
            text += f"; only in the {where}: {listed}"
    return text or "; in another order"
