"""The layer's time relative to torch's BatchNorm2d + LeakyReLU(0.01, inplace=True), measured alternately."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from segtrain.abn import operators
from segtrain.abn.backends import cupy
from segtrain.abn.modules import InPlaceABN
from segtrain.abn.operators import resolve, use_backend

HOST_SHAPE, CALLS = (2, 64, 4, 4), 20  # calls of a round
SHAPES = ((8, 64, 128, 128), (2, 256, 96, 96), (2, 1024, 48, 48))


class Standard(nn.Sequential):
    """The usual pair of layers, whose time is the unit of all ratios."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.LeakyReLU(0.01, inplace=True))


class Clock:
    """Seconds of what runs inside `with`, on the CPU or between two CUDA events.

    host: by the clock on the wall. processor: of all threads of the process, which other programs disturb less.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []

    def __enter__(self) -> "Clock":
        if self.cuda:
            torch.cuda.synchronize()
            self.events[0].record()
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.host = self.seconds = time.perf_counter() - self.began[0]
        self.processor = time.process_time() - self.began[1]
        if self.cuda:
            self.events[1].record()
            torch.cuda.synchronize()
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1000


def pass_times(
    backend: str, layer: Callable[[Tensor], Tensor], x: Tensor, dz: Tensor, device: str
) -> tuple[float, float, float]:
    """Seconds of (forward, backward, the host for both). The layer gets a tensor that it may overwrite."""
    use_backend(backend)
    resolve(device)
    source = x.detach().requires_grad_() + 0
    with Clock(device) as forward:
        z = layer(source)
    with Clock(device) as backward:
        z.backward(dz)
    return forward.seconds, backward.seconds, forward.host + backward.host


def medians(candidates: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int) -> dict[str, list[float]]:
    """Each candidate's medians over interleaved rounds, the first two left out."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    for _ in range(rounds + 2):
        for name, run in candidates.items():
            found[name].append(run())
    return {name: [statistics.median(column) for column in zip(*rows[2:], strict=True)] for name, rows in found.items()}


def host_table(rounds: int = 200) -> Iterator[str]:
    """Lines of text: microseconds of the host for a call of the layer, by every back end, over torch's pair of layers.

    On a tensor so small that the CPU computes next to nothing. cupy: with launches that do nothing, whose real cost
    needs a device, and counted. Sets the back end to "auto".
    """
    x = torch.randn(HOST_SHAPE)
    dz, launch = torch.randn_like(x), cupy.launch
    launches: list[str] = []

    def passes(backend: str, layer: nn.Module) -> tuple[float, ...]:
        operators.use_backend(backend if backend == "native" else "aten")
        if backend == "cupy":
            operators.resolved["cpu"], cupy.launch = cupy, lambda kernel, *_: launches.append(kernel.function)
        found = []
        try:
            for _ in range(CALLS):
                source = x.detach().requires_grad_() + 0
                with Clock("cpu") as forward:
                    z = layer(source)
                with Clock("cpu") as backward:
                    z.backward(dz)
                found.append((forward.seconds, backward.seconds))
        finally:
            cupy.launch = launch
        return tuple(statistics.median(column) for column in zip(*found, strict=True))

    candidates: dict[str, nn.Module] = {"torch": Standard(x.shape[1]), "cupy": InPlaceABN(x.shape[1])}
    if reason := operators.BACKENDS["native"].available():
        yield f"native cannot run here: {reason}"
    for name in ("aten",) if reason else ("native", "aten"):
        candidates[name] = InPlaceABN(x.shape[1])
    try:
        found = medians({name: partial(passes, name, layer) for name, layer in candidates.items()}, rounds)
    finally:
        use_backend("auto")
    yield f"host time of one call on {' x '.join(map(str, x.shape))}, over BatchNorm2d + LeakyReLU in place"
    base = sum(found["torch"])
    for name, (forward, backward) in found.items():
        line = f"{name:7s} forward {1e6 * forward:5.1f} us, backward {1e6 * backward:5.1f} us, together "
        yield line + f"{(forward + backward) / base:.2f}"
    yield f"cupy launches a call: {len(launches) / ((rounds + 2) * CALLS):g} ({', '.join(dict.fromkeys(launches))})"


def layer_table(device: str, rounds: int = 20) -> Iterator[str]:
    """Lines of text: the time of the layer, with every back end that runs here, over BatchNorm2d + LeakyReLU in place.

    On a CUDA device also the bandwidth, for 8 passes over the tensor, and the host's time for forward and backward.
    Sets the back end to "auto".
    """
    backends = []
    for name in ("cupy", "aten") if device == "cuda" else ("native", "aten"):
        try:
            use_backend(name)
            backends.append(name)
        except RuntimeError as error:
            yield str(error)
    yield "shape, layout: total (forward / backward) over BatchNorm2d + LeakyReLU in place"
    for shape in SHAPES:
        for layout, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "channels_last")):
            x, dz = (torch.randn(shape, device=device).to(memory_format=layout) for _ in range(2))
            standard = Standard(shape[1]).to(device)
            candidates = {"standard": partial(pass_times, "aten", standard, x, dz, device)}
            for backend in backends:
                layer = InPlaceABN(shape[1]).to(device)
                candidates[backend] = partial(pass_times, backend, layer, x, dz, device)
            found = medians(candidates, rounds)
            base = found["standard"]
            line = f"{shape} {name:14s} standard {1e3 * (base[0] + base[1]):7.2f} ms"
            for backend, (forward, backward, host) in list(found.items())[1:]:
                total = (forward + backward) / (base[0] + base[1])
                line += f" | {backend} {total:.2f} ({forward / base[0]:.2f} / {backward / base[1]:.2f})"
                if device == "cuda":
                    line += f" {8 * x.nbytes / (forward + backward) / 1e9:.0f} GB/s, host {1e6 * host:.0f} us"
            yield line
    use_backend("auto")
