"""The one reader of any file that holds a network: a checkpoint of a run, or weights in any form.

content = run_content(Path("wide_resnet38_deeplab_vistas.pth.tar"))  # as downloaded; evaluate and predict take it
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segtrain.config import DATASET_CONFIGS, InferenceConfig, ModelConfig, TrainConfig
from segtrain.data.labels import published_table
from segtrain.errors import DataError, UsageError
from segtrain.models import from_config
from segtrain.weights import checkpoint
from segtrain.weights.layouts import FORMS, WHOLE_PICTURES, rows_of
from segtrain.weights.transfer import HEAD_OF, Source, existing, identify, known_files, read, take

DATA_OF = {"cityscapes": ("cityscapes",), "vistas": ("vistas_v1.2",), "cocostuff": ("cocostuff",)}
kept: dict[tuple[Path, int, int], dict[str, Any]] = {}  # what `run_content` has read for its next call


def run_content(path: Path, keep: bool = False) -> dict[str, Any]:
    """What a checkpoint of a run holds, or what `as_run` makes of any other file of weights, as downloaded.

    keep: for the next call for the same file, which takes it and need not read it again.
    UsageError if there is no such file, naming a published one's page, link and md5; DataError if it is damaged or
    holds something else; both as of `as_run`.
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
        return as_run(read(path))
    try:
        return checkpoint.load(path)
    except checkpoint.Foreign:
        try:
            source = read(path)
        except DataError as error:
            raise DataError(
                f"{path} is not a checkpoint that segtrain wrote, nor weights of a form that it knows: {error}"
            ) from error
    return as_run(source)


def published_figure(content: Mapping[str, Any]) -> str | None:
    """What was published of the weights in `run_content`, with its conditions; None unless a known file holds them."""
    known = next((one for one in known_files() if one["name"] == content.get("known")), None)
    return None if known is None else f"{known['name']}: {known['published']}"


def as_run(source: Source) -> dict[str, Any]:
    """The content that a checkpoint of a run has, made of weights in any form: the network after 0 steps.

    Two entries are not a run's: `report`, what was loaded, as text; `known`, the name of the published file, or None.
    UsageError if nobody has said what its classes are; DataError if it does not fit the network that it should be of.
    The classes of an ImageNet classifier have no names but their numbers, in the order of the folders' names.
    """
    options = options_of(source)
    whole_pictures = options.head == "classifier"
    if whole_pictures:
        count = rows_of(source.tensors, FORMS[source.form], "classifier.fc.weight")
        if count is None:
            raise UsageError(f"{source.path} is no network of a run: it has a backbone, and nothing that tells classes")
        classes: dict[str, Any] = {"names": [f"class {n}" for n in range(count)], "of": "pictures", "numbered": True}
        data = "imagenet"
    elif source.classes is None:
        raise UsageError(
            f"{source.path} is no network of a run: what its classes are is not known; train from it with "
            "model.weights=FILE"
        )
    else:
        classes, names = source.classes.as_dict(), source.classes.names
        fits = (name for name, tables in DATA_OF.items() if any(published_table(t).names == names for t in tables))
        data = next(fits, "folder")
    model = from_config(options, len(classes["names"]))
    report = take(source, model, None if whole_pictures else source.classes)
    if source.known is None and not source.model and not whole_pictures:
        like = namesake_by_tensors(source, options.backbone)
        whose = f"the published {like['name']}'s are" if like else "ImageNet's are"
        report.notes.append(
            f"it does not say how its pictures were normalised: {whose} taken, model.mean={options.mean} "
            f"model.std={options.std}"
        )
    config = TrainConfig(dataset=DATASET_CONFIGS[data](name=data), model=options)
    if whole_pictures:
        config.inference = InferenceConfig(name="center224", resize=256, crop=224)
    return {
        "config": asdict(config), "classes": classes, "step": 0, "trained_on": None,
        "model": model.state_dict(), "optimizer": {}, "validated": 0,
        "best": {"top1" if whole_pictures else "miou": math.nan, "step": 0},
        "provenance": source.provenance, "report": str(report), "known": source.known and source.known["name"],
    }  # fmt: skip


def options_of(source: Source) -> ModelConfig:
    """The network that the file's tensors are of, with BatchNorm where the file's is one; UsageError if not known."""
    if source.model:
        try:
            return ModelConfig(**source.model)
        except TypeError as error:
            raise DataError(f"{source.path}: its network has options that this version has not: {error}") from error
    backbone = identify(source.tensors, source.form)
    if backbone is None:
        raise UsageError(f"{source.path}: by its {len(source.tensors)} tensors it is of no backbone of this package")
    options = ModelConfig(backbone=backbone, head=HEAD_OF.get(source.form, "deeplabv3"))
    if source.form in WHOLE_PICTURES:
        pooled = "wider_resnet38_pooled" if backbone == "wider_resnet38" else backbone
        options = ModelConfig(backbone=pooled, head="classifier", output_stride=32)
    options.norm = "inplace_abn" if source.scale == "abs" else "batch_norm"
    options.activation, options.negative_slope = source.activation, source.negative_slope
    if source.form == "torchvision_deeplabv3":
        options.backbone_options = {"first_dilation": "previous"}
    options.head_channels = rows_of(source.tensors, FORMS[source.form], "head.red_conv.weight") or options.head_channels
    like = source.known or namesake_by_tensors(source, backbone)
    if like is not None:
        options.mean = like.get("mean", options.mean)
        options.std = like.get("std", options.std)
        if like["name"] == "wide_resnet38_deeplab_vistas":
            options.pooling_size = [672, 672]  # 84 cells of stride 8, as in the official test script
    return options


def namesake_by_tensors(source: Source, backbone: str) -> dict[str, Any] | None:
    """The published segmentation network of the same backbone and classes, where a file was written anew."""
    if source.form != "segmenter" or source.classes is None:
        return None
    for known in known_files():
        alike = known["form"] == "segmenter" and known["backbone"] == backbone
        if alike and published_table(known["labels"]).names == source.classes.names:
            return known
    return None
