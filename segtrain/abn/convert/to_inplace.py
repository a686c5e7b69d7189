"""BatchNorm and the activation after it to InPlaceABN."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segtrain.abn.checks import SCALES, invertible, one_of
from segtrain.abn.convert.conversion import (
    Conversion,
    adopt,
    difference,
    measure_difference,
    note_near_zero,
    replace_module,
)
from segtrain.abn.convert.observe import Left, copy_model, group_of, observe
from segtrain.abn.convert.plan import Plan, activation_after, make_plan
from segtrain.abn.convert.rewrite import join
from segtrain.abn.modules import ABN, InPlaceABN, InPlaceABNSync


def to_inplace(model: nn.Module, probe: Any, *, scale: str = "signed", replace_relu: float | None = None) -> Conversion:
    """Convert BatchNorm (1d, 2d, 3d, Sync) and the activation after it to InPlaceABN (Sync), weights unchanged.

    The norm may be followed by a LeakyReLU or ELU (module or function), by nothing, or by an addition and one of these
    (ResNet v1), which becomes one operation: a module whose forward must change for that is replaced by its
    torch.fx.GraphModule, with the same submodules under the same names. The layer overwrites its input if nothing else
    needs it, and writes elsewhere otherwise.

    probe: the arguments of one call, a tensor or a tuple.
    scale: "signed" takes any weight, and moves those closer to 0 than eps to eps; "abs" is the published form.
    replace_relu: negative slope of the LeakyReLU that replaces each ReLU; None leaves the norms before a ReLU, which
    cannot be inverted, unchanged.
    Raises ValueError for an unknown scale or slope, and with scale="abs" for weights below eps, naming the layers.
    """
    one_of("scale", scale, SCALES)
    if replace_relu is not None:
        invertible("leaky_relu", replace_relu)
    seen = observe(model, probe), observe(model, probe, training=True)
    new = copy_model(model)
    norms = {name: module for name, module in new.named_modules() if isinstance(module, _BatchNorm)}
    conversion = Conversion(new)
    plans: dict[str, Plan] = {}
    for name, norm in norms.items():
        try:
            plans[name] = make_plan(new, name, norm, seen, replace_relu)
        except Left as left:
            conversion.left[name] = str(left)
    conversion.model, refused = join(new, plans, seen)
    conversion.left |= refused
    plans = {name: plan for name, plan in plans.items() if name not in refused}
    if scale == "abs":
        refuse_below_eps({name: norms[name] for name in plans})
    expected = seen[0].results
    relus = {}
    for name, plan in plans.items():
        conversion.converted[name] = plan.describe()
        if plan.relu:
            conversion.replaced_relu.append(name)
            relus[activation_after(seen[0], name).number] = plan.param
        conversion.model = replace_module(conversion.model, norms[name], inplace_layer(norms[name], plan, scale))
    if relus:
        original, expected = expected, observe(model, probe, replace=relus).results
        conversion.relu_difference = difference(expected, original)
    for name in conversion.converted:
        layer = conversion.model.get_submodule(name)
        if isinstance(layer, ABN):
            note_near_zero(conversion, name, layer)
    return measure_difference(conversion, expected, probe)


def inplace_layer(norm: nn.Module, plan: Plan, scale: str) -> InPlaceABN:
    """The layer for a plan, with the parameters and buffers of the norm itself."""
    sync = isinstance(norm, nn.SyncBatchNorm)
    assert isinstance(norm, _BatchNorm)
    layer = (InPlaceABNSync if sync else InPlaceABN)(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, plan.activation, plan.param,
        overwrite=plan.overwrite, scale=scale,
    )  # fmt: skip
    if isinstance(layer, InPlaceABNSync):
        layer.group = group_of(norm)
    adopt(layer, norm)
    if scale == "abs" and layer.weight is not None:
        with torch.no_grad():
            layer.weight.sub_(layer.eps)  # the layer adds it
    return layer


def refuse_below_eps(norms: dict[str, Any]) -> None:
    """ValueError for weights that |weight| + eps cannot represent."""
    bad = {name: int((norm.weight < norm.eps).sum()) for name, norm in norms.items() if norm.weight is not None}
    listed = [f"{name} ({count} of {norms[name].num_features})" for name, count in bad.items() if count]
    if listed:
        raise ValueError(
            f'scale="abs" multiplies with |weight| + eps and cannot represent weights below eps: {", ".join(listed)}. '
            'Use scale="signed"'
        )
