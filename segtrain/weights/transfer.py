"""Weights in files of others and of our own: which file it is, whose names its tensors have, what a network takes.

report = load_weights(Path("resnet50-0676ba61.pth"), model, table)
print(report)  # what matched, what did not and why, what the change of norm and activation does
"""

import copy
import hashlib
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from segtrain.abn import ABN, BatchNormAct
from segtrain.abn.functional import ACTIVATIONS, SCALES, effective_scale
from segtrain.config.locations import CONFIGS
from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.data.taxonomy import RECOMMENDED, taxonomy
from segtrain.errors import DataError, UsageError
from segtrain.models import HEADS, Classifier, Segmenter
from segtrain.weights import checkpoint
from segtrain.weights.layouts import FORMS, LEAVES, place, rows_of

Network = Segmenter | Classifier
TABLES = ("cityscapes", "vistas_v1.2", "vistas_v2.0", "cocostuff")

# ---------------------------------------------------------------------------------------------- the known files


@cache
def known_files() -> list[dict[str, Any]]:
    """segtrain/data/tables/weights.json, a dict for each file."""
    files: list[dict[str, Any]] = read_json_table("weights")["files"]
    return files


def known_by_name(path: Path) -> dict[str, Any] | None:
    return next((known for known in known_files() if path.name in (known["file"], known["name"])), None)


def known_by_hash(md5: str, sha256: str) -> dict[str, Any] | None:
    for known in known_files():
        if md5 in (known["md5"], known["md5_old"]) or (known.get("sha256") and sha256.startswith(known["sha256"])):
            return known
    return None


def known_by_tensors(tensors: Mapping[str, Tensor], form: str) -> list[dict[str, Any]]:
    """The published files that a file could be by its names, its backbone and the number of its classes."""
    backbone = identify(tensors, form)
    classes = rows_of(tensors, FORMS[form], "cls.weight") or rows_of(tensors, FORMS[form], "classifier.fc.weight")
    return [
        known for known in known_files()
        if (known["form"], known["backbone"], known["classes"]) == (form, backbone, classes)
    ]  # fmt: skip


def has_hash(known: Mapping[str, Any]) -> bool:
    return bool(known["md5"] or known.get("sha256"))


