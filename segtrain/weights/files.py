"""Files of weights, read without running code from them, and written with what describes their tensors.

file = read_weights(Path("resnet50-0676ba61.pth"))
file.tensors, file.layout, file.title  # tensors under the file's own names, in the key layout "torchvision"
"""

import hashlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from segtrain.abn.checks import ACTIVATIONS, SCALES
from segtrain.config.locations import CONFIGS
from segtrain.data.labels import LabelTable
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.weights import checkpoint
from segtrain.weights.identify import classes_of, known_by_tensors, layout_of
from segtrain.weights.layouts import LAYOUTS, LEAVES
from segtrain.weights.provenance import data_names, of_foreign_file, provenance, with_terms
from segtrain.weights.published import describe_known, has_hash, known_by_hash, known_by_name


@dataclass
class WeightsFile:
    """The weights in a file.

    tensors: under the file's own names, without wrappers. layout: name of their key layout. known: the published file
    that it is. scale: what its norm layers multiply with, "abs" (|weight| + eps) or "signed" (the weight). classes:
    those of its segmentation classifier, if known. model: options of the network, if the file holds them.
    has_settings: the file itself states what its norm layers are. arch: name of the network in an official checkpoint
    of an ImageNet classifier, which tells forms with equal tensors apart; "" if it is not stated.
    """

    path: Path
    tensors: dict[str, Tensor]
    layout: str
    known: dict[str, Any] | None
    activation: str
    negative_slope: float
    scale: str
    classes: LabelTable | None
    provenance: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    has_settings: bool = False
    arch: str = ""
    md5: str = ""
    sha256: str = ""

    @property
    def title(self) -> str:
        name = f"{self.known['name']}, " if self.known else ""
        return f"{name}{LAYOUTS[self.layout].title}"

    def scale_is_assumed(self) -> bool:
        """Whether scale="abs" is a guess that matters: nothing states it, and some norm weights are negative."""
        if self.known or self.has_settings or self.scale != "abs":
            return False
        norms = (key.replace("running_var", "weight") for key in self.tensors if key.endswith(".running_var"))
        return any(key in self.tensors and bool((self.tensors[key] < 0).any()) for key in norms)

    def num_tensors(self) -> int:
        """Number of tensors as in the published counts, without num_batches_tracked."""
        return sum(not key.endswith("num_batches_tracked") for key in self.tensors)

    def settings(self, scale: str) -> dict[str, Any]:
        """What `write_weights` stores beside the tensors when their norm weights are written as `scale`."""
        return {
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "scale": scale,
            "classes": self.classes.as_dict() if self.classes is not None else None,
            "provenance": self.provenance,
            "model": self.model,
        }


def existing(
    path: Path, kind: str = "weights", remedy: str = "give one, or model.weights=none to begin with random weights"
) -> Path:
    """Return the path if it is a file; else UsageError, with the download page if the name is a published file's."""
    if path.is_file():
        return path
    if (path / "last.pt").is_file():
        raise UsageError(f"{path} is a run folder, not a {kind} file: give {path / 'last.pt'}")
    known, recipe = known_by_name(path), path.parent.name
    how = " `segtrain weights` lists the published ones."
    if known:
        how = f"\nIt is a published file, to be downloaded by hand:\n{describe_known(known)}"
    elif (CONFIGS / "experiment" / f"{recipe}.yaml").is_file():
        how = f"\nAnother recipe makes it: run that first, segtrain train experiment={recipe} name={recipe}"
    raise UsageError(f"no {kind} file {path}: {remedy}.{how}")


def read_weights(path: Path) -> WeightsFile:
    """Read a file of weights onto the CPU.

    A checkpoint of a run, a safetensors file, or a file by torch.save: a state_dict, possibly under `state_dict` or
    `model`, with `body`, `head` and `cls` in one dict or three, with the prefix `module.`, with norm layers wrapped as
    `.bn.`. UsageError if the file does not exist; DataError if it is damaged, holds objects, or has unknown names.
    """
    existing(path)
    md5, sha256 = hashes(path)
    known = known_by_hash(md5, sha256)
    content, settings = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    arch = content.get("arch")
    try:
        if content.get("kind") == checkpoint.KIND:
            checkpoint.require_own_content(content, path)
            settings = checkpoint_settings(content)
            content = content.get("ema") or content["model"]  # averaged weights, if the run has them
        labels = LabelTable.from_dict(settings["classes"]) if settings.get("classes") else None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise bad_settings(path, f"{type(error).__name__}: {error}") from error
    tensors = unwrap(content)
    layout = layout_of(tensors, path)
    alike = [] if known or settings else known_by_tensors(tensors, layout)
    if known is None:  # no hash is published for some files
        known = next((one for one in alike if not has_hash(one) and path.name == one["file"]), None)
    published = known or {}
    return WeightsFile(
        path,
        tensors,
        layout,
        known,
        activation=settings.get("activation") or published.get("activation") or LAYOUTS[layout].activation,
        negative_slope=settings.get("negative_slope", 0.01),
        scale=settings.get("scale") or published.get("scale") or LAYOUTS[layout].scale,
        classes=labels or classes_of(published, tensors, layout),
        provenance=settings.get("provenance") or of_foreign_file(path, known, alike),
        model=settings.get("model", {}),
        has_settings="scale" in settings,
        arch=arch if isinstance(arch, str) else "",
        md5=md5,
        sha256=sha256,
    )


