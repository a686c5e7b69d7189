"""Files of weights as what else one wants of them: a list, other names, another container, the checkpoint of a run.

content = run_content(Path("wide_resnet38_deeplab_vistas.pth.tar"))  # as downloaded; evaluate and predict take it
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from segtrain.abn.functional import effective_scale
from segtrain.config import DATASET_CONFIGS, ConvertConfig, InferenceConfig, ModelConfig, TrainConfig, WeightsConfig
from segtrain.console import say
from segtrain.data.dataset import dataset_with_classes, published_tables
from segtrain.data.labels import LabelTable, published_table, read_user_table
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.models import build_classifier, build_model, from_config
from segtrain.weights import checkpoint
from segtrain.weights.layouts import FORMS, WHOLE_PICTURES, named, rows_of
from segtrain.weights.transfer import (
    HEAD_OF,
    Network,
    Source,
    describe_known,
    existing,
    gather,
    has_hash,
    hashes,
    identify,
    known_by_name,
    known_files,
    origin,
    read,
    refusal,
    take,
)


def weights(config: WeightsConfig) -> None:
    """`segtrain weights`: list the published files, or say which of them a file is.

    DataError for a file that has the name of a published one but not its hash.
    """
    if config.verify is None:
        for known in known_files():
            say(describe_known(known))
        say(f"{len(known_files())} files; segtrain weights verify=FILE says which of them a file is")
        return
    path = existing(Path(config.verify), remedy="give the file that is to be looked at")
    source = read(path)
    md5, sha256 = hashes(path)
    likely = identify(source.tensors, source.form) or "no backbone of this package"
    say(f"{path}: md5 {md5}, sha256 {sha256}")
    say(f"tensors    {count_of(source)}, {FORMS[source.form].title}, by their number {likely}")
    namesake = known_by_name(path)
    if source.known is not None:
        edition = " (first release)" if md5 == source.known["md5_old"] else ""
        say(f"published  {describe_known(source.known)}{edition}")
    elif namesake is not None and has_hash(namesake):
        raise DataError(
            f"{path} has the name of a published file but not its content: damaged, or written anew. Published is\n"
            f"{describe_known(namesake)}"
        )
    else:
        say("published  by its hash, it is none of the files that `segtrain weights` lists with one")
    for line in origin(source.provenance):
        say(line)


def convert(config: ConvertConfig) -> Path:
    """`segtrain convert`: the same weights under other names or in another container. Returns the file written."""
    source = read(existing(Path(str(config.input)), remedy="give the file that is to be converted"))
    source.scale = config.input_scale or source.scale
    if config.classes is not None:
        source.classes = classes_named(config.classes, source)
    path = Path(str(config.output))
    if path.resolve() == source.path.resolve():
        raise UsageError(f"output={path} is the input itself: give another name")
    if config.form == "run":
        write_run(source, path)
    else:
        tensors, scale = ours(source), source.scale
        names = FORMS.get(config.form)
        if names is not None and names.scale == "signed" and scale == "abs":
            # Such files are BatchNorm's, which multiplies with the weight.
            norms = {key.removesuffix("running_var") + "weight" for key in tensors if key.endswith("running_var")}
            tensors = {k: effective_scale(t, 1e-5, "abs") if k in norms else t for k, t in tensors.items()}
            scale = "signed"
            say(f"norm layers  |weight| + eps written as BatchNorm's weight; the activation stays {source.activation}")
        write(path, shown(tensors) if names is None else named(names, tensors), settings_of(source, scale))
    say(f"read         {source.path}: {source.title}, {count_of(source)} tensors")
    for line in origin(source.provenance) if config.form != "run" else []:  # whose report has told it
        say(line)
    say(str(path))
    return path


def classes_named(name: str, source: Source) -> LabelTable:
    """The published table, or the user's, of classes=; UsageError if it is not what the file tells apart."""
    known = published_tables()
    if name not in known and not Path(name).is_file():
        raise UsageError(f"classes={name} is not possible: choose {', '.join(known)} or a file that is there")
    table = published_table(name) if name in known else read_user_table(Path(name))
    rows = rows_of(source.tensors, FORMS[source.form], "cls.weight")
    if rows is None:
        raise UsageError(f"classes={name}: {source.path} has no classifier of pixels whose rows they could be")
    if rows != table.num_classes:
        raise UsageError(f"classes={name} has {table.num_classes} classes, {source.path} tells {rows} apart")
    return table


def count_of(source: Source) -> int:
    """num_batches_tracked is not counted, as in the published enumeration."""
    return sum(not key.endswith("num_batches_tracked") for key in source.tensors)


def ours(source: Source) -> dict[str, Tensor]:
    """All of the file by our names; DataError for tensors without one."""
    form = FORMS[source.form]
    if source.form in ("segmenter", "official"):
        return {
            key if source.form == "segmenter" or key.startswith("classifier.") else f"body.{key}": tensor
            for key, tensor in source.tensors.items()
            if not key.endswith("num_batches_tracked")
        }
    options = options_of(source)
    last = "classifier.fc." if options.head == "classifier" else "cls."
    count = rows_of(source.tensors, form, f"{last}weight")
    with torch.device("meta"):
        if options.head == "classifier":
            model: Network = build_classifier(options.backbone, count or 1)
        else:
            model = build_model(options.backbone, options.head, count or 1, head_channels=options.head_channels)
    found, report = gather(source, model)
    if count is None:  # a network without its last layer, as others hand it on
        report.missing = [key for key in report.missing if not key.startswith(last)]
    if report.ratio < 1:
        raise DataError(refusal(report, model, 1.0))
    return found


def shown(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as our networks have them: those of a classifier without `body.`."""
    whole = any(key.startswith("classifier.") for key in tensors)
    return {key.removeprefix("body.") if whole else key: tensor for key, tensor in tensors.items()}


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


def settings_of(source: Source, scale: str) -> dict[str, Any]:
    """What `read` needs to know beside the tensors."""
    return {
        "activation": source.activation,
        "negative_slope": source.negative_slope,
        "scale": scale,
        "classes": source.classes.as_dict() if source.classes is not None else None,
        "provenance": source.provenance,
        "model": source.model,
    }


def write(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """A safetensors file, or what torch.save makes of the official layout, with the settings beside the tensors."""
    ready = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        write_atomically(path, safetensors_bytes(ready, {"format": "pt", "segtrain": json.dumps(settings)}))
        return
    if path.suffix not in (".pth", ".pt", ".tar"):
        raise UsageError(f"output={path} is not possible: end the name in .safetensors, .pth or .pth.tar")
    buffer = io.BytesIO()
    torch.save({"state_dict": ready, "segtrain": dict(settings)}, buffer)
    write_atomically(path, buffer.getvalue())


def write_run(source: Source, path: Path) -> None:
    """A checkpoint that evaluate, predict and train take."""
    content = as_run(source)
    say(content.pop("report"))
    checkpoint.save(path, content)


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
        data = dataset_with_classes(names) or "folder"
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