def hashes(path: Path) -> tuple[str, str]:
    """md5 and sha256 of a file, in one reading."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
            sha256.update(block)
    return md5.hexdigest(), sha256.hexdigest()


def describe_known(known: Mapping[str, Any]) -> str:
    """The row of a known file, for a message."""
    hashed = f"md5 {known['md5']}" if known["md5"] else f"sha256 {known.get('sha256')}..."
    if not has_hash(known):
        hashed = "none is published: known by its name and its tensors"
    old = f" (first release {known['md5_old']})" if known["md5_old"] else ""
    head = f" + {known['head']}" if known.get("head") else ""
    return (
        f"{known['name']}: {known['backbone']}{head}, {known['classes']} classes, {known['activation']}\n"
        f"  file       {known['file']}\n  page       {known['page']}\n  link       {known['link']}\n"
        f"  hash       {hashed}{old}\n  published  {known['published']}\n  licence    {known['licence']}"
    )


# ------------------------------------------------------------------------------------------------- reading


@dataclass
class Source:
    """The weights in a file. tensors: under its own names, without wrappers. scale: what its norm layers multiply
    with, "abs" or "signed". classes: what its last layer tells apart, where that is known."""

    path: Path
    tensors: dict[str, Tensor]
    form: str
    known: dict[str, Any] | None
    activation: str
    negative_slope: float
    scale: str
    classes: LabelTable | None
    provenance: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)  # options of the network, where the file holds them
    told: bool = False  # the file itself says what its norm layers are
    md5: str = ""
    sha256: str = ""

    @property
    def title(self) -> str:
        named = f"{self.known['name']}, " if self.known else ""
        return f"{named}{FORMS[self.form].title}"

    def scale_is_assumed(self) -> bool:
        """Whether nothing says that weights of norm layers are |weight| + eps, and it would make a difference."""
        if self.known or self.told or self.scale != "abs":
            return False
        norms = (key.replace("running_var", "weight") for key in self.tensors if key.endswith(".running_var"))
        return any(key in self.tensors and bool((self.tensors[key] < 0).any()) for key in norms)


def existing(
    path: Path, kind: str = "weights", remedy: str = "give one, or model.weights=none to begin with random weights"
) -> Path:
    """The path of a file of weights; UsageError if it is not there, saying where a published one is to be had."""
    if path.is_file():
        return path
    known, recipe = known_by_name(path), path.parent.name
    how = " `segtrain weights` lists the published ones."
    if known:
        how = f"\nIt is a published file, to be downloaded by hand:\n{describe_known(known)}"
    elif (CONFIGS / "experiment" / f"{recipe}.yaml").is_file():
        how = f"\nIt comes of another recipe, to be trained first: segtrain train experiment={recipe} name={recipe}"
    raise UsageError(f"no {kind} file {path}: {remedy}.{how}")


def read(path: Path) -> Source:
    """Read a file of weights, on the CPU; never runs code from it.

    A checkpoint of a run, a safetensors file, or what torch.save wrote: a state_dict alone, or under `state_dict` or
    `model`; body, head and cls apart or together; with `module.` before all names; with a level `.bn.` more at norms.
    UsageError if it is not there, DataError if it is damaged, holds objects, or has names of no known form.
    """
    existing(path)
    md5, sha256 = hashes(path)
    known = known_by_hash(md5, sha256)
    content, settings = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    try:
        if content.get("kind") == checkpoint.KIND:
            settings = run_settings(content)
            content = content.get("ema") or content["model"]  # the averaged weights, where the run kept them
        labels = LabelTable.from_dict(settings["classes"]) if settings.get("classes") else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path}: what stands beside its tensors is not as segtrain writes it ({type(error).__name__}: {error}): "
            "use another copy"
        ) from error
    tensors = clean(content)
    form = form_of(tensors, path)
    alike = [] if known or settings else known_by_tensors(tensors, form)
    if known is None:  # of some files no hash is published
        known = next((one for one in alike if not has_hash(one) and path.name == one["file"]), None)
    published = known or {}
    return Source(
        path,
        tensors,
        form,
        known,
        activation=settings.get("activation") or published.get("activation") or FORMS[form].activation,
        negative_slope=settings.get("negative_slope", 0.01),
        scale=settings.get("scale") or published.get("scale") or FORMS[form].scale,
        classes=labels or classes_of(published, tensors, form),
        provenance=settings.get("provenance") or own_provenance(path, known, alike),
        model=settings.get("model", {}),
        told="scale" in settings,
        md5=md5,
        sha256=sha256,
    )


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What torch.save wrote, of tensors, numbers, text and containers; numpy's numbers too (a stored score). And the
    settings that `convert.write` put beside the tensors."""
    with path.open("rb") as file:
        start = file.read(40)
    if start and not start.startswith((b"PK", b"\x80")):  # a zip file, or a pickle as the first versions of torch wrote
        known = known_by_name(path)
        page = ": a web page was saved in its place" if start.lstrip().startswith(b"<") else ""
        where = f". It is to be had here:\n{describe_known(known)}" if known else ""
        raise DataError(f"{path} is no file of weights, it begins with {start.decode(errors='replace')!r}{page}{where}")
    scalar: Any = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    harmless += [np.dtype, type(np.dtype("float64")), type(np.dtype("float32")), type(np.dtype("int64"))]
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the sums that it writes
            with zipfile.ZipFile(path) as archive:
                if (wrong := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{wrong} is not what was written")
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(f"{path} holds objects that could run code, which are never loaded ({named[1]})") from error
        raise DataError(f"{path} is damaged or cut short, or no file of weights: use another copy") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0].partition(" internal miniz error")[0] or "it ends too early"
        raise DataError(f"{path} is damaged or cut short ({reason}): use another copy") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds no named tensors but a {type(content).__name__}")
    return dict(content), checked(path, content.get("segtrain", {}))


