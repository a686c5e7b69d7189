"""Layers that normalise and activate: `ABN` (the usual layer) and `InPlaceABN` (half the memory).

All have the constructor of ABN and options of their own, and load each other's state_dict, which is that of torch's
BatchNorm. The same state does not mean the same function: ABN multiplies with the weight, In-Place ABN with |weight| +
eps, and ScaledABN is In-Place ABN's function by ordinary autograd.
"""

from typing import Any

import torch
from torch import Tensor, nn

from segtrain.abn.autograd import Options
from segtrain.abn.backends.aten import Activation
from segtrain.abn.checkpointing import KEEP, recomputed_abn
from segtrain.abn.checks import (
    ACTIVATIONS,
    KEEPS,
    SCALES,
    VARIANTS,
    check_reference_dtypes,
    check_tensors,
    invertible,
    one_of,
    recomputing,
)
from segtrain.abn.functional import abn, activate, inplace_abn, inplace_abn_sync
from segtrain.abn.sync import group_or_none


def own(tensors: dict[str, Any], name: str, module: nn.Module) -> Any:
    """The module's attribute of this name; found several times faster among `tensors`, its parameters or buffers."""
    return tensors[name] if name in tensors else getattr(module, name)


class ABN(nn.Module):
    """torch's BatchNorm, with a weight of either sign, and an activation: act(weight * xhat + bias), as published.

    num_features: C of the input (N, C) or (N, C, *spatial); the output has the input's shape and dtype.
    eps: added to the variance.
    momentum: weight of the newest batch in the running statistics, or None for their plain average.
    affine: whether there are weight and bias. track_running_stats: whether there are running statistics.
    activation: leaky_relu | elu | relu | identity. activation_param: negative slope, or alpha of elu. Both may be
    changed on the layer.
    A shortcut, a second argument of the output's shape, is added before the activation.
    Raises ValueError for an unknown activation, and in training for an input with one value per channel.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    track_running_stats: bool = True  # of layers that the official package pickled before 1.1
    # Version 2 files hold num_batches_tracked; those of the official releases before 1.1 (version 1) do not.
    _version = 2

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
    ) -> None:
        super().__init__()
        self.check_activation(activation, activation_param)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.activation_param = activation_param
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long) if tracked else None)

    @staticmethod
    def check_activation(activation: str, param: float) -> None:
        """Raises ValueError for an activation that the layer does not have."""
        one_of("activation", activation, ACTIVATIONS)

    def reset_running_stats(self) -> None:
        """Reset the running statistics to mean 0, variance 1 and no batches."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Reset to scale 1, shift 0 and initial running statistics."""
        with torch.no_grad():
            if self.affine:
                nn.init.ones_(self.weight)  # type: ignore[arg-type]
                nn.init.zeros_(self.bias)  # type: ignore[arg-type]
            self.reset_running_stats()

    # The names of the next two are the official class's: layers derived from it call them.

    def _get_momentum_and_training(self) -> tuple[float, bool]:
        """(momentum, use the batch's statistics?) for one call of forward, which is counted if it updates them."""
        use_batch = self.training or self.running_mean is None
        momentum = 0.0 if self.momentum is None else self.momentum
        tracked = (
            own(self._buffers, "num_batches_tracked", self) if self.training and self.track_running_stats else None
        )
        if tracked is not None and not recomputing():  # the first forward has been counted already
            tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(tracked)
        return momentum, use_batch

    def _get_running_stats(self) -> tuple[Tensor | None, Tensor | None]:
        """(running mean, running variance) that one call of forward uses, or in training updates."""
        if self.training and not self.track_running_stats:
            return None, None
        buffers = self._buffers
        mean, var = own(buffers, "running_mean", self), own(buffers, "running_var", self)
        if self.training and recomputing():  # the first forward has updated them already
            return None if mean is None else mean.clone(), None if var is None else var.clone()
        return mean, var

    def statistics(self) -> tuple[Tensor | None, Tensor | None, bool, float]:
        """(running mean, running variance, use the batch's statistics?, momentum) for one call of forward."""
        momentum, use_batch = self._get_momentum_and_training()
        return *self._get_running_stats(), use_batch, momentum

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        mean, var, use_batch, momentum = self.statistics()
        check_tensors(x, self.weight, self.bias, mean, var, shortcut, use_batch)
        check_reference_dtypes(x, self.weight, self.bias, mean, var)
        y = nn.functional.batch_norm(x, mean, var, self.weight, self.bias, use_batch, momentum, self.eps)
        if shortcut is not None:
            y = y + shortcut
        return activate(y, self.activation, self.activation_param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle layers of other versions too: of the official package, and of segtrain's ABN before it was that."""
        if type(self) is ABN and "scale" in state:  # it multiplied with |weight| + eps then
            self.__class__ = ScaledABN
        if "num_batches_tracked" not in state["_buffers"] | state["_parameters"]:  # before the official 1.1
            mean = state["_buffers"].get("running_mean")
            state["_buffers"]["num_batches_tracked"] = None if mean is None else torch.tensor(0, device=mean.device)
        super().__setstate__(state)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        key = prefix + "num_batches_tracked"
        if local_metadata.get("version", 1) < 2 and self.num_batches_tracked is not None and key not in state_dict:
            state_dict[key] = torch.tensor(0, dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, activation={self.activation}[{self.activation_param}]"
        )


class BatchNormAct(ABN):
    """ABN under the name that it has in networks with model.norm=batch_norm."""


def is_exported(layer: nn.Module) -> bool:
    """Whether torch.export, torch.onnx or torch.jit records a layer for inference: into operations that it knows."""
    return not layer.training and (torch._C._get_tracing_state() is not None or torch.compiler.is_exporting())


class ScaledABN(ABN):
    """ABN with a scale that is never 0, act(gamma * xhat + bias) with gamma = |weight| + eps, by ordinary autograd.

    The reference for InPlaceABN, and model.norm=abn: the same numbers and the same state_dict, twice the memory.
    Arguments as ABN. eps: added to the variance, and to |weight|.
    scale: "abs", or "signed" for gamma = weight with a magnitude of at least eps.
    """

    scale = "abs"  # of layers that the official package has pickled

    def __init__(self, *args: Any, scale: str = "abs", **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = one_of("scale", scale, SCALES)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return abn(
            x, self.weight, self.bias, *self.statistics(), self.eps, self.activation, self.activation_param,
            shortcut=shortcut, scale=self.scale,
        )  # fmt: skip


class InPlaceABN(ScaledABN):
    """ScaledABN that writes its output over its input, and in backward computes its input again from that output.

    Arguments as ScaledABN, but the activation must be invertible (leaky_relu, elu, identity).
    overwrite: nothing else may need the input afterwards. If something does (at the start of a residual block),
    overwrite=False writes elsewhere and, like the in-place form, keeps the output only. A shortcut is not overwritten;
    it is kept for backward too.
    variant: "one" | "two" of the paper, sections 3.2 and 3.3.
    Exported in eval mode (torch.export, torch.onnx), it becomes the ordinary operations of ScaledABN, which leave the
    input as it is; `segtrain.abn.convert.fold` before that folds it into the convolution.
    keep: "exact", or "8bit" | "4bit", see `inplace_abn`.
    """

    overwrite, variant = True, "one"  # of layers that the official package has pickled
    keep = "exact"  # of layers pickled before there was a choice

    def __init__(
        self, *args: Any, overwrite: bool = True, variant: str = "one", keep: str = "exact", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.overwrite = overwrite
        self.variant = one_of("variant", variant, VARIANTS)
        self.keep = one_of("keep", keep, KEEPS)

    @staticmethod
    def check_activation(activation: str, param: float) -> None:
        invertible(activation, param)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if is_exported(self):
            return super().forward(x, shortcut)
        parameters = self._parameters
        return inplace_abn(
            x, own(parameters, "weight", self), own(parameters, "bias", self), *self.statistics(), self.eps,
            self.activation, self.activation_param, shortcut=shortcut, overwrite=self.overwrite, variant=self.variant,
            scale=self.scale, keep=self.keep,
        )  # fmt: skip


class InPlaceABNSync(InPlaceABN):
    """InPlaceABN with the statistics of all processes of a group, see `inplace_abn_sync`.

    Arguments as InPlaceABN. group: a process group, by default all processes.
    """

    def __init__(self, *args: Any, group: Any = None, **options: Any) -> None:
        if len(args) == 8:  # the official package takes the group by position, after activation_param
            *args, group = args  # type: ignore[assignment]
        super().__init__(*args, **options)
        self.group = group

    def set_group(self, group: Any) -> None:
        """Synchronise over another group. Not between a forward and its backward."""
        self.group = group

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if is_exported(self):
            return super().forward(x, shortcut)
        return inplace_abn_sync(
            x, self.weight, self.bias, *self.statistics(), self.eps, self.activation, self.activation_param, self.group,
            shortcut=shortcut, overwrite=self.overwrite, variant=self.variant, scale=self.scale,
            keep=self.keep,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, which belongs to a running job: a copied layer synchronises over all processes."""
        return {**self.__dict__, "group": None}


class RecomputedABN(ScaledABN):
    """ScaledABN by the paper's checkpointing: backward computes the output again where the next layer needs it.

    Saves memory only inside `recomputed_outputs()`. Arguments as ScaledABN.
    keep: "input" (figure 2b), or "normalised" (figure 2c), which overwrites the input unless `overwrite` is False.
    synchronised: use the statistics of all processes, or of the group that set_group sets.
    """

    def __init__(
        self,
        *args: Any,
        keep: str = "normalised",
        overwrite: bool = True,
        synchronised: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.keep = one_of("keep", keep, KEEP)
        self.overwrite = overwrite
        self.synchronised = synchronised
        self.group: Any = None

    def set_group(self, group: Any) -> None:
        """Synchronise over another group, if the layer synchronises. Not between a forward and its backward."""
        self.group = group

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        mean, var, use_batch, momentum = self.statistics()
        name = "identity" if shortcut is not None else self.activation
        activation = Activation("leaky_relu", 0.0) if name == "relu" else Activation(name, self.activation_param)
        options = Options(use_batch, momentum, self.eps, activation, self.overwrite, scale=self.scale)
        group = group_or_none(self.group) if self.synchronised and use_batch else None
        z = recomputed_abn(x, self.weight, self.bias, mean, var, shortcut, self.keep, group, options)
        return z if shortcut is None else activate(z + shortcut, self.activation, self.activation_param)
