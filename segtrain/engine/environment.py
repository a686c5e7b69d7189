"""Where and with what a training computes: the device, the versions, the code."""

import contextlib
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import segtrain
from segtrain.config import TrainConfig
from segtrain.console import say
from segtrain.device import resolve_device
from segtrain.distributed.group import World
from segtrain.engine.graphs import not_capturable
from segtrain.errors import UsageError
from segtrain.models import not_compilable
from segtrain.models.execution import require_inference_compile
from segtrain.models.precision import require_precision
from segtrain.threads import cpus


@contextlib.contextmanager
def training_device(config: TrainConfig, dist: World) -> Iterator[torch.device]:
    """The device of this process, with deterministic algorithms while inside if trainer.deterministic asks for them.

    UsageError if there are more processes than GPUs, or if trainer.compile, trainer.cuda_graphs, inference.precision
    or inference.compile cannot work here.
    """
    device, threads = resolve_device(config.device), torch.get_num_threads()
    if config.trainer.compile and (reason := not_compilable(config.model, device)):
        raise UsageError(f"trainer.compile=true is not possible: {reason}")
    if config.trainer.cuda_graphs and (reason := not_capturable(config, dist, device)):
        raise UsageError(f"trainer.cuda_graphs=true is not possible: {reason}")
    require_precision(config.inference.precision, device)
    if config.inference.compile:
        require_inference_compile(config.model, device)
    if device.type == "cuda":
        device = own_gpu(config, dist)
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield device
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def own_gpu(config: TrainConfig, dist: World) -> torch.device:
    """The GPU of this process."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise UsageError(f"{processes} processes on this machine, which has {gpus} GPUs: --nproc-per-node={gpus}")
    torch.backends.cudnn.benchmark = not config.trainer.deterministic
    if gpus > 1 and dist.size == 1:
        torchrun = f"torchrun --standalone --nproc-per-node={gpus} -m segtrain train ..."
        say(f"GPUs       one of {gpus} is used; all of them: {torchrun}")
    return torch.device("cuda", dist.local_rank)


def keep_threads(config: TrainConfig, dist: World, saved: dict[str, Any] | None) -> None:
    """Compute with as many threads as the run did before, if trainer.deterministic asks for it, and if they fit.

    The number of threads decides in which order sums are added up, and so their last bits. torchrun sets it to 1.
    Prints a difference that stays.
    """
    before, now = (saved or {}).get("environment", {}).get("threads"), torch.get_num_threads()
    if not isinstance(before, int) or before == now or before < 1:
        return
    if config.trainer.deterministic:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here * before <= cpus():
            torch.set_num_threads(before)
            say(f"threads    {before} as before, instead of {now}: trainer.deterministic=true")
            return
        remedy = f"{here} x {before} threads do not fit the {cpus()} CPUs that this process may use"
    else:
        remedy = f"OMP_NUM_THREADS={before} or trainer.deterministic=true keeps them"
    say(f"WARNING    threads: {now} from here on, {before} before, so that sums are rounded otherwise: "
        f"the run no longer equals an uninterrupted one to the bit ({remedy})")  # fmt: skip


def session_environment(config: TrainConfig, dist: World, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Where and with what a session of a run is computed, for environment.json and the checkpoints.

    Sets the number of threads as `keep_threads` says. saved: the checkpoint that the run goes on from.
    git: commits of the imported code and of the working folder.
    """
    keep_threads(config, dist, saved)
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "processes": dist.size,
        "threads": torch.get_num_threads(),
        "segtrain": segtrain.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),  # a class of its own, which checkpoints cannot hold
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cards": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": {"segtrain": git_state(Path(__file__).parent), "here": git_state(Path.cwd())},
        "seed": config.trainer.seed,
        "accumulation": config.trainer.accumulation,
    }


def git_state(folder: Path) -> str | None:
    """'<commit>' or '<commit>, with changes'; None where there is no git or no repository."""
    try:
        answers = [
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    commit, changes = (answer.stdout.strip() for answer in answers)
    return f"{commit}, with changes" if changes else commit
