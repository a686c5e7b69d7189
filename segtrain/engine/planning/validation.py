"""What validation needs: whole images, tiles, scales and flips, traced on fake tensors."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from segtrain.config import InferenceConfig, TrainConfig, classifies
from segtrain.engine.planning.solve import Line, Needs, largest
from segtrain.engine.planning.trace import granule_of, kind_of_device
from segtrain.models import from_config
from segtrain.models.ledger import Ledger, bytes_of, on_fake_tensors
from segtrain.models.precision import PRECISIONS
from segtrain.models.preprocess import normalise_images
from segtrain.scoring.inference import ALIGNED, Cells, all_views, fused, strip_rows

MANY_SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


class Inference(NamedTuple):
    """One way to validate an image, and the bytes it takes beside the weights. overrides: words that choose it."""

    name: str
    overrides: list[str]
    peak: int


class InferenceTracer:
    """Predicts images with one network on fake tensors, and counts. weights: bytes of parameters and buffers."""

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.model = config.model
        self.num_classes = num_classes
        self.granule = granule_of(kind_of_device(config))
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.network: nn.Module = from_config(replace(config.model, backend="auto"), num_classes)
        with self.mode:
            on_fake_tensors(self.network)
        self.network.eval()
        self.there = [*self.network.parameters(), *self.network.buffers()]
        self.weights = bytes_of(self.there, self.granule)
        self.peaks: dict[tuple[tuple[int, int], str], int] = {}  # that were traced

    def peak(self, size: tuple[int, int], options: InferenceConfig) -> int:
        """Most bytes alive beside the weights, for a batch of images of that size [height, width]."""
        key = size, repr(options)
        if key not in self.peaks:
            self.peaks[key] = self.traced(size, options)
        return self.peaks[key]

    def traced(self, size: tuple[int, int], options: InferenceConfig) -> int:
        areas: list[int] = []

        def outline(window: Tensor) -> Tensor:
            cells = [-(-extent // self.model.output_stride) for extent in window.shape[-2:]]
            areas.append(window.numel())
            return torch.empty(len(window), self.num_classes, *cells)

        together = options.together()
        with self.mode, torch.no_grad():
            all_views(outline, torch.empty(together, self.model.in_channels, *size), options)
        widest, left = max(areas), 2  # the second of several windows finds the logits of the first

        def network(window: Tensor) -> Tensor:
            nonlocal left
            if window.numel() < widest or left == 0:
                return outline(window)
            left -= 1
            ready = normalise_images(window, self.model.mean, self.model.std)
            with autocast_of(options):
                logits: Tensor = self.network(ready, upsample=False).float()
            return logits

        ledger = Ledger(self.granule, self.there, self.granule == 1)
        with self.mode, torch.no_grad(), ledger:
            ledger.begin("inference")
            images = torch.empty(together, self.model.in_channels, *size, dtype=torch.uint8)
            views = [one[0] for one in all_views(network, images, options)]  # the classes of an image at a time
            rows = min(size[0], 2 * strip_rows(views[0], size[1]))  # a third strip finds what the second has found
            rest = torch.empty(size[0] - rows, size[1], dtype=torch.uint8)  # of the classes
            fused([Cells(one, 0, one.shape[1]) for one in views], (rows, size[1]), (0, rows))
            del rest
        return ledger.peaks()["inference"][0]

    def classification_peak(self, config: InferenceConfig) -> int:
        """The same for a batch of views of images, as image classification evaluates them."""
        ledger = Ledger(self.granule, self.there, self.granule == 1)
        side = config.crop or 224
        with self.mode, torch.no_grad(), ledger:
            ledger.begin("inference")
            pixels: Any = torch.empty(config.together(), self.model.in_channels, side, side, dtype=torch.uint8)
            with autocast_of(config):
                self.network(normalise_images(pixels, self.model.mean, self.model.std))
        return ledger.peaks()["inference"][0]


def autocast_of(options: InferenceConfig) -> torch.autocast:
    """The precision of the options, for fake tensors, which are on the CPU."""
    return torch.autocast("cpu", PRECISIONS[options.precision], enabled=options.precision != "fp32")


def validation_ways(config: TrainConfig, num_classes: int, size: tuple[int, int], memory: int) -> list[Inference]:
    """The configured inference, the whole image, and several scales with flip: each as it is, or in the largest tile
    that fits `memory`, which is what one device has beside weights, optimizer and gradients."""
    tracer = InferenceTracer(config, num_classes)
    configured = config.inference
    ways = {f"inference={configured.name}": configured}
    if classifies(config.dataset):
        return [Inference(name, [name], tracer.classification_peak(configured)) for name in ways]
    whole = InferenceConfig(
        longest_side=configured.longest_side, precision=configured.precision, batch_size=configured.batch_size
    )
    ways.setdefault("inference=whole", whole)
    if not configured.flip or len(configured.scales) == 1:
        ways[f"inference.scales={MANY_SCALES} inference.flip=true".replace(", ", ",")] = replace(
            whole, scales=MANY_SCALES, flip=True
        )
    found = []
    for name, options in ways.items():
        seen = fitted_size(size, options.longest_side)
        peak = tracer.peak(seen, options)
        found.append(Inference(name, name.split(), peak))
        if peak > memory and (tile := largest_tile(tracer, seen, options, memory)) is not None:
            word = f"inference.tile=[{tile[0]},{tile[1]}]"
            tiled = tracer.peak(seen, replace(options, tile=list(tile)))
            found.append(Inference(f"{name} {word}", [*name.split(), word], tiled))
    return found


def fitted_size(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    """The image's size as the network sees it."""
    scale = 1.0 if longest is None else longest / max(size)
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def largest_tile(
    tracer: InferenceTracer, size: tuple[int, int], options: InferenceConfig, memory: int
) -> tuple[int, int] | None:
    """The largest square tile whose predictions fit; None if not even the smallest does."""
    enlarged = max(options.scales)
    limits = 1, max(1, round(max(size) * enlarged) // ALIGNED)
    whole = size[0] * size[1] * (enlarged / ALIGNED) ** 2, tracer.peak(size, replace(options, tile=None))

    def needs(cells: int) -> Needs:
        return Needs(tracer.peak(size, replace(options, tile=[ALIGNED * cells] * 2)))

    first = Line.through((0, 0), whole)
    cells, _ = largest(needs, lambda k: k * k, memory, limits, first, whole)
    return (ALIGNED * cells, ALIGNED * cells) if cells else None
