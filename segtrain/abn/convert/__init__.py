"""Networks between BatchNorm and In-Place ABN, with the difference that it makes on a probe input.

    conversion = to_inplace(torchvision.models.resnet50(weights="DEFAULT"), probe, replace_relu=0.01)
    print(conversion)  # what was converted, what was left and why, near-zero scales, differences
    train(conversion.model)
    fold(conversion.model, probe).model  # convolutions with bias and activations, for export

All three return a converted copy and leave the given model as it is. What follows a norm layer, and who else uses its
input, is seen by running a copy of the network on the probe, in eval mode and in training mode, so any network can be
converted whose probe takes the ways that matter. A norm whose surroundings are not understood is left and listed.
"""

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from segtrain.abn.functional import SCALES, effective_scale, invertible, one_of
from segtrain.abn.modules import ABN, BatchNormAct, InPlaceABN, InPlaceABNSync

NEAR_ZERO = 1e-3  # below this scale half precision cannot recover the normalised input (bfloat16: mean error 0.6)
BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Operations whose output is new memory that they do not keep for backward themselves: it may be overwritten.
FRESH = ("convolution", "addmm", "mm", "cat", "add")
aten = torch.ops.aten


@dataclass
class Conversion:
    """A converted copy of a network, and how far it is from the original.

    converted, left: by name of the layer, what it became, or why it is as it was. near_zero: how many channels of
    those layers have |scale| < 1e-3, where half precision cannot recover the normalised input. replaced_relu: layers
    behind which a LeakyReLU stands for a ReLU. max_difference, relative_difference: the largest |difference| of the
    outputs on the probe in eval mode, also over the largest |output|; where ReLUs were replaced, against the original
    with the same replaced. relu_difference: what replacing them does to the original's output, largest |difference|.
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


# ------------------------------------------------------------------------------------- what a network does, observed


class Operation(NamedTuple):
    """One call of an ATen operator."""

    number: int
    name: str  # "relu_", "convolution", ...
    given: dict[str, Any]  # arguments by name
    inputs: list[tuple[Tensor, int | None]]  # each with the number of the operation that it comes from
    outputs: list[Tensor]
    written: set[int]  # addresses of the memory that it writes to
    modules: tuple[str, ...]  # names of the modules under way, innermost last


class Record(TorchDispatchMode):
    """Every operation of a network under way, and who uses its result.

    replace: number of an operation, a ReLU -> the slope of the LeakyReLU to call instead.
    """

    def __init__(self, replace: dict[int, float] | None = None) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # module name -> arguments of each
        self.results: list[Tensor] = []  # what the network returns
        self.modules: list[str] = []
        self.replace = replace or {}
        self.made: dict[int, int] = {}  # id of a tensor -> number of the operation that made it
        self.users: dict[int, list[Operation]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        number = len(self.operations)
        inputs = [(t, self.made.get(id(t))) for t in tensors((args, kwargs))]
        schema = function._schema
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        written = {address(t) for name in changed for t in tensors(given.get(name))}
        if number in self.replace:
            leaky = aten.leaky_relu_ if written else aten.leaky_relu
            result = leaky(args[0], self.replace[number])
        else:
            result = function(*args, **kwargs)
        name = schema.name.split("::")[-1]
        # Keeping every tensor keeps its id and its address its own.
        outputs = list(tensors(result))
        operation = Operation(number, name, given, inputs, outputs, written, tuple(self.modules))
        self.operations.append(operation)
        for _, source in inputs:
            if source is not None:
                self.users.setdefault(source, []).append(operation)
        self.made |= {id(t): number for t in outputs}
        return result

    def is_returned(self, operation: Operation) -> bool:
        return any(result is t for result in self.results for t in operation.outputs)

    def only_user(self, operation: Operation) -> Operation | None:
        """The one operation that uses its result, where nothing else does."""
        users = self.users.get(operation.number, [])
        return users[0] if len(users) == 1 and not self.is_returned(operation) else None

    def written_after(self, t: Tensor, number: int) -> bool:
        return any(address(t) in operation.written for operation in self.operations[number + 1 :])

    def of(self, module: str) -> list[Operation]:
        """The operations that a module itself issues, not those of its parts."""
        return [operation for operation in self.operations if operation.modules and operation.modules[-1] == module]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def observe(model: nn.Module, probe: Any, training: bool = False, replace: dict[int, float] | None = None) -> Record:
    """Runs a copy of the model; norm layers use their running statistics, so that a probe of one picture will do."""
    model = copied(model).train(training)
    record = Record(replace)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm | ABN):
            module.eval()

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            record.modules.append(name)
            record.calls.setdefault(name, []).append((args, kwargs))

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            record.modules.pop()

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
    # Memory of the caller's must stay as it is whatever the network does to its input.
    arguments = copy.deepcopy(probe if isinstance(probe, tuple) else (probe,))
    with torch.random.fork_rng(), torch.no_grad(), record:
        record.results = list(tensors(model(*arguments)))
    return record


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; process groups, which cannot be copied, are shared."""
    groups = {id(m): group for m in model.modules() if (group := group_of(m)) is not None}
    twin = copy.deepcopy(model, {id(group): group for group in groups.values()})
    for old, new in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(old, InPlaceABNSync) and isinstance(new, InPlaceABNSync):
            new.group = old.group
    return twin


