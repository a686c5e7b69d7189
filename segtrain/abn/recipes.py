"""How to compute a layer's output again, so that nobody keeps it: what other layers save of it is intercepted.

    with recomputed_outputs():
        logits = model(images)

Without that, the layers give the same numbers and other layers keep their outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Recipe(Protocol):
    """Computes an output again, in the memory layout that it had."""

    def output(self) -> Tensor: ...


class Ready:
    """A recipe whose output is at hand in backward and costs nothing, so that nobody else holds it."""


class Derived(NamedTuple):
    """The recipe of what was computed of an output: by pooling, say."""

    source: Recipe
    function: Callable[[Tensor], Tensor]

    def output(self) -> Tensor:
        return self.function(self.source.output())


class Latest:
    """The output that was computed last: layers that read one output run backward one after the other."""

    def __init__(self) -> None:
        self.recipe: Recipe | None = None
        self.made: Tensor | None = None
        self.count = 0  # how often an output was computed

    def output(self, recipe: Recipe) -> Tensor:
        if self.made is None or self.recipe is not recipe:
            self.forget()  # first, so that the two are never there together
            self.recipe, self.made = recipe, recipe.output()
            self.count += 1
        return self.made

    def forget(self) -> None:
        self.recipe = self.made = None


class Samples(Protocol):
    """Compares a map that backward computes again with what it was in forward."""

    def take(self, t: Tensor) -> Tensor | None: ...

    def compare(self, made: Tensor, sample: Tensor | None) -> None: ...


class Known(NamedTuple):
    """An output that can be computed again: its memory, what was written there, and how."""

    storage: StorageWeakRef
    version: int
    dtype: torch.dtype
    recipe: Recipe


class Recipes:
    """Recipes by the storage of their output; a freed output has none.

    samples: who compares the maps that `rebuilding` computes again, or None.
    """

    def __init__(self) -> None:
        self.known: dict[int, Known] = {}
        self.latest = Latest()
        self.samples: Samples | None = None

    def add(self, z: Tensor, recipe: Recipe, writes: int = 0) -> None:
        """Remember the recipe of z, which fills its storage. z must not be written to any more, or it is kept.

        writes: how often autograd is yet to count what has been written to z: once inside the forward of an autograd
        function that marks z as dirty.
        """
        self.known = {key: entry for key, entry in self.known.items() if not entry.storage.expired()}
        output = StorageWeakRef(z.untyped_storage())
        self.known[output.cdata] = Known(output, z._version + writes, z.dtype, recipe)

    def find(self, t: Tensor) -> Recipe | None:
        entry = self.known.get(t.untyped_storage()._cdata)
        if entry is None or entry.storage.expired() or (entry.version, entry.dtype) != (t._version, t.dtype):
            return None
        return entry.recipe

    def pack(self, t: Tensor) -> Tensor | Callable[[], Tensor]:
        recipe = self.find(t)
        if recipe is None:
            return t
        size, stride, offset, latest = t.size(), t.stride(), t.storage_offset(), self.latest
        dtype, device = t.dtype, t.device
        if isinstance(recipe, Ready):
            return lambda: recipe.output().as_strided(size, stride, offset)

        def rebuilt() -> Tensor:
            if runs_frozen_convolution():
                return torch.empty_strided(size, stride, dtype=dtype, device=device)
            return latest.output(recipe).as_strided(size, stride, offset)

        return rebuilt


def runs_frozen_convolution() -> bool:
    """Whether backward is at a convolution whose weight has no gradient: of its input, it reads the layout alone."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == "ConvolutionBackward0" and node.next_functions[1][0] is None


def unpack(packed: Any) -> Tensor:
    found: Tensor = packed if isinstance(packed, Tensor) else packed()
    return found


watching: list[Recipes] = []


@contextmanager
def recomputed_outputs() -> Iterator[Recipes]:
    """Inside it, outputs that can be computed again are not kept by other layers: those of `RecomputedABN`, and of
    `InPlaceABN` with keep="8bit" or "4bit".

    Autograd cannot detect that a tensor saved inside it is overwritten before backward. Without gradients nothing is
    saved, and tensors of inference mode do not count what is written to them: then nobody watches.
    """
    recipes = Recipes()
    if not torch.is_grad_enabled():
        yield recipes
        return
    watching.append(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, unpack):
            yield recipes
    finally:
        watching.remove(recipes)
        recipes.known.clear()  # the graph alone holds what it needs, and frees it as backward goes


def intercepting() -> Recipes | None:
    """The recipes whose hooks see what is saved now. None where nobody watches, and under hooks set further inside:
    those of torch.utils.checkpoint, which saves nothing but a block's input."""
    if torch.compiler.is_compiling() or not watching:
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return watching[-1] if hooks is not None and hooks[0] == watching[-1].pack else None


def derive(z: Tensor, out: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """Let nobody keep `out` = function(z) if z itself can be computed again. out: dense, and fills its storage."""
    recipes = intercepting()
    recipe = None if recipes is None else recipes.find(z)
    if recipes is not None and recipe is not None:
        recipes.add(out, Derived(recipe, function))
