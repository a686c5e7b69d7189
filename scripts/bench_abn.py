#!/usr/bin/env python
"""Time and memory of In-Place ABN, as ratios to torch's BatchNorm2d + LeakyReLU(0.01, inplace=True).

    python scripts/bench_abn.py              the layer: every back end, three shapes, both memory layouts
    python scripts/bench_abn.py --host       the host's own time for a call, with launches on a device left out
    python scripts/bench_abn.py --figure4    norm + activation + convolution in the paper's five forms, with kept bytes
    python scripts/bench_abn.py --step       a whole training step of ResNet-50 + DeepLabV3
    python scripts/bench_abn.py --peak       peak memory and time of such a step, each in its own process
    python scripts/bench_abn.py --kept       bytes kept by a training step of the paper's networks, saving by saving
    python scripts/bench_abn.py --precision  errors against float64 for scales from 1 to 0.001

Candidates take turns within one run; figures are medians. On a CUDA device, times are measured by events, and the table
of the layer adds bandwidth and host time per call.

--page-faults removed raises the allocator's limits (glibc: MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) for all
candidates, so that a new output tensor causes no page faults.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from segtrain import abn
from segtrain.abn import ABN, BatchNormAct, InPlaceABN, RecomputedABN, ScaledABN, recomputed_outputs
from segtrain.abn.benchmark import Clock, Standard, host_table, layer_table, medians
from segtrain.errors import UsageError
from segtrain.losses import CrossEntropy
from segtrain.models.blocks import Norm
from segtrain.models.deeplabv3 import DeepLabV3
from segtrain.models.memory import REBUILT, SAVINGS, Allocations, training_step_bytes, training_step_costs
from segtrain.models.resnet import resnet50
from segtrain.models.segmenter import Segmenter

LARGE = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
# Channels and extent of the 3x3 convolutions in ResNeXt-101's four modules at 224 x 224 (64 groups), and the overhead
# in percent that the paper's figure 4 gives for In-Place ABN and for checkpointing, at batch 32 on a Titan Xp.
FIGURE4 = (
    ("Conv1", 128, 56, 1.8, 4.0), ("Conv2", 256, 28, 2.0, 3.7), ("Conv3", 512, 14, 1.6, 3.1),
    ("Conv4", 1024, 7, 0.8, 1.2),
)  # fmt: skip


class Block(nn.Module):
    """Norm, activation, 3x3 grouped convolution. The norm overwrites its input."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(x))
        return out


FORMS: dict[str, Callable[[int], nn.Module]] = {
    "standard": Standard,
    "in-place I": InPlaceABN,
    "in-place II": lambda c: InPlaceABN(c, variant="two"),
    "checkpointing": lambda c: RecomputedABN(c, keep="input"),
    "proposed checkpointing": lambda c: RecomputedABN(c, keep="normalised"),
}


def kept_maps(make: Callable[[int], nn.Module], channels: int, extent: int) -> float:
    """Full-size tensors that norm, activation and convolution keep for backward, without the output."""
    block = Block(make(channels), channels)
    x = torch.randn(2, channels, extent, extent, requires_grad=True)
    with recomputed_outputs(), Allocations() as allocations:
        out = block(x + 0)
        kept = allocations.alive() - out.nbytes
    return round(kept / x.nbytes, 1)


def figure4(device: str, rounds: int, batch: int) -> None:
    print(f"norm + activation + convolution, forward + backward, batch {batch}: percent over standard")
    names = "".join(f"{name:>26s}" for name in list(FORMS)[1:])
    print(f"{'':8s}{'standard':>12s}{names}{'paper: I, checkpointing':>28s}")
    kept = [kept_maps(make, 128, 56) for make in FORMS.values()]
    print(
        f"{'kept':8s}{kept[0]:10.1f} x" + "".join(f"{maps:24.1f} x" for maps in kept[1:]) + "   the size of the input"
    )
    for name, channels, extent, in_place, checkpointing in FIGURE4:
        x = torch.randn(batch, channels, extent, extent, device=device)
        candidates = {}
        for form, make in FORMS.items():
            block = Block(make(channels), channels).to(device)

            def run(block: nn.Module = block, x: Tensor = x) -> tuple[float, ...]:
                with recomputed_outputs():
                    source = x.detach().requires_grad_() + 0
                    with Clock(device) as forward:
                        out = block(source)
                dz = torch.ones_like(out)
                with Clock(device) as backward:
                    out.backward(dz)
                return (forward.seconds + backward.seconds,)

            candidates[form] = run
        found = {form: values[0] for form, values in medians(candidates, rounds).items()}
        base = found["standard"]
        line = f"{name:8s}{1e3 * base:9.2f} ms"
        for form in list(FORMS)[1:]:
            line += f"{100 * (found[form] / base - 1):+24.1f} %"
        print(f"{line}{in_place:+18.1f}, {checkpointing:+.1f} %", flush=True)
        ratio = found["proposed checkpointing"] / found["in-place I"]
        print(f"{'':8s}proposed checkpointing takes {ratio:.3f}x the time of in-place I")


