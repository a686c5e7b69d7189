"""`segtrain convert`: rename the keys of weights, change the container, or make a checkpoint of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segtrain.abn.autograd import effective_scale
from segtrain.config import ConvertConfig
from segtrain.console import say
from segtrain.data.labels import LabelTable, published_table, read_user_table
from segtrain.data.registry import published_tables
from segtrain.errors import DataError, UsageError
from segtrain.files import file_to_write
from segtrain.models import build_classifier, build_model
from segtrain.weights import checkpoint
from segtrain.weights.files import WeightsFile, existing, read_weights, write_weights
from segtrain.weights.identify import backbone_of
from segtrain.weights.layouts import LAYOUTS, num_rows, to_layout
from segtrain.weights.matching import Network, match
from segtrain.weights.network_file import as_run, options_of
from segtrain.weights.provenance import origin
from segtrain.weights.transfer import mismatch_message


def convert(config: ConvertConfig) -> Path:
    """Write the same weights with other keys or in another container. Returns the file written."""
    path = file_to_write(str(config.output), "weights.safetensors")
    source = read_weights(existing(Path(str(config.input)), remedy="give the file that is to be converted"))
    source.scale = config.input_scale or source.scale
    if config.classes is not None:
        source.classes = classes_named(config.classes, source)
    if path.resolve() == source.path.resolve():
        raise UsageError(f"output={path} is the input itself: give another name")
    if config.form == "run":
        write_run(source, path)
    elif config.form == "official":
        write_official(source, path)
    else:
        tensors, scale = our_tensors(source), source.scale
        layout = LAYOUTS.get(config.form)
        if layout is not None and layout.scale == "signed" and scale == "abs":
            # These layouts are BatchNorm's, which multiplies with the weight itself.
            norms = {key.removesuffix("running_var") + "weight" for key in tensors if key.endswith("running_var")}
            tensors = {k: effective_scale(t, 1e-5, "abs") if k in norms else t for k, t in tensors.items()}
            scale = "signed"
            say(f"norm layers  |weight| + eps written as BatchNorm's weight; the activation stays {source.activation}")
        renamed = network_keys(tensors) if layout is None else to_layout(layout, tensors)
        write_weights(path, renamed, source.settings(scale))
    say(f"read         {source.path}: {source.title}, {source.num_tensors()} tensors")
    for line in origin(source.provenance) if config.form != "run" else []:  # the report on a run lists it too
        say(line)
    say(str(path))
    return path


def classes_named(name: str, source: WeightsFile) -> LabelTable:
    """The published or the user's table that `classes` names; UsageError if the file has another number of classes."""
    tables = published_tables()
    if name not in tables and not Path(name).is_file():
        raise UsageError(f"classes={name} is neither a published table ({', '.join(tables)}) nor an existing file")
    table = published_table(name) if name in tables else read_user_table(Path(name))
    rows = num_rows(source.tensors, LAYOUTS[source.layout], "cls.weight")
    if rows is None:
        raise UsageError(f"classes={name}: {source.path} has no segmentation classifier, whose classes they could be")
    if rows != table.num_classes:
        raise UsageError(f"classes={name} has {table.num_classes} classes, {source.path} has {rows}")
    return table


def our_tensors(source: WeightsFile) -> dict[str, Tensor]:
    """All tensors of the file in our one naming; DataError if some have no place there."""
    layout = LAYOUTS[source.layout]
    if source.layout in ("segmenter", "official"):
        return {
            key if source.layout == "segmenter" or key.startswith("classifier.") else f"body.{key}": tensor
            for key, tensor in source.tensors.items()
            if not key.endswith("num_batches_tracked")
        }
    options = options_of(source)
    last = "classifier.fc." if options.head == "classifier" else "cls."
    count = num_rows(source.tensors, layout, f"{last}weight")
    with torch.device("meta"):
        if options.head == "classifier":
            model: Network = build_classifier(options.backbone, count or 1)
        else:
            model = build_model(options.backbone, options.head, count or 1, head_channels=options.head_channels)
    tensors, report = match(source, model)
    if count is None:  # a backbone published without its classifier
        report.missing = [key for key in report.missing if not key.startswith(last)]
    if report.ratio < 1:
        raise DataError(mismatch_message(report, model, 1.0))
    return tensors


