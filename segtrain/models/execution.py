"""Other ways to run a network: compiled by torch.compile, and sharded over processes by FSDP2."""

import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._functorch import config as partitioner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

from segtrain.abn.sync import group_or_none
from segtrain.config import ModelConfig
from segtrain.errors import SegtrainError, UsageError
from segtrain.models.blocks import Stage

LEAST_BUDGET = 1e-9  # at 0 itself, torch ignores what is marked as kept
MOST_GRAPHS = 32  # of networks that predict images, for all sizes together
OLDEST_GPU = (7, 0)  # compute capability that Triton generates code for
Backend = Callable[[Any, Any], Any]  # torch.fx graph and its inputs -> a function of the inputs
INFERENCE_BACKEND: str | Backend = "inductor"


def not_compilable(options: ModelConfig, device: torch.device) -> str:
    """'' if `compiled` works here, else the reason and what to do instead."""
    if options.norm.endswith("_sync") and group_or_none(None) is not None:
        return (
            f"a graph cannot hold the statistics that model.norm={options.norm} exchanges between the processes: "
            f"choose model.norm={options.norm.removesuffix('_sync')}, or start one process"
        )
    if options.recompute != "none":
        return f"torch.compile plans what backward computes again: model.recompute={options.recompute} must be none"
    if options.keep != "exact":
        return f"a graph cannot hold the kept codes of model.keep={options.keep}: choose model.keep=exact"
    return no_gpu_compiler(device) if device.type == "cuda" else no_cpu_compiler()


def no_cpu_compiler() -> str:
    """Why torch.compile can make no code for the CPU; '' if it can."""
    compiler = os.environ.get("CXX") or "g++"  # where torch looks
    if shutil.which(compiler) is None:
        return f"torch.compile found no C++ compiler {compiler!r} (Debian and Ubuntu: apt install g++; or set CXX)"
    return no_python_headers()


def no_gpu_compiler(device: torch.device) -> str:
    """Why torch.compile can make no code for this GPU; '' if it can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        least, found = (".".join(map(str, pair)) for pair in (OLDEST_GPU, capability))
        return (
            f"Triton makes code for compute capability {least} and newer, and this GPU has {found}: "
            "choose trainer.compile=false"
        )
    if find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU: pip install triton, or choose trainer.compile=false"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]  # where Triton looks
    if not any(map(shutil.which, compilers)):
        return (
            f"Triton found no C compiler {' or '.join(map(repr, compilers))} (Debian and Ubuntu: apt install gcc; or "
            "set CC)"
        )
    return no_python_headers()


def no_python_headers() -> str:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"torch.compile needs {header} (Debian and Ubuntu: apt install python3-dev)"
    return ""


def compiled(
    model: nn.Module, options: ModelConfig, device: torch.device, memory_budget: float | None = None
) -> nn.Module:
    """Compile `model` into one graph by torch.compile; the result is called as the model, which keeps its state.

    The numbers, dropout included, equal the model's up to rounding, and In-Place ABN keeps as few bytes for backward.
    Under DistributedDataParallel, which is put around the result, one graph becomes several, one a bucket of gradients.
    memory_budget: as `within_budget`. The first call of every mode, precision and shape compiles for minutes, and torch
    refuses the ninth: use the result for training, and the model itself to validate images of any size. Raises
    UsageError, before anything is built, if it cannot work here.
    """
    reason = not_compilable(options, device)
    if reason:
        raise UsageError(f"trainer.compile=true is not possible: {reason}")
    backend = inductor if memory_budget is None else within_budget(inductor, memory_budget)
    return cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False, backend=backend))


def require_inference_compile(options: ModelConfig, device: torch.device) -> None:
    """UsageError if `compiled_answer` cannot work with such a network here. Statistics are fixed, so any norm can."""
    reason = no_gpu_compiler(device) if device.type == "cuda" else no_cpu_compiler()
    if options.is_timm():
        reason = "encoders of timm are not tested in graphs"
    elif options.recompute != "none" or options.keep != "exact":
        reason = f"a graph cannot hold what model.recompute={options.recompute} and model.keep={options.keep} do"
    if reason:
        reason = reason.replace("trainer.compile=false", "inference.compile=false")
        raise UsageError(f"inference.compile=true is not possible: {reason}")


def compiled_answer(network: nn.Module, images: Tensor, **options: Any) -> Tensor:
    """network(images, **options), without gradients, by a graph of torch.compile. Equal up to rounding.

    A graph serves many sizes and batches, but not all: a size or batch of 1, and sizes that a layer treats otherwise,
    get graphs of their own. Each takes up to minutes. SegtrainError after MOST_GRAPHS of them.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        with config.patch(recompile_limit=MOST_GRAPHS):
            found: Tensor = answering(INFERENCE_BACKEND)(network, images, **options)
    except FailOnRecompileLimitHit as error:
        raise SegtrainError(
            f"inference.compile=true: {MOST_GRAPHS} graphs did not suffice for the sizes of these images: give "
            "inference.tile=[height,width], or leave out inference.compile"
        ) from error
    return found


