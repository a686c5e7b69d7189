"""ABN of every kind to BatchNorm and a plain activation."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from segtrain.abn.convert.conversion import (
    BATCH_NORMS,
    Conversion,
    adopt,
    measure_difference,
    note_near_zero,
    replace_module,
    scale_of,
)
from segtrain.abn.convert.observe import copy_model, observe
from segtrain.abn.modules import ABN


class BatchNormAddAct(nn.Module):
    """act(bn(x) + shortcut): the plain form of a layer that is called with a shortcut."""

    def __init__(self, bn: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.bn = bn
        self.act = act

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(x) + shortcut)
        return out


def to_batch_norm(model: nn.Module, probe: Any) -> Conversion:
    """Convert ABN layers of every class to nn.BatchNorm and an activation module, which run and export anywhere.

    A layer becomes an nn.Sequential of `bn` and `act`, the BatchNorm alone if it has no activation, or a
    BatchNormAddAct if it adds a shortcut. The BatchNorm's weight is the scale that the layer multiplied with: |weight|
    + eps, or the signed weight. Synchronised layers become ordinary ones; nn.SyncBatchNorm.convert_sync_batchnorm
    synchronises them again. Layers that the probe does not reach are left.

    probe: the arguments of one call, a tensor or a tuple.
    """
    record = observe(model, probe)
    new = copy_model(model)
    conversion = Conversion(new)
    for name, layer in list(new.named_modules()):
        if not isinstance(layer, ABN):
            continue
        calls = record.calls.get(name, [])
        added = {([*args, kwargs.get("shortcut")])[1] is not None for args, kwargs in calls}
        dims = {args[0].dim() for args, _ in calls}
        if len(added) != 1 or len(dims) != 1:
            conversion.left[name] = "called in different ways" if calls else "not called by the probe"
            continue
        conversion.converted[name] = "batch norm" + (", addition" if True in added else "")
        if layer.activation != "identity":
            conversion.converted[name] += f", {layer.activation}"
        note_near_zero(conversion, name, layer)
        conversion.model = replace_module(conversion.model, layer, plain_layers(layer, dims.pop(), added.pop()))
    return measure_difference(conversion, record.results, probe)


def plain_layers(layer: ABN, dims: int, adds: bool) -> nn.Module:
    norm: Any = BATCH_NORMS[dims](
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    scale = scale_of(layer)
    adopt(norm, layer)
    if layer.weight is not None and scale is not None:
        norm.weight = nn.Parameter(scale.detach().clone(), layer.weight.requires_grad)
    makers: dict[str, Callable[[], nn.Module]] = {
        "leaky_relu": lambda: nn.LeakyReLU(layer.activation_param),
        "elu": lambda: nn.ELU(layer.activation_param),
        "relu": nn.ReLU,
        "identity": nn.Identity,
    }
    act = makers[layer.activation]()
    if adds:
        both: nn.Module = BatchNormAddAct(norm, act)
    elif layer.activation == "identity":
        both = norm
    else:
        both = nn.Sequential(OrderedDict(bn=norm, act=act))
    both.training = layer.training
    return both
