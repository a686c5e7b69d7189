"""Find the modules whose output was overwritten while backward still needs it."""

from typing import Any

import torch
from torch import Tensor, nn


def is_overwritten_error(error: RuntimeError) -> bool:
    """Whether this is autograd's complaint that a saved tensor has been changed in place."""
    return "modified by an inplace operation" in str(error)


def overwritten_outputs(model: nn.Module, *inputs: Tensor) -> list[str]:
    """Names of the modules whose output some operation saves for backward and a later one overwrites.

    Runs `model(*inputs)` once more. An output that is overwritten but not saved, such as that of a convolution before
    In-Place ABN, is no mistake and is not listed.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}  # by storage: the module that returned it last
    saved: dict[int, dict[int, str]] = {}  # by storage: version when saved -> the module whose output it was
    early: set[int] = set()  # storages saved before any module returned them: by the module itself

    def pack(t: Tensor) -> Tensor:
        key = t.untyped_storage()._cdata
        if key in outputs:
            name, output = outputs[key]
            saved.setdefault(key, {}).setdefault(output._version, name)
        else:
            early.add(key)
        return t

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                key = output.untyped_storage()._cdata
                outputs[key] = name, output
                if key in early or output._version in saved.get(key, {}):
                    saved.setdefault(key, {})[output._version] = name
                    early.discard(key)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note(name)) for name, module in leaves]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    lost = []
    for key, versions in saved.items():
        lost += [name for version, name in versions.items() if version < outputs[key][1]._version]
    return list(dict.fromkeys(lost))
