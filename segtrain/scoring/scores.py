"""Scores from int64 counts over a whole dataset, by the rules of each benchmark's own evaluation script.

Everything is counted in label ids, as the scripts do. Counts add up over images and over processes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from segtrain.config import IGNORE_INDEX
from segtrain.data.labels import LabelTable
from segtrain.data.rules import PLAIN, Rules
from segtrain.distributed.group import all_reduce_arrays
from segtrain.native.pixels import joint_histogram
from segtrain.scoring.boundary import boundary_counts


class Scores:
    """Counts of labelled and predicted pixels, and the scores that follow from them.

    pixels: int64 (256, 256), label id x predicted id. weighted: float64 (256, 256), the same over the pixels of
    objects, each pixel weighted by (average object size of the class / size of its object). boundary: int64 (2, C),
    intersection and union of the classes' boundary bands, or None. images: number of images counted.
    """

    def __init__(self, table: LabelTable, rules: Rules = PLAIN, boundary: bool = False) -> None:
        self.table = table
        self.rules = rules
        self.pixels = np.zeros((256, 256), np.int64)
        self.weighted = np.zeros((256, 256))
        self.boundary = np.zeros((2, table.num_classes), np.int64) if boundary else None
        self.images = 0
        self.images_with_instances = 0
        self.object_pixels = np.zeros(2, np.int64)  # in the instance maps; and of these, where the label agrees
        self.class_of = np.full(256, IGNORE_INDEX, np.uint8)  # label id -> train id
        self.sizes = np.full(256, np.nan)  # label id -> average size of its objects; NaN: it has none; 0: not known
        for row in table.rows:
            self.class_of[row["id"]] = row["train_id"]
            if row.get("has_instances") and row["train_id"] != IGNORE_INDEX:
                self.sizes[row["id"]] = row.get("avg_instance_size") or 0

    def add(
        self, ids: np.ndarray, predicted: np.ndarray, instances: np.ndarray | None = None,
        to_id: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Count one image: uint8 (H, W) label ids and predicted ids, and integer (H, W) instance values if known.

        to_id: uint8 (256,), predicted value -> id, where they differ; call `translate` after the last image. Returns
        the pixels of this image, int64 (256, 256), label id x predicted id.
        """
        pixels = np.zeros((256, 256), np.int64)
        joint_histogram(ids, predicted, pixels)
        self.pixels += pixels
        self.images += 1
        if instances is not None and self.rules.divisor is not None:
            self.images_with_instances += 1
            self.add_objects(instances, predicted)
            objects = instances > 255
            agrees = instances[objects] // self.rules.divisor == ids[objects]
            self.object_pixels += len(agrees), int(agrees.sum())
        if self.boundary is not None:
            self.boundary += boundary_counts(
                self.class_of[ids], self.class_of[predicted if to_id is None else to_id[predicted]],
                self.table.num_classes,
            )  # fmt: skip
        return pixels if to_id is None else translated(pixels, to_id)

    def add_objects(self, instances: np.ndarray, predicted: np.ndarray) -> None:
        divisor, single = self.rules.divisor, self.rules.single
        assert divisor is not None and single is not None
        values = np.arange(1 << 16)
        labels = values // divisor
        counted = single(values) & (labels < 256) & ~np.isnan(self.sizes[np.minimum(labels, 255)])
        sizes = np.bincount(instances.ravel(), minlength=1 << 16)
        objects = np.flatnonzero(counted & (sizes > 0))
        if not len(objects):
            return
        number = np.full(1 << 16, -1, np.int32)
        number[objects] = np.arange(len(objects)) * 256
        place = number[instances]
        inside = place >= 0
        found = np.bincount(place[inside] + predicted[inside], minlength=256 * len(objects)).reshape(-1, 256)
        label = objects // divisor
        average = np.where(self.sizes[label] > 0, self.sizes[label], sizes[objects])
        np.add.at(self.weighted, label, found * (average / sizes[objects])[:, None])

    def translate(self, to_id: np.ndarray) -> None:
        """Map the columns, predicted values, to ids. to_id: uint8 (256,)."""
        for name in ("pixels", "weighted"):
            setattr(self, name, translated(getattr(self, name), to_id))

    def all_reduce(self) -> None:
        """Add up the counts of all processes of this command. A collective call."""
        number = np.array([self.images, self.images_with_instances])
        all_reduce_arrays(
            number, self.object_pixels, self.pixels, self.weighted, *([] if self.boundary is None else [self.boundary])
        )
        self.images, self.images_with_instances = map(int, number)

    # ------------------------------------------------------------------------------------------------------- scores

    def confusion(self) -> np.ndarray:
        """The confusion matrix int64 (C, C + 1), ground truth x prediction, in train ids.

        The last column counts evaluated pixels that were predicted as something outside the classes. Pixels without
        an evaluated label never count.
        """
        classes = self.table.num_classes
        by_class = np.zeros((classes + 1, classes + 1), np.int64)
        index = np.minimum(self.class_of, classes)
        np.add.at(by_class, (index[:, None], index[None, :]), self.pixels)
        return by_class[:classes]

    def evaluated(self) -> np.ndarray:
        """The confusion matrix after the rule for predictions outside the classes."""
        matrix = self.confusion()
        if self.rules.ignored_prediction == "dropped":
            matrix[:, -1] = 0
        return matrix

    def result(self) -> dict[str, Any]:
        """All scores as fractions, ready for JSON: None, never NaN, for a class that is left out."""
        names, matrix = self.table.names, self.evaluated()
        iou, labelled = iou_of(matrix, self.rules.absent), matrix.sum(1)
        total, there = int(labelled.sum()), labelled > 0
        hits = np.diagonal(matrix)
        result: dict[str, Any] = {
            "miou": mean(iou),
            "pixel_accuracy": float(hits.sum() / total) if total else None,
            "mean_accuracy": float((hits[there] / labelled[there]).mean()) if total else None,
            "frequency_weighted_iou": float((labelled[there] * iou[there]).sum() / total) if total else None,
            "per_class": named_values(names, iou),
            "classes_averaged": int((~np.isnan(iou)).sum()),
            "classes_in_ground_truth": int(there.sum()),
        }
        leaves = {name: [index] for index, name in enumerate(names)}
        result |= object_means("iiou", "per_class_iiou", self.object_scores(leaves, matrix))
        levels = self.levels()
        for level, groups in enumerate(levels):
            counts = merge_classes(matrix, groups.values())
            grouped = named_values(groups, iou_of(counts, self.rules.absent))
            scores = {"miou": mean(grouped.values()), "per_class": grouped}
            scores |= object_means("iiou", "per_class_iiou", self.object_scores(groups, counts))
            if level == 0:
                result |= {"category_miou": scores["miou"], "category_iiou": scores["iiou"],
                           "per_category": grouped, "per_category_iiou": scores["per_class_iiou"]}  # fmt: skip
            else:
                result["subcategories"] = scores
        for key in ("category_miou", "category_iiou", "per_category", "per_category_iiou"):
            result.setdefault(key, None)
        if self.boundary is not None:
            inside, union = self.boundary
            bands = np.divide(inside, union, out=np.full(len(union), np.nan), where=union > 0)
            result |= {"boundary_miou": mean(bands), "per_class_boundary_iou": named_values(names, bands)}
        return result

    def levels(self) -> list[dict[str, list[int]]]:
        """For each level, group name -> train ids."""
        result: list[dict[str, list[int]]] = []
        for train_id, row in self.table.class_rows.items():
            for level, name in enumerate(self.rules.categories(row)):
                if level == len(result):
                    result.append({})
                result[level].setdefault(name, []).append(train_id)
        return result

    def object_scores(self, groups: Mapping[str, list[int]], matrix: np.ndarray) -> dict[str, float] | None:
        """Instance-weighted IoU of the groups all of whose classes consist of objects; NaN: no such object occurs.

        None unless every image had instances that agree with its labels. matrix: (G, G + 1) counts of the groups.
        """
        if self.images_with_instances < max(self.images, 1) or self.instances_disagree():
            return None
        result = {}
        for index, (name, members) in enumerate(groups.items()):
            ids = np.flatnonzero(np.isin(self.class_of, members))
            if np.isnan(self.sizes[ids]).any():
                continue
            alarms = matrix[:, index].sum() - matrix[index, index]
            within = self.weighted[ids]
            if self.rules.merged and len(members) > 1:
                kin = self.kin(name)
                found = within[:, kin].sum()
                alarms += self.pixels[np.ix_(np.flatnonzero(self.outside(members)), np.setdiff1d(kin, ids))].sum()
            else:
                found = within[np.arange(len(ids)), ids].sum()
            union = within.sum() + alarms
            result[name] = float(found / union) if union > 0 else np.nan
        return result

    def instances_disagree(self) -> bool:
        """Whether the instance maps, read as the rules say, contradict the labels."""
        return bool(self.object_pixels[1] < 0.5 * self.object_pixels[0])

    def kin(self, name: str) -> np.ndarray:
        """All ids with objects in a category, ignored ids too.

        For Cityscapes, a caravan predicted where a car is counts as a vehicle found.
        """
        first = self.table.class_rows
        objects = [row for row in self.table.rows if row.get("has_instances")]
        return np.array([r["id"] for r in objects if name in self.rules.categories(first.get(r["train_id"], r))])

    def outside(self, members: list[int]) -> np.ndarray:
        """bool (256,): evaluated ids that are in none of these classes."""
        return (self.class_of != IGNORE_INDEX) & ~np.isin(self.class_of, members)

    def under_other_rules(self) -> dict[str, float | None]:
        """mIoU of the same counts as other tools define it; on small splits these differ by whole points."""
        full, lenient = self.confusion(), self.confusion()
        lenient[:, -1] = 0
        union, truth = iou_of(full, "union"), iou_of(full, "ground truth")
        outside = bool(full[:, -1].any())
        labelled = {"COCO-Stuff, detectron2 (left out: not labelled)": mean(truth)}
        if outside:
            labelled = {
                "COCO-Stuff (left out: not labelled)": mean(truth),
                "detectron2 (left out: not labelled; a prediction outside the classes is dropped)":
                    mean(iou_of(lenient, "ground truth")),
            }  # fmt: skip
        return {
            "cityscapesScripts, mmsegmentation (left out: neither labelled nor predicted)": mean(union),
            **labelled,
            "mapillary_vistas (a prediction outside the classes is dropped)": mean(iou_of(lenient, "union")),
            "torchmetrics MulticlassJaccardIndex macro (refuses predictions outside the classes)":
                None if outside else mean(union),
            "absent counts 0 (HRNet; torchmetrics none().mean())": mean(np.nan_to_num(union, nan=0.0)),
            "absent counts 1 (segmentation_models_pytorch)": mean(np.nan_to_num(union, nan=1.0)),
        }  # fmt: skip