def checked(path: Path, settings: Any) -> dict[str, Any]:
    """What `convert.write` put beside the tensors; DataError for anything else."""
    known = {"activation": ACTIVATIONS, "scale": SCALES}
    kinds: dict[str, Any] = {
        "negative_slope": (int, float), "classes": (dict, type(None)), "provenance": dict, "model": dict,
    }  # fmt: skip
    wrong = ["no options"]
    if isinstance(settings, dict):
        wrong = [key for key, kind in kinds.items() if key in settings and not isinstance(settings[key], kind)]
        wrong += [key for key, values in known.items() if key in settings and settings[key] not in values]
        if isinstance(told := settings.get("provenance"), dict) and not told.keys() >= summed([], []).keys():
            wrong.append("provenance")
    if wrong:
        raise DataError(
            f"{path}: what stands beside its tensors is not as segtrain writes it ({', '.join(wrong)}): "
            "use another copy"
        )
    return dict(settings)


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors, and the settings that `convert.write` put beside them."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(metadata.get("segtrain", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no safetensors file ({error}): use another copy") from error
    return tensors, checked(path, settings)


def run_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's checkpoint says about its weights."""
    model, data = content["config"]["model"], content["config"]["dataset"]
    return {
        "activation": model["activation"],
        "negative_slope": model["negative_slope"],
        "scale": "signed" if model["norm"].startswith("batch_norm") else model.get("scale", "abs"),
        "classes": content["classes"] if model.get("head") != "classifier" else None,
        "provenance": content.get("provenance") or provenance(data_names(data), None),
        "model": model,
    }


