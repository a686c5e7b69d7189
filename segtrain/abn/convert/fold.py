"""Fold norm layers into the convolutions next to them, for export."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segtrain.abn.convert.conversion import BATCH_NORMS, Conversion, measure_difference, replace_module
from segtrain.abn.convert.observe import Left, Operation, Record, has_hooks, norm_call, observe
from segtrain.abn.convert.to_batch_norm import to_batch_norm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold(model: nn.Module, probe: Any) -> Conversion:
    """Fold norm layers, in eval mode, into the convolution before them or, where that is exact, after them.

    ABN layers of every class and nn.BatchNorm, with their running statistics, go into the convolution, transposed
    convolution or linear layer whose output is their input and is used by nothing else; or, if they have no activation,
    into the one convolution or linear layer that uses their output (pre-activation networks), if that pads without
    zeros or the norm has no shift. Their activations become plain modules. Other layers are left as BatchNorm and
    activation. Use the copy in eval mode only: it does not train as the original does.

    probe: the arguments of one call, a tensor or a tuple.
    """
    expected = observe(model, probe).results
    plain = to_batch_norm(model, probe)
    new = plain.model.eval()
    conversion = Conversion(new, left=plain.left, near_zero=plain.near_zero)
    neighbours = Neighbours(new, observe(new, probe))
    for name, norm in list(new.named_modules()):
        if not isinstance(norm, _BatchNorm):
            continue
        listed = name.removesuffix(".bn") if name.removesuffix(".bn") in plain.converted else name
        try:
            target, before = neighbours.find(name, norm)
        except Left as reason:
            conversion.left[listed] = str(reason)
            continue
        absorb(new.get_submodule(target), norm, before)
        new = conversion.model = replace_module(new, norm, nn.Identity())
        conversion.converted[listed] = f"folded into {target}, {'before' if before else 'behind'} it"
    for name in conversion.converted:
        pair = new.get_submodule(name)
        if name in plain.converted and isinstance(pair, nn.Sequential):  # an Identity and the activation
            new = conversion.model = replace_module(new, pair, pair[1])
    return measure_difference(conversion, expected, probe)


class Neighbours:
    """The linear layers of a network that its norms may be folded into.

    record: of the network in eval mode on the probe.
    """

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model = model
        self.record = record
        self.owners: dict[int, int] = {}  # id of a parameter -> how many modules hold it
        for module in model.modules():
            for parameter in module._parameters.values():
                self.owners[id(parameter)] = self.owners.get(id(parameter), 0) + 1

    def find(self, name: str, norm: nn.Module) -> tuple[str, bool]:
        """(Name of the layer that can absorb the norm, whether it comes before the norm). Raises Left if none can."""
        if type(norm) not in (*BATCH_NORMS.values(), nn.SyncBatchNorm) or has_hooks(norm):
            raise Left(f"of class {type(norm).__name__}, or with hooks")
        operation = norm_call(self.record, name)
        if norm.running_mean is None:
            raise Left("it has no running statistics")
        x, source = operation.inputs[0]
        maker = None if source is None else self.record.operations[source]
        kinds = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
        if maker is not None and self.suits(maker, kinds, x.dim()) and self.record.only_user(maker) is operation:
            return maker.modules[-1], True
        user = self.record.only_user(operation)
        if user is None or not self.suits(user, (*CONVOLUTIONS, nn.Linear), x.dim()) or not is_first(user, operation):
            raise Left("no convolution next to it that nothing else uses")
        if pads_zeros(self.model.get_submodule(user.modules[-1])) and bool(affine_map(norm)[1].any()):
            raise Left("the convolution behind it pads with zeros, which the norm does not shift")
        return user.modules[-1], False

    def suits(self, operation: Operation, kinds: tuple[type[nn.Module], ...], dims: int) -> bool:
        """Whether it is the only call of a layer of one of these classes that shares its weights with no other.

        dims: number of dimensions of the norm's input; a linear layer applied to more than 2 is no neighbour.
        """
        module = self.model.get_submodule(operation.modules[-1]) if operation.modules else self.model
        parameters: Iterable[Any] = [p for p in module._parameters.values() if p is not None]
        return (
            getattr(module, "stands_for", type(module)) in kinds
            and operation.name in ("convolution", "addmm", "mm")
            and (type(module) is not nn.Linear or dims == 2)
            and len(self.record.calls[operation.modules[-1]]) == 1
            and not has_hooks(module)
            and all(self.owners.get(id(p), 1) == 1 for p in parameters)
        )


def is_first(user: Operation, operation: Operation) -> bool:
    """Whether the operation's result is the input that the user convolves, not its weight or bias."""
    names = {"addmm": "mat1", "mm": "self", "convolution": "input"}
    return user.given[names[user.name]] is operation.outputs[0]


def pads_zeros(module: nn.Module) -> bool:
    """Whether the layer pads its input with zeros."""
    if isinstance(module, nn.Linear) or getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    layer: Any = module
    padding = layer.padding
    return padding == "same" and max(layer.kernel_size) > 1 if isinstance(padding, str) else any(padding)


def affine_map(norm: Any) -> tuple[Tensor, Tensor]:
    """(factor, shift) of a norm in eval mode, float64."""
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double()


def absorb(layer: Any, norm: nn.Module, before: bool) -> None:
    """Write the norm's affine map into the weight and bias of the layer before it, or after it (before=False)."""
    factor, shift = affine_map(norm)
    weight = layer.weight.detach().double()
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    groups = getattr(layer, "groups", 1)
    if before:
        if isinstance(layer, TRANSPOSED):  # (in, out / groups, ...)
            split = weight.view(groups, -1, *weight.shape[1:])
            weight = (split * factor.view(groups, 1, -1, *(1,) * (weight.dim() - 2))).view_as(weight)
        else:
            weight = weight * factor.view(-1, *(1,) * (weight.dim() - 1))
        bias = bias * factor + shift
    else:
        # Output channel o reads the input channels of its group only.
        per_group = weight.shape[0] // groups
        shape = (groups, 1, weight.shape[1], *(1,) * (weight.dim() - 2))
        split = weight.view(groups, per_group, *weight.shape[1:])
        bias = bias + (split * shift.view(shape)).flatten(2).sum(2).flatten()
        weight = (split * factor.view(shape)).view_as(weight)
    grads = layer.weight.requires_grad
    layer.bias = nn.Parameter(bias.to(layer.weight), grads)
    layer.weight = nn.Parameter(weight.to(layer.weight), grads)