def deeplab(norm: str, recompute: str = "none") -> Segmenter:
    """ResNet-50 + DeepLabV3 with 19 classes at stride 8."""
    layers = Norm(norm)
    return Segmenter(resnet50(layers, 8), DeepLabV3(2048, 256, layers, 8), 256, 19, recompute)


# norm, model.recompute, whether the loss is segtrain's (else torch's upsampling and cross-entropy)
STEPS = {
    "standard": ("batch_norm", "none", False),
    "in-place": ("inplace_abn", "none", False),
    "in-place, our loss": ("inplace_abn", "none", True),
    "checkpointed blocks": ("batch_norm", "blocks", False),
}


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor, our_loss: bool
) -> None:
    optimizer.zero_grad(set_to_none=True)
    if our_loss:
        loss = CrossEntropy()(model(images, upsample=False), target).sum() / target.numel()
    else:
        loss = nn.functional.cross_entropy(model(images), target, ignore_index=255)
    loss.backward()
    optimizer.step()


def made(name: str, device: str, layout: torch.memory_format) -> Callable[[int], tuple[float, ...]]:
    """A function of the image size that trains one step and returns its time in seconds."""
    torch.manual_seed(0)
    norm, recompute, our_loss = STEPS[name]
    model = deeplab(norm, recompute).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def run(size: int) -> tuple[float, ...]:
        images = torch.randn(2, 3, size, size, device=device).to(memory_format=layout)
        target = torch.randint(0, 19, (2, size, size), device=device)
        with Clock(device) as clock:
            train_step(model, optimizer, images, target, our_loss)
        return (clock.seconds,)

    return run


def step_table(device: str, rounds: int, size: int) -> None:
    print(f"training step of ResNet-50 + DeepLabV3, 2 x {size} x {size}, over standard")
    for layout in (torch.contiguous_format, torch.channels_last):
        found = medians({name: partial(made(name, device, layout), size) for name in STEPS}, rounds)
        base = found["standard"][0]
        line = f"{'NCHW' if layout == torch.contiguous_format else 'channels_last':14s} standard {base:.2f} s"
        print(line + "".join(f" | {name} {value[0] / base:.3f}" for name, value in list(found.items())[1:]), flush=True)


def one_peak(name: str, device: str, size: int) -> None:
    """Print as JSON: peak bytes of one step above what exists before it (model, gradients, momentum), and seconds."""
    run = made(name, device, torch.contiguous_format)
    run(64)  # allocates momentum and everything else that is allocated once
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, seconds = torch.cuda.memory_allocated(), run(size)[0]
        print(json.dumps([torch.cuda.max_memory_allocated() - before, seconds]))
        return
    ctypes.CDLL(None).malloc_trim(0)  # return free memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak resident size
    before = resident("VmRSS")
    seconds = run(size)[0]
    print(json.dumps([resident("VmHWM") - before, seconds]))