def clean(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named tensors in what was read, without wrappers."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return clean(content[key])
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            flat[key] = value
        elif isinstance(value, Mapping) and key in ("body", "head", "cls"):
            flat |= {f"{key}.{name}": tensor for name, tensor in clean(value).items()}
    if flat and all(key.startswith("module.") for key in flat):
        flat = {key.removeprefix("module."): value for key, value in flat.items()}
    # Norms of the first release were wrapped: bn1.bn.weight.
    return {re.sub(rf"((?:^|\.)\w*bn\w*)\.bn\.{LEAVES}$", r"\1.\2", key): value for key, value in flat.items()}


def form_of(tensors: Mapping[str, Tensor], path: Path) -> str:
    for name, form in FORMS.items():
        if form.mark in tensors:
            return name
    some = ", ".join(list(tensors)[:4]) or "no tensors at all"
    known = "; ".join(f"{form.title} ({form.mark})" for form in FORMS.values())
    raise DataError(f"{path}: its tensors have names of no known form ({some}, ...). Known are: {known}")


def classes_of(known: Mapping[str, Any], tensors: Mapping[str, Tensor], form: str) -> LabelTable | None:
    """What the rows of a published segmentation classifier stand for; None where nobody has said."""
    count = rows_of(tensors, FORMS[form], "cls.weight")
    if count is None:
        return None
    if known.get("labels") == "voc" or (form == "torchvision_deeplabv3" and count == 21):
        names = read_json_table("weights")["voc"]
        return LabelTable(
            [{"name": name, "id": i, "color": [0, 0, 0], "train_id": i} for i, name in enumerate(names)], "VOC"
        )
    # The one segmenter of the official repository, also where its file was written anew and has another md5.
    labels = "vistas_v1.2" if form == "segmenter" and count == 65 and not known else known.get("labels")
    if labels is None and form == "nvidia_deeplabv3plus" and count == 19:
        labels = "cityscapes"
    return published_table(labels) if labels else None


# ------------------------------------------------------------------------------------------------- provenance


def data_names(data: Mapping[str, Any]) -> list[str]:
    """The data sets behind the options of one, those in a mixture by name."""
    if data["name"] != "mixture":
        return [data["name"]]
    return [part.get("dataset", name) for name, part in data["parts"].items() if part.get("weight") != 0]


def own_provenance(path: Path, known: dict[str, Any] | None, alike: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a file that nothing but its name, its hash and its tensors speak for. alike: the published files that have
    such tensors; it may be one of them, written anew, so that what they all forbid is taken to hold."""
    licence, names = "not known", ", ".join(one["name"] for one in alike)
    if known is not None:
        licence, alike = known["licence"], [known]
    elif alike and len({one["licence"] for one in alike}) == 1:
        licence = f"not known; its tensors are those of {names}: {alike[0]['licence']}"
    entry = {"file": path.name, "known": known["name"] if known else None, "licence": licence}
    entry["noncommercial"] = True if alike and all(one["noncommercial"] for one in alike) else None
    data = [name for name in (alike[0]["data"] if alike else []) if all(name in one["data"] for one in alike)]
    return summed([entry], data)


def origin(found: Mapping[str, Any]) -> list[str]:
    """What `provenance` found, a line each."""
    parts = [f"weights {entry['file']} ({entry['licence']})" for entry in found["weights"]]
    parts += [f"data {name} ({licence})" for name, licence in found["data"].items()]
    return [f"not for commercial use: {part}" if part in found["noncommercial"] else f"from {part}" for part in parts]


def provenance(trained_on: Iterable[str], start: "Report | None") -> dict[str, Any]:
    """What a network comes from, for its checkpoints: plain lists and dicts.

    trained_on: names of data sets. start: the report of the weights it began with, whose own provenance it inherits.
    weights: files with licence; data: names -> licence; noncommercial: what of these may not be used commercially.
    start: the file itself, not inherited: its sha256, how many tensors matched, and which share of those that should.
    """
    if start is None:
        return summed([], trained_on)
    before, source = start.provenance, start.source
    began = {"file": str(source.path), "sha256": source.sha256, "matched": start.matched, "share": start.ratio}
    return summed(before["weights"], [*before["data"], *trained_on]) | {"start": began}


def summed(weights: list[dict[str, Any]], data: Iterable[str]) -> dict[str, Any]:
    terms = read_json_table("weights")["data"]
    unknown = {"licence": "not known", "noncommercial": None}
    used = {name: terms.get(name, unknown) for name in dict.fromkeys(data)}
    parts = [f"weights {entry['file']} ({entry['licence']})" for entry in weights if entry["noncommercial"]]
    parts += [f"data {name} ({entry['licence']})" for name, entry in used.items() if entry["noncommercial"]]
    return {
        "weights": [dict(entry) for entry in weights],
        "data": {name: entry["licence"] for name, entry in used.items()},
        "noncommercial": parts,
    }


# ------------------------------------------------------------------------------------------------- into a network


@dataclass
class Report:
    """What became of every tensor. Numbers are of tensors; num_batches_tracked is not counted.

    missing, other_shape: of the network; left: of the file, with no place and no reason for it; explained: the same
    with one. rows: what the classifier's rows are, by class. rounding, as_published: the largest |difference| of
    outputs on a probe, relative to the largest output, against the file's weights under torch's BatchNorm with the
    network's activation, and with the activation of the file.
    """

    source: Source
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    other_shape: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    explained: dict[str, int] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rounding: float | None = None
    as_published: float | None = None

    @property
    def ratio(self) -> float:
        """Share of all that should have matched."""
        total = self.matched + len(self.missing) + len(self.other_shape) + len(self.left)
        return self.matched / total if total else 0.0

    @property
    def provenance(self) -> dict[str, Any]:
        return self.source.provenance

    @property
    def normalised(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation by which the pictures of the file's training were normalised, if known."""
        mean, std = ((self.source.known or self.source.model).get(key) for key in ("mean", "std"))
        return (list(mean), list(std)) if mean and std else None

    def mismatches(self) -> list[str]:
        kinds = (
            ("not in the file", self.missing), ("of another shape", self.other_shape), ("without a place", self.left),
        )  # fmt: skip
        return [f"{len(some)} {kind} ({', '.join(some[:3])})" for kind, some in kinds if some]

    def __str__(self) -> str:
        lines = [
            f"{self.source.path}: {self.source.title}",
            f"{self.matched} tensors matched ({100 * self.ratio:.0f} %)",
        ]
        lines += self.mismatches()
        lines += [f"{count} not taken: {reason}" for reason, count in self.explained.items()]
        lines += [*self.rows, *self.notes]
        if self.rounding is not None and self.as_published is not None:
            lines.append(
                f"outputs on a probe differ by {self.rounding:.1e} (relative) from the file's weights under BatchNorm "
                f"with this network's activation, and by {self.as_published:.1e} from the file's as published"
            )
        lines += [f"not for commercial use: {part}" for part in self.provenance["noncommercial"]]
        return "\n".join(lines)


def load_weights(
    path: Path,
    model: Network,
    table: LabelTable | None = None,
    least: float = 1.0,
    mapping: str | None = None,
    column: str = RECOMMENDED,
) -> Report:
    """Copy what the file and the network share into the network. Returns what happened, to be printed and kept.

    table: the classes that the network is to tell apart. Where the file's are others, the rows of its classifier that
    `mapping` (a published taxonomy or a YAML file; default: the published one that fits, else equal names) leads to a
    class are kept, and the other classes' rows stay as initialised. Of an ImageNet classifier only the body is taken.
    least: share of the tensors that must match, 1 = all: neither may the network lack one, nor the file have one more.
    Raises DataError below that, and if the layers of the network cannot represent the weights (model.scale=abs and
    negative ones); UsageError if there is no such file.
    """
    return take(read(path), model, table, least, mapping, column)


def take(
    source: Source, model: Network, table: LabelTable | None = None, least: float = 1.0, mapping: str | None = None,
    column: str = RECOMMENDED,
) -> Report:  # fmt: skip
    """`load_weights` of a file that has been read."""
    found, report = gather(source, model)
    classifier = "cls." if isinstance(model, Segmenter) else "classifier.fc."
    rows = {key: found.pop(key) for key in list(found) if key.startswith(classifier)}
    if report.ratio < least:
        raise DataError(refusal(report, model, least))
    own = canonical(model)
    fill(model, found, source.scale)
    if rows and not same_classes(source, rows[f"{classifier}weight"], own[f"{classifier}weight"], table):
        report.rows = fine_tuned(rows, own, source.classes, table, classifier, mapping, column)
    elif rows:
        with torch.no_grad():
            for key, value in rows.items():
                own[key].copy_(value)
    note_changes(report, model)
    return report


def canonical(model: Network) -> dict[str, Tensor]:
    """The network's own tensors under the one naming; num_batches_tracked left out."""
    tensors = {k: t for k, t in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if isinstance(model, Segmenter):
        return tensors
    return {key if key.startswith("classifier.") else f"body.{key}": tensor for key, tensor in tensors.items()}


def gather(source: Source, model: Network) -> tuple[dict[str, Tensor], Report]:
    """The file's tensors by our names, and what of network and file has no partner. The classifier's rows may be of
    another number; they count as matched."""
    form = FORMS[source.form]
    report = Report(source)
    found: dict[str, Tensor] = {}
    used = set()
    for key, own in canonical(model).items():
        where = place(form, key)
        if where is None:
            continue  # no file of this form has it
        used |= set(where.names)
        if not all(name in source.tensors for name in where.names):
            report.missing.append(key)
            continue
        value = where.take(source.tensors)
        last = key.startswith(("cls.", "classifier.fc."))
        if value.shape == own.shape or (last and value.shape[1:] == own.shape[1:]):
            found[key] = value
            report.matched += 1
        else:
            report.other_shape.append(f"{key} is {tuple(value.shape)} there, {tuple(own.shape)} here")
    reasons: Counter[str] = Counter()
    for name in source.tensors:
        if name in used or name.endswith("num_batches_tracked"):
            continue
        bare = "bn_out" in name and hasattr(model, "body") and not hasattr(model.body, "bn_out")
        reason = next((why for pattern, why in form.explained if re.match(pattern, name)), None)
        if reason is None or ("bn_out" in name and not bare):
            report.left.append(name)
        else:
            reasons[reason] += 1
    report.explained = dict(reasons)
    return found, report


def refusal(report: Report, model: Network, least: float) -> str:
    source = report.source
    likely, hint = identify(source.tensors, source.form), ""
    if likely and likely != identify(canonical(model), "segmenter"):
        hint += f" By its tensors it is a {likely}: model.backbone={likely}."
    head, channels = HEAD_OF.get(source.form), rows_of(source.tensors, FORMS[source.form], "head.red_conv.weight")
    if head and channels and isinstance(model, Segmenter):
        build = HEADS[head]
        if not (isinstance(build, type) and isinstance(model.head, build)) or channels != model.cls.in_channels:
            hint += f" Its head is model.head={head} model.head_channels={channels}."
    return (
        f"{source.path} ({source.title}) does not fit this network: {report.matched} tensors match, "
        f"{100 * report.ratio:.0f} %, where {100 * least:.0f} % are asked for; {'; '.join(report.mismatches())}.{hint} "
        "model.weights_match=SHARE takes what matches"
    )


HEAD_OF = {  # form -> the head of its networks
    "segmenter": "deeplabv3", "torchvision_deeplabv3": "deeplabv3_torchvision", "nvidia_deeplabv3plus": "deeplabv3plus",
}  # fmt: skip

# Parameters and tensors (running statistics counted among these only) of the bodies, as published.
BODIES = {
    (11_176_512, 100): "resnet18", (21_284_672, 180): "resnet34", (23_508_032, 265): "resnet50",
    (42_500_160, 520): "resnet101", (22_331_200, 259): "resnext50", (40_853_312, 514): "resnext101",
    (56_110_912, 769): "resnext152", (22_979_904, 265): "resnext50_32x4d", (86_742_336, 520): "resnext101_32x8d",
    (105_070_912, 191): "wider_resnet38", (30_714_880, 1330): "densenet264",
}  # fmt: skip


def identify(tensors: Mapping[str, Tensor], form: str) -> str | None:
    """The backbone by the number of its parameters and tensors, or None."""
    other = ("head.", "cls.", "classifier.", "fc.", "aux_classifier.", "aspp.", "bot_", "final.")
    body = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(other) and not key.endswith("num_batches_tracked")
    }
    count = sum(tensor.numel() for key, tensor in body.items() if not key.rpartition(".")[2].startswith("running_"))
    bare = 2 * 4096 if form == "nvidia_deeplabv3plus" else 0  # it has no bn_out
    return BODIES.get((count + bare, len(body) + (4 if bare else 0)))


# ------------------------------------------------------------------------------------------------- norms


def norm_layers(model: nn.Module) -> dict[str, ABN]:
    """By canonical name."""
    prefix = "" if isinstance(model, Segmenter) else "body."
    return {f"{prefix}{name}": module for name, module in model.named_modules() if isinstance(module, ABN)}


def scale_kind(layer: ABN) -> str:
    return "signed" if isinstance(layer, BatchNormAct) else layer.scale


def fill(model: Network, found: Mapping[str, Tensor], scale: str) -> None:
    """Copy tensors in; the weights of norm layers so that these multiply with what the source multiplied with."""
    layers = norm_layers(model)
    weights = {f"{name}.weight": layer for name, layer in layers.items()}
    refuse_negative(weights, found, scale)
    own = canonical(model)
    with torch.no_grad():
        for key, value in found.items():
            if key in weights:
                value = converted(value, weights[key], scale)
            own[key].copy_(value)
        for layer in layers.values():
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.zero_()


def converted(weight: Tensor, layer: ABN, scale: str) -> Tensor:
    kind = scale_kind(layer)
    if kind == scale:
        return weight
    return effective_scale(weight, layer.eps, "abs") if kind == "signed" else weight - layer.eps


def refuse_negative(weights: Mapping[str, ABN], found: Mapping[str, Tensor], scale: str) -> None:
    """DataError where a BatchNorm's weights would have to be |weight| + eps and are not."""
    bad = {
        key: int((found[key] < layer.eps).sum())
        for key, layer in weights.items()
        if key in found and scale == "signed" and scale_kind(layer) == "abs"
    }
    listed = [f"{key} ({count} of {len(found[key])})" for key, count in bad.items() if count]
    if listed:
        raise DataError(
            f"BatchNorm's weights of this file are negative or 0 in {len(listed)} layers ({', '.join(listed[:3])}); "
            "layers with model.scale=abs multiply with |weight| + eps: add model.scale=signed, which takes any weight"
        )


def note_changes(report: Report, model: Network) -> None:
    """What the file's norms and activations become here, and how much that changes the outputs."""
    source = report.source
    namesake = known_by_name(source.path)
    if source.known is not None and not has_hash(source.known):
        report.notes.append(
            f"taken for the published {source.known['name']} by its name and tensors: no hash is published"
        )
    if source.known is None and namesake is not None and has_hash(namesake):
        wanted = namesake["md5"] or f"sha256 {namesake['sha256']}..."
        report.notes.append(
            f"WARNING: it has the name of the published {namesake['name']} but not its hash, {wanted}: its md5 is "
            f"{source.md5}. Damaged, or another file"
        )
    if source.form == "torchvision_deeplabv3" and isinstance(model, Segmenter) and not dilates_as_torchvision(model):
        report.notes.append(
            "torchvision's DeepLabV3 dilates otherwise, so that outputs differ: add model.output_stride=8 "
            "'model.backbone_options={first_dilation:previous}'"
        )
    if source.form == "nvidia_deeplabv3plus":
        report.notes.append(
            "its authors enlarge the logits with corners aligned, here pixels' areas are: up to half a pixel's shift"
        )
    if source.scale_is_assumed():
        report.notes.append(
            "some of its norms' weights are negative, and it does not say what they are: taken as In-Place ABN's, "
            "|weight| + eps; if they are BatchNorm's, `segtrain convert input_scale=signed` says so"
        )
    layers = [layer for layer in norm_layers(model).values() if layer.activation != "identity"]
    here, slope = layers[0].activation, layers[0].activation_param
    kind = scale_kind(layers[0])
    same = here == source.activation and (here in ("relu", "identity") or slope == source.negative_slope)
    if kind != source.scale:
        words = {"abs": "|weight| + eps", "signed": "the weight"}
        report.notes.append(f"norm layers multiplied with {words[source.scale]}, here with {words[kind]}: converted")
    if not same:
        ours = f"{here}({slope:g})" if here in ("leaky_relu", "elu") else here
        report.notes.append(
            f"its activation {source.activation} is {ours} here, a real change: train or evaluate again"
        )
    if not same or kind != source.scale:
        report.rounding, report.as_published = differences(model, source, here, slope)


def dilates_as_torchvision(model: Segmenter) -> bool:
    """Strides turned into dilations of 2 and 4, where the first 3x3 convolution still has the dilation before."""
    modules = [getattr(model.body, name, None) for name in ("mod4", "mod5")]
    blocks: list[Any] = [module[0] for module in modules if isinstance(module, nn.Sequential)]
    return [block.convs.conv2.dilation[0] for block in blocks] == [1, 2]


def differences(model: Network, source: Source, activation: str, slope: float) -> tuple[float, float]:
    """How far the network's outputs on one random picture are from those of the file's weights under torch's
    BatchNorm: with the network's own activation, and with the file's. Largest |difference| over largest |output|."""
    found, _ = gather(source, model)
    rows = [key for key in found if key.startswith(("cls.", "classifier.fc."))]
    for key in rows:
        del found[key]
    device = next(model.parameters()).device
    probe = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).to(device)
    mode = model.training
    outputs = [probed(model, probe, bool(rows))]
    model.train(mode)
    for kind, param in ((activation, slope), (source.activation, source.negative_slope)):
        outputs.append(probed(plain(model, found, source.scale, kind, param), probe, bool(rows)))
    largest = max(t.abs().max().item() for t in outputs[0]) or 1.0
    return tuple(  # type: ignore[return-value]
        max((a - b).abs().max().item() for a, b in zip(outputs[0], other, strict=True)) / largest
        for other in outputs[1:]
    )


@torch.no_grad()
def probed(model: Network, probe: Tensor, through_head: bool) -> list[Tensor]:
    """Outputs in eval mode: of the head if the file has one, else of the backbone."""
    model.eval()
    if isinstance(model, Classifier):
        return [model(probe)]
    out = model.body(probe)
    if through_head:
        out = model.head(out)
    return list(out) if isinstance(out, tuple) else [out]


def plain(model: Network, found: Mapping[str, Tensor], scale: str, activation: str, slope: float) -> Network:
    """A copy of the network whose norms are torch's BatchNorm with an activation, filled from the file anew."""
    twin = copy.deepcopy(model)
    if isinstance(twin, Segmenter):
        twin.recompute = "none"
    for parent in list(twin.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, ABN):
                kept = "identity" if layer.activation == "identity" else activation
                norm = BatchNormAct(layer.num_features, layer.eps, layer.momentum, activation=kept)
                norm.activation_param = slope
                setattr(parent, name, norm.to(next(model.parameters()).device))
    fill(twin, found, scale)
    return twin


# ------------------------------------------------------------------------------------------------- other classes


def same_classes(source: Source, theirs: Tensor, own: Tensor, table: LabelTable | None) -> bool:
    if theirs.shape != own.shape:
        return False
    if table is None:
        return True
    return source.classes is not None and source.classes.names == table.names


def fine_tuned(
    rows: Mapping[str, Tensor], own: Mapping[str, Tensor], classes: LabelTable | None, table: LabelTable | None,
    classifier: str, mapping: str | None, column: str,
) -> list[str]:  # fmt: skip
    """Give each of our classes the classifier rows of the file's classes that it is told from. Returns what was done.

    Of several, the one of the same name is taken, else their mean.
    """
    count, theirs = len(own[f"{classifier}weight"]), len(rows[f"{classifier}weight"])
    if classes is None or table is None:
        return [
            f"the classifier's {count} rows start anew: what the file's {theirs} rows stand for is not known "
            "(`segtrain convert classes=` writes it into a file)"
        ]
    told = told_by(classes, table, mapping, column)
    kept: list[str] = []
    means: list[str] = []
    anew: list[str] = []
    with torch.no_grad():
        for train_id, name in enumerate(table.names):
            sources = [i for i, own_name in enumerate(classes.names) if told.get(own_name) == (train_id,)]
            equal = [i for i in sources if plain_name(classes.names[i]) == plain_name(name)]
            taken = equal[:1] or sources
            for key, value in rows.items():
                if taken and key in own:
                    own[key][train_id] = value[taken].mean(0)
            (kept if len(taken) == 1 else means if taken else anew).append(name)
    lines = [f"{theirs} classes in the file, {count} here: {len(kept)} rows of the classifier kept"]
    if means:
        lines[0] += f", {len(means)} the mean of several ({', '.join(means)})"
    if anew:
        lines[0] += f", {len(anew)} start anew ({', '.join(anew[:8])}{', ...' if len(anew) > 8 else ''})"
    return lines


def plain_name(name: str) -> str:
    """construction--flat--road and Road are one name."""
    return name.rpartition("--")[2].replace("-", " ").replace("_", " ").lower()


def told_by(classes: LabelTable, table: LabelTable, mapping: str | None, column: str) -> Mapping[str, tuple[int, ...]]:
    """Name of a class of the file -> train ids here."""
    source = next((found for found in map(published_table, TABLES) if found.names == classes.names), classes)
    cityscapes = published_table("cityscapes").names
    if mapping is None and set(cityscapes) <= set(table.names):
        if source.names == published_table("vistas_v1.2").names:
            mapping = "vistas_to_cityscapes"
        elif source.names == published_table("vistas_v2.0").names:
            mapping = "vistas_v2.0_to_cityscapes"
    if mapping is not None:
        return taxonomy(source, table, mapping, column)
    ours = {plain_name(name): train_id for train_id, name in enumerate(table.names)}
    return {name: (ours[plain_name(name)],) for name in source.names if plain_name(name) in ours}
