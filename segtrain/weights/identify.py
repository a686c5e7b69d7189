"""Identify weights by their tensors: key layout, backbone, classes, and the published files with the same ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.errors import DataError
from segtrain.weights.layouts import LAYOUTS, num_rows
from segtrain.weights.published import known_files

HEAD_OF = {  # key layout -> model.head of its networks
    "segmenter": "deeplabv3", "torchvision_deeplabv3": "deeplabv3_torchvision", "nvidia_deeplabv3plus": "deeplabv3plus",
}  # fmt: skip

# (number of parameters, number of tensors) of the published backbones; running statistics count as tensors only.
BODIES = {
    (11_176_512, 100): "resnet18", (21_284_672, 180): "resnet34", (23_508_032, 265): "resnet50",
    (42_500_160, 520): "resnet101", (22_331_200, 259): "resnext50", (40_853_312, 514): "resnext101",
    (56_110_912, 769): "resnext152", (22_979_904, 265): "resnext50_32x4d", (86_742_336, 520): "resnext101_32x8d",
    (105_070_912, 191): "wider_resnet38", (30_714_880, 1330): "densenet264",
}  # fmt: skip


def layout_of(tensors: Mapping[str, Tensor], path: Path) -> str:
    """The name in LAYOUTS of the file's key layout; DataError if it has none of them."""
    for name, layout in LAYOUTS.items():
        if layout.mark in tensors:
            return name
    if "cls.weight" in tensors and any(key.startswith("body.") for key in tensors):
        return "segmenter"  # with the backbone of a plugin or of timm
    some = ", ".join(list(tensors)[:4]) or "no tensors at all"
    known = "; ".join(f"{layout.title} ({layout.mark})" for layout in LAYOUTS.values())
    raise DataError(f"{path}: its tensors have the names of no known layout ({some}, ...). Known are: {known}")


def backbone_of(tensors: Mapping[str, Tensor], layout: str) -> str | None:
    """The backbone with as many parameters and tensors; None if there is none."""
    other = ("head.", "cls.", "classifier.", "fc.", "aux_classifier.", "aspp.", "bot_", "final.")
    body = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(other) and not key.endswith("num_batches_tracked")
    }
    count = sum(tensor.numel() for key, tensor in body.items() if not key.rpartition(".")[2].startswith("running_"))
    bare = 2 * 4096 if layout == "nvidia_deeplabv3plus" else 0  # it has no bn_out
    return BODIES.get((count + bare, len(body) + (4 if bare else 0)))


def known_by_tensors(tensors: Mapping[str, Tensor], layout: str) -> list[dict[str, Any]]:
    """The published files of the same key layout, backbone and number of classes."""
    backbone = backbone_of(tensors, layout)
    rows = (num_rows(tensors, LAYOUTS[layout], f"{last}.weight") for last in ("cls", "classifier.fc"))
    classes = next((count for count in rows if count), None)
    return [
        known for known in known_files()
        if (known["form"], known["backbone"], known["classes"]) == (layout, backbone, classes)
    ]  # fmt: skip


def classes_of(known: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: str) -> LabelTable | None:
    """The classes of a published segmentation network, in the order of its classifier's rows; None if unknown.

    known: its row among the published files, or an empty dict.
    """
    count = num_rows(tensors, LAYOUTS[layout], "cls.weight")
    if count is None:
        return None
    if known.get("labels") == "voc" or (layout == "torchvision_deeplabv3" and count == 21):
        names = read_json_table("weights")["voc"]
        return LabelTable(
            [{"name": name, "id": i, "color": [0, 0, 0], "train_id": i} for i, name in enumerate(names)], "VOC"
        )
    # The only segmentation network of the official repository, also if its file was rewritten and has another hash.
    labels = "vistas_v1.2" if layout == "segmenter" and count == 65 and not known else known.get("labels")
    if labels is None and layout == "nvidia_deeplabv3plus" and count == 19:
        labels = "cityscapes"
    return published_table(labels) if labels else None