def group_of(module: nn.Module) -> Any:
    return getattr(module, "process_group" if isinstance(module, nn.SyncBatchNorm) else "group", None)


def compare(conversion: Conversion, expected: list[Tensor], probe: Any) -> Conversion:
    """Fills in the differences."""
    found = observe(conversion.model, probe).results
    conversion.max_difference = difference(found, expected)
    largest = max((t.double().abs().max().item() for t in expected if t.numel()), default=0.0)
    conversion.relative_difference = conversion.max_difference / largest if largest else 0.0
    return conversion


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest |difference|; inf where not even the shapes agree, NaN where one is."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    parts = [(a.double() - b.double()).abs().max() for a, b in zip(found, expected, strict=True) if a.numel()]
    return torch.stack(parts).max().item() if parts else 0.0


# --------------------------------------------------------------------------------------- BatchNorm to In-Place ABN


class Plan(NamedTuple):
    """What one BatchNorm becomes."""

    activation: str = "identity"
    param: float = 0.01
    relu: bool = False  # the activation stands for a ReLU
    adds: bool = False  # adds a shortcut before the activation
    overwrite: bool = False
    caller: str = ""  # name of the module that calls the norm
    applies: str | None = None  # name of the module that applies the activation: the caller, or an activation module
    activates: str | None = None  # name of the module in whose forward the activation is called

    def describe(self) -> str:
        form = "in place" if self.overwrite else "writes elsewhere"
        return f"{self.activation}, {'adds the shortcut, ' if self.adds else ''}{form}"


class Left(Exception):
    """Why a layer is left as it is."""


def to_inplace(model: nn.Module, probe: Any, *, scale: str = "signed", replace_relu: float | None = None) -> Conversion:
    """BatchNorm (1d, 2d, 3d, Sync) with what follows it to InPlaceABN (Sync): weights and statistics as they are.

    What follows may be a LeakyReLU or ELU (module or function), nothing, or an addition and one of these (ResNet v1),
    which becomes one operation: a module whose forward must change for that is replaced by its torch.fx.GraphModule,
    with the same parts under the same names. An input that nothing else needs is overwritten, any other left alone.
    probe: the arguments of one call, a tensor or a tuple. replace_relu: the negative slope of the LeakyReLU that a
    ReLU is to be replaced by; None leaves the norms before a ReLU, which cannot be inverted, as they are.
    scale: "signed" takes any weight, and moves those nearer to 0 than eps to eps; "abs" is the published form.
    Raises ValueError for an unknown scale or slope, and with scale="abs" for weights below eps, naming the layers.
    """
    one_of("scale", scale, SCALES)
    if replace_relu is not None:
        invertible("leaky_relu", replace_relu)
    seen = observe(model, probe), observe(model, probe, training=True)
    new = copied(model)
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
        refuse_negative({name: norms[name] for name in plans})
    expected = seen[0].results
    relus = {}
    for name, plan in plans.items():
        conversion.converted[name] = plan.describe()
        if plan.relu:
            conversion.replaced_relu.append(name)
            relus[activation_after(seen[0], name).number] = plan.param
        conversion.model = replace(conversion.model, norms[name], inplace_layer(norms[name], plan, scale))
    if relus:
        original, expected = expected, observe(model, probe, replace=relus).results
        conversion.relu_difference = difference(expected, original)
    note_near_zero(conversion)
    return compare(conversion, expected, probe)


