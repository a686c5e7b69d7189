"""Other ways to run a network: compiled by torch.compile, and sharded over processes by FSDP2."""

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from segtrain.abn.sync import group_or_none
from segtrain.config import ModelConfig
from segtrain.errors import UsageError
from segtrain.models.blocks import Stage


def not_compilable(options: ModelConfig, device: torch.device) -> str:
    """'' if `compiled` works here, else the reason and what to do instead."""
    if device.type != "cpu":
        return f"it is tested on the CPU only, not on {device.type}: choose device=cpu, or trainer.compile=false"
    if group_or_none(None) is not None:
        return "it works in one process, because a graph cannot hold what layers and DDP exchange: start one"
    if options.recompute != "none":
        return f"torch.compile plans what backward computes again: model.recompute={options.recompute} must be none"
    if options.keep != "exact":
        return f"a graph cannot hold the kept codes of model.keep={options.keep}: choose model.keep=exact"
    compiler = os.environ.get("CXX") or "g++"  # where torch looks
    if shutil.which(compiler) is None:
        return f"torch.compile found no C++ compiler {compiler!r} (Debian and Ubuntu: apt install g++; or set CXX)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"torch.compile needs {header} (Debian and Ubuntu: apt install python3-dev)"
    return ""


def compiled(model: nn.Module, options: ModelConfig, device: torch.device) -> Callable[..., Tensor]:
    """Compile `model` into one graph by torch.compile; the result is called as the model, which keeps its state.

    The numbers, dropout included, equal the model's up to rounding, and In-Place ABN keeps as few bytes for backward.
    The first call of every mode, precision and shape compiles for minutes, and torch refuses the ninth: use the result
    for training, and the model itself to validate images of any size. Raises UsageError, before anything is built, if
    it cannot work here.
    """
    reason = not_compilable(options, device)
    if reason:
        raise UsageError(f"trainer.compile=true is not possible: {reason}")
    # torch's own random numbers, so that a step draws the same numbers as without compilation.
    return torch.compile(model, fullgraph=True, dynamic=False, options={"fallback_random": True})


def sharded(model: nn.Module) -> None:
    """Shard parameters, gradients and optimizer state over all processes, in place, by FSDP2, one block at a time.

    Call it before the optimizer is made. Running statistics are not sharded. Gradients are averages over the processes,
    as with DDP; all processes must run forward and backward together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for stage in model.modules():
        if isinstance(stage, Stage):
            for block in stage:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
