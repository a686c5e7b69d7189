"""Networks out of files, ready to be used: `segtrain.load(checkpoint).predict(image)`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from segtrain.config import InferenceConfig, ModelConfig, checkpoint_path, names_pictures, with_defaults
from segtrain.console import say
from segtrain.data.bands import read_channels
from segtrain.data.class_mapping import ClassMapping, class_mapping
from segtrain.data.labels import LabelTable
from segtrain.device import is_out_of_memory, resolve_device
from segtrain.errors import ImageTooLarge, UsageError
from segtrain.models import BACKBONES, HEADS, Classifier, Segmenter, from_config
from segtrain.models.execution import compiled_answer, require_inference_compile
from segtrain.models.precision import answer_in, require_precision
from segtrain.models.preprocess import normalise_images
from segtrain.scoring.inference import Network, Prediction, fitted, nearest, nearest_planes, segment_batch
from segtrain.weights import checkpoint
from segtrain.weights.network_file import run_content

ImageLike = str | Path | Image.Image | np.ndarray | torch.Tensor


class Predictor(NamedTuple):
    """A segmentation network with everything that using it needs. The network is in eval mode on `device`.

    table: the classes that are predicted. metadata: what else its file holds, as of `LoadedNetwork`. mapping: how the
    network's own classes make up those of the table, None if they are the same. others: networks of the same classes,
    with whose probabilities this one's are averaged.
    """

    network: Segmenter
    table: LabelTable
    options: ModelConfig
    device: torch.device
    metadata: dict[str, Any] = {}
    mapping: ClassMapping | None = None
    others: tuple["Predictor", ...] = ()

    def predict(self, image: ImageLike, inference: InferenceConfig | None = None) -> np.ndarray:
        """Predict the class of each pixel: train ids uint8 (H, W), which index table.names; 255 for a taxonomy's void.

        image: a path, a PIL image, RGB uint8 (H, W, 3), or a tensor uint8 (3, H, W); of a network of other channels,
        those of dataset.channels instead of RGB. The EXIF orientation of a file is
        applied, so that the answer is that of the image as a viewer shows it; a PIL image is taken as it is.
        inference: scales, flip and tiles; default: those with which the run was validated, as `segtrain predict` takes
        them. UsageError for another type or shape.

        >>> network = segtrain.load("runs/toy")
        >>> classes = network.predict("photo.jpg")
        >>> [network.classes[i] for i in np.unique(classes)]
        >>> Image.fromarray(network.palette[classes]).save("classes.png")
        """
        pixels = as_pixels(image, self.value_range, self.channels, self.options.in_channels)
        if inference is None:
            inference = self.inference
            require_precision(inference.precision, self.device)
        return self.segment(pixels, inference).train_ids

    @property
    def inference(self) -> InferenceConfig:
        """With which its run was validated: another scale would show it objects of sizes that it has not learned."""
        return InferenceConfig(**self.metadata.get("config", {}).get("inference", {}))

    @property
    def classes(self) -> list[str]:
        """The names of the classes that `predict` returns, by train id."""
        return self.table.names

    @property
    def palette(self) -> np.ndarray:
        """Their colours: RGB uint8 (256, 3), so that `palette[predict(image)]` is an image; void is black."""
        return self.table.colorize(np.arange(256, dtype=np.uint8)[None])[0]

    def to(self, device: str | torch.device) -> "Predictor":
        """The same on another device. The network itself is moved, as by nn.Module.to.

        >>> network = segtrain.load("runs/toy", device="cpu").to("cuda")
        """
        on = torch.device(device)
        return self._replace(
            network=self.network.to(on), device=on, others=tuple(other.to(on) for other in self.others)
        )

    @property
    def value_range(self) -> tuple[float, float] | None:
        """dataset.value_range of its training: what is black and white in images of more than 8 bits."""
        found = self.metadata.get("config", {}).get("dataset", {}).get("value_range")
        return None if found is None else (found[0], found[1])

    @property
    def channels(self) -> tuple[int, ...] | None:
        """dataset.channels of its training: which bands of an image it takes; None for RGB images."""
        found = self.metadata.get("config", {}).get("dataset", {}).get("channels")
        return None if found is None else tuple(found)

    def logits(self, images: torch.Tensor, precision: str = "fp32", compile: bool = False) -> torch.Tensor:
        """uint8 (N, in_channels, H, W) -> logits float32 (N, C, h, w) at the network's output stride. precision,
        compile: as of inference.precision and inference.compile."""
        ready = normalise_images(images, self.options.mean, self.options.std)
        if compile:
            require_inference_compile(self.options, self.device)
        network = partial(compiled_answer, self.network) if compile else self.network
        return answer_in(precision, partial(network, upsample=False), ready)

    def own_classes(self) -> list[str]:
        """The classes of its logits, before a taxonomy."""
        return self.table.names if self.mapping is None else self.mapping.names

    def averaged_with(self, others: Sequence["Predictor"], names: Sequence[str]) -> "Predictor":
        """This network, its probabilities averaged with those of others. names: of the files, the first is its own.

        UsageError unless all have the same classes, channels, range of values and normalisation.
        """
        for other, name in zip(others, names[1:], strict=True):
            for what, theirs, ours in (
                ("classes", other.own_classes(), self.own_classes()),
                ("dataset.channels", other.channels, self.channels),
                ("dataset.value_range", other.value_range, self.value_range),
                ("mean and std", [other.options.mean, other.options.std], [self.options.mean, self.options.std]),
            ):
                if theirs != ours:
                    raise UsageError(
                        f"checkpoint=[...]: {name} has other {what} than {names[0]}, so they cannot be averaged"
                    )
        return self._replace(others=tuple(others))

    def segment(
        self, image: np.ndarray, inference: InferenceConfig | None = None, probability: bool = False,
        target: np.ndarray | None = None, asked: np.ndarray | None = None,
    ) -> Prediction:  # fmt: skip
        """uint8 (H, W, in_channels) -> train ids uint8 (H, W) and, if asked for, their probabilities float32 (H, W).

        inference: default: the whole image once, at scale 1. target: train ids uint8 (H, W) of the network's own
        classes, for the loss. asked: train ids uint8 (H, W) of the classes whose probabilities to return; 255 for none.
        """
        options = inference or InferenceConfig()
        targets, classes = (None if one is None else [one] for one in (target, asked))
        return self.segment_batch([image], self.seen([image], options), options, probability, targets, classes)[0]

    def seen(self, images: Sequence[np.ndarray], options: InferenceConfig) -> torch.Tensor:
        """Images uint8 (H, W, in_channels) of one size, as the network sees them: uint8 (N, in_channels, h, w) on the
        host. UsageError for other channels."""
        self.require_channels(images[0].shape[2])
        fitting = [one if options.longest_side is None else fitted(one, options.longest_side) for one in images]
        planes = [torch.from_numpy(np.ascontiguousarray(one.transpose(2, 0, 1))) for one in fitting]
        return planes[0][None] if len(planes) == 1 else torch.stack(planes)

    def segment_batch(
        self, images: Sequence[np.ndarray], seen: torch.Tensor, options: InferenceConfig, probability: bool = False,
        targets: Sequence[np.ndarray] | None = None, asked: Sequence[np.ndarray] | None = None, every: bool = False,
    ) -> list[Prediction]:  # fmt: skip
        """`segment` for images of one size. seen: `seen(images, options)`, on whatever device. every: return the
        probabilities of all classes too."""
        tensor = seen.to(self.device)
        wanted = None if targets is None else [torch.from_numpy(one).to(self.device).long() for one in targets]
        height, width = tensor.shape[-2:]
        fitting = None if asked is None else [nearest(one, (height, width)) for one in asked]
        classes = None if fitting is None else [torch.from_numpy(one).to(self.device).long() for one in fitting]
        networks = self.networks(options)
        found = segment_batch(networks, tensor, options, probability, self.mapping, wanted, classes, every)
        if options.longest_side is None:
            return found
        size = images[0].shape[0], images[0].shape[1]
        return [
            Prediction(
                nearest(one.train_ids, size), None if one.probability is None else nearest(one.probability, size),
                one.loss, None if one.of_asked is None else nearest(one.of_asked, size),
                None if one.probabilities is None else nearest_planes(one.probabilities, size),
            )
            for one in found
        ]  # fmt: skip

    def networks(self, inference: InferenceConfig) -> list[Network]:
        """Functions from uint8 images to logits: of this network, and of those that it is averaged with."""
        precision, compiled = inference.precision, inference.compile
        return [partial(one.logits, precision=precision, compile=compiled) for one in (self, *self.others)]

    def require_channels(self, count: int) -> None:
        """UsageError unless the network takes images of so many channels."""
        if count != self.options.in_channels:
            raise UsageError(
                f"the network takes images of {self.options.in_channels} channels (model.in_channels), got {count}"
            )


@contextmanager
def naming_image(name: str, shape: Sequence[int], together: int = 1) -> Iterator[None]:
    """Inside, running out of memory is the fault of this image of shape (H, W, ...), the first of so many:
    ImageTooLarge."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ImageTooLarge(name, (shape[0], shape[1]), together) from error