def network_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of our networks' state_dict: those of a Classifier have no `body.`."""
    classifies = any(key.startswith("classifier.") for key in tensors)
    return {key.removeprefix("body.") if classifies else key: tensor for key, tensor in tensors.items()}


def write_run(source: WeightsFile, path: Path) -> None:
    """Write a checkpoint of a run, as evaluate, predict and train read it."""
    content = as_run(source)
    say(content.pop("report"))
    checkpoint.save(path, content)


# ------------------------------------------------------------------------------------------------ official

EPS = 1e-5  # of the official layers
OFFICIAL_HEAD = (
    "map_convs", "map_bn", "global_pooling_conv", "global_pooling_bn", "red_conv", "pool_red_conv", "red_bn",
)  # fmt: skip


def write_official(source: WeightsFile, path: Path) -> None:
    """Write weights in the structure that the official repository's scripts load strictly.

    A segmentation network has its body, head and cls apart; a classifier's names begin with `module.`, and `arch` names
    its network. UsageError for another head or container; DataError for weights that its layers cannot represent.
    """
    if path.suffix == ".safetensors":
        raise UsageError(f"output={path}: form=official is a file by torch.save: end it in .pth.tar, .pth or .pt")
    tensors, scale, beside = our_tensors(source), source.scale, {}
    parts = {"body", "head", "cls"} & {key.partition(".")[0] for key in tensors}
    if {"head", "cls"} <= parts:
        strange = [key for key in tensors if key.startswith("head.") and key.split(".")[1] not in OFFICIAL_HEAD]
        if strange:
            raise UsageError(f"form=official has the head deeplabv3 only, and so no place for {strange[0]}")
        if scale == "signed":
            tensors, scale = with_absolute_scale(source, tensors), "abs"
        written: dict[str, Any] = {
            part: {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}
            for part in ("body", "head", "cls")
        }
        channels, classes = len(tensors["head.red_conv.weight"]), len(tensors["cls.weight"])
        say(
            f"network      its script needs net_{official_arch(source)}, a head of {channels} channels, {classes} "
            f"classes, activation {source.activation}"
        )
    else:
        written = {f"module.{key}": tensor for key, tensor in to_layout(LAYOUTS["official"], tensors).items()}
        arch = source.arch or official_arch(source)
        beside = {"arch": arch}
        mode = "standard" if scale == "signed" else "inplace"
        say(f"network      its configuration needs arch {arch}, bn_mode {mode}, activation {source.activation}")
    write_weights(path, written, source.settings(scale), beside)


def official_arch(source: WeightsFile) -> str:
    """The official name of the network; WideResNet-38 has two forms with the same tensors, A2 for segmentation."""
    backbone = str(source.model.get("backbone") or backbone_of(source.tensors, source.layout))
    if backbone == "wider_resnet38" and (source.model or source.layout == "segmenter"):
        return "wider_resnet38_a2"
    return backbone.removesuffix("_pooled")


def with_absolute_scale(source: WeightsFile, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of BatchNorm as those of layers that multiply with |weight| + eps. DataError for any below eps."""
    norms = [key.removesuffix("running_var") + "weight" for key in tensors if key.endswith(".running_var")]
    bad = [f"{key} ({int((tensors[key] < EPS).sum())} of {len(tensors[key])})" for key in norms
           if bool((tensors[key] < EPS).any())]  # fmt: skip
    if bad:
        raise DataError(
            f"{source.path}: BatchNorm's weights are below {EPS} in {len(bad)} layers ({', '.join(bad[:3])}); the "
            "official segmentation network multiplies with |weight| + eps, which cannot be that: use another form"
        )
    say(f"norm layers  BatchNorm's weight written as that less eps: the official layer adds {EPS}")
    return {key: tensor - EPS if key in norms else tensor for key, tensor in tensors.items()}
