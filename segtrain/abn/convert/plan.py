"""Decide what each BatchNorm becomes, from the operations around it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from segtrain.abn.checks import invertible
from segtrain.abn.convert.conversion import BATCH_NORMS
from segtrain.abn.convert.observe import Left, Operation, Record, has_hooks, norm_call, storage_address

ACTIVATION_MODULES = (nn.LeakyReLU, nn.ELU, nn.ReLU)
# Operations whose output is new memory that they do not keep for backward: it may be overwritten.
FRESH = ("convolution", "addmm", "mm", "cat", "add")


class Plan(NamedTuple):
    """What one BatchNorm becomes."""

    activation: str = "identity"
    param: float = 0.01
    relu: bool = False  # the activation replaces a ReLU
    adds: bool = False  # adds a shortcut before the activation
    overwrite: bool = False
    caller: str = ""  # name of the module that calls the norm
    applies: str | None = None  # name of the module that applies the activation: the caller, or an activation module
    activates: str | None = None  # name of the module in whose forward the activation is called

    def describe(self) -> str:
        form = "in place" if self.overwrite else "writes elsewhere"
        return f"{self.activation}, {'adds the shortcut, ' if self.adds else ''}{form}"


def make_plan(
    model: nn.Module, name: str, norm: nn.Module, seen: tuple[Record, Record], replace_relu: float | None
) -> Plan:
    """The plan on which eval mode and training agree. Raises Left where the norm has to stay.

    seen: records in eval mode and in training mode. replace_relu: as in to_inplace.
    """
    bundled = type(norm).__name__ == "BatchNormAct2d"  # timm's: a BatchNorm that calls its own activation
    if type(norm) not in (*BATCH_NORMS.values(), nn.SyncBatchNorm) and not bundled:
        raise Left(f"of class {type(norm).__name__}, which may do more than BatchNorm")
    if has_hooks(norm):
        raise Left("has hooks")
    if norm.weight is not None and norm.weight.dtype not in (torch.float32, torch.float64):
        raise Left(f"its weight is {norm.weight.dtype}: convert before casting")
    plan, trained = (plan_in(model, record, name, replace_relu) for record in seen)
    overwrite = plan.overwrite and trained.overwrite
    if plan._replace(overwrite=overwrite) != trained._replace(overwrite=overwrite):
        raise Left("other things follow it in training than in eval mode")
    return plan._replace(overwrite=overwrite)


class Surroundings(NamedTuple):
    """The operations around one call of a norm."""

    norm: Operation
    total: Operation | None  # the addition of a shortcut to the norm's output
    activation: Operation | None

    def needed_by_backward(self) -> list[Tensor]:
        """What the converted layer keeps: its output, and the shortcut that it adds."""
        assert self.activation is not None
        shortcuts = [] if self.total is None else [t for t, _ in self.total.inputs if t is not self.norm.outputs[0]]
        return [self.activation.outputs[0], *shortcuts]


def find_surroundings(record: Record, name: str) -> Surroundings:
    """Find the norm's one call and the addition and activation that nothing else shares with it."""
    norm = norm_call(record, name)
    user = record.only_user(norm)
    total = user if user is not None and is_sum(user, norm) else None
    last = user if total is None else record.only_user(total)
    return Surroundings(norm, total, last if last is not None and activation_call(last) else None)


def plan_in(model: nn.Module, record: Record, name: str, replace_relu: float | None) -> Plan:
    """What a norm becomes according to one record. Raises Left."""
    around = find_surroundings(record, name)
    norm, last = around.norm, around.activation
    caller = norm.modules[-2] if len(norm.modules) > 1 else ""
    plan = Plan(overwrite=owns_input(model, record, norm, caller), caller=caller)
    if last is None:
        if record.written_after(norm.outputs[0], norm.number):
            raise Left(
                "what follows writes over its output and is no activation that can be inverted; a ReLU as nn.ReLU or "
                "F.relu is converted with replace_relu=0.01"
            )
        return plan
    activation, param, relu = invertible_activation(last, replace_relu)
    if any(record.written_after(t, last.number) for t in around.needed_by_backward()):
        raise Left("what it is to keep for backward is overwritten later")
    inner = last.modules[-1] if last.modules else ""
    is_module = inner != name and isinstance(model.get_submodule(inner), ACTIVATION_MODULES)
    outer = last.modules[-2] if is_module and len(last.modules) > 1 else inner
    return plan._replace(
        activation=activation, param=param, relu=relu, adds=around.total is not None, applies=inner, activates=outer
    )


def invertible_activation(operation: Operation, replace_relu: float | None) -> tuple[str, float, bool]:
    """(activation, parameter, whether it stands for a ReLU) of an activation's call. Raises Left if not invertible."""
    known = activation_call(operation)
    assert known is not None
    activation, param, relu = known
    if relu:
        if replace_relu is None:
            raise Left("followed by ReLU, which cannot be inverted: replace_relu=0.01 makes it a LeakyReLU")
        param = replace_relu
    try:
        invertible(activation, param)
    except ValueError as error:
        raise Left(str(error)) from None
    return activation, param, relu


def activation_call(operation: Operation) -> tuple[str, float, bool] | None:
    """(activation, parameter, whether it is a ReLU), or None for any other operation."""
    name = operation.name.removesuffix("_")
    given = operation.given
    if name == "relu":
        return "leaky_relu", 0.0, True
    if name == "leaky_relu":
        return "leaky_relu", float(given.get("negative_slope", 0.01)), False
    if name == "elu" and given.get("scale", 1) == given.get("input_scale", 1) == 1:
        return "elu", float(given.get("alpha", 1)), False
    return None


def activation_after(record: Record, name: str) -> Operation:
    """The activation of a norm whose plan has one."""
    last = find_surroundings(record, name).activation
    assert last is not None
    return last


def is_sum(operation: Operation, norm: Operation) -> bool:
    """Whether it adds a tensor of the norm's shape to the norm's output, in place or into new memory."""
    y = norm.outputs[0]
    operands = [t for t, _ in operation.inputs]
    return (
        operation.name in ("add", "add_")
        and operation.given.get("alpha", 1) == 1
        and len(operands) == 2
        and operands[0] is not operands[1]
        and all(t.shape == y.shape and t.dtype == y.dtype for t in operands)
        and operation.written <= {storage_address(y)}
        and not any(storage_address(t) == storage_address(y) for t in operands if t is not y)
    )


def owns_input(model: nn.Module, record: Record, norm: Operation, caller: str) -> bool:
    """Whether a norm may overwrite its input: a neighbouring module made it, and nothing else uses it."""
    source = norm.inputs[0][1]
    if source is None:
        return False
    maker = record.operations[source]
    module = maker.modules[-1] if maker.modules else ""
    neighbour = module == caller or (len(maker.modules) > 1 and maker.modules[-2] == caller)
    return (
        neighbour
        and maker.name in FRESH
        and record.users[source] == [norm]
        and not record.is_returned(maker)
        and (module == caller or not has_hooks(model.get_submodule(module)))
    )