def as_pixels(
    image: ImageLike, value_range: tuple[float, float] | None = None, channels: tuple[int, ...] | None = None,
    count: int = 3,
) -> np.ndarray:  # fmt: skip
    """An image in any form that `Predictor.predict` takes -> uint8 (H, W, count).

    value_range, channels: as of `read_channels`, for files. count: of the channels; a PIL image is RGB."""
    if isinstance(image, str | Path):
        return read_channels(Path(image), channels, value_range, exif="apply")
    if isinstance(image, Image.Image):
        if channels is not None or count != 3:
            raise UsageError(
                f"predict takes an array uint8 (H, W, {count}) of the bands dataset.channels, or a path, got a PIL "
                "image, which is taken as RGB"
            )
        return np.asarray(image.convert("RGB"))
    is_tensor = isinstance(image, torch.Tensor)
    if not is_tensor and not isinstance(image, np.ndarray):
        raise UsageError(f"predict takes a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    wanted = f"a tensor uint8 ({count}, H, W)" if is_tensor else f"an array uint8 (H, W, {count})"
    found = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
    if not found.startswith("uint8 "):
        convert = "to(torch.uint8)" if is_tensor else "astype(np.uint8)"
        raise UsageError(
            f"predict takes {wanted}, got {found}: for values from 0 to 1, (image * 255).round().{convert}"
        )
    if image.ndim != 3 or image.shape[0 if is_tensor else 2] != count or 0 in image.shape:
        order = "red, green, blue" if count == 3 else "of the training"
        raise UsageError(f"predict takes {wanted}, the channels in the order {order}, got {found}")
    return image.permute(1, 2, 0).cpu().numpy() if isinstance(image, torch.Tensor) else image


class LoadedNetwork(NamedTuple):
    """A network of either task, in eval mode.

    options: those that it was built with. metadata: what else its file holds, as `run_content` names it, without the
    weights and the optimizer's state. averaged: whether its weights are the averaged ones.
    """

    network: Segmenter | Classifier
    options: ModelConfig
    metadata: dict[str, Any]
    averaged: bool


def load_predictor(
    path: Path | str, device: str = "auto", weights: str = "auto", taxonomy: str = "none", taxonomy_rest: str = "void",
    target: LabelTable | None = None,
) -> Predictor:  # fmt: skip
    """Load the segmentation network in a checkpoint, a run folder or another file of weights.

    path: of a run folder, last.pt is taken, and best.pt if the run has trainer.patience; it is printed.
    device: auto, cuda or cpu. weights: as of `load_network`. taxonomy, taxonomy_rest, target: as of `class_mapping`;
    what is mapped is printed. UsageError for a network of image classification.

    The network itself, `.network`, takes normalised images: (x / 255 - mean) / std, x RGB float (N, 3, H, W), with mean
    and std of `.options`.

    >>> network = segtrain.load("runs/toy/best.pt", device="cpu")
    >>> classes = network.predict("photo.jpg")  # uint8 (H, W), which index network.table.names
    """
    if not isinstance(path, str | Path):
        raise UsageError(f"segtrain.load takes the path of a checkpoint or run folder, got {type(path).__name__}")
    on, path = resolve_device(device), Path(path)
    if path.is_dir():
        path = checkpoint_path(None, path)
        say(f"checkpoint  {path}")
    loaded = load_network(path, on, weights)
    if not isinstance(loaded.network, Segmenter):
        raise UsageError(names_pictures(path))
    table = LabelTable.from_dict(loaded.metadata["classes"])
    mapping = class_mapping(table, target, taxonomy, taxonomy_rest)
    if mapping is not None:
        say("\n".join(mapping.lines()))
        table = mapping.target
    return Predictor(loaded.network, table, loaded.options, on, loaded.metadata, mapping)


def load_network(
    path: Path, device: torch.device, weights: str = "auto", activation: str | None = None
) -> LoadedNetwork:
    """Load the network in a checkpoint or in a published file of weights as downloaded.

    weights: the averaged ones if there are any (auto), the averaged ones (ema), or those of the last step (raw). Prints
    which, if there is a choice. activation: replaces the one that the network was trained with.
    """
    content = run_content(path)
    if "report" in content:
        say(content["report"])
    if weights == "ema" and "ema" not in content:
        raise UsageError(f"checkpoint_weights=ema: {path} has no averaged weights; train with trainer.ema_decay=0.999")
    averaged = "ema" in content and weights != "raw"
    if "ema" in content:
        say(f"weights     {'averaged weights' if averaged else 'raw weights of the last step'} (checkpoint_weights=)")
    options = ModelConfig(**with_defaults(content["config"])["model"])
    if activation is not None and activation != options.activation:
        replace_activation(options, activation)
    for part, name, known in (("backbone", options.backbone, BACKBONES), ("head", options.head, HEADS)):
        if name not in known and name != "classifier" and not (part == "backbone" and options.is_timm()):
            raise UsageError(
                f"{path} was trained with model.{part}={name}, which is not known here: "
                "give plugins=[FILE] with the file that defines it"
            )
    network = from_config(options, len(content["classes"]["names"]))
    checkpoint.load_strict(network, content["ema" if averaged else "model"], path)
    metadata = {key: value for key, value in content.items() if key not in ("model", "ema", "optimizer")}
    return LoadedNetwork(network.eval().to(device), options, metadata, averaged)


def replace_activation(options: ModelConfig, activation: str) -> None:
    """Evaluate with another activation, as in the paper's Table 1. In-Place ABN becomes ABN, which need not invert."""
    in_place = options.norm.startswith("inplace_abn")
    norm = f"; norm abn, as {options.norm} but for the inverse, which only training needs" if in_place else ""
    say(f"activation  {activation}, where {options.activation} was trained with{norm}")
    options.activation = activation
    if in_place:
        options.norm, options.norm_variant = "abn", "one"
    options.check()
