"""`segtrain convert`: rename the keys of weights, change the container, or make a checkpoint of a run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from segtrain.abn.autograd import effective_scale
from segtrain.config import ConvertConfig
from segtrain.console import say
from segtrain.data.dataset import published_tables
from segtrain.data.labels import LabelTable, published_table, read_user_table
from segtrain.errors import DataError, UsageError
from segtrain.models import build_classifier, build_model
from segtrain.weights import checkpoint
from segtrain.weights.files import WeightsFile, existing, read_weights, write_weights
from segtrain.weights.layouts import LAYOUTS, num_rows, to_layout
from segtrain.weights.matching import Network, match
from segtrain.weights.network_file import as_run, options_of
from segtrain.weights.provenance import origin
from segtrain.weights.transfer import mismatch_message


def convert(config: ConvertConfig) -> Path:
    """Write the same weights with other keys or in another container. Returns the file written."""
    source = read_weights(existing(Path(str(config.input)), remedy="give the file that is to be converted"))
    source.scale = config.input_scale or source.scale
    if config.classes is not None:
        source.classes = classes_named(config.classes, source)
    path = Path(str(config.output))
    if path.resolve() == source.path.resolve():
        raise UsageError(f"output={path} is the input itself: give another name")
    if config.form == "run":
        write_run(source, path)
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
