"""model.recompute=grouped, identity_input and both: which maps of a network are rebuilt, and a guard that measures how
exactly."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from segtrain.abn import InPlaceABN, recomputed_outputs
from segtrain.abn.rebuilding import Drift, remember_convolution, repeatable
from segtrain.config.model import REBUILDING
from segtrain.console import say
from segtrain.errors import UsageError
from segtrain.models.blocks import IdentityResidualBlock, ResidualBlock, Stage, unlike_a_convolution

CHECK_EVERY = 100  # passes
# The relative distance of a rebuilt map from the true one above which maps are kept instead. Rounding alone gives some
# units of float32, 1.2e-7; an activation in half precision is rounded to 5e-4 or 4e-3 anyway.
MOST_DRIFT, MOST_DRIFT_HALF = 2e-5, 5e-4


class Rebuilding:
    """Rebuilds what `model.recompute` names in a network's training passes, and checks every CHECK_EVERY of them.

    drift: that for which it was given up, or None. grouped, inputs: number of blocks that rebuild.
    """

    def __init__(self, body: nn.Module, recompute: str) -> None:
        self.recompute = recompute
        self.passes = 0
        self.drift: float | None = None
        self.grouped = rebuild_grouped(body) if recompute in ("grouped", "both") else 0
        self.inputs = rebuild_inputs(body) if recompute in ("identity_input", "both") else 0
        if recompute in ("grouped", "both") and not self.grouped:
            raise UsageError(
                f"model.recompute={recompute}: this backbone has no grouped convolution before In-Place ABN: choose "
                "resnext50, resnext101 or resnext152, or model.recompute=none"
            )
        if recompute in ("identity_input", "both") and not self.inputs:
            raise UsageError(
                f"model.recompute={recompute}: this backbone has no blocks whose output is their input plus a "
                "convolution: choose resnext50, resnext101, resnext152 or wider_resnet38, or model.recompute=none"
            )

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The context of a forward pass."""
        if self.drift is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or checkpointed():
            yield
            return
        checks = self.passes % CHECK_EVERY == 0
        self.passes += 1
        half = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        with repeatable(), recomputed_outputs() as recipes:
            if checks:
                first, most = self.passes == 1, MOST_DRIFT_HALF if half else MOST_DRIFT
                recipes.samples = Drift(lambda worst: self.conclude(worst, most, first))
            yield

    def conclude(self, worst: float, most: float, first: bool) -> None:
        """Give up where rebuilt maps are not what they were."""
        if not worst <= most and self.drift is None:
            self.drift = worst
            text = (
                f"WARNING    rebuilt maps are {worst:.1e} from the true ones (at most {most:.0e} is allowed): from the "
                "next pass on they are kept, as with model.recompute=none"
            )
            print(text, file=sys.stderr, flush=True)  # in every process: each decides for itself
        elif first:
            say(f"rebuilt    maps are {worst:.1e} from the true ones, relatively (at most {most:.0e} is allowed)")

    def __str__(self) -> str:
        if self.drift is not None:
            return f"no maps: they were {self.drift:.1e} from the true ones, and are kept"
        parts = [
            f"the last convolution's input in {self.grouped} grouped blocks" if self.grouped else "",
            f"the input of {self.inputs} identity blocks, walking backward" if self.inputs else "",
        ]
        return " and ".join(part for part in parts if part) + f"; checked every {CHECK_EVERY} passes"


def rebuilding_of(body: nn.Module, recompute: str) -> Rebuilding | None:
    return Rebuilding(body, recompute) if recompute in REBUILDING else None


def checkpointed() -> bool:
    """Whether torch.utils.checkpoint saves nothing of this pass anyway."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def rebuild_grouped(body: nn.Module) -> int:
    """Have backward repeat each grouped convolution of a block that In-Place ABN follows; how many blocks that are."""
    count = 0
    for block in body.modules():
        if isinstance(block, IdentityResidualBlock | ResidualBlock):
            layers = list(block.convs)
            for layer, norm in zip(layers, layers[1:], strict=False):
                if isinstance(layer, nn.Conv2d) and layer.groups > 1 and isinstance(norm, InPlaceABN):
                    layer.register_forward_hook(remember)
                    count += 1
    return count


def remember(conv: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
    """The hook behind a convolution whose output backward computes again."""
    assert isinstance(conv, nn.Conv2d)
    if not unlike_a_convolution(conv, hooks=1):
        remember_convolution(conv, inputs[0], out)


def rebuild_inputs(body: nn.Module) -> int:
    """Have every stage walk backward through its identity blocks; how many blocks that are."""
    count = 0
    for part in body.modules():
        if isinstance(part, Stage):
            found = [block for block in part if isinstance(block, IdentityResidualBlock)]
            part.walks = any(block.proj_conv is None for block in found)
            count += sum(block.proj_conv is None for block in found)
            for block in found:
                block.wide_sum = part.walks
    return count
