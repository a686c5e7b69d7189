"""Run a copy of a network on a probe and record every operation and who uses its result."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from segtrain.abn.modules import ABN, InPlaceABNSync

aten = torch.ops.aten


class Left(Exception):
    """Why a layer is left unchanged."""


class Operation(NamedTuple):
    """One call of an ATen operator."""

    number: int
    name: str  # "relu_", "convolution", ...
    given: dict[str, Any]  # arguments by name
    inputs: list[tuple[Tensor, int | None]]  # each with the number of the operation that it comes from
    outputs: list[Tensor]
    written: set[int]  # addresses of the memory that it writes to
    modules: tuple[str, ...]  # names of the modules being called, innermost last


class Record(TorchDispatchMode):
    """Records every operation that a network runs, and who uses its result.

    replace: number of a ReLU operation -> negative slope of the LeakyReLU to run instead.
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
        written = {storage_address(t) for name in changed for t in tensors(given.get(name))}
        if number in self.replace:
            leaky = aten.leaky_relu_ if written else aten.leaky_relu
            result = leaky(args[0], self.replace[number])
        else:
            result = function(*args, **kwargs)
        name = schema.name.split("::")[-1]
        # Holding every tensor keeps ids and addresses unique.
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
        """The only operation that uses its result, or None if there are several, none, or the network returns it.

        Where the user works in place, it is the user's result that the network returns.
        """
        users = self.users.get(operation.number, [])
        if len(users) != 1:
            return None
        in_place = storage_address(operation.outputs[0]) in users[0].written
        return users[0] if in_place or not self.is_returned(operation) else None

    def written_after(self, t: Tensor, number: int) -> bool:
        return any(storage_address(t) in operation.written for operation in self.operations[number + 1 :])

    def of(self, module: str) -> list[Operation]:
        """The operations that a module itself issues, without those of its submodules."""
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


def storage_address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def observe(model: nn.Module, probe: Any, training: bool = False, replace: dict[int, float] | None = None) -> Record:
    """Run a copy of the model. Norm layers use their running statistics, so a probe of one image is enough.

    probe: the arguments of one call, a tensor or a tuple. replace: see Record.
    """
    model = copy_model(model).train(training)
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
    # The caller's tensors must not change, whatever the network does to its input.
    arguments = copy.deepcopy(probe if isinstance(probe, tuple) else (probe,))
    with torch.random.fork_rng(), torch.no_grad(), record:
        record.results = list(tensors(model(*arguments)))
    return record


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy; process groups, which cannot be copied, are shared."""
    groups = {id(m): group for m in model.modules() if (group := group_of(m)) is not None}
    twin = copy.deepcopy(model, {id(group): group for group in groups.values()})
    for old, new in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(old, InPlaceABNSync) and isinstance(new, InPlaceABNSync):
            new.group = old.group
    return twin


def group_of(module: nn.Module) -> Any:
    return getattr(module, "process_group" if isinstance(module, nn.SyncBatchNorm) else "group", None)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks may read the module's inputs or outputs."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def norm_call(record: Record, name: str) -> Operation:
    """The one batch-norm operation of a norm layer. Raises Left unless the probe called the layer exactly once."""
    found = [operation for operation in record.of(name) if "batch_norm" in operation.name]
    if len(found) != 1:
        raise Left("not called by the probe" if not found else f"called {len(found)} times")
    return found[0]
