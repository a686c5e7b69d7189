"""Whose names tensors have: our own and those of every known kind of file, as tables.

Everything in between has one naming, that of a Segmenter's state_dict: body. head. cls. and, for whole pictures,
classifier.fc. A form says where each of these tensors lies in somebody's file (`place`).
"""

import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from segtrain.errors import UsageError

LEAVES = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


class Row(NamedTuple):
    """Our names that fit `ours` lie under `theirs`, whose {} are the groups of `ours`, numbers less `minus`.

    Several of theirs are joined along the first dimension. fifths: of a reduction of five branches, which columns.
    """

    ours: str
    theirs: tuple[str, ...]
    minus: tuple[int, ...] = ()
    fifths: tuple[int, int] = (0, 5)


def row(ours: str, *theirs: str, minus: tuple[int, ...] = (), fifths: tuple[int, int] = (0, 5)) -> Row:
    return Row(ours, theirs, minus, fifths)


def resnet_rows(prefix: str) -> tuple[Row, ...]:
    """A ResNet as torchvision and timm name it: stem, layer1.0.conv1, downsample.0 (convolution) and .1 (norm)."""
    block = prefix + "layer{}.{}."
    return (
        row(r"body\.mod1\.(\w+)\.(\w+)", prefix + "{}.{}"),
        row(r"body\.mod(\d)\.block(\d+)\.convs\.(\w+)\.(\w+)", block + "{}.{}", minus=(1, 1)),
        row(r"body\.mod(\d)\.block(\d+)\.proj_conv\.(\w+)", block + "downsample.0.{}", minus=(1, 1)),
        row(r"body\.mod(\d)\.block(\d+)\.proj_bn\.(\w+)", block + "downsample.1.{}", minus=(1, 1)),
    )


class Form(NamedTuple):
    """mark: a tensor that only this form has. explained: tensors that have no place here, and why."""

    title: str
    mark: str
    rows: tuple[Row, ...]
    activation: str
    scale: str
    explained: tuple[tuple[str, str], ...] = ()