def hashes(path: Path) -> tuple[str, str]:
    """md5 and sha256 of a file, read once."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
            sha256.update(block)
    return md5.hexdigest(), sha256.hexdigest()


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content and settings of a file by torch.save, which may hold tensors, numbers (numpy's too), text, containers."""
    with path.open("rb") as file:
        start = file.read(40)
    if start and not start.startswith((b"PK", b"\x80")):  # neither a zip file nor a pickle, as old versions wrote
        known = known_by_name(path)
        page = ": a web page was saved in its place" if start.lstrip().startswith(b"<") else ""
        where = f". Download it from here:\n{describe_known(known)}" if known else ""
        raise DataError(f"{path} is no file of weights, it begins with {start.decode(errors='replace')!r}{page}{where}")
    scalar: Any = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    harmless += [np.dtype, type(np.dtype("float64")), type(np.dtype("float32")), type(np.dtype("int64"))]
    try:
        if zipfile.is_zipfile(path):  # torch writes check sums but does not verify them
            with zipfile.ZipFile(path) as archive:
                if (wrong := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{wrong} is not what was written")
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(f"{path} holds objects that could run code, which are never loaded ({match[1]})") from error
        raise DataError(f"{path} is damaged or cut short, or no file of weights: use another copy") from error
    except checkpoint.UNREADABLE as error:
        reason = str(error).partition("\n")[0].partition(" internal miniz error")[0] or "it ends too early"
        raise DataError(f"{path} is damaged or cut short ({reason}): use another copy") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds no named tensors but a {type(content).__name__}")
    return dict(content), checked_settings(path, content.get("segtrain", {}))


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and settings of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(metadata.get("segtrain", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no safetensors file ({error}): use another copy") from error
    return tensors, checked_settings(path, settings)


def checked_settings(path: Path, settings: Any) -> dict[str, Any]:
    """The settings that `write_weights` stored, an empty dict if there are none; DataError for anything else."""
    choices = {"activation": ACTIVATIONS, "scale": SCALES}
    kinds: dict[str, Any] = {
        "negative_slope": (int, float), "classes": (dict, type(None)), "provenance": dict, "model": dict,
    }  # fmt: skip
    wrong = ["no options"]
    if isinstance(settings, dict):
        wrong = [key for key, kind in kinds.items() if key in settings and not isinstance(settings[key], kind)]
        wrong += [key for key, values in choices.items() if key in settings and settings[key] not in values]
        before = settings.get("provenance")
        if isinstance(before, dict) and not before.keys() >= with_terms([], []).keys():
            wrong.append("provenance")
    if wrong:
        raise bad_settings(path, ", ".join(wrong))
    return dict(settings)


def bad_settings(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: what it stores beside its tensors is not what segtrain writes ({reason}): use another copy"
    )


def checkpoint_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the weights in a checkpoint of a run."""
    model, data = content["config"]["model"], content["config"]["dataset"]
    return {
        "activation": model["activation"],
        "negative_slope": model["negative_slope"],
        "scale": "signed" if model["norm"].startswith("batch_norm") else model.get("scale", "abs"),
        "classes": content["classes"] if model.get("head") != "classifier" else None,
        "provenance": content.get("provenance") or provenance(data_names(data), None),
        "model": model,
    }


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named tensors in the content of a file, without the wrappers that `read_weights` lists."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return unwrap(content[key])
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            flat[key] = value
        elif isinstance(value, Mapping) and key in ("body", "head", "cls"):
            flat |= {f"{key}.{name}": tensor for name, tensor in unwrap(value).items()}
    if flat and all(key.startswith("module.") for key in flat):
        flat = {key.removeprefix("module."): value for key, value in flat.items()}
    # Norm layers of the first release were wrapped: bn1.bn.weight.
    return {re.sub(rf"((?:^|\.)\w*bn\w*)\.bn\.{LEAVES}$", r"\1.\2", key): value for key, value in flat.items()}


def write_weights(
    path: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any], beside: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file, or one by torch.save with the tensors under `state_dict`, with settings beside them.

    beside: further entries of a file by torch.save, whose tensors may also be dicts of tensors. UsageError for a name
    that ends otherwise.
    """
    contiguous = {key: contiguous_copy(value) for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        write_atomically(path, safetensors_bytes(contiguous, {"format": "pt", "segtrain": json.dumps(settings)}))
        return
    if path.suffix not in (".pth", ".pt", ".tar"):
        raise UsageError(f"output must end in .safetensors, .pt, .pth or .pth.tar, got {path}")
    buffer = io.BytesIO()
    torch.save({**(beside or {}), "state_dict": contiguous, "segtrain": dict(settings)}, buffer)
    write_atomically(path, buffer.getvalue())


def contiguous_copy(value: Any) -> Any:
    """A tensor on the CPU that shares no memory, or a dict of such."""
    if isinstance(value, Mapping):
        return {key: contiguous_copy(item) for key, item in value.items()}
    return value.detach().cpu().contiguous().clone()
