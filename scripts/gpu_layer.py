"""Parts of scripts/gpu_report.py: what measures, the correctness of the kernels, and the time of the layer."""

import gc
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segtrain import abn
from segtrain.abn import InPlaceABN
from segtrain.abn.benchmark import SHAPES, Standard

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent.parent
# Channels, extent and group size of figure 4's modules, at the paper's batch of 32.
FIGURE4 = ((32, 128, 56, 56), (32, 256, 28, 28), (32, 512, 14, 14), (32, 1024, 7, 7))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Budget(NamedTuple):
    """What a part may use. tiny: toy sizes on the CPU. long: more than the eight minutes' worth is wanted."""

    device: str
    tiny: bool
    long: bool
    ends: float

    def left(self) -> float:
        return self.ends - time.monotonic()


# ------------------------------------------------------------------------------------------------ measuring


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], before: Callable[[], Any], budget: Budget, rounds: int) -> float:
    """Median seconds of `run`, each after an untimed `before`, which also drives older data out of the cache."""
    found = []
    for _ in range(2 if budget.tiny else rounds + 3):
        before()
        if budget.device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            run()
            events[1].record()
            torch.cuda.synchronize()
            found.append(events[0].elapsed_time(events[1]) / 1000)
        else:
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
    return statistics.median(found[min(3, len(found) - 1) :])


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def command(words: list[str], budget: Budget) -> tuple[float, int, str]:
    """Seconds, exit status and text of `segtrain WORDS`."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    try:
        answer = subprocess.run([sys.executable, "-m", "segtrain", *words], capture_output=True, text=True,
                                env=environment, timeout=max(10, budget.left()))  # fmt: skip
    except subprocess.TimeoutExpired:
        return time.monotonic() - began, 124, "no time"
    return time.monotonic() - began, answer.returncode, answer.stdout + answer.stderr


# ------------------------------------------------------------------------------------------------ 1. correctness


def selftest(budget: Budget) -> Iterator[Row]:
    """The kernels case by case against float64; what only a device shows; a whole network against the CPU.

    The back end aten is torch's own operations, which round more in half precision than the kernels' bounds allow.
    """
    from segtrain.abn import selftest as tests

    for name in ("cupy",) if budget.device == "cuda" else ("native",):
        try:
            abn.use_backend(name)
        except RuntimeError as error:
            yield {"backend": name, "left out": str(error)}
            continue
        module = importlib.import_module(f"segtrain.abn.backends.{name}")
        cases = list(tests.cases())[:: 40 if budget.tiny else 1]
        allowed = budget.left() * 0.6
        began, done, failed, worst = time.monotonic(), 0, [], 0.0
        for case in cases:
            if time.monotonic() - began > allowed:
                break
            for result in tests.check_backend(module, budget.device, [case]):
                worst = max(worst, result.error / result.bound if result.bound else math.inf * (result.error > 0))
                failed += [] if result.good else [str(result)]
            done += 1
        yield {"backend": name, "cases": done, "of": len(cases), "failed": len(failed), "first": failed[:5],
               "largest error over its bound": worst}  # fmt: skip
    abn.use_backend("auto")
    if budget.device == "cuda":
        from segtrain.abn.device_checks import check_device

        for result in check_device():
            yield {"check": f"{result.case}, {result.what}", "error": result.error, "good": result.good}
    yield from whole_network(budget)


def whole_network(budget: Budget) -> Iterator[Row]:
    """Distance of the whole gradient from float64 on the CPU: In-Place ABN beside BatchNorm on the same device."""
    from segtrain.losses import CrossEntropy
    from segtrain.models.build import build_model

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for norm in ("batch_norm", "inplace_abn"):
        torch.manual_seed(0)
        network = build_model("resnet18", num_classes=19, output_stride=16, head_channels=16, norm=norm)
        for module in network.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                module.p = 0
        images, target = torch.randn(2, 3, 65, 65), torch.randint(0, 19, (2, 65, 65))
        found = {}
        state = network.state_dict()
        for where, dtype in (("cpu", torch.float64), (budget.device, torch.float32)):
            network.load_state_dict(state)
            network.to(where, dtype).zero_grad()
            loss = CrossEntropy()(network(images.to(where, dtype), upsample=False), target.to(where)).sum()
            loss.backward()
            found[dtype] = torch.cat([p.grad.flatten().double().cpu() for p in network.parameters()])
            network.float()
        wanted = found[torch.float64]
        yield {"network": f"resnet18, {norm}", "distance of the gradient from float64":
               float((found[torch.float32] - wanted).norm() / wanted.norm())}  # fmt: skip


# ------------------------------------------------------------------------------------------------ 2. the layer


def layer(budget: Budget) -> Iterator[Row]:
    """Forward and backward beside torch's pair, the same compiled, and the bandwidth of a copy, caches flushed."""
    abn.use_backend("auto")
    yield {"kernels": abn.describe_backend(budget.device)}
    scratch = torch.empty((1 << 20) if budget.tiny else (1 << 28), dtype=torch.uint8, device=budget.device)
    shapes = ((2, 8, 16, 16),) if budget.tiny else (*SHAPES, *FIGURE4, (4, 256, 128, 128))
    for dtype_name, dtype in DTYPES.items():
        yield {"dtype": dtype_name, "copy GB/s": copy_bandwidth(dtype, scratch, budget) / 1e9}
    for dtype_name, last, shape in product(DTYPES, (False, True), shapes):
        if budget.tiny and dtype_name == "fp16":
            continue
        if budget.left() < 5:
            yield {"layer": f"{shape} {dtype_name}", "left out": "no time"}
            return
        yield one_layer(shape, dtype_name, last, scratch, budget)


