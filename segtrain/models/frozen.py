"""Parts of a network that do not train: model.frozen and model.frozen_norm."""

import re
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segtrain.abn import ABN
from segtrain.errors import UsageError, with_available
from segtrain.models.timm_encoder import TimmEncoder


class Freezable(nn.Module):
    """A network whose norm layers in `still` stay in eval mode while it trains: they use their running statistics.

    frozen: the names that were given to `freeze`.
    """

    frozen: tuple[str, ...] = ()
    still: Sequence[nn.Module] = ()

    def train(self, mode: bool = True) -> "Freezable":
        super().train(mode)
        for layer in self.still:
            layer.eval()
        return self


def freeze(network: Freezable, names: Sequence[str], statistics: bool) -> None:
    """Exclude the parameters of these parts from training and, with `statistics`, keep their running statistics.

    names: of `network_parts`. UsageError for a name that the network lacks, and if nothing is left to train. Dropout
    inside the parts is not changed.
    """
    parts = network_parts(network)
    for name in names:
        if name not in parts:
            raise UsageError(f"model.frozen={name}: the network has no such part{with_available(name, parts)}")
    modules = [module for name in names for part in parts[name] for module in part.modules()]
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    network.frozen = tuple(names)
    if statistics:
        network.still = [module for module in modules if isinstance(module, ABN | _BatchNorm)]
        network.train(network.training)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(f"model.frozen=[{','.join(names)}] leaves nothing to train: name fewer parts")


def network_parts(network: nn.Module) -> dict[str, list[nn.Module]]:
    """The parts of a network that have parameters, by name; a part may be several modules.

    backbone, head and classifier; the backbone's own modules, such as mod1; and in networks of stages, stem and layer1,
    layer2, ... for what comes before the first stage and for each stage.
    """
    children = dict(network.named_children())
    body = children.pop("body", None)
    if body is None:  # a classifier of images: the backbone's modules are its own
        inside = {name: module for name, module in children.items() if name != "classifier"}
        parts = {"backbone": list(inside.values()), "classifier": [children["classifier"]]}
    else:
        inside = body.parts() if isinstance(body, TimmEncoder) else dict(body.named_children())
        parts = {"backbone": [body], "head": [children["head"]], "classifier": [children["cls"]]}
    parts |= {name: [module] for name, module in inside.items()} | stages_of(inside)
    return {name: part for name, part in parts.items() if any(list(module.parameters()) for module in part)}


def stages_of(inside: dict[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """stem, layer1, layer2, ... of a backbone that has mod1, mod2, ..., or layer1, layer2, ..., or stages_0, ..."""
    stages: dict[str, list[nn.Module]] = {}
    if "mod2" in inside:
        stages["stem"] = [inside["mod1"]] if "mod1" in inside else []
        for name in inside:
            if (match := re.fullmatch(r"mod(\d+)", name)) and int(match[1]) > 1:
                before = [inside[f"tra{match[1]}"]] if f"tra{match[1]}" in inside else []  # of DenseNets
                stages[f"layer{int(match[1]) - 1}"] = [*before, inside[name]]
    elif first := next((name for name in ("layer1", "stages_0") if name in inside), None):  # timm's
        names = list(inside)
        stages["stem"] = [inside[name] for name in names[: names.index(first)]]
        for name in names if first == "stages_0" else []:
            if match := re.fullmatch(r"stages_(\d+)", name):
                stages[f"layer{int(match[1]) + 1}"] = [inside[name]]
    return stages


def describe_frozen(network: Freezable) -> str:
    """'backbone, with its statistics: 1.2 of 12.3 M parameters train'"""
    every = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    statistics = f", running statistics of {len(network.still)} norm layers too" if network.still else ""
    return f"{', '.join(network.frozen)}{statistics}: {trained / 1e6:.4g} of {every / 1e6:.4g} M parameters train"