def make_plan(
    model: nn.Module, name: str, norm: nn.Module, seen: tuple[Record, Record], replace_relu: float | None
) -> Plan:
    """Raises Left where the norm is to stay."""
    bundled = type(norm).__name__ == "BatchNormAct2d"  # timm's: a BatchNorm that calls its own activation
    if type(norm) not in (*BATCH_NORMS.values(), nn.SyncBatchNorm) and not bundled:
        raise Left(f"of class {type(norm).__name__}, which may do more than BatchNorm")
    if has_hooks(norm):
        raise Left("has hooks")
    if norm.weight is not None and norm.weight.dtype not in (torch.float32, torch.float64):
        raise Left(f"its weight is {norm.weight.dtype}: convert before casting")
    plan, trained = (look(model, record, name, replace_relu) for record in seen)
    overwrite = plan.overwrite and trained.overwrite
    if plan._replace(overwrite=overwrite) != trained._replace(overwrite=overwrite):
        raise Left("other things follow it in training than in eval mode")
    return plan._replace(overwrite=overwrite)


def normalisation(record: Record, name: str) -> Operation:
    """The one operation of a norm layer; Left where it was not called just once."""
    found = [operation for operation in record.of(name) if "batch_norm" in operation.name]
    if len(found) != 1:
        raise Left("not called by the probe" if not found else f"called {len(found)} times")
    return found[0]


def look(model: nn.Module, record: Record, name: str, replace_relu: float | None) -> Plan:
    """What surrounds a norm in one record."""
    norm = normalisation(record, name)
    y = norm.outputs[0]
    caller = norm.modules[-2] if len(norm.modules) > 1 else ""
    plan = Plan(overwrite=owns_input(model, record, norm, caller), caller=caller)
    user = record.only_user(norm)
    total = user if user is not None and is_sum(user, norm) else None
    last = user if total is None else record.only_user(total)
    known = None if last is None else activation_of(last)
    if last is None or known is None:
        if record.written_after(y, norm.number):
            raise Left("its output is overwritten by what follows")
        return plan
    activation, param, relu = known
    if relu:
        if replace_relu is None:
            raise Left("followed by ReLU, which cannot be inverted: replace_relu=0.01 makes it a LeakyReLU")
        param = replace_relu
    try:
        invertible(activation, param)
    except ValueError as error:
        raise Left(str(error)) from None
    kept = [last.outputs[0]]
    if total is not None:
        kept += [t for t, _ in total.inputs if t is not y]
    if any(record.written_after(t, last.number) for t in kept):
        raise Left("what it is to keep for backward is overwritten later")
    inner = last.modules[-1] if last.modules else ""
    is_module = inner != name and isinstance(model.get_submodule(inner), ACTIVATION_MODULES)
    outer = last.modules[-2] if is_module and len(last.modules) > 1 else inner
    return plan._replace(
        activation=activation, param=param, relu=relu, adds=total is not None, applies=inner, activates=outer
    )


ACTIVATION_MODULES = (nn.LeakyReLU, nn.ELU, nn.ReLU)


def activation_of(operation: Operation) -> tuple[str, float, bool] | None:
    """(activation, parameter, whether it is a ReLU), or None for anything else."""
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
    """The activation of a layer whose plan has one."""
    user = record.only_user(normalisation(record, name))
    assert user is not None
    last = user if activation_of(user) else record.only_user(user)
    assert last is not None
    return last


def is_sum(operation: Operation, norm: Operation) -> bool:
    """Whether it adds a tensor of the norm's shape to the norm's output, into memory of the norm's or into new."""
    y = norm.outputs[0]
    operands = [t for t, _ in operation.inputs]
    return (
        operation.name in ("add", "add_")
        and operation.given.get("alpha", 1) == 1
        and len(operands) == 2
        and operands[0] is not operands[1]
        and all(t.shape == y.shape and t.dtype == y.dtype for t in operands)
        and operation.written <= {address(y)}
        and not any(address(t) == address(y) for t in operands if t is not y)
    )


def owns_input(model: nn.Module, record: Record, norm: Operation, caller: str) -> bool:
    """Whether a norm may overwrite its input: made for it by its neighbour, and used by nothing else."""
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