@cache
def answering(backend: str | Backend) -> Callable[..., Tensor]:
    """One compiled function for all networks, which are its arguments: graphs of a network that is gone go with it."""
    compiling: Callable[..., Tensor] = torch.compile(answer_of, fullgraph=True, dynamic=True, backend=backend)
    return compiling


def answer_of(network: nn.Module, images: Tensor, **options: Any) -> Tensor:
    found: Tensor = network(images, **options)
    return found


class KeepRandom(CustomGraphPass):
    """Marks what draws random numbers as kept for backward, in a graph that is not yet divided.

    With a low activation_memory_budget and fallback_random, torch 2.14 draws them a second time: a dropout then has
    another mask in backward than in forward, and the gradient is wrong.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if is_random(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> str:
        return "segtrain: random numbers are kept, 1"


def is_random(node: torch.fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def inductor(graph: Any, inputs: Any, make_code: Callable[..., Any] | None = None) -> Any:
    """torch.compile's own back end. A step draws torch's own random numbers, the same as without compilation.

    make_code: takes the place of `compile_fx_inner`, as `run_as_graph` can.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def checked(part: Any, *arguments: Any, is_backward: bool = False, **options: Any) -> Any:
        if is_backward and any(map(is_random, part.graph.nodes)):
            raise SegtrainError(
                f"torch {torch.__version__} would draw random numbers of forward again in backward, and the gradient "
                "would be wrong: choose trainer.memory_budget=null, or trainer.compile=false"
            )
        return (make_code or compile_fx_inner)(part, *arguments, is_backward=is_backward, **options)

    patches = {"fallback_random": True, "joint_custom_post_pass": KeepRandom()}
    return compile_fx(graph, inputs, inner_compile=checked, config_patches=patches)


def run_as_graph(
    graph: torch.fx.GraphModule, *_: Any, around: Callable[[], AbstractContextManager[Any]] = nullcontext, **__: Any
) -> Callable[[list[Any]], Any]:
    """Stands for Inductor's code of a graph: runs it an operation at a time, and frees tensors after their last use.

    For tests, and to count on fake tensors: making code takes most of the time of a compilation. around: the context of
    every run.
    """

    def run(arguments: list[Any]) -> Any:
        with around():
            return torch.fx.Interpreter(graph).boxed_run(arguments)  # one that stays would hold the results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def within_budget(backend: Backend, budget: float) -> Backend:
    """A back end whose graphs keep at most `budget` (0 to 1) of the activations that torch keeps for speed.

    It sets torch's activation_memory_budget while it compiles. What is not kept, backward computes again: first what
    costs the fewest operations. A graph keeps its inputs and random numbers anyway.
    """

    def compile_graph(graph: Any, inputs: Any) -> Any:
        with partitioner.patch(activation_memory_budget=max(budget, LEAST_BUDGET)):
            return backend(graph, inputs)

    return compile_graph


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
