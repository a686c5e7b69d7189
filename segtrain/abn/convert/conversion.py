"""What a conversion returns, and what the three conversions share."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.abn.autograd import effective_scale
from segtrain.abn.convert.observe import observe
from segtrain.abn.modules import ABN, ScaledABN

NEAR_ZERO = 1e-3  # below this scale half precision cannot recover the normalised input (bfloat16: mean error 0.6)
BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass
class Conversion:
    """A converted copy of a network, and how much its outputs differ from the original's.

    converted, left: name of a layer -> what it became, or why it was left unchanged.
    near_zero: name of a layer -> channels with |scale| < 1e-3, whose normalised input half precision cannot recover.
    replaced_relu: layers whose ReLU became a LeakyReLU.
    max_difference, relative_difference: largest |difference| of the outputs on the probe in eval mode, and the same
    divided by the largest |output|; where ReLUs were replaced, from the original with the same ReLUs replaced.
    relu_difference: largest |difference| that replacing ReLUs makes to the original's outputs.
    """

    model: nn.Module
    converted: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    near_zero: dict[str, int] = field(default_factory=dict)
    replaced_relu: list[str] = field(default_factory=list)
    max_difference: float = 0.0
    relative_difference: float = 0.0
    relu_difference: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{len(self.converted)} layers converted, {len(self.left)} left; "
            f"largest difference on the probe {self.max_difference:.2g} ({self.relative_difference:.2g} relative)"
        ]
        if self.replaced_relu:
            lines.append(
                f"ReLU replaced by LeakyReLU behind {len(self.replaced_relu)} layers, which changes the outputs by up "
                f"to {self.relu_difference:.2g}: train or evaluate again"
            )
        lines += [f"{name}: {count} channels of scale below {NEAR_ZERO:g}" for name, count in self.near_zero.items()]
        lines += [f"{name} left: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def measure_difference(conversion: Conversion, expected: list[Tensor], probe: Any) -> Conversion:
    """Measure the differences from the `expected` outputs on the probe, and store them in the conversion."""
    found = observe(conversion.model, probe).results
    conversion.max_difference = difference(found, expected)
    largest = max((t.double().abs().max().item() for t in expected if t.numel()), default=0.0)
    conversion.relative_difference = conversion.max_difference / largest if largest else 0.0
    return conversion


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest |difference|; inf if the shapes differ, NaN if an element is NaN."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    parts = [(a.double() - b.double()).abs().max() for a, b in zip(found, expected, strict=True) if a.numel()]
    return torch.stack(parts).max().item() if parts else 0.0


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` is registered. Returns the model, or `new` if `old` was the model itself."""
    for module in list(model.modules()):
        for key, part in list(module._modules.items()):
            if part is old:
                module._modules[key] = new
    return new if model is old else model


def adopt(layer: nn.Module, other: nn.Module) -> None:
    """Give a layer the parameters, running statistics and mode of another."""
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(layer, key, getattr(other, key))
    layer.training = other.training


def scale_of(layer: ABN) -> Tensor | None:
    """The factor that the layer multiplies with, (C,), or None without a weight."""
    if layer.weight is None or not isinstance(layer, ScaledABN):
        return layer.weight
    return effective_scale(layer.weight, layer.eps, layer.scale)


def note_near_zero(conversion: Conversion, name: str, layer: ABN) -> None:
    """Count the channels whose scale half precision cannot invert, if there are any."""
    scale = scale_of(layer)
    count = 0 if scale is None else int((scale.abs() < NEAR_ZERO).sum())
    if count:
        conversion.near_zero[name] = count