def has_hooks(module: nn.Module) -> bool:
    """Somebody may look at what goes into or out of it."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def join(model: nn.Module, plans: dict[str, Plan], seen: tuple[Record, Record]) -> tuple[nn.Module, dict[str, str]]:
    """Takes the activations and additions out of the model that its norms will do: (model, {name: why not})."""
    parts = dict(model.named_modules())  # as they were: names move on to what replaces them
    by_module: dict[str, list[str]] = {}  # activation module -> the norms that would take it over
    rewritten: dict[str, list[str]] = {}  # module whose forward must change -> its norms
    for name, plan in plans.items():
        if plan.applies is None or plan.activates == name:
            continue  # no activation, or the norm's own
        if plan.adds or plan.applies == plan.activates:
            rewritten.setdefault(plan.caller, []).append(name)
        elif not take_from_sequence(parts, name, plan):
            by_module.setdefault(plan.applies, []).append(name)
    for module, names in by_module.items():
        calls = [{operation.number for operation in record.of(module)} for record in seen]
        absorbed = [{activation_after(record, name).number for name in names} for record in seen]
        if calls == absorbed and not has_hooks(parts[module]):
            replace(model, parts[module], nn.Identity())
        else:  # called elsewhere too: the calls have to go, not the module
            for name in names:
                rewritten.setdefault(plans[name].caller, []).append(name)
    refused: dict[str, str] = {}
    for caller, names in rewritten.items():
        strangers = [name for name in names if plans[name].activates != caller]
        refused |= dict.fromkeys(strangers, "the activation behind it is called by another module")
        own = {name: (parts[name], plans[name]) for name in names if name not in strangers}
        changed, not_own = rewrite(parts[caller], own)
        refused |= not_own
        model = replace(model, parts[caller], changed)
    return model, refused


def take_from_sequence(parts: dict[str, nn.Module], name: str, plan: Plan) -> bool:
    """Norm and activation next to each other in one nn.Sequential: an Identity takes the activation's place there."""
    sequence = parts[plan.caller]
    if type(sequence).forward is not nn.Sequential.forward or plan.activates != plan.caller:
        return False
    norm, activation = parts[name], parts[plan.applies or ""]
    entries = list(sequence._modules.items())
    places = [i for i, (_, module) in enumerate(entries) if module is norm]
    if len(places) != 1 or has_hooks(activation):
        return False
    behind = [entry for entry in entries[places[0] + 1 :] if not isinstance(entry[1], nn.Identity)]
    if not behind or behind[0][1] is not activation:
        return False
    sequence._modules[behind[0][0]] = nn.Identity()
    return True


class PartsAsLeaves(fx.Tracer):
    """Traces one module's own forward, its parts being single calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Rewritten(fx.GraphModule):
    """A module with another forward, and everything else that it had, which torch.fx alone would drop."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        return carry_over(super().__deepcopy__(memo), copy.deepcopy(vars(self), memo))


def carry_over(module: fx.GraphModule, state: dict[str, Any]) -> fx.GraphModule:
    """Gives it parts, parameters, buffers in their order, mode, and plain attributes."""
    for key in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
        vars(module)[key] = state[key]
    for key, value in state.items():
        if key not in vars(module) and key != "forward":
            vars(module)[key] = value
    return module


def rewrite(module: nn.Module, plans: dict[str, tuple[nn.Module, Plan]]) -> tuple[nn.Module, dict[str, str]]:
    """(the module with a forward whose norms do their activations and additions, {name of a norm: why not})."""
    kind = type(module).__name__
    try:
        graph = traced(module)
    except Left as left:
        return module, dict.fromkeys(plans, f"the forward of {kind} cannot be rewritten: {left}")
    refused = {}
    for name, (norm, plan) in plans.items():
        try:
            merge(graph, module, norm, plan)
        except Left as left:
            refused[name] = f"not recognised in the forward of {kind}: {left}"
    if len(refused) == len(plans):
        return module, refused
    graph.lint()
    return carry_over(Rewritten(module, graph, kind), vars(module)), refused


def traced(module: nn.Module) -> fx.Graph:
    """The graph of a module's own forward; Left where it is not surely the same at every call."""
    if has_hooks(module):
        raise Left("it has hooks")
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise Left("it takes optional arguments")
    training = module.training
    graphs = []
    try:
        for mode in (True, False):
            module.training = mode  # of this module only: its parts are not traced
            graphs.append(PartsAsLeaves().trace(module))
    except Exception as error:  # noqa: BLE001 - somebody's forward, called with stand-ins: anything may happen
        raise Left(str(error).partition("\n")[0]) from None
    finally:
        module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise Left("it does other things in training than in eval mode")
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graphs[0].nodes):
        raise Left("it makes tensors of its own")
    return graphs[0]


