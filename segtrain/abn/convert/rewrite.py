"""Take activations and additions out of a network, by torch.fx where a forward has to change."""

import copy
import inspect
from typing import Any

from torch import fx, nn

from segtrain.abn.convert.conversion import replace_module
from segtrain.abn.convert.observe import Left, Record, has_hooks
from segtrain.abn.convert.plan import ACTIVATION_MODULES, Plan, activation_after


def join(model: nn.Module, plans: dict[str, Plan], seen: tuple[Record, Record]) -> tuple[nn.Module, dict[str, str]]:
    """Remove the activations and additions that the norms will apply: (model, {name of a norm: why not}).

    seen: records of the unchanged model in eval mode and in training mode. The model is changed.
    """
    parts = dict(model.named_modules())  # before any change: names pass on to what replaces a module
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
            replace_module(model, parts[module], nn.Identity())
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
        model = replace_module(model, parts[caller], changed)
    return model, refused


def take_from_sequence(parts: dict[str, nn.Module], name: str, plan: Plan) -> bool:
    """Replace the activation by an Identity if it follows the norm in one nn.Sequential. Returns whether it did."""
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
    """Traces the forward of one module; each submodule is a single call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Rewritten(fx.GraphModule):
    """A module with a new forward and all its other attributes, which torch.fx alone would drop."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        return carry_over(super().__deepcopy__(memo), copy.deepcopy(vars(self), memo))


def carry_over(module: fx.GraphModule, state: dict[str, Any]) -> fx.GraphModule:
    """Give it the submodules, parameters, buffers in their order, mode, and plain attributes of `state`."""
    for key in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
        vars(module)[key] = state[key]
    for key, value in state.items():
        if key not in vars(module) and key != "forward":
            vars(module)[key] = value
    return module


def rewrite(module: nn.Module, plans: dict[str, tuple[nn.Module, Plan]]) -> tuple[nn.Module, dict[str, str]]:
    """(The module with a forward whose norms apply their activations and additions, {name of a norm: why not})."""
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
    """The graph of a module's own forward. Raises Left unless it is the same at every call."""
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
    except Exception as error:  # noqa: BLE001 - any forward, called with proxies: anything may happen
        raise Left(str(error).partition("\n")[0]) from None
    finally:
        module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise Left("it does other things in training than in eval mode")
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graphs[0].nodes):
        raise Left("it makes tensors of its own")
    return graphs[0]


def merge(graph: fx.Graph, owner: nn.Module, norm: nn.Module, plan: Plan) -> None:
    """Replace norm (-> addition) -> activation by one call of the norm. Raises Left if the graph differs."""

    def part(node: fx.Node) -> nn.Module | None:
        return owner.get_submodule(str(node.target)) if node.op == "call_module" else None

    def follow(node: fx.Node) -> fx.Node:
        """The only user of a node, beyond any Identity, which joins the path."""
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
    """Name of the function or method that a node calls, without the underscore of an in-place one."""
    return getattr(node.target, "__name__", str(node.target)).removesuffix("_").removesuffix("_")
