"""Match the tensors of a file with those of a network, and copy them in."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.abn import ABN, ScaledABN
from segtrain.abn.autograd import effective_scale
from segtrain.errors import DataError
from segtrain.models import Classifier, Segmenter
from segtrain.weights.files import WeightsFile
from segtrain.weights.layouts import LAYOUTS, locate

Network = Segmenter | Classifier


@dataclass
class Report:
    """What became of every tensor. Tensors are counted without num_batches_tracked.

    missing, other_shape: tensors of the network that the file lacks or has in another shape. left: tensors of the file
    without a place. explained: reason -> number of tensors of the file that are left out on purpose. rows: what became
    of the classifier's rows if the classes differ. rounding, as_published: largest |difference| of outputs on a probe,
    relative to the largest output, from the file's weights under torch's BatchNorm with the network's activation, and
    with the file's own.
    """

    source: WeightsFile
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
        """Matched tensors as a fraction of all that should have matched."""
        total = self.matched + len(self.missing) + len(self.other_shape) + len(self.left)
        return self.matched / total if total else 0.0

    @property
    def provenance(self) -> dict[str, Any]:
        return self.source.provenance

    @property
    def start(self) -> dict[str, Any]:
        """The entry `start` of the provenance of a network that started from this file."""
        file = self.source
        return {"file": str(file.path), "sha256": file.sha256, "matched": self.matched, "share": self.ratio}

    @property
    def normalised(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation that the file's images were normalised with in training, if known."""
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
        lines += [f"not for commercial use: {line}" for line in self.provenance["noncommercial"]]
        return "\n".join(lines)


def canonical(model: Network) -> dict[str, Tensor]:
    """The network's own tensors in our one naming (see layouts.py), without num_batches_tracked."""
    tensors = {k: t for k, t in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if isinstance(model, Segmenter):
        return tensors
    return {key if key.startswith("classifier.") else f"body.{key}": tensor for key, tensor in tensors.items()}


def match(source: WeightsFile, model: Network) -> tuple[dict[str, Tensor], Report]:
    """The file's tensors in our naming that fit the network, and a report of those of either that have no partner.

    Tensors of the last layer may differ in their number of rows; they count as matched.
    """
    layout = LAYOUTS[source.layout]
    report = Report(source)
    matched: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, own in canonical(model).items():
        location = locate(layout, key)
        if location is None:
            continue  # no file of this layout has it
        used |= set(location.keys)
        if not all(name in source.tensors for name in location.keys):
            report.missing.append(key)
            continue
        value = location.read(source.tensors)
        last = key.startswith(("cls.", "classifier.fc."))
        if value.shape == own.shape or (last and value.shape[1:] == own.shape[1:]):
            matched[key] = value
            report.matched += 1
        elif takes_other_channels(key, value, own, model.in_channels):
            matched[key] = spread_rgb(value, model.in_channels)
            report.matched += 1
            report.notes.append(channels_note(key, model.in_channels))
        else:
            report.other_shape.append(f"{key} is {tuple(value.shape)} there, {tuple(own.shape)} here")
    reasons: Counter[str] = Counter()
    bare = hasattr(model, "body") and not hasattr(model.body, "bn_out")
    for name in source.tensors:
        if name in used or name.endswith("num_batches_tracked"):
            continue
        reason = next((why for pattern, why in layout.explained if re.match(pattern, name)), None)
        if reason is None or ("bn_out" in name and not bare):
            report.left.append(name)
        else:
            reasons[reason] += 1
    report.explained = dict(reasons)
    return matched, report


def takes_other_channels(key: str, value: Tensor, own: Tensor, channels: int) -> bool:
    """Whether a tensor of a file is the first convolution of RGB images, and the network's takes other images."""
    like = (*value.shape[:1], channels, *value.shape[2:])
    return key.startswith("body.") and channels != 3 and value.shape[1:2] == (3,) and own.shape == like


def spread_rgb(weight: Tensor, channels: int) -> Tensor:
    """Weights of a convolution of RGB images, (n, 3, h, w) -> (n, channels, h, w): their mean, times 3 / channels.

    So an image that is the same in all channels has the same outputs as before.
    """
    return weight.sum(1, keepdim=True).div(channels).expand(-1, channels, -1, -1)


def channels_note(key: str, channels: int) -> str:
    return (
        f"{key} is of RGB images in the file and takes {channels} channels here: each has the mean over red, green "
        f"and blue, times 3/{channels}"
    )


def copy_(model: Network, tensors: Mapping[str, Tensor], scale: str) -> None:
    """Copy tensors into the network, converting the weights of norm layers from `scale` to what the layers use.

    DataError, with nothing copied, if the layers cannot represent them.
    """
    layers = norm_layers(model)
    weights = {f"{name}.weight": layer for name, layer in layers.items()}
    refuse_unrepresentable(weights, tensors, scale)
    own = canonical(model)
    with torch.no_grad():
        for key, value in tensors.items():
            if key in weights:
                value = converted(value, weights[key], scale)
            own[key].copy_(value)
        for layer in layers.values():
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.zero_()


def norm_layers(model: nn.Module) -> dict[str, ABN]:
    """The norm layers of a network, in our one naming."""
    prefix = "" if isinstance(model, Segmenter) else "body."
    return {f"{prefix}{name}": module for name, module in model.named_modules() if isinstance(module, ABN)}


def scale_kind(layer: ABN) -> str:
    """What the layer multiplies with: "abs", |weight| + eps, or "signed", the weight."""
    return layer.scale if isinstance(layer, ScaledABN) else "signed"


def converted(weight: Tensor, layer: ABN, scale: str) -> Tensor:
    kind = scale_kind(layer)
    if kind == scale:
        return weight
    return effective_scale(weight, layer.eps, "abs") if kind == "signed" else weight - layer.eps


def refuse_unrepresentable(weights: Mapping[str, ABN], tensors: Mapping[str, Tensor], scale: str) -> None:
    """DataError if signed weights are below eps in layers that multiply with |weight| + eps."""
    bad = {
        key: int((tensors[key] < layer.eps).sum())
        for key, layer in weights.items()
        if key in tensors and scale == "signed" and scale_kind(layer) == "abs"
    }
    listed = [f"{key} ({count} of {len(tensors[key])})" for key, count in bad.items() if count]
    if listed:
        raise DataError(
            f"BatchNorm's weights of this file are negative or 0 in {len(listed)} layers ({', '.join(listed[:3])}); "
            "layers with model.scale=abs multiply with |weight| + eps: add model.scale=signed, which takes any weight"
        )
