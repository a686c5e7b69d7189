"""Key layouts: the names under which each known kind of file stores our tensors.

All code in between uses one naming, that of a Segmenter's state_dict: `body.`, `head.`, `cls.`, and `classifier.fc.`
for image classification. A layout says where each of these tensors lies in a file (`locate`).
"""

import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from segtrain.errors import UsageError

LEAVES = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


class KeyRule(NamedTuple):
    """Our keys that match the pattern `ours` lie under the keys `theirs`.

    {} in `theirs` are the groups of `ours`, numbers reduced by `minus`. Several tensors are concatenated along
    dimension 0.
    fifths: range of input channels, in fifths, of a convolution that reduces five concatenated branches.
    """

    ours: str
    theirs: tuple[str, ...]
    minus: tuple[int, ...] = ()
    fifths: tuple[int, int] = (0, 5)


def rule(ours: str, *theirs: str, minus: tuple[int, ...] = (), fifths: tuple[int, int] = (0, 5)) -> KeyRule:
    return KeyRule(ours, theirs, minus, fifths)


def resnet_rules(prefix: str) -> tuple[KeyRule, ...]:
    """Rules for torchvision's and timm's ResNets: layer1.0.conv1, downsample.0 (convolution), downsample.1 (norm)."""
    block = prefix + "layer{}.{}."
    return (
        rule(r"body\.mod1\.(\w+)\.(\w+)", prefix + "{}.{}"),
        rule(r"body\.mod(\d)\.block(\d+)\.convs\.(\w+)\.(\w+)", block + "{}.{}", minus=(1, 1)),
        rule(r"body\.mod(\d)\.block(\d+)\.proj_conv\.(\w+)", block + "downsample.0.{}", minus=(1, 1)),
        rule(r"body\.mod(\d)\.block(\d+)\.proj_bn\.(\w+)", block + "downsample.1.{}", minus=(1, 1)),
    )


class KeyLayout(NamedTuple):
    """The names of one kind of file.

    mark: a key that identifies the layout. activation, scale: of its norm layers, unless the file says otherwise.
    explained: (pattern of keys that have no place in our networks, reason).
    """

    title: str
    mark: str
    rules: tuple[KeyRule, ...]
    activation: str
    scale: str
    explained: tuple[tuple[str, str], ...] = ()


