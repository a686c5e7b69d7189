"""Files of weights as what else one wants of them: a list, other names, another container, the checkpoint of a run."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from segtrain.abn.functional import effective_scale
from segtrain.config import ConvertConfig, WeightsConfig
from segtrain.console import say
from segtrain.data.labels import LabelTable, published_table, read_user_table
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.models import build_classifier, build_model
from segtrain.weights import checkpoint
from segtrain.weights.layouts import FORMS, named, rows_of
from segtrain.weights.network_file import as_run, options_of
from segtrain.weights.transfer import (
    TABLES,
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
    if name not in TABLES and not Path(name).is_file():
        raise UsageError(f"classes={name} is not possible: choose {', '.join(TABLES)} or a file that is there")
    table = published_table(name) if name in TABLES else read_user_table(Path(name))
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
