#!/usr/bin/env python
"""Everything that only a GPU can show, in one command: correctness, speed, memory, and a training with its scores.

    python scripts/gpu_report.py --minutes 8 --output FOLDER     about eight minutes on one CUDA device
    python scripts/gpu_report.py --minutes 40                    more networks, crops and compiled forms
    python scripts/gpu_report.py --tiny                          the same on the CPU with toy sizes, to test the script
    python scripts/gpu_report.py --part layer --part steps       some parts

Needs the package or a checkout with PYTHONPATH, torch, and CuPy for the kernels; what else is missing is named, and the
parts that need it are left out. Each part is a process of its own with a budget of time: it measures what matters most
first, and what it has no time for is named. Every figure is printed, and stored in FOLDER/gpu.json, when it is known.
"""

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import platform
import re
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
CROPS = {"resnet50": (4, 512), "resnext101": (4, 512), "wider_resnet38": (3, 512)}  # images a GPU, as in the paper
# Channels, extent and group size of figure 4's modules, at the paper's batch of 32.
FIGURE4 = ((32, 128, 56, 56), (32, 256, 28, 28), (32, 512, 14, 14), (32, 1024, 7, 7))
CARD = 12e9  # bytes of the paper's cards
LARGEST_LINES = 80
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


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError
TOY = ["trainer.max_steps=4", "dataset.scenes=6", "dataset.val_scenes=2", "augmentation.crop_size=[64,96]",
       "augmentation.scale=[0.3,0.5]", "model.backbone=resnet18", "model.head_channels=8"]  # fmt: skip


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


# ------------------------------------------------------------------------------------------------ 3. whole steps


class Form(NamedTuple):
    """One way to train: norm, recompute, keep, and the compiler's memory budget (None: not compiled)."""

    name: str
    norm: str = "inplace_abn"
    recompute: str = "none"
    keep: str = "exact"
    compiled: float | None = None


FORMS = (
    Form("standard", "batch_norm"), Form("in place"), Form("8 bits", keep="8bit"),
    Form("standard, compiled at 0.3", "batch_norm", compiled=0.3), Form("4 bits", keep="4bit"),
    Form("standard, checkpointed blocks", "batch_norm", "blocks"), Form("grouped", recompute="grouped"),
    Form("identity_input", recompute="identity_input"), Form("both", recompute="both"),
    Form("in place, checkpointed blocks", recompute="blocks"),
)  # fmt: skip


