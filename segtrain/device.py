"""Which processor computes, and what to install for the GPU of this machine."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from torch import Tensor

from segtrain.errors import UsageError

CUDA13_DRIVER = 580  # first driver series for CUDA 13, which plain pip's torch is built with
NEW_ENOUGH = f"driver r{CUDA13_DRIVER} or newer (nvidia-smi then shows CUDA 13.0 or newer)"
CUDA13_CAPABILITY = (7, 5)  # Turing; CUDA 13 dropped older ones
CUDA126_DRIVER = 525
MOST_CONSTANTS = 256
constants: dict[Hashable, Tensor] = {}


def resolve_device(name: str) -> torch.device:
    """The device for auto, cuda or cpu. UsageError for a GPU that torch cannot use, unless cpu is requested."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        oldest = min(
            (int(arch.removeprefix("sm_")) for arch in torch.cuda.get_arch_list() if arch[3:].isdigit()), default=0
        )
        if capability[0] * 10 + capability[1] >= oldest:
            return torch.device("cuda")
    gpus = nvidia_gpus()
    if gpus:
        raise UsageError(
            f"torch {torch.__version__} cannot use {gpus[0]}. {advice(gpus[0])} device=cpu insists on the CPU."
        )
    if name == "cuda":
        raise UsageError("device=cuda: no NVIDIA GPU and driver found here (nvidia-smi lists none); use device=cpu")
    return torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """One phrase for the first line of a run."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()} (torch {torch.__version__})"
    return f"CPU, {torch.get_num_threads()} threads (torch {torch.__version__})"


class NvidiaGpu:
    """A GPU as nvidia-smi describes it: name, driver version such as '580.65.06', compute capability."""

    def __init__(self, name: str, driver: str, capability: tuple[int, int]) -> None:
        self.name = name
        self.driver = driver
        self.capability = capability

    def __str__(self) -> str:
        return f"the {self.name} (driver {self.driver}, compute capability {'.'.join(map(str, self.capability))})"


def nvidia_gpus() -> list[NvidiaGpu]:
    """The NVIDIA GPUs of this machine; empty without nvidia-smi or a working driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in lines:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[2].replace(".", "").isdigit():
            major, minor = (parts[2] + ".0").split(".")[:2]
            gpus.append(NvidiaGpu(parts[0], parts[1], (int(major), int(minor))))
    return gpus


def advice(gpu: NvidiaGpu) -> str:
    """What to install for a GPU, by its driver and generation."""
    series = int(gpu.driver.split(".")[0]) if gpu.driver.split(".")[0].isdigit() else 0
    if series >= CUDA13_DRIVER and gpu.capability >= CUDA13_CAPABILITY:
        return "Install with plain pip and the CUDA 13 kernels: pip install '.[cuda13]'."
    older = (
        "Install torch for CUDA 12.6 first: pip install 'torch<2.15' torchvision --index-url "
        "https://download.pytorch.org/whl/cu126, then pip install '.[cuda12]'"
    )
    if series < CUDA126_DRIVER:
        return f"Update its driver ({NEW_ENOUGH}, r{CUDA126_DRIVER} at least). {older}."
    if gpu.capability >= CUDA13_CAPABILITY:
        return f"Plain pip brings a CUDA 13 torch, which needs {NEW_ENOUGH}: update the driver. Or: {older}."
    return f"Plain pip brings a CUDA 13 torch, which needs a Turing GPU or newer. {older}."


def memory() -> str:
    """Peak memory of this process so far: of the GPU if one is in use, else resident memory."""
    peak = peak_memory()
    return "" if peak is None else f"{peak / 1e9:.1f} GB{' GPU' if torch.cuda.is_initialized() else ''}"


def peak_memory() -> int | None:
    """The same in bytes; None if the system does not report it."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main_memory() -> int | None:
    """Bytes of memory that the machine or the container has, divided by the processes of this command that share it;
    None if the system does not say."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    with contextlib.suppress(OSError, ValueError):  # another system, or a container without a limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now; on the CPU, those that the system and the container give this process's
    share of, one of the machine's processes of this command."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):  # another system, or a container without a limit
        pass
    if not free:
        raise UsageError("this system does not say how much memory is free: give trainer.batch_size as a number")
    return min(free) // processes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU had no memory left for a tensor."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def kept_constant(device: torch.device, make: Callable[[], Tensor], *what: Hashable) -> Tensor:
    """make() on that device, never to be written to. Made once for each `what`, which says all that make() depends on.

    To copy numbers to a GPU anew in each step would make the host wait for it. Made anew where something traces or
    watches what torch does.
    """
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return make().to(device)
    key = device, torch.get_default_dtype(), what
    found = constants.get(key)
    if found is None:
        if len(constants) >= MOST_CONSTANTS:
            constants.clear()
        with torch.inference_mode(False):  # whatever needs it first
            found = constants[key] = make().to(device)
    return found