def copy_bandwidth(dtype: torch.dtype, scratch: Tensor, budget: Budget) -> float:
    """Bytes read and written a second by a copy of 256 MiB within the device."""
    source = torch.zeros((1 << 12) if budget.tiny else (1 << 28) // dtype.itemsize, dtype=dtype, device=budget.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), scratch.zero_, budget, 20)


def one_layer(shape: tuple[int, ...], dtype: str, last: bool, scratch: Tensor, budget: Budget) -> Row:
    layout = torch.channels_last if last else torch.contiguous_format
    kind = DTYPES[dtype]
    x, dz = (torch.randn(shape, device=budget.device).to(kind, memory_format=layout) for _ in range(2))
    standard = Standard(shape[1]).to(budget.device)
    candidates: dict[str, nn.Module] = {"ours": InPlaceABN(shape[1]).to(budget.device), "torch": standard}
    if not budget.tiny and shape in SHAPES and dtype != "fp16":
        candidates["compiled"] = torch.compile(Standard(shape[1]).to(budget.device), dynamic=False)
    times = {}
    for name, module in candidates.items():
        try:
            times[name] = passes(module, x, dz, scratch, budget)
        except Exception as error:  # noqa: BLE001  # a part that fails is named and passed over
            times[name] = (math.nan, math.nan)
            print(f"             {name} failed on {shape} {dtype}: {str(error).splitlines()[0]}", flush=True)
    total = {name: forward + backward for name, (forward, backward) in times.items()}
    # Statistics read x, normalising reads and writes it; backward reads z and dz twice and writes dx.
    row: Row = {"layer": "x".join(map(str, shape)), "dtype": dtype, "layout": "NHWC" if last else "NCHW",
                "ms": 1e3 * total["ours"], "over torch": total["ours"] / total["torch"],
                "counted GB/s": 8 * x.nbytes / total["ours"] / 1e9,
                "forward": times["ours"][0] / times["torch"][0],
                "backward": times["ours"][1] / times["torch"][1]}  # fmt: skip
    return row | ({"over compiled": total["ours"] / total["compiled"]} if "compiled" in total else {})


def passes(module: nn.Module, x: Tensor, dz: Tensor, scratch: Tensor, budget: Budget) -> tuple[float, float]:
    """Median seconds of forward and of backward. The layer may overwrite its input."""
    place: dict[str, Tensor] = {}

    def fresh() -> None:
        place["x"] = x.detach().requires_grad_() + 0
        scratch.zero_()

    def forward() -> None:
        place["z"] = module(place["x"])

    def ready() -> None:
        fresh()
        forward()
        scratch.zero_()

    return (
        seconds_of(forward, fresh, budget, 15),
        seconds_of(lambda: place["z"].backward(dz), ready, budget, 15),
    )