NO_CLASSES = "classes of whole pictures"
WHOLE_PICTURES = ("official", "nvidia", "torchvision")  # forms of ImageNet classifiers
BARE_SUM = "the head reads the sum before this norm"
FORMS = {  # the first whose mark is there: NVIDIA's have that of the official one too
    "segmenter": Form(
        "segmentation network (body, head, cls)", "body.mod1.conv1.weight",
        (row(r"((?:body|head|cls)\..*)", "{}"),), "leaky_relu", "abs",
        ((r"body\.bn_out\.", BARE_SUM),),
    ),
    "torchvision": Form(
        "ImageNet classifier, torchvision's or timm's names", "layer1.0.conv1.weight",
        (*resnet_rows(""), row(r"classifier\.fc\.(\w+)", "fc.{}")), "relu", "signed", ((r"fc\.", NO_CLASSES),),
    ),
    "torchvision_deeplabv3": Form(
        "torchvision's DeepLabV3", "backbone.layer1.0.conv1.weight",
        (
            *resnet_rows("backbone."),
            row(r"head\.map_convs\.0\.(\w+)", "classifier.0.convs.0.0.{}"),
            row(r"head\.map_convs\.([123])\.(\w+)", "classifier.0.convs.{}.0.{}"),
            row(r"head\.map_bn\.(\w+)", *(f"classifier.0.convs.{i}.1.{{}}" for i in range(4))),
            row(r"head\.global_pooling_conv\.(\w+)", "classifier.0.convs.4.1.{}"),
            row(r"head\.global_pooling_bn\.(\w+)", "classifier.0.convs.4.2.{}"),
            row(r"head\.red_conv\.(\w+)", "classifier.0.project.0.{}", fifths=(0, 4)),
            row(r"head\.pool_red_conv\.(\w+)", "classifier.0.project.0.{}", fifths=(4, 5)),
            row(r"head\.red_bn\.(\w+)", "classifier.0.project.1.{}"),
            row(r"head\.refine_conv\.(\w+)", "classifier.1.{}"),
            row(r"head\.refine_bn\.(\w+)", "classifier.2.{}"),
            row(r"cls\.(\w+)", "classifier.4.{}"),
        ),
        "relu", "signed", ((r"aux_classifier\.", "a second head, used in training only"),),
    ),
    "nvidia_deeplabv3plus": Form(
        "NVIDIA's WideResNet-38 DeepLabV3+", "aspp.features.0.0.weight",
        (
            row(rf"body\.(.*\bbn\d)\.{LEAVES}", "{}.0.{}"),
            row(r"body\.(.*)", "{}"),
            row(r"head\.map_convs\.(\d)\.(\w+)", "aspp.features.{}.0.{}"),
            row(r"head\.map_bn\.(\w+)", *(f"aspp.features.{i}.1.{{}}" for i in range(4))),
            row(r"head\.global_pooling_conv\.(\w+)", "aspp.img_conv.0.{}"),
            row(r"head\.global_pooling_bn\.(\w+)", "aspp.img_conv.1.{}"),
            row(r"head\.pool_red_conv\.(\w+)", "bot_aspp.{}", fifths=(0, 1)),
            row(r"head\.red_conv\.(\w+)", "bot_aspp.{}", fifths=(1, 5)),
            row(r"head\.fine_conv\.(\w+)", "bot_fine.{}"),
            row(r"head\.conv1\.(\w+)", "final.0.{}"),
            row(r"head\.bn1\.(\w+)", "final.1.{}"),
            row(r"head\.conv2\.(\w+)", "final.3.{}"),
            row(r"head\.bn2\.(\w+)", "final.4.{}"),
            row(r"cls\.(\w+)", "final.6.{}"),
        ),
        "relu", "signed",
    ),
    "nvidia": Form(
        "ImageNet classifier, NVIDIA's names", "mod2.block1.bn1.0.weight",
        (
            row(rf"body\.(.*\bbn\d|bn_out)\.{LEAVES}", "{}.0.{}"), row(r"body\.(.*)", "{}"),
            row(r"(classifier\.fc\..*)", "{}"),
        ),
        "relu", "signed", ((r"classifier\.fc\.", NO_CLASSES), (r"bn_out\.", BARE_SUM)),
    ),
    "official": Form(
        "ImageNet classifier, official names", "mod1.conv1.weight",
        (row(r"body\.(.*)", "{}"), row(r"(classifier\.fc\..*)", "{}")), "leaky_relu", "abs",
        ((r"classifier\.fc\.", NO_CLASSES), (r"bn_out\.", BARE_SUM)),
    ),
}  # fmt: skip


class Place(NamedTuple):
    names: tuple[str, ...]
    fifths: tuple[int, int]

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[name] for name in self.names]
        whole = parts[0] if len(parts) == 1 or parts[0].dim() == 0 else torch.cat(parts)
        if self.fifths == (0, 5):
            return whole
        first, last = (whole.shape[1] * n // 5 for n in self.fifths)
        return whole[:, first:last]


def place(form: Form, key: str) -> Place | None:
    """Where our tensor `key` lies in a file of that form; None if files of that form have no such tensor."""
    for one in form.rows:
        if match := re.fullmatch(one.ours, key):
            groups = [
                str(int(group) - minus) if minus else group
                for group, minus in zip_longest(match.groups(), one.minus, fillvalue=0)
            ]
            return Place(tuple(theirs.format(*groups) for theirs in one.theirs), one.fifths)
    return None


def rows_of(tensors: Mapping[str, Tensor], form: Form, key: str) -> int | None:
    """Length of our tensor `key`, one that lies in one piece, in a file of that form; None if it is not there."""
    where = place(form, key)
    return len(tensors[where.names[0]]) if where is not None and where.names[0] in tensors else None


def named(form: Form, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of a form: what `place` takes apart is put together again."""
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for key, tensor in tensors.items():
        where = place(form, key)
        if where is None:
            raise UsageError(f"a file of {form.title} has no place for {key}: choose form=segtrain")
        parts = [tensor] * len(where.names) if tensor.dim() == 0 else tensor.chunk(len(where.names))
        for name, part in zip(where.names, parts, strict=True):
            found.setdefault(name, []).append((where.fifths[0], part))
    return {
        name: torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])], dim=1 if len(parts) > 1 else 0)
        if parts[0][1].dim()
        else parts[0][1]
        for name, parts in found.items()
    }