def merge(graph: fx.Graph, owner: nn.Module, norm: nn.Module, plan: Plan) -> None:
    """Makes norm (-> addition) -> activation one call of the norm."""

    def part(node: fx.Node) -> nn.Module | None:
        return owner.get_submodule(str(node.target)) if node.op == "call_module" else None

    def follow(node: fx.Node) -> fx.Node:
        """The only user of a node; an Identity in between joins the path."""
        path.append(node)
        users = list(node.users)
        if len(users) != 1:
            raise Left("its output is used more than once")
        return follow(users[0]) if isinstance(part(users[0]), nn.Identity) else users[0]

    path: list[fx.Node] = []  # what the norm replaces
    calls = [node for node in graph.nodes if part(node) is norm]
    if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
        raise Left("it is not called once, with one argument")
    arguments: tuple[Any, ...] = calls[0].args
    after = follow(calls[0])
    if plan.adds:
        if target(after) not in ("add", "iadd", "__add", "__iadd") or len(after.args) != 2 or after.kwargs:
            raise Left("what follows is no plain addition")
        arguments = (*arguments, after.args[1] if after.args[0] is path[-1] else after.args[0])
        after = follow(after)
    if not isinstance(part(after), ACTIVATION_MODULES) and target(after) not in ("relu", "leaky_relu", "elu"):
        raise Left("what follows is no activation")
    path.append(after)
    with graph.inserting_before(after):
        joined = graph.call_module(str(calls[0].target), arguments)
    after.replace_all_uses_with(joined)
    for node in reversed(path):
        graph.erase_node(node)


def target(node: fx.Node) -> str:
    """Name of the function or method that a node calls, in-place or not."""
    return getattr(node.target, "__name__", str(node.target)).removesuffix("_").removesuffix("_")


def inplace_layer(norm: nn.Module, plan: Plan, scale: str) -> InPlaceABN:
    """The layer with the norm's own parameters and buffers."""
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


def adopt(layer: nn.Module, other: nn.Module) -> None:
    """Gives a layer the other's parameters, running statistics and mode."""
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(layer, key, getattr(other, key))
    layer.training = other.training


def refuse_negative(norms: dict[str, Any]) -> None:
    """ValueError for weights that |weight| + eps cannot represent."""
    bad = {name: int((norm.weight < norm.eps).sum()) for name, norm in norms.items() if norm.weight is not None}
    listed = [f"{name} ({count} of {norms[name].num_features})" for name, count in bad.items() if count]
    if listed:
        raise ValueError(
            f'scale="abs" multiplies with |weight| + eps and cannot represent weights below eps: {", ".join(listed)}. '
            'Use scale="signed"'
        )


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts new wherever old is registered; the model, or new if that was the model itself."""
    for module in list(model.modules()):
        for key, part in list(module._modules.items()):
            if part is old:
                module._modules[key] = new
    return new if model is old else model


def note_near_zero(conversion: Conversion) -> None:
    for name in conversion.converted:
        layer = conversion.model.get_submodule(name)
        if isinstance(layer, ABN) and layer.weight is not None:
            count = int((scale_of(layer).abs() < NEAR_ZERO).sum())  # type: ignore[union-attr]
            if count:
                conversion.near_zero[name] = count


# --------------------------------------------------------------------------------------- In-Place ABN to BatchNorm


class BatchNormAddAct(nn.Module):
    """BatchNorm, an added shortcut, an activation: three plain modules' work, for layers called with a shortcut."""

    def __init__(self, bn: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.bn = bn
        self.act = act

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(x) + shortcut)
        return out


def to_batch_norm(model: nn.Module, probe: Any) -> Conversion:
    """ABN of every kind to nn.BatchNorm and an activation module, which run and export anywhere.

    A layer becomes an nn.Sequential of `bn` and `act`, or the BatchNorm itself if it has no activation, or a
    BatchNormAddAct if it adds a shortcut. The BatchNorm's weight is the scale that the layer multiplied with: |weight|
    + eps, or the signed weight. Synchronised layers become ordinary ones: nn.SyncBatchNorm.convert_sync_batchnorm does
    the rest. Layers that the probe does not reach are left.
    """
    record = observe(model, probe)
    new = copied(model)
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
        if layer.weight is not None:
            count = int((scale_of(layer).abs() < NEAR_ZERO).sum())  # type: ignore[union-attr]
            if count:
                conversion.near_zero[name] = count
        conversion.model = replace(conversion.model, layer, plain_layers(layer, dims.pop(), added.pop()))
    return compare(conversion, record.results, probe)


def scale_of(layer: ABN) -> Tensor | None:
    """What the layer multiplies with."""
    if layer.weight is None or isinstance(layer, BatchNormAct):
        return layer.weight
    return effective_scale(layer.weight, layer.eps, layer.scale)


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


