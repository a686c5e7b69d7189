"""The package `inplace_abn` as code that was written for the official one imports it, made of this package's parts."""

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from segtrain.abn import functional


class InPlaceABN:
    """`inplace_abn.functions.InPlaceABN`, of which callers use `apply` alone."""

    @staticmethod
    def apply(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        group: Any = None,
        world_size: int = 1,
    ) -> Tensor:
        """`inplace_abn`, or with a world_size above 1 `inplace_abn_sync` over the group."""
        arguments = (
            x, weight, bias, running_mean, running_var, training, momentum, eps, activation, activation_param,
        )  # fmt: skip
        if world_size > 1:
            return functional.inplace_abn_sync(*arguments, group)
        return functional.inplace_abn(*arguments)


def official_package(names: dict[str, Any], abn: ModuleType, group: ModuleType) -> ModuleType:
    """A new package `inplace_abn` with these names, and in sys.modules its modules abn, functions and group."""
    package = ModuleType("inplace_abn", "segtrain.abn under the name and in the modules of the official package.")
    package.__spec__ = importlib.machinery.ModuleSpec("inplace_abn", None, is_package=True)
    package.__path__ = []
    functions = ModuleType("inplace_abn.functions")
    functions.__spec__ = importlib.machinery.ModuleSpec("inplace_abn.functions", None)
    shared = {name: getattr(functional, name) for name in ("inplace_abn", "inplace_abn_sync")}
    vars(functions).update(shared, InPlaceABN=InPlaceABN, __all__=list(shared))
    vars(package).update(names)
    for name, part in {"abn": abn, "functions": functions, "group": group}.items():
        setattr(package, name, part)  # `abn` is the module there, not the function
        sys.modules[f"inplace_abn.{name}"] = part
    return package
