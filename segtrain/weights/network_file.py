"""The one reader of any file that holds a network: a checkpoint of a run, or weights in any known layout.

content = run_content(Path("wide_resnet38_deeplab_vistas.pth.tar"))  # as downloaded; evaluate and predict use it
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segtrain.config import DATASET_CONFIGS, InferenceConfig, ModelConfig, TrainConfig
from segtrain.data.labels import published_table
from segtrain.data.registry import dataset_with_classes
from segtrain.errors import DataError, UsageError
from segtrain.models import from_config
from segtrain.weights import checkpoint
from segtrain.weights.files import WeightsFile, existing, read_weights
from segtrain.weights.identify import HEAD_OF, backbone_of
from segtrain.weights.layouts import CLASSIFIERS, LAYOUTS, num_rows
from segtrain.weights.published import known_files
from segtrain.weights.transfer import load_into

kept: dict[tuple[Path, int, int], dict[str, Any]] = {}  # what `run_content` has read for its next call


def run_content(path: Path, keep: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of a run; for any other file of weights, what `as_run` makes of it.

    keep: the next call for the same file returns the same content without reading it again.
    UsageError if there is no such file, with the download page of a published one; DataError if it is damaged or holds
    something else; both as of `as_run`.
    """
    state = existing(path, "checkpoint", "a run keeps its own as runs/<name>/last.pt and best.pt").stat()
    key = (path.resolve(), state.st_mtime_ns, state.st_size)
    content = kept.get(key) or read_content(path)
    kept.clear()
    if keep:
        kept[key] = content
    return content


def read_content(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return as_run(read_weights(path))
    try:
        return checkpoint.load(path)
    except checkpoint.Foreign:
        try:
            source = read_weights(path)
        except DataError as error:
            raise DataError(
                f"{path} is neither a checkpoint that segtrain wrote nor a file of weights that it knows: {error}"
            ) from error
    return as_run(source)


def published_figure(content: Mapping[str, Any]) -> str | None:
    """The published score of the weights in `run_content`, with its conditions; None if they are not published."""
    known = next((one for one in known_files() if one["name"] == content.get("known")), None)
    return None if known is None else f"{known['name']}: {known['published']}"


def as_run(source: WeightsFile) -> dict[str, Any]:
    """Weights as the content of a checkpoint of a run after 0 steps.

    Two more entries: `report`, the text of the Report on loading them; `known`, name of the published file or None.
    UsageError if the classes are not known; DataError if the weights do not fit their network.
    The classes of an ImageNet classifier are numbered in the order of the folders' names.
    """
    options = options_of(source)
    classifies = options.head == "classifier"
    if classifies:
        count = num_rows(source.tensors, LAYOUTS[source.layout], "classifier.fc.weight")
        if count is None:
            raise UsageError(f"{source.path} cannot be used as a network: it has a backbone, but no classifier")
        classes: dict[str, Any] = {"names": [f"class {n}" for n in range(count)], "of": "pictures", "numbered": True}
        data = "imagenet"
    elif source.classes is None:
        raise UsageError(
            f"{source.path} cannot be used as a network: its classes are not known. Start a training from it with "
            "model.weights=FILE, or name the classes with `segtrain convert classes=`"
        )
    else:
        classes, names = source.classes.as_dict(), source.classes.names
        data = dataset_with_classes(names) or "folder"
    model = from_config(options, len(classes["names"]))
    report = load_into(source, model, None if classifies else source.classes)
    if source.known is None and not source.model and not classifies:
        like = namesake_by_tensors(source, options.backbone)
        whose = f"the published {like['name']}'s are" if like else "ImageNet's are"
        report.notes.append(
            f"it does not state how its images were normalised: {whose} taken, model.mean={options.mean} "
            f"model.std={options.std}"
        )
    config = TrainConfig(dataset=DATASET_CONFIGS[data](name=data), model=options)
    if classifies:
        config.inference = InferenceConfig(name="center224", resize=256, crop=224)
    return {
        "config": asdict(config), "classes": classes, "step": 0, "trained_on": None,
        "model": model.state_dict(), "optimizer": {}, "validated": 0,
        "best": {"top1" if classifies else "miou": math.nan, "step": 0},
        "provenance": source.provenance, "report": str(report), "known": source.known and source.known["name"],
    }  # fmt: skip


def options_of(source: WeightsFile) -> ModelConfig:
    """Options of the network that the tensors belong to, with BatchNorm if the file's norm layers are BatchNorm.

    UsageError if its backbone is not known; DataError if the file states options that this version does not have.
    """
    if source.model:
        try:
            return ModelConfig(**source.model)
        except TypeError as error:
            raise DataError(
                f"{source.path}: its network has options that this version does not have: {error}"
            ) from error
    backbone = backbone_of(source.tensors, source.layout)
    if backbone is None:
        raise UsageError(f"{source.path}: its {len(source.tensors)} tensors are those of no known backbone")
    options = ModelConfig(backbone=backbone, head=HEAD_OF.get(source.layout, "deeplabv3"))
    if source.layout in CLASSIFIERS:
        if backbone == "wider_resnet38" and not source.arch.endswith("_a2"):
            backbone = "wider_resnet38_pooled"
        options = ModelConfig(backbone=backbone, head="classifier", output_stride=32)
    options.norm = "inplace_abn" if source.scale == "abs" else "batch_norm"
    options.activation, options.negative_slope = source.activation, source.negative_slope
    if source.layout == "torchvision_deeplabv3":
        options.backbone_options = {"first_dilation": "previous"}
    channels = num_rows(source.tensors, LAYOUTS[source.layout], "head.red_conv.weight")
    options.head_channels = channels or options.head_channels
    like = source.known or namesake_by_tensors(source, backbone)
    if like is not None:
        options.mean = like.get("mean", options.mean)
        options.std = like.get("std", options.std)
        if like["name"] == "wide_resnet38_deeplab_vistas":
            options.pooling_size = [672, 672]  # 84 cells of stride 8, as in the official test script
    return options


def namesake_by_tensors(source: WeightsFile, backbone: str) -> dict[str, Any] | None:
    """The published segmentation network of the same backbone and classes, which may have been rewritten."""
    if source.layout != "segmenter" or source.classes is None:
        return None
    for known in known_files():
        alike = known["form"] == "segmenter" and known["backbone"] == backbone
        if alike and published_table(known["labels"]).names == source.classes.names:
            return known
    return None