# ------------------------------------------------------------------------------------------ folded into convolutions


def fold(model: nn.Module, probe: Any) -> Conversion:
    """For export: norm layers in eval mode become part of the convolution before or, where exact, after them.

    ABN of every kind and nn.BatchNorm, with their running statistics, go into the convolution, transposed convolution
    or linear layer that makes their input and nothing else; or, without activation, into the one convolution or linear
    layer that uses their output (pre-activation networks), if it pads with no zeros or the norm shifts nothing. Their
    activations become plain modules. The rest is left as BatchNorm and activation. The copy is in eval mode for good:
    it does not train as the original did.
    """
    expected = observe(model, probe).results
    plain = to_batch_norm(model, probe)
    new = plain.model.eval()
    record = observe(new, probe)
    conversion = Conversion(new, left=plain.left, near_zero=plain.near_zero)
    owners: dict[int, int] = {}
    for module in new.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, norm in list(new.named_modules()):
        if not isinstance(norm, _BatchNorm):
            continue
        listed = name.removesuffix(".bn") if name.removesuffix(".bn") in plain.converted else name
        try:
            target, before = linear_neighbour(new, record, name, norm, owners)
        except Left as reason:
            conversion.left[listed] = str(reason)
            continue
        absorb(new.get_submodule(target), norm, before)
        new = conversion.model = replace(new, norm, nn.Identity())
        conversion.converted[listed] = f"folded into {target}, {'before' if before else 'behind'} it"
    for name in conversion.converted:
        pair = new.get_submodule(name)
        if name in plain.converted and isinstance(pair, nn.Sequential):  # an Identity and the activation
            new = conversion.model = replace(new, pair, pair[1])
    return compare(conversion, expected, probe)


def linear_neighbour(
    model: nn.Module, record: Record, name: str, norm: nn.Module, owners: dict[int, int]
) -> tuple[str, bool]:
    """(name of the layer that can take the norm in, whether it comes before the norm); Left where there is none."""
    if type(norm) not in (*BATCH_NORMS.values(), nn.SyncBatchNorm) or has_hooks(norm):
        raise Left(f"of class {type(norm).__name__}, or with hooks")
    operation = normalisation(record, name)
    if norm.running_mean is None:
        raise Left("it has no running statistics")
    x, source = operation.inputs[0]

    def suits(candidate: Operation, kinds: tuple[type[nn.Module], ...]) -> bool:
        """Whether it is the one call of a layer of its own weights."""
        module = model.get_submodule(candidate.modules[-1]) if candidate.modules else model
        parameters: Iterable[Any] = [p for p in module._parameters.values() if p is not None]
        return (
            getattr(module, "stands_for", type(module)) in kinds
            and candidate.name in ("convolution", "addmm", "mm")
            and (type(module) is not nn.Linear or x.dim() == 2)
            and len(record.calls[candidate.modules[-1]]) == 1
            and not has_hooks(module)
            and all(owners.get(id(p), 1) == 1 for p in parameters)
        )

    maker = None if source is None else record.operations[source]
    kinds = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
    if maker is not None and suits(maker, kinds) and record.only_user(maker) is operation:
        return maker.modules[-1], True
    user = record.only_user(operation)
    if user is not None and suits(user, (*CONVOLUTIONS, nn.Linear)) and is_first(user, operation):
        following = model.get_submodule(user.modules[-1])
        if not pads_zeros(following) or not bool(affine_map(norm)[1].any()):
            return user.modules[-1], False
        raise Left("the convolution behind it pads with zeros, which the norm does not shift")
    raise Left("no convolution next to it that nothing else uses")


def is_first(user: Operation, operation: Operation) -> bool:
    """Whether the operation's result is the picture that the user convolves, not its weight or bias."""
    names = {"addmm": "mat1", "mm": "self", "convolution": "input"}
    return user.given[names[user.name]] is operation.outputs[0]


def pads_zeros(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    padding: Any = module.padding
    return padding == "same" and max(module.kernel_size) > 1 if isinstance(padding, str) else any(padding)  # type: ignore


def affine_map(norm: Any) -> tuple[Tensor, Tensor]:
    """(factor, shift) of a norm in eval mode, float64."""
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double()


def absorb(layer: Any, norm: nn.Module, before: bool) -> None:
    """Writes the norm's map into the weight and bias of the layer that comes before the norm, or behind it."""
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
