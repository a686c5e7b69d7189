"""`segtrain info`: describe this machine or a checkpoint, or test the CUDA kernels."""

import os
import platform
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torchvision

import segtrain
from segtrain import abn, device
from segtrain.abn import benchmark, coded_operators, coded_selftest, device_checks, selftest
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.config import InfoConfig
from segtrain.console import Progress, printable, say
from segtrain.errors import SegtrainError, UsageError
from segtrain.files import write_atomically
from segtrain.weights.network_file import published_figure, run_content
from segtrain.weights.provenance import origin


def info(config: InfoConfig) -> None:
    if config.checkpoint is not None:
        describe_checkpoint(Path(config.checkpoint))
        return
    if config.gpu_test:
        gpu_test()
        return
    say(f"segtrain     {segtrain.__version__}, Python {platform.python_version()}, {platform.platform()}")
    say(
        f"torch        {torch.__version__} (CUDA {torch.version.cuda or 'none'}), torchvision {torchvision.__version__}"
    )
    say(f"CPU          {os.cpu_count()} cores, {torch.get_num_threads()} threads used")
    gpus = device.nvidia_gpus()
    for gpu in gpus:
        say(f"GPU          {gpu}")
        say(f"             {device.advice(gpu)}")
    if not gpus:
        say(
            f"GPU          none found. For an NVIDIA GPU, Turing or newer, driver r{device.CUDA13_DRIVER} or newer "
            "(nvidia-smi shows CUDA 13.0 or newer): pip install '.[cuda13]'; an older one: torch<2.15 from "
            "https://download.pytorch.org/whl/cu126 "
            "first, then pip install '.[cuda12]'"
        )
    try:
        say(f"used         {device.resolve_device('auto')}")
    except UsageError as error:
        say(f"used         none: {error}")
    say(f"kernels      In-Place ABN on the CPU: {abn.describe_backend('cpu')}; on CUDA: {abn.describe_backend('cuda')}")
    tested = tested_file()
    say(f"tested       {tested.read_text().strip() if tested.exists() else NOT_TESTED}")


NOT_TESTED = "no CUDA device on this machine yet: segtrain info gpu_test=true"


def tested_file() -> Path:
    return Path(os.environ.get("SEGTRAIN_CACHE") or "~/.cache/segtrain").expanduser() / "gpu_test.txt"


def gpu_test() -> None:
    """Test and benchmark the CUDA kernels. UsageError if they cannot run here, SegtrainError if they are wrong."""
    if device.resolve_device("auto").type != "cuda":
        raise UsageError("gpu_test=true needs a CUDA device, and there is none: `segtrain info` says what to install")
    try:
        abn.use_backend("cupy")
    except RuntimeError as error:
        raise UsageError(f"gpu_test=true: {error}") from error
    name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    say(f"device       {name}")
    results = run_cases(cupy_ops, "cuda")
    for result in device_checks.check_device():
        results.append(result)
        say(f"             {result.case}, {result.what}: off by {result.error:.1e}, bound {result.bound:.1e}")
    report(results, name)
    for line in benchmark.layer_table("cuda"):
        say(line)


def run_cases(ops: ModuleType, where: str) -> list[selftest.Result]:
    """Run the self-test on the back end `ops` and the device `where`, with a progress line."""
    coder = coded_operators.coder_of(ops)
    checks: list[Callable[[], list[selftest.Result]]] = [
        *(partial(selftest.check_backend, ops, where, [case]) for case in selftest.cases()),
        *(partial(coded_selftest.check_coder, coder, where, [case]) for case in coded_selftest.coded_cases()),
        partial(coded_selftest.check_degenerate, coder, where),
    ]
    progress = Progress("cases", len(checks))
    results = []
    for done, check in enumerate(checks, 1):
        results += check()
        progress.show(done)
    return results


def report(results: list[selftest.Result], name: str) -> None:
    """Print and store how the tests went; SegtrainError if any failed."""
    failed = [result for result in results if not result.good]
    summary = f"{name}: {len(results) - len(failed)} of {len(results)} checks passed on {date.today()}"
    tested_file().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(tested_file(), f"{summary}\n".encode())
    say(f"tests        {summary}")
    if failed:
        listed = "\n".join(map(str, failed[:20]))
        raise SegtrainError(
            f"the CUDA kernels give wrong results here: {len(failed)} of {len(results)} checks failed. "
            f"model.backend=aten avoids them. Please report these lines with the output of `segtrain info`:\n{listed}"
        )


def describe_checkpoint(path: Path) -> None:
    content = run_content(path)
    model, data = content["config"]["model"], content["config"]["dataset"]
    parameters = sum(tensor.numel() for tensor in content["model"].values())
    if "report" in content:
        say(content["report"])
    else:
        best = content.get("best", {})
        measure, name = ("top1", "top-1") if "top1" in best else ("miou", "mIoU")
        score = best.get(measure, -1)  # -1 before the first validation, NaN of converted weights
        scored = f"best validation {name} {100 * score:.1f} %" if score >= 0 else "never validated"
        say(f"{path}: step {content['step']}, {scored}")
    say(f"model   {model['backbone']} + {model['head']}, norm {model['norm']}, {parameters} numbers")
    names = [printable(name, inline=True) for name in content["classes"]["names"]]
    more = f", ... ({len(names)})" if len(names) > 200 else ""
    say(f"data    {data['name']}, classes: {', '.join(names[:200])}{more}")
    for line in origin(content["provenance"]) if content.get("provenance") else []:
        say(line)
    if (figure := published_figure(content)) is not None:
        say(f"published  {figure}")