def resident(field: str) -> int:
    """Resident bytes now (VmRSS), or their peak since the last reset (VmHWM). Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def peak_table(device: str, rounds: int, size: int) -> None:
    print(f"peak memory of one training step of ResNet-50 + DeepLabV3, 2 x {size} x {size}, each in its own process")
    found: dict[str, list[list[float]]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name in STEPS:
            command = [sys.executable, __file__, "--one-peak", name, "--device", device, "--size", str(size)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    base = middle["standard"]
    for name, (size_bytes, seconds) in middle.items():
        print(
            f"{name:20s} {size_bytes / 2**20:7.0f} MiB ({size_bytes / base[0]:.2f})  {seconds:.2f} s "
            f"({seconds / base[1]:.2f})"
        )


def kept_table() -> None:
    print("kept for backward by a training step at stride 8 with 19 classes, on fake tensors")
    for backbone, batch in (("resnext101", 4), ("wider_resnet38", 5), ("resnet50", 4)):
        kept = [training_step_bytes(saving, backbone, CrossEntropy(), batch, (512, 512)) for saving in SAVINGS]
        for saving, size in zip(SAVINGS, kept, strict=True):
            print(f"{backbone} {batch} x 512 x 512  {saving.name:44s}{size / 2**30:6.2f} GiB  {size / kept[0]:.3f}")
        rebuilt_table(backbone, batch, kept[0])


def rebuilt_table(backbone: str, batch: int, standard: int) -> None:
    """Exact rebuilding, in float32 and by autocast to bfloat16, with its FLOPs and its peak in backward."""
    for dtype in (torch.float32, torch.bfloat16):
        flops = None
        for saving in (SAVINGS[3], *REBUILT):
            try:
                costs = training_step_costs(saving, backbone, CrossEntropy(), batch, (512, 512), dtype)
            except UsageError:  # the backbone has no such blocks
                continue
            flops = flops or costs.flops
            print(
                f"{backbone} {batch} x 512 x 512  {str(dtype)[6:]:9s}{saving.name:40s}{costs.kept / 2**30:6.2f} GiB  "
                f"{costs.kept / standard:.3f}  peak {costs.peak / 2**30:.2f} GiB  FLOPs {costs.flops / flops - 1:+.1%}",
                flush=True,
            )


def precision_table(device: str) -> None:
    print("norm-wise relative error against float64 (ours / BatchNorm + LeakyReLU), shift -0.5 to 0.5, 16 channels")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for correlated in (False, True):
            for scale in (1, 0.3, 0.1, 0.01, 0.001):
                rows = [errors(device, dtype, scale, correlated, kind) for kind in (InPlaceABN, BatchNormAct)]
                cells = [
                    f"{what} {a:.1e} / {b:.1e}"
                    for what, a, b in zip(("z", "dx", "dscale", "dshift"), *rows, strict=True)
                ]
                print(
                    f"{str(dtype)[6:]:9s} {'correlated  ' if correlated else 'uncorrelated'} scale {scale:<6}", *cells
                )


def errors(device: str, dtype: torch.dtype, scale: float, correlated: bool, kind: type[ABN]) -> list[float]:
    """Errors of z, dx, dscale and dshift, for a gradient of noise, or of noise plus the normalised input."""
    torch.manual_seed(0)
    x = torch.randn(8, 16, 24, 24).to(dtype)
    xhat = nn.functional.batch_norm(x.float(), None, None, training=True)
    dz = (torch.randn(x.shape) + (xhat if correlated else 0)).to(dtype)
    found = []
    for layer, leaf, gradient in (
        (ScaledABN(16).double(), x.double(), dz.double()),
        (kind(16).to(device), x.clone().to(device), dz.to(device)),
    ):
        with torch.no_grad():
            layer.weight.fill_(scale + layer.eps if type(layer) is BatchNormAct else scale)
            layer.bias.copy_(torch.linspace(-0.5, 0.5, 16))
        leaf.requires_grad_()
        z = layer(leaf * 1)
        z.backward(gradient)
        found.append([t.detach().cpu().double() for t in (z, leaf.grad, layer.weight.grad, layer.bias.grad)])
    return [((b - a).norm() / a.norm()).item() for a, b in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("host", "figure4", "step", "peak", "kept", "precision"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--one-peak", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="repeats of every figure (default 20, 10 for a step, 3 for a peak)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--size", type=int, default=256, help="height and width of the images of a step in pixels")
    parser.add_argument("--batch", type=int, default=8, help="batch of --figure4; the paper's is 32")
    parser.add_argument("--page-faults", choices=["kept", "removed"], default="kept")
    options = parser.parse_args()
    if options.page_faults == "removed" and any(os.environ.get(key) != value for key, value in LARGE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **LARGE})
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    if options.one_peak:
        one_peak(options.one_peak, device, options.size)
        return
    what = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{what}, torch {torch.__version__}, page faults {options.page_faults}, {abn.describe_backend(device)}")
    if options.host:
        for line in host_table(options.rounds or 100):
            print(line, flush=True)
    elif options.figure4:
        figure4(device, options.rounds or 20, options.batch)
    elif options.step:
        step_table(device, options.rounds or 10, options.size)
    elif options.peak:
        peak_table(device, options.rounds or 3, options.size)
    elif options.kept:
        kept_table()
    elif options.precision:
        precision_table(device)
    else:
        for line in layer_table(device, options.rounds or 20):
            print(line, flush=True)


if __name__ == "__main__":
    main()