class Step:
    """A network, its optimizer, and one step of both on random images."""

    def __init__(self, backbone: str, form: Form, size: tuple[int, int], dtype: str, budget: Budget) -> None:
        from segtrain.losses import CrossEntropy
        from segtrain.models.build import build_model

        torch.manual_seed(0)
        small = {"head_channels": 16} if budget.tiny else {}
        network: nn.Module = build_model(
            backbone, num_classes=19, output_stride=8, norm=form.norm, recompute=form.recompute, keep=form.keep, **small
        ).to(budget.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
        if form.compiled is not None:
            importlib.import_module("torch._functorch.config").activation_memory_budget = form.compiled
            network = torch.compile(network, dynamic=False)
        self.network, self.loss, self.device, self.dtype = network, CrossEntropy(), budget.device, DTYPES[dtype]
        batch, side = size
        self.images = torch.randn(batch, 3, side, side, device=budget.device).to(memory_format=torch.channels_last)
        self.target = torch.randint(0, 19, (batch, side, side), device=budget.device)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.network(self.images, upsample=False)
        (self.loss(logits, self.target).sum() / self.target.numel()).backward()
        self.optimizer.step()


def steps(budget: Budget) -> Iterator[Row]:
    """Time and memory of whole steps; float32 convolutions use TF32, as PyTorch's default does."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    names = ["resnet18"] if budget.tiny else list(CROPS)
    base: dict[tuple[str, str], Row] = {}
    for backbone, dtype, form in product(names, ("bf16", "fp32")[: 1 if budget.tiny else 2], FORMS):
        size = (2, 33) if budget.tiny else CROPS[backbone]
        if form.compiled is not None and (budget.tiny or (backbone != "resnet50" and not budget.long)):
            continue
        if budget.left() < 15 and not budget.tiny:
            yield {"step": f"{backbone} {dtype}, {form.name}", "left out": "no time"}
            continue
        row: Row = {"step": backbone, "dtype": dtype, "form": form.name, "batch": f"{size[0]} x {size[1]}^2"}
        release()
        try:
            row |= timed_step(Step(backbone, form, size, dtype, budget), size[0], budget)
        except Exception as error:  # noqa: BLE001
            yield row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
            continue
        first = base.setdefault((backbone, dtype), row)
        yield row | {f"{key} over {first['form']}": row[key] / first[key] for key in ("ms", "peak MiB") if first[key]}
    if budget.device == "cuda" and budget.left() > 15:
        yield from captured(budget)


def timed_step(step: Step, batch: int, budget: Budget) -> Row:
    """Peak memory is that above what exists between two steps; reserved memory is the allocator's."""
    step()  # compiles kernels, chooses convolutions, makes the momentum
    step()
    peak = reserved = 0.0
    if budget.device == "cuda":
        synchronise(budget.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronise(budget.device)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        reserved = torch.cuda.max_memory_reserved() / 2**20
    seconds = seconds_of(step, lambda: None, budget, 8)
    return {"ms": 1e3 * seconds, "images/s": batch / seconds, "peak MiB": peak, "reserved MiB": reserved}


def captured(budget: Budget) -> Iterator[Row]:
    """A ResNet-50 step in a CUDA graph: whether it can be captured, its time, and whether the weights agree."""
    for form in (FORMS[0], FORMS[1]):
        row: Row = {"CUDA graph": f"resnet50 bf16, {form.name}"}
        release()
        try:
            step = Step("resnet50", form, CROPS["resnet50"], "bf16", budget)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            plain = seconds_of(step, lambda: None, budget, 8)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            yield row | {"over uncaptured": seconds_of(graph.replay, lambda: None, budget, 8) / plain}
        except Exception as error:  # noqa: BLE001
            yield row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}


# ------------------------------------------------------------------------------------------------ 4. crops


def crops(budget: Budget) -> Iterator[Row]:
    """The largest batch of 512 x 512 that trains within 12 GB, the context included, as on the paper's cards."""
    if budget.device == "cuda":
        torch.cuda.init()
        context = 500e6  # of CUDA and cuDNN, which the allocator does not see
        torch.cuda.set_per_process_memory_fraction((CARD - context) / torch.cuda.get_device_properties(0).total_memory)
    names = ["resnet18"] if budget.tiny else ["resnext101", "wider_resnet38"]
    for backbone, name in product(names, ("standard", "in place", "8 bits", "both", "4 bits")):
        form = next(one for one in FORMS if one.name == name)
        if budget.left() < 20 and not budget.tiny:
            yield {"largest batch": f"{backbone}, {name}", "left out": "no time"}
            continue
        yield {"largest batch": f"{backbone}, {name}", "images of 512^2 in 12 GB": largest(backbone, form, budget)}


def largest(backbone: str, form: Form, budget: Budget) -> int:
    """By doubling, then halving the interval."""
    if budget.tiny:
        return 2 * fits(backbone, form, 2, budget)
    good, bad = 0, 1
    while fits(backbone, form, bad, budget):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(backbone, form, middle, budget) else (good, middle)
    return good


def fits(backbone: str, form: Form, batch: int, budget: Budget) -> bool:
    release()
    torch.backends.cudnn.benchmark = False
    try:
        step = Step(backbone, form, (batch, 33 if budget.tiny else 512), "fp32", budget)
        step()
        step()
        synchronise(budget.device)
    except OUT_OF_MEMORY:
        return False
    return True


# ------------------------------------------------------------------------------------------------ 5. the main job


def job(budget: Budget) -> Iterator[Row]:
    """Trainings by the command line on this device and on the CPU, resumed ones, and the scores of both."""
    for name in ("hydra", "albumentations"):
        importlib.import_module(name)
    output = Path(os.environ["GPU_REPORT"]) / "runs"
    size = TOY if budget.tiny else []
    runs = {}
    for where in dict.fromkeys((budget.device, "cpu")):
        run = output / f"toy-{where}"
        seconds, status, text = command(["train", "experiment=toy", f"run={run}", f"device={where}", *size], budget)
        if status:
            yield {"training": where, "failed": text.strip().splitlines()[-1] if text.strip() else f"status {status}"}
            return
        losses = [row["train/loss"] for row in log_of(run) if "train/loss" in row]
        runs[where] = run
        yield {"training": where, "seconds": seconds, "first loss": losses[0], "last loss": losses[-1],
               "mIoU %": 100 * json.loads((run / "evaluation.json").read_text())["miou"]}  # fmt: skip
    for where in runs:
        seconds, status, text = command(
            ["evaluate", f"run={runs[budget.device]}", f"device={where}", f"output={output / f'scores-{where}'}"],
            budget,
        )
        found = next((output / f"scores-{where}").rglob("evaluation.json"), None)
        score = json.loads(found.read_text())["miou"] if found else math.nan
        yield {"evaluation": where, "mIoU %": 100 * score, "seconds": seconds, **({"failed": text} if status else {})}
    seconds, status, text = command(
        ["verify-resume", "experiment=toy", f"device={budget.device}", "trainer.deterministic=true",
         f"output={output / 'resumed'}", *size], budget)  # fmt: skip
    last = text.strip().splitlines()[-1] if text.strip() else ""
    yield {"resumed on": budget.device, "seconds": seconds, "status": status, "verdict": last}


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


def log_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ 6. one step's time


KINDS = (
    ("in-place ABN", r"abn|segtrain|normalise|sums|gradient"), ("batch norm", r"batch_norm|bn_"),
    ("convolution", r"conv|cudnn|gemm|cutlass|xmma|wgrad|dgrad|implicit"), ("copies", r"memcpy|memset|copy"),
    ("optimizer", r"multi_tensor|sgd|foreach"),
)  # fmt: skip


def profile(budget: Budget) -> Iterator[Row]:
    """Shares of device time by kind of kernel, and the device's idle share between the kernels of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    activities = [ProfilerActivity.CUDA if budget.device == "cuda" else ProfilerActivity.CPU]
    for form in FORMS[:3]:
        release()
        size = (2, 33) if budget.tiny else CROPS["resnet50"]
        step = Step("resnet18" if budget.tiny else "resnet50", form, size, "bf16", budget)
        for _ in range(3):
            step()
        synchronise(budget.device)
        with recorded(activities=activities) as prof:
            step()
            synchronise(budget.device)
        spans = [(event.time_range.start, event.time_range.end, event.name) for event in prof.events()
                 if budget.tiny or event.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
        yield {"profile": form.name, **shares(spans)}


def shares(spans: list[tuple[float, float, str]]) -> Row:
    """spans: (start, end, name) in microseconds."""
    if not spans:
        return {"failed": "no kernels were recorded"}
    times = dict.fromkeys([name for name, _ in KINDS] + ["other"], 0.0)
    for start, end, name in spans:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        times[kind] += end - start
    busy, reached = 0.0, -math.inf
    for start, end, _ in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole, total = reached - min(start for start, _, _ in spans), sum(times.values())
    return {f"{kind} %": 100 * value / total for kind, value in times.items()} | {
        "idle %": 100 * (1 - busy / whole), "ms": whole / 1e3, "kernels": len(spans),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the report


# In order of value, with their shares of the time.
PARTS: dict[str, tuple[Callable[[Budget], Iterator[Row]], float]] = {
    "selftest": (selftest, 0.2), "layer": (layer, 0.17), "steps": (steps, 0.3), "job": (job, 0.15),
    "crops": (crops, 0.14), "profile": (profile, 0.04),
}  # fmt: skip


def in_words(row: Row) -> str:
    """The row as one line."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return " | ".join(f"{key} {shown(value)}" for key, value in row.items() if value not in ("", []))


def run_part(name: str, options: argparse.Namespace) -> None:
    """In a process of its own: print each row, and add it to the part's file."""
    budget = Budget(options.device, options.tiny, options.minutes > 20, time.monotonic() + options.seconds)
    try:
        for row in PARTS[name][0](budget):
            add_row(options.output / f"{name}.jsonl", name, row)
    except ModuleNotFoundError as error:
        add_row(options.output / f"{name}.jsonl", name, {"left out": f"{error.name} is not installed"})


def add_row(path: Path, name: str, row: Row) -> None:
    print(f"{name:9s} {in_words(row)}", flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def machine(device: str) -> Row:
    found: Row = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    with contextlib.suppress(ImportError):
        found["cupy"] = importlib.import_module("cupy").__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda,
                  "processors": properties.multi_processor_count}  # fmt: skip
    return found


def gather(output: Path, parts: list[str], about: Row) -> dict[str, Any]:
    """All rows so far, which gpu.json then holds."""
    content: dict[str, Any] = {"machine": about}
    for name in parts:
        path = output / f"{name}.jsonl"
        content[name] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    temporary = output / ".gpu.json.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(output / "gpu.json")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--output", type=Path, default=Path("segtrain-out/gpu-report"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--part", action="append", choices=list(PARTS), default=[])
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # of a part, in its own process
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    options.output = options.output.absolute()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu_report: torch sees no CUDA device here; --tiny runs every part on the CPU with toy sizes\n")
    if options.seconds is not None:
        run_part(options.part[0], options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    parts = options.part or list(PARTS)
    about = machine(options.device)
    print(f"machine   {in_words(about)}", flush=True)
    ends = time.monotonic() + 60 * options.minutes
    for number, name in enumerate(parts):
        (options.output / f"{name}.jsonl").unlink(missing_ok=True)
        left = max(0.0, ends - time.monotonic())
        seconds = left if options.tiny else left * PARTS[name][1] / sum(PARTS[other][1] for other in parts[number:])
        run_in_process(name, seconds, options)
        gather(options.output, parts, about)
    summary(gather(options.output, parts, about), parts)
    print(f"stored    {options.output / 'gpu.json'}", flush=True)


def run_in_process(name: str, seconds: float, options: argparse.Namespace) -> None:
    """A failing part, also one that breaks the device for its process, is named and passed over."""
    words = [sys.executable, __file__, "--part", name, "--seconds", f"{seconds:.0f}", "--minutes", str(options.minutes),
             "--output", str(options.output), *(["--tiny"] if options.tiny else [])]  # fmt: skip
    environment = {**os.environ, "GPU_REPORT": str(options.output)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    try:
        answer = subprocess.run(words, env=environment, stderr=subprocess.PIPE, text=True, timeout=seconds + 60)
        fault = f"exit status {answer.returncode}: {answer.stderr.strip()[-300:]}" if answer.returncode else ""
    except subprocess.TimeoutExpired:
        fault = f"ended after {seconds + 60:.0f} s"
    if fault:
        add_row(options.output / f"{name}.jsonl", name, {"failed": fault})


def summary(content: dict[str, Any], parts: list[str]) -> None:
    """At most 80 lines, the first rows of each part, what failed before all else."""
    rows = [(name, row) for name in parts for row in content[name]]
    bad = [(name, row) for name, row in rows if row.get("failed") or row.get("good") is False]
    share = max(3, (LARGEST_LINES - 4 - min(len(bad), 20)) // len(parts))
    print(f"\n{'=' * 40} {len(rows)} rows, {len(bad)} failed", flush=True)
    for name, row in bad[:20]:
        print(f"FAILED {name}: {in_words(row)[:200]}")
    for name in parts:
        for row in [row for row in content[name] if "left out" not in row][:share]:
            print(f"{name:9s} {in_words(row)[:200]}", flush=True)


if __name__ == "__main__":
    main()