def translated(counts: np.ndarray, to_id: np.ndarray) -> np.ndarray:
    """Counts (256, 256) with the columns, predicted values, mapped to ids. to_id: uint8 (256,)."""
    moved = np.zeros_like(counts)
    np.add.at(moved.T, to_id, counts.T)
    return moved


def iou_of(matrix: np.ndarray, absent: str) -> np.ndarray:
    """TP / (TP + FP + FN) as float64 (C,) from (C, C + 1) counts; NaN for a class that the rule leaves out."""
    hits, labelled = np.diagonal(matrix), matrix.sum(1)
    union = labelled + matrix[:, :-1].sum(0) - hits
    counts = union > 0 if absent == "union" else labelled > 0
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=counts)


def merge_classes(matrix: np.ndarray, groups: Iterable[list[int]]) -> np.ndarray:
    """Counts (C, C + 1) of classes -> (G, G + 1) of groups of classes."""
    members = np.zeros((0, matrix.shape[0]), np.int64)
    for group in groups:
        members = np.vstack([members, np.isin(np.arange(matrix.shape[0]), group)])
    return np.hstack([members @ matrix[:, :-1] @ members.T, members @ matrix[:, -1:]])


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are neither None nor NaN; None if there is none."""
    known = [float(value) for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else None


def named_values(names: Iterable[str], values: Iterable[float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}


def object_means(average: str, each: str, scores: Mapping[str, float] | None) -> dict[str, Any]:
    if scores is None:
        return {average: None, each: None}
    return {average: mean(scores.values()), each: named_values(scores, scores.values())}