IMAGE_CLASSES = "classifier of images"
CLASSIFIERS = ("official", "nvidia", "torchvision")  # layouts of ImageNet classifiers
NORM_AFTER_SUM = "the head reads the sum before this norm"
CLASSIFIER_ENDS = ((r"classifier\.fc\.", IMAGE_CLASSES), (r"bn_out\.", NORM_AFTER_SUM))
LAYOUTS = {  # the first whose mark is in a file: NVIDIA's files have the official mark too
    "segmenter": KeyLayout(
        "segmentation network (body, head, cls)", "body.mod1.conv1.weight",
        (rule(r"((?:body|head|cls)\..*)", "{}"),), "leaky_relu", "abs",
        ((r"body\.bn_out\.", NORM_AFTER_SUM),),
    ),
    "torchvision": KeyLayout(
        "ImageNet classifier, torchvision's or timm's names", "layer1.0.conv1.weight",
        (*resnet_rules(""), rule(r"classifier\.fc\.(\w+)", "fc.{}")), "relu", "signed", ((r"fc\.", IMAGE_CLASSES),),
    ),
    "torchvision_deeplabv3": KeyLayout(
        "torchvision's DeepLabV3", "backbone.layer1.0.conv1.weight",
        (
            *resnet_rules("backbone."),
            rule(r"head\.map_convs\.0\.(\w+)", "classifier.0.convs.0.0.{}"),
            rule(r"head\.map_convs\.([123])\.(\w+)", "classifier.0.convs.{}.0.{}"),
            rule(r"head\.map_bn\.(\w+)", *(f"classifier.0.convs.{i}.1.{{}}" for i in range(4))),
            rule(r"head\.global_pooling_conv\.(\w+)", "classifier.0.convs.4.1.{}"),
            rule(r"head\.global_pooling_bn\.(\w+)", "classifier.0.convs.4.2.{}"),
            rule(r"head\.red_conv\.(\w+)", "classifier.0.project.0.{}", fifths=(0, 4)),
            rule(r"head\.pool_red_conv\.(\w+)", "classifier.0.project.0.{}", fifths=(4, 5)),
            rule(r"head\.red_bn\.(\w+)", "classifier.0.project.1.{}"),
            rule(r"head\.refine_conv\.(\w+)", "classifier.1.{}"),
            rule(r"head\.refine_bn\.(\w+)", "classifier.2.{}"),
            rule(r"cls\.(\w+)", "classifier.4.{}"),
        ),
        "relu", "signed", ((r"aux_classifier\.", "a second head, used in training only"),),
    ),
    "nvidia_deeplabv3plus": KeyLayout(
        "NVIDIA's WideResNet-38 DeepLabV3+", "aspp.features.0.0.weight",
        (
            rule(rf"body\.(.*\bbn\d)\.{LEAVES}", "{}.0.{}"),
            rule(r"body\.(.*)", "{}"),
            rule(r"head\.map_convs\.(\d)\.(\w+)", "aspp.features.{}.0.{}"),
            rule(r"head\.map_bn\.(\w+)", *(f"aspp.features.{i}.1.{{}}" for i in range(4))),
            rule(r"head\.global_pooling_conv\.(\w+)", "aspp.img_conv.0.{}"),
            rule(r"head\.global_pooling_bn\.(\w+)", "aspp.img_conv.1.{}"),
            rule(r"head\.pool_red_conv\.(\w+)", "bot_aspp.{}", fifths=(0, 1)),
            rule(r"head\.red_conv\.(\w+)", "bot_aspp.{}", fifths=(1, 5)),
            rule(r"head\.fine_conv\.(\w+)", "bot_fine.{}"),
            rule(r"head\.conv1\.(\w+)", "final.0.{}"),
            rule(r"head\.bn1\.(\w+)", "final.1.{}"),
            rule(r"head\.conv2\.(\w+)", "final.3.{}"),
            rule(r"head\.bn2\.(\w+)", "final.4.{}"),
            rule(r"cls\.(\w+)", "final.6.{}"),
        ),
        "relu", "signed",
    ),
    "nvidia": KeyLayout(
        "ImageNet classifier, NVIDIA's names", "mod2.block1.bn1.0.weight",
        (
            rule(rf"body\.(.*\bbn\d|bn_out)\.{LEAVES}", "{}.0.{}"), rule(r"body\.(.*)", "{}"),
            rule(r"(classifier\.fc\..*)", "{}"),
        ),
        "relu", "signed", CLASSIFIER_ENDS,
    ),
    "official": KeyLayout(
        "ImageNet classifier, official names", "mod1.conv1.weight",
        (rule(r"body\.(.*)", "{}"), rule(r"(classifier\.fc\..*)", "{}")), "leaky_relu", "abs", CLASSIFIER_ENDS,
    ),
}  # fmt: skip


class Location(NamedTuple):
    """The keys of a file whose concatenation holds one of our tensors, and the fifths of its input channels."""

    keys: tuple[str, ...]
    fifths: tuple[int, int]

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        pieces = [tensors[key] for key in self.keys]
        joined = pieces[0] if len(pieces) == 1 or pieces[0].dim() == 0 else torch.cat(pieces)
        if self.fifths == (0, 5):
            return joined
        first, last = (joined.shape[1] * n // 5 for n in self.fifths)
        return joined[:, first:last]


def locate(layout: KeyLayout, key: str) -> Location | None:
    """Where our tensor `key` lies in a file of that layout; None if such files have no such tensor."""
    for one in layout.rules:
        if match := re.fullmatch(one.ours, key):
            groups = [
                str(int(group) - minus) if minus else group
                for group, minus in zip_longest(match.groups(), one.minus, fillvalue=0)
            ]
            return Location(tuple(theirs.format(*groups) for theirs in one.theirs), one.fifths)
    return None


def num_rows(tensors: Mapping[str, Tensor], layout: KeyLayout, key: str) -> int | None:
    """Length of our tensor `key`, which must lie under one key, in a file of that layout; None if it is not there."""
    location = locate(layout, key)
    return len(tensors[location.keys[0]]) if location is not None and location.keys[0] in tensors else None


def to_layout(layout: KeyLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the keys of a layout, the inverse of `locate`. UsageError for a tensor without a place."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for key, tensor in tensors.items():
        location = locate(layout, key)
        if location is None:
            raise UsageError(f"a file of {layout.title} has no place for {key}: choose form=segtrain")
        chunks = [tensor] * len(location.keys) if tensor.dim() == 0 else tensor.chunk(len(location.keys))
        for name, chunk in zip(location.keys, chunks, strict=True):
            pieces.setdefault(name, []).append((location.fifths[0], chunk))
    ordered = {name: [chunk for _, chunk in sorted(some, key=lambda item: item[0])] for name, some in pieces.items()}
    return {
        name: chunks[0] if len(chunks) == 1 or chunks[0].dim() == 0 else torch.cat(chunks, dim=1)
        for name, chunks in ordered.items()
    }
