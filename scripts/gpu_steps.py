"""Parts of scripts/gpu_report.py: whole steps, the largest batches in 12 GB, and the profile of a step."""

import importlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_layer import DTYPES, Budget, Row, command, release, seconds_of, synchronise
from torch import nn

CROPS = {"resnet50": (4, 512), "resnext101": (4, 512), "wider_resnet38": (3, 512)}  # images a GPU, as in the paper
CARD = 12e9  # bytes of the paper's cards
PLANNED = ("batch_norm", "inplace_abn", "inplace_abn+8bit", "inplace_abn+both", "inplace_abn+4bit")
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError


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


def forms_of(backbone: str) -> list[Form]:
    """Those that the backbone can be trained in."""
    forms = list(FORMS)
    if not backbone.startswith("resnext"):  # without grouped convolutions
        forms = [form for form in forms if form.recompute not in ("grouped", "both")]
    if not backbone.startswith(("resnext", "wider")):  # without sums that are nothing but a convolution and the input
        forms = [form for form in forms if form.recompute != "identity_input"]
    return forms


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
    each = ((b, dtype, form) for b in names for dtype in ("bf16", "fp32") for form in forms_of(b))
    for backbone, dtype, form in each:
        if budget.tiny and dtype == "fp32":
            continue
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
    for backbone in names:
        yield planned(backbone, budget)
    wanted = ("standard", "in place", "8 bits", "both", "identity_input", "4 bits")
    each = ((backbone, form) for backbone in names for form in forms_of(backbone) if form.name in wanted)
    for backbone, form in each:
        if budget.left() < 20 and not budget.tiny:
            yield {"largest batch": f"{backbone}, {form.name}", "left out": "no time"}
            continue
        yield {"largest batch": f"{backbone}, {form.name}", "images of 512^2 in 12 GB": largest(backbone, form, budget)}


def planned(backbone: str, budget: Budget) -> Row:
    """What `segtrain plan` says of one such card, which takes no GPU. Of --tiny, whether it takes these words."""
    output = Path(os.environ["GPU_REPORT"]) / f"plan-{backbone}"
    words = [f"model.backbone={backbone}", f"output={output}", "trainer.batch_size=2", "plan.device_memory=12GB"]
    words += ["--cfg", "job"] if budget.tiny else []
    seconds, status, text = command(["plan", "experiment=cityscapes_resnext101_std_16x512", *words], budget)
    row: Row = {"planned": backbone, "seconds": seconds}
    if budget.tiny and not status:
        return row
    if not (output / "plan.json").is_file():
        return row | {"failed": text.strip().splitlines()[-1] if text.strip() else f"status {status}"}
    most = json.loads((output / "plan.json").read_text())["max_batch"]
    return row | {name: most[name] for name in PLANNED if name in most}


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
