"""Every option: its type, its default, what it means and what is allowed. Imports nothing heavy.

The YAML files in configs/ choose values for these classes; an override that names no field here, or has another type,
is refused before anything is built (cli.py), and so is a value or a combination that cannot work (`check` methods).
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from segtrain.errors import UsageError
from segtrain.threads import cpus

IGNORE_INDEX = 255  # train id of pixels that count nowhere: not in the loss, not in the scores


def option(default: Any, text: str) -> Any:
    """A field with its default and the line that `segtrain COMMAND --help` prints."""
    metadata = {"help": text}
    if isinstance(default, list | dict) or callable(default):
        make = default if callable(default) else default.copy
        return field(default_factory=make, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(allowed: bool, key: str, value: Any, text: str) -> None:
    """UsageError naming key, value and what is allowed."""
    if not allowed:
        raise UsageError(f"{key}={value} is not possible: {text}")


def installed(module: str) -> bool:
    """Whether it can be imported, without doing that."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def require_size(key: str, size: list[int], least: int) -> None:
    require(len(size) == 2 and min(size) >= least, key, size, f"give [height,width] in pixels, each at least {least}")


# ---------------------------------------------------------------------------------------------------- data sets


@dataclass
class DatasetConfig:
    name: str = option("", "")  # set by dataset=...
    root: str | None = option(None, "folder of the data; default $SEGTRAIN_DATA/<name>, else datasets/<name>")
    train_split: str = option("train", "split that training reads")
    val_split: str = option("val", "split that validation and evaluate read")
    cache_dir: str | None = option(
        None, "where results of checks and the cache are kept; default $SEGTRAIN_CACHE, else ~/.cache/segtrain"
    )

    cache: str = option("none", "none | decoded: training pictures as plain pixels in cache_dir, once")

    def folder(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        return Path(os.environ.get("SEGTRAIN_DATA", "datasets")).expanduser() / self.name

    def cache_folder(self) -> Path:
        default = os.environ.get("SEGTRAIN_CACHE", "~/.cache/segtrain")
        return Path(self.cache_dir or default).expanduser()

    def check(self) -> None:
        require(self.cache in ("none", "decoded"), "dataset.cache", self.cache, "choose none or decoded")


@dataclass
class StreetsConfig(DatasetConfig):
    scenes: int = option(240, "training scenes to draw")
    val_scenes: int = option(60, "validation scenes to draw")
    night_scenes: int = option(0, "scenes of the night split to draw")
    seed: int = option(0, "which scenes are drawn")
    size: list[int] = option([256, 512], "[height,width] of a scene in pixels; width = 2 x height")

    def check(self) -> None:
        super().check()
        require_size("dataset.size", self.size, 256)
        require(self.size[1] == 2 * self.size[0], "dataset.size", self.size, "the width must be twice the height")
        for key in ("scenes", "val_scenes", "night_scenes", "seed"):
            require(getattr(self, key) >= 0, f"dataset.{key}", getattr(self, key), "give 0 or more")


@dataclass
class CityscapesConfig(DatasetConfig):
    pass


@dataclass
class KittiConfig(DatasetConfig):
    val_list: str = option(
        "mseg_150_50", "published list of validation images: mseg_150_50 | nvidia_sdcnet_cv0 | _cv1 | _cv2"
    )


@dataclass
class VistasConfig(DatasetConfig):
    version: str = option("v1.2", "v1.2 (65 classes) | v2.0 (116 classes)")

    def check(self) -> None:
        super().check()
        require(self.version in ("v1.2", "v2.0"), "dataset.version", self.version, "choose v1.2 or v2.0")


@dataclass
class CocoStuffConfig(DatasetConfig):
    classes: str = option("all171", "all171 (80 things, 91 stuff) | stuff91")
    split: str = option(
        "full", "full | challenge2017: the 40k / 5k pictures of the paper's Table 3 (its classes: stuff91)"
    )
    other: str = option(
        "ignore", "things under stuff91: ignore | class, one more; which of the two the paper did is not known"
    )

    def check(self) -> None:
        super().check()
        for key, known in (
            ("classes", ("all171", "stuff91")), ("split", ("full", "challenge2017")), ("other", ("ignore", "class")),
        ):  # fmt: skip
            require(getattr(self, key) in known, f"dataset.{key}", getattr(self, key), f"choose {' or '.join(known)}")
        require(
            self.other == "ignore" or self.classes == "stuff91", "dataset.other", self.other,
            "things are classes of their own under dataset.classes=all171; choose dataset.classes=stuff91",
        )  # fmt: skip


@dataclass
class FolderConfig(DatasetConfig):
    splits: dict[str, dict[str, str]] = option(
        {},
        "split -> {images: glob, labels: glob}, paired by what * and ** stand for, or {pairs: list file}; below root",
    )
    classes: str | None = option(
        None, "CSV or YAML with id, name, color, ignore; absolute, or below root or the current folder"
    )

    def check(self) -> None:
        super().check()
        for split, entry in self.splits.items():
            keys = set(entry)
            fits = keys == {"pairs"} or {"images"} <= keys <= {"images", "labels"}
            require(fits, f"dataset.splits.{split}", entry, "give {images: ..., labels: ...} or {pairs: ...}")


@dataclass
class MixtureConfig(DatasetConfig):
    target: str = option("cityscapes", "the part whose classes all others are told in, and whose val_split validates")
    parts: dict[str, Any] = option(
        {},
        "part -> {weight, split, taxonomy, column, dataset and options of that data set: root, version, ...}; "
        "taxonomy: vistas_to_cityscapes or a YAML file",
    )

    def check(self) -> None:
        super().check()
        require(
            len(self.parts) >= 1, "dataset.parts", self.parts, "name the data sets to mix: dataset.parts.kitti={...}"
        )


@dataclass
class ImageNetConfig(DatasetConfig):
    """Whole pictures, a folder for each class: root/<split>/<class>/*.JPEG."""

    def check(self) -> None:
        super().check()
        require(
            self.cache == "none", "dataset.cache", self.cache, f"dataset={self.name} has no such cache; leave it out"
        )


def classifies(dataset: DatasetConfig) -> bool:
    """Whether its pictures have a class each, instead of one for every pixel."""
    return isinstance(dataset, ImageNetConfig)


DATASET_CONFIGS: dict[str, type[DatasetConfig]] = {
    "streets": StreetsConfig,
    "cityscapes": CityscapesConfig,
    "kitti": KittiConfig,
    "vistas": VistasConfig,
    "cocostuff": CocoStuffConfig,
    "folder": FolderConfig,
    "imagenet": ImageNetConfig,
    "mixture": MixtureConfig,
}


# ---------------------------------------------------------------------------------------------------- the other groups


@dataclass
class ModelConfig:
    backbone: str = option(
        "resnet18",
        "resnet18 | 34 | 50 | 101, resnext50 | 101 | 152, wider_resnet38, densenet264; torchvision's resnext50_32x4d | "
        "101_32x8d; wider_resnet38_pooled (ImageNet form)",
    )
    backbone_options: dict[str, Any] = option(
        {},
        "further arguments of the backbone's builder, {key: value}: of resnets first_dilation, own | previous (as "
        "torchvision), of wider_resnet38 drops, channel | element",
    )
    head: str = option("deeplabv3", "deeplabv3 | deeplabv3_torchvision | deeplabv3plus; classifier, of whole pictures")
    head_channels: int = option(256, "channels of every branch of the head")
    pooling_size: list[int] | None = option(
        None, "[height,width] in pixels that the head pools in eval mode; null: the whole picture"
    )
    output_stride: int = option(8, "pixels per cell of the feature map: 8 | 16 | 32")
    norm: str = option("inplace_abn", "inplace_abn | inplace_abn_sync | abn | batch_norm | batch_norm_sync")
    norm_variant: str = option("one", "one | two: how In-Place ABN finds its gradients (paper, sections 3.2 and 3.3)")
    scale: str = option(
        "abs", "abs | signed: norm layers multiply with |weight| + eps, as published, or with the weight"
    )
    recompute: str = option(
        "none", "what backward computes again: none | norm | norm_proposed (the paper's checkpointing) | blocks"
    )
    weights: str = option(
        "none", "file to start from: checkpoint of a run, published weights, torchvision's, timm's | none: random"
    )
    weights_match: float = option(1.0, "least share of tensors that must match, of those that such a file has")
    weights_taxonomy: str | None = option(
        None, "how the file's classes are told in the data's: vistas_to_cityscapes or a YAML file; default: by name"
    )
    backend: str = option("auto", "In-Place ABN kernels: auto | cupy (CUDA) | native (compiled, CPU) | aten (anywhere)")
    activation: str = option("leaky_relu", "leaky_relu | elu | identity (in place), and relu with abn or batch_norm")
    negative_slope: float = option(0.01, "slope of leaky_relu below zero, or alpha of elu")
    mean: list[float] = option([0.485, 0.456, 0.406], "RGB mean taken off the input, on a scale of 0 to 1")
    std: list[float] = option([0.229, 0.224, 0.225], "RGB deviation the input is divided by")

    def check(self) -> None:
        # Names of parts are checked where the parts are known, by models.build_model, on which training begins.
        activations = ("leaky_relu", "elu", "identity", "relu")
        require(self.activation in activations, "model.activation", self.activation, f"choose {', '.join(activations)}")
        in_place = self.norm.startswith("inplace_abn")
        for key, known in (
            ("norm_variant", ("one", "two")), ("scale", ("abs", "signed")),
            ("recompute", ("none", "norm", "norm_proposed", "blocks")), ("backend", ("auto", "cupy", "native", "aten")),
        ):  # fmt: skip
            require(getattr(self, key) in known, f"model.{key}", getattr(self, key), f"choose {', '.join(known)}")
        require(
            self.norm_variant == "one" or in_place, "model.norm_variant", self.norm_variant,
            f"model.norm={self.norm} has no variants; choose model.norm=inplace_abn",
        )  # fmt: skip
        require(
            self.recompute not in ("norm", "norm_proposed") or self.norm in ("abn", "batch_norm"),
            "model.recompute", self.recompute,
            f"it is the alternative to In-Place ABN, for model.norm=abn or batch_norm, not {self.norm}",
        )  # fmt: skip
        require(
            self.scale == "abs" or self.norm in ("abn", "inplace_abn", "inplace_abn_sync"), "model.scale", self.scale,
            f"model.norm={self.norm} multiplies with the weight itself anyway; leave it out",
        )  # fmt: skip
        require(
            not (in_place and self.activation == "relu"), "model.activation", "relu",
            "In-Place ABN cannot invert it; choose leaky_relu, elu or identity, or model.norm=abn",
        )  # fmt: skip
        require(
            self.negative_slope > 0 or not in_place or self.activation == "identity",
            "model.negative_slope", self.negative_slope, "In-Place ABN divides by it; give more than 0",
        )  # fmt: skip
        share = 0 < self.weights_match <= 1
        require(share, "model.weights_match", self.weights_match, "give a share above 0 and at most 1")
        require(self.head_channels >= 1, "model.head_channels", self.head_channels, "give 1 or more")
        require(len(self.mean) == 3, "model.mean", self.mean, "give three numbers, [red,green,blue]")
        require(len(self.std) == 3 and min(self.std) > 0, "model.std", self.std, "give three positive numbers")
        if self.pooling_size is not None:
            require_size("model.pooling_size", self.pooling_size, 32)
        if self.head == "classifier":
            for key, value, default in (
                ("head_channels", self.head_channels, 256),
                ("pooling_size", self.pooling_size, None),
            ):
                require(value == default, f"model.{key}", value, "model.head=classifier does not read it; leave it out")


@dataclass
class LossConfig:
    name: str = option(
        "cross_entropy", "cross_entropy | bootstrapped | max_pooling | focal | dice | lovasz, or one of a plugin"
    )
    hardest: float = option(
        1.0, "bootstrapped, max_pooling: share of a picture's pixels, the hardest ones, that counts; 1 = all"
    )
    normalisation: str = option(
        "chosen", "bootstrapped: chosen, over the chosen pixels of all pictures, ignored ones not part of the share | "
        "seamseg, per picture, ignored ones part of it with loss 0",
    )  # fmt: skip
    select: str = option("image", "bootstrapped: hardest pixels of each image | of the batch, one process only")
    p: float = option(1.0, "max_pooling: norm of the pixels' weights, 1 = only the hardest share counts, to .inf = all")
    gamma: float = option(2.0, "focal: power of 1 - probability that weighs a pixel down")
    class_weights: list[float] | None = option(
        None, "cross_entropy, focal: weight of each class, for a weighted mean over the pixels; null: all alike"
    )
    label_smoothing: float = option(
        0.0, "cross_entropy, bootstrapped, max_pooling: share of the target spread evenly over all classes"
    )
    options: dict[str, Any] = option({}, "arguments of a plugin's loss")

    def check(self) -> None:
        read = {
            "cross_entropy": ("class_weights", "label_smoothing"),
            "bootstrapped": ("hardest", "normalisation", "select", "label_smoothing"),
            "max_pooling": ("hardest", "p", "label_smoothing"),
            "focal": ("gamma", "class_weights"),
            "dice": (),
            "lovasz": (),
        }
        # Names are checked by losses.build_loss: a plugin's loss may read whatever there is.
        refuse_unread(self, "loss", self.name, read)
        require(0 < self.hardest <= 1, "loss.hardest", self.hardest, "give a share above 0 and at most 1")
        for key, known in (("normalisation", ("chosen", "seamseg")), ("select", ("image", "batch"))):
            require(getattr(self, key) in known, f"loss.{key}", getattr(self, key), f"choose {' or '.join(known)}")
        require(
            self.select == "image" or self.normalisation == "chosen", "loss.select", self.select,
            "loss.normalisation=seamseg is a mean per image; choose image",
        )  # fmt: skip
        require(self.p >= 1, "loss.p", self.p, "give 1 or more, up to .inf")
        require(0 <= self.gamma < float("inf"), "loss.gamma", self.gamma, "give 0 or more")
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "give 0 or more, below 1")
        if self.class_weights is not None:
            weights = self.class_weights
            sound = all(0 <= weight < float("inf") for weight in weights) and any(weights)
            require(sound, "loss.class_weights", weights, "give one number of 0 or more for each class, not all 0")


def refuse_unread(options: Any, group: str, name: str, read: Mapping[str, tuple[str, ...]]) -> None:
    """UsageError for an option of `group` that was set although the choice `name` does not read it.

    read: choice -> what it reads, of the options that not every choice reads. A name that is not in it may read all.
    """
    if name not in read:
        return
    for item in fields(options):
        value, readers = getattr(options, item.name), [other for other, keys in read.items() if item.name in keys]
        default = item.default if item.default_factory is MISSING else item.default_factory()
        special = readers or item.name == "options"
        if special and name not in readers and value != default:
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            hint = f"it is for {group}={' or '.join(readers)}" if readers else "it is for the parts of plugins"
            raise UsageError(
                f"{group}.{item.name}={value} is not possible: {group}.name={name} does not read it ({hint}); "
                f"leave it at {shown}, or let {group}={name} set them all"
            )


@dataclass
class OptimizerConfig:
    name: str = option("sgd", "sgd | adamw")
    lr: float = option(0.0025, "learning rate at step 0, or after warm-up")
    momentum: float = option(0.9, "sgd: momentum")
    nesterov: bool = option(False, "sgd: Nesterov's form of momentum")
    betas: list[float] = option([0.9, 0.999], "adamw: decay of the means of gradients and of their squares, per step")
    weight_decay: float = option(1e-4, "sgd: L2 penalty; adamw: decoupled decay, times the learning rate per step")
    decay_norm_and_bias: bool = option(True, "decay weights and biases of norms and all other biases too, as published")
    backbone_lr_factor: float = option(1.0, "learning rate of the backbone as a multiple of the others'")
    fused: bool | None = option(None, "update in one kernel; null: where device and type of the parameters have one")
    clip_norm: float | None = option(None, "largest norm of the gradient over all parameters; longer ones are scaled")

    def check(self) -> None:
        require(self.name in ("sgd", "adamw"), "optimizer.name", self.name, "choose sgd or adamw")
        refuse_unread(self, "optimizer", self.name, {"sgd": ("momentum", "nesterov"), "adamw": ("betas",)})
        require(0 < self.lr < float("inf"), "optimizer.lr", self.lr, "give more than 0")
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "give 0 or more, less than 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "give 0 or more")
        require(
            self.momentum > 0 or not self.nesterov,
            "optimizer.nesterov",
            self.nesterov,
            "it needs optimizer.momentum > 0",
        )
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(fits, "optimizer.betas", self.betas, "give two numbers of 0 or more, less than 1")
        factor = self.backbone_lr_factor
        require(0 <= factor < float("inf"), "optimizer.backbone_lr_factor", factor, "give 0 or more")
        positive = self.clip_norm is None or self.clip_norm > 0
        require(positive, "optimizer.clip_norm", self.clip_norm, "give more than 0, or null for none")


@dataclass
class ScheduleConfig:
    name: str = option("poly", "poly | linear | step | cosine | constant; every step, over the whole training")
    power: float = option(0.9, "poly: lr x (1 - share of the training done) ** power")
    end_factor: float = option(0.0, "linear, cosine: learning rate at the end, as a share of optimizer.lr")
    milestones: list[float] = option(
        [], "step: shares of the training after which the rate falls, ascending, with ten digits where they do not end"
    )
    factor: float = option(0.1, "step: what the rate is multiplied by at each milestone")
    warmup_steps: int = option(0, "steps in which the rate rises linearly to what the schedule says; 0: none")
    warmup_factor: float = option(0.1, "share of the schedule's rate that the first step of a warm-up has")

    def check(self) -> None:
        read = {
            "poly": ("power",), "linear": ("end_factor",), "step": ("milestones", "factor"), "cosine": ("end_factor",),
            "constant": (),
        }  # fmt: skip
        require(self.name in read, "schedule.name", self.name, f"choose {', '.join(read)}")
        refuse_unread(self, "schedule", self.name, read)
        require(self.power >= 0, "schedule.power", self.power, "give 0 or more")
        require(0 <= self.end_factor <= 1, "schedule.end_factor", self.end_factor, "give a share from 0 to 1")
        ascending = self.milestones == sorted(set(self.milestones)) and all(0 < share < 1 for share in self.milestones)
        require(
            ascending and (self.name != "step" or len(self.milestones) > 0), "schedule.milestones", self.milestones,
            "give shares of the training between 0 and 1, ascending, such as [0.3333333333,0.6666666667]",
        )  # fmt: skip
        require(0 < self.factor < 1, "schedule.factor", self.factor, "give more than 0, less than 1")
        require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "give 0 or more")
        require(
            self.warmup_steps > 0 or self.warmup_factor == ScheduleConfig.warmup_factor, "schedule.warmup_factor",
            self.warmup_factor, "without schedule.warmup_steps nothing reads it; give them, or leave it out",
        )  # fmt: skip
        require(0 <= self.warmup_factor <= 1, "schedule.warmup_factor", self.warmup_factor, "give a share from 0 to 1")


@dataclass
class AugmentationConfig:
    name: str = option("segmentation", "segmentation | imagenet, for whole pictures; set by augmentation=...")
    crop_size: list[int] = option([512, 512], "[height,width] in pixels of a training sample")
    scale: list[float] = option([0.7, 2.0], "[least,most] random enlargement before the crop, uniform")
    flip: float = option(0.5, "probability of a mirror image")
    area: list[float] = option([0.08, 1.0], "imagenet: [least,most] share of the picture that is shown, uniform")
    aspect: list[float] = option([0.75, 1.3333333333], "imagenet: [least,most] width / height of that, log-uniform")
    lighting: float = option(0.0, "imagenet: deviation of the shift along the principal components of its colours")
    color: float = option(
        0.0, "most change of brightness, contrast and saturation, as a share: 0.2 is 0.8 to 1.2 times"
    )
    extra: list[Any] = option(
        [], "transforms of albumentations after that, [{name: GaussianBlur, p: 0.3, blur_limit: [3,7]}, ...]"
    )

    def check(self) -> None:
        read = {"segmentation": ("scale", "extra"), "imagenet": ("area", "aspect", "lighting")}
        require(self.name in read, "augmentation.name", self.name, "choose segmentation or imagenet")
        refuse_unread(self, "augmentation", self.name, read)
        shares = len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 1
        require(shares, "augmentation.area", self.area, "give [least,most], both above 0 and at most 1")
        positive = len(self.aspect) == 2 and 0 < self.aspect[0] <= self.aspect[1]
        require(positive, "augmentation.aspect", self.aspect, "give [least,most], both positive")
        require(self.lighting >= 0, "augmentation.lighting", self.lighting, "give 0 or more")
        require_size("augmentation.crop_size", self.crop_size, 32)
        ordered = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]
        require(ordered, "augmentation.scale", self.scale, "give [least,most], both positive")
        require(0 <= self.flip <= 1, "augmentation.flip", self.flip, "give a probability")
        require(0 <= self.color < 1, "augmentation.color", self.color, "give a share of 0 or more, less than 1")
        # Transforms and their arguments are checked where albumentations is known, in data/transforms.py.
        for entry in self.extra:
            named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
            require(named, "augmentation.extra", entry, "give mappings with the name of a transform of albumentations")


@dataclass
class SamplingConfig:
    class_uniform: float = option(0.0, "share of the crops drawn by class: a class, a picture with it, a pixel of it")

    def check(self) -> None:
        share = 0 <= self.class_uniform <= 1
        require(share, "sampling.class_uniform", self.class_uniform, "give a share from 0 to 1")


@dataclass
class LoaderConfig:
    workers: int | None = option(
        None, "loader processes of each process, 0 = none; default: one per CPU, shared by the processes of a machine"
    )
    prefetch: int = option(4, "batches that every loader process reads ahead")

    def check(self) -> None:
        require(self.workers is None or self.workers >= 0, "loader.workers", self.workers, "give 0 or more")
        require(self.prefetch >= 1, "loader.prefetch", self.prefetch, "give 1 or more")

    def count(self) -> int:
        """Processes to start."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, cpus() // here) if self.workers is None else self.workers


@dataclass
class TrainerConfig:
    batch_size: int = option(16, "pictures per step, over all processes and accumulated parts")
    accumulation: int = option(1, "parts of a process's share of the batch that go through the network one by one")
    max_steps: int | None = option(None, "length of the training in steps")
    epochs: float | None = option(None, "length of the training in passes over the data, instead of max_steps")
    hours: float | None = option(None, "length of the training in hours of this machine's clock, instead of max_steps")
    patience: int | None = option(None, "end early after so many validations without a better mIoU")
    precision: str = option("fp32", "fp32 | bf16 | fp16: arithmetic of the network; weights and loss stay float32")
    compile: bool = option(False, "compile the network with torch.compile")
    deterministic: bool = option(False, "only algorithms that give the same bits every time, where they are slower too")
    ema_decay: float | None = option(None, "keep averaged weights too, e.g. 0.999; they are validated and used")
    parallel: str = option("ddp", "several processes: ddp | fsdp, which shares out weights and optimizer (FSDP2)")
    sync_group: str = option("all", "processes whose statistics are one: all | node | a number of neighbouring ranks")
    seed: int = option(0, "initial weights, order and augmentation follow from it")
    validate_every: int = option(500, "steps between validations; the last step is always followed by one")
    save_every: int = option(200, "steps between checkpoints")
    keep_last: int = option(2, "checkpoints step_<n>.pt to keep, the newest ones; besides last.pt and best.pt")
    check_data: bool = option(True, "before the first step, check every file and label id")
    overfit: int | None = option(None, "train and validate on so many training pictures: any network must learn them")
    on_bad_step: str = option("stop", "a loss or gradient that is no number: stop | skip the step")
    spike_factor: float = option(
        10.0, "report a loss so many times the median of the last 100 (and skip it, if so told); 0 = never"
    )

    def check(self) -> None:
        for key in ("accumulation", "max_steps", "validate_every", "save_every", "keep_last", "overfit", "patience"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"trainer.{key}", value, "give 1 or more")
        require(
            self.batch_size >= 2, "trainer.batch_size", self.batch_size,
            "give 2 or more: the pooled branch of DeepLabV3 has one value per picture to normalise over",
        )  # fmt: skip
        require(self.seed >= 0, "trainer.seed", self.seed, "give 0 or more")
        for key in ("epochs", "hours"):
            value = getattr(self, key)
            require(value is None or value > 0, f"trainer.{key}", value, "give more than 0")
        lengths = {key: getattr(self, key) for key in ("max_steps", "epochs", "hours")}
        others = ", ".join(f"trainer.{key}={value}" for key, value in lengths.items() if key != "max_steps")
        require(
            sum(value is not None for value in lengths.values()) == 1, "trainer.max_steps", self.max_steps,
            f"set one of trainer.max_steps, trainer.epochs and trainer.hours, and the others to null ({others})",
        )  # fmt: skip
        for key, known in (
            ("precision", ("fp32", "bf16", "fp16")), ("parallel", ("ddp", "fsdp")), ("on_bad_step", ("stop", "skip")),
        ):  # fmt: skip
            require(getattr(self, key) in known, f"trainer.{key}", getattr(self, key), f"choose {', '.join(known)}")
        require(
            self.sync_group in ("all", "node") or (self.sync_group.isdigit() and int(self.sync_group) >= 1),
            "trainer.sync_group", self.sync_group, "choose all, node or a number of ranks, such as 4",
        )  # fmt: skip
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1, "trainer.ema_decay", self.ema_decay,
            "give more than 0 and less than 1, or null for none",
        )  # fmt: skip
        require(
            self.spike_factor == 0 or self.spike_factor > 1, "trainer.spike_factor", self.spike_factor,
            "give more than 1, or 0 for never",
        )  # fmt: skip
        fp16 = self.precision == "fp16"
        for key, on in (("ema_decay", self.ema_decay is not None), ("compile", self.compile), ("precision", fp16)):
            require(
                not (on and self.parallel == "fsdp"), f"trainer.{key}", getattr(self, key),
                "with trainer.parallel=fsdp it is not there; choose trainer.parallel=ddp",
            )  # fmt: skip

    def steps(self, samples: int) -> int | None:
        """Length of the training in steps for a data set of that many samples; None where the clock decides."""
        if self.max_steps is not None:
            return self.max_steps
        return None if self.epochs is None else max(1, round(self.epochs * samples / self.batch_size))


@dataclass
class InferenceConfig:
    name: str = option("whole", "names the folder of an evaluation; set by inference=...")
    scales: list[float] = option([1.0], "enlargements whose class probabilities are averaged")
    flip: bool = option(False, "average with the mirrored picture too")
    tile: list[int] | None = option(None, "[height,width] in pixels of a window; null: the whole picture at once")
    overlap: float = option(0.25, "least share of a window that its neighbour covers too")
    longest_side: int | None = option(
        None,
        "pixels that pictures are brought to, small ones too; answers go back to their own size; null: as they are",
    )
    resize: int | None = option(None, "whole pictures: length that the shorter side is made, in pixels")
    crop: int | None = option(None, "whole pictures: side of the square that is looked at, in pixels")
    crops: str = option("center", "whole pictures: center | ten, the corners and mirror images too")

    def check(self) -> None:
        require(self.crops in ("center", "ten"), "inference.crops", self.crops, "choose center or ten")
        whole_pictures = self.crop is not None
        require(
            whole_pictures == (self.resize is not None), "inference.resize", self.resize,
            "set inference.resize and inference.crop, or neither",
        )  # fmt: skip
        if self.crop is not None and self.resize is not None:
            require(
                32 <= self.crop <= self.resize, "inference.crop", self.crop, "give 32 or more, at most inference.resize"
            )
            for key, unread in (("scales", [1.0]), ("flip", False), ("tile", None), ("longest_side", None)):
                value = getattr(self, key)
                require(
                    value == unread, f"inference.{key}", value, "it is for pixels; with inference.crop leave it out"
                )
        require(whole_pictures or self.crops == "center", "inference.crops", self.crops, "it needs inference.crop")
        positive = len(self.scales) >= 1 and min(self.scales) > 0
        require(positive, "inference.scales", self.scales, "give one or more positive numbers")
        require(0 <= self.overlap < 1, "inference.overlap", self.overlap, "give 0 or more, less than 1")
        require(
            self.tile is not None or self.overlap == 0.25, "inference.overlap", self.overlap,
            "without windows nothing reads it; leave it at 0.25, or give inference.tile=[height,width]",
        )  # fmt: skip
        least = self.longest_side is None or self.longest_side >= 32
        require(least, "inference.longest_side", self.longest_side, "give 32 or more, or null")
        if self.tile is not None:
            require_size("inference.tile", self.tile, 32)
            whole = all(extent % 32 == 0 for extent in self.tile)
            require(whole, "inference.tile", self.tile, "give multiples of 32: windows must meet the network's cells")


@dataclass
class LoggingConfig:
    every: int = option(20, "steps between lines of progress")
    pictures: int = option(6, "validation pictures drawn (image | target | prediction)")
    wandb: bool = option(False, "also to Weights & Biases; WANDB_MODE=offline keeps it in the run folder")
    mlflow: bool = option(False, "also to MLflow, where MLFLOW_TRACKING_URI says, else in the folder mlruns")
    project: str = option("segtrain", "wandb's project, MLflow's experiment")

    def check(self) -> None:
        for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
            missing = getattr(self, name) and not installed(name)
            require(not missing, f"logging.{name}", "true", f"the package is not installed: pip install {package}")
        require(self.every >= 1, "logging.every", self.every, "give 1 or more")
        require(self.pictures >= 0, "logging.pictures", self.pictures, "give 0 or more")


# ---------------------------------------------------------------------------------------------------- the commands


@dataclass
class CommandConfig:
    """What every command's configuration can do: check itself, group by group."""

    def check(self) -> "CommandConfig":
        for item in fields(self):
            group = getattr(self, item.name)
            if hasattr(group, "check"):
                group.check()
        weights = getattr(self, "checkpoint_weights", "auto")
        require(weights in ("auto", "ema", "raw"), "checkpoint_weights", weights, "choose auto, ema or raw")
        device = getattr(self, "device", "auto")
        require(device in ("auto", "cuda", "cpu"), "device", device, "choose auto, cuda or cpu")
        return self


def refuse_pictures(dataset: DatasetConfig) -> None:
    """For commands about labels of pixels."""
    require(
        not classifies(dataset), "dataset", dataset.name,
        "its pictures have a class each, and no labels of pixels; choose another, or segtrain train or evaluate",
    )  # fmt: skip


def refuse_other_task(checkpoint: Path, head: str, dataset: type[DatasetConfig], name: str) -> None:
    """UsageError where a network of whole pictures is to label pixels, or the other way round."""
    whole = issubclass(dataset, ImageNetConfig)
    if head == "classifier" and not whole:
        raise UsageError(names_pictures(checkpoint))
    if head != "classifier" and whole:
        raise UsageError(
            f"{checkpoint} labels pixels (model.head={head}), dataset={name} has whole pictures: leave dataset= out "
            "for what it was trained on, or take another with the same classes"
        )


def names_pictures(checkpoint: Path) -> str:
    return (
        f"{checkpoint} names whole pictures (model.head=classifier): `segtrain evaluate dataset=imagenet` scores it, "
        "and model.weights= begins a segmentation network with its backbone"
    )


def group(kind: type) -> Any:
    return field(default_factory=kind)


def plugins() -> Any:
    return option([], "your own files or modules, [./my_parts.py], which add to BACKBONES, HEADS, LOSSES, DATASETS")


@dataclass
class TrainConfig(CommandConfig):
    experiment: str | None = option(None, "recipe; set by experiment=...")
    name: str | None = option(None, "run folder runs/<name>; default: the recipe and the overrides that change the run")
    run: str | None = option(None, "the run folder itself, instead of runs/<name>")
    restart: bool = option(False, "move an old run aside and begin anew")
    plugins: list[str] = plugins()
    device: str = option("auto", "auto | cuda | cpu")
    dataset: DatasetConfig = group(DatasetConfig)
    model: ModelConfig = group(ModelConfig)
    loss: LossConfig = group(LossConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    schedule: ScheduleConfig = group(ScheduleConfig)
    augmentation: AugmentationConfig = group(AugmentationConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    loader: LoaderConfig = group(LoaderConfig)
    trainer: TrainerConfig = group(TrainerConfig)
    inference: InferenceConfig = group(InferenceConfig)
    logging: LoggingConfig = group(LoggingConfig)

    def check(self) -> "CommandConfig":
        require(
            not (self.optimizer.fused and self.trainer.precision == "fp16"), "optimizer.fused", "true",
            "torch's fused updates go wrong after a step that trainer.precision=fp16 skips; choose null, or bf16",
        )  # fmt: skip
        if classifies(self.dataset):
            for key, value, wanted in (
                ("model.head", self.model.head, "classifier"), ("loss.name", self.loss.name, "cross_entropy"),
                ("loss.class_weights", self.loss.class_weights, None),
                ("model.weights_taxonomy", self.model.weights_taxonomy, None),
                ("augmentation.name", self.augmentation.name, "imagenet"),
                ("sampling.class_uniform", self.sampling.class_uniform, 0),
            ):  # fmt: skip
                choice = f"{key.removesuffix('.name')}={'null' if wanted is None else wanted}"
                require(
                    value == wanted, key, value,
                    f"dataset={self.dataset.name} has whole pictures: choose {choice}, or a recipe: "
                    "experiment=imagenet_resnet50_sync",
                )  # fmt: skip
        else:
            for key, value, other in (
                ("model.head", self.model.head, "classifier"), ("augmentation.name", self.augmentation.name, "imagenet")
            ):  # fmt: skip
                require(
                    value != other,
                    key,
                    value,
                    f"it is for whole pictures, dataset=imagenet; {self.dataset.name} has labels of pixels",
                )
        check_views(self.inference, self.dataset)
        return super().check()


def check_views(inference: "InferenceConfig", dataset: DatasetConfig) -> None:
    whole = inference.crop is not None
    here, there = (
        ("whole pictures", "labels of pixels") if classifies(dataset) else ("labels of pixels", "whole pictures")
    )
    known = "center224, tencrop or center320" if classifies(dataset) else "whole, tiled or multiscale"
    require(
        whole == classifies(dataset), "inference", inference.name,
        f"it is for {there}, as is a checkpoint that brings it along, and dataset={dataset.name} has {here}: choose "
        f"inference={known}",
    )  # fmt: skip


def run_folder(config: TrainConfig) -> Path:
    return Path(config.run or Path("runs") / (config.name or f"{config.dataset.name}_{config.model.backbone}"))


@dataclass
class VerifyConfig(TrainConfig):
    """verify-resume: the options of train, and where its two runs go. overrides: as given, for the runs themselves."""

    output: str | None = option(None, "folder of the two runs; default segtrain-out/verify-resume")
    overrides: list[str] = option([], "")


@dataclass
class ReplayConfig(CommandConfig):
    run: str | None = option(None, "run folder")
    step: int = option(1, "step whose batch is rebuilt, counted from 1 as in the lines of the training")
    root: str | None = option(None, "where the data are now, if they have moved")
    plugins: list[str] = plugins()
    output: str | None = option(None, "folder for the picture; default <run>/replay")

    def check(self) -> "CommandConfig":
        require(self.run is not None, "run", self.run, "give the folder of a run")
        require(self.step >= 1, "step", self.step, "steps are counted from 1")
        return super().check()


@dataclass
class RunsConfig(CommandConfig):
    root: str = option("runs", "folder that holds the run folders")
    table: str | None = option(None, "paper: its tables instead, finished runs of its recipes beside what it published")

    def check(self) -> "CommandConfig":
        require(self.table in (None, "paper"), "table", self.table, "choose paper, or leave it out for a list")
        return super().check()


@dataclass
class EvaluateConfig(CommandConfig):
    checkpoint: str | None = option(None, "checkpoint of a run, or published file of weights as downloaded")
    run: str | None = option(None, "instead: a run folder, whose last.pt is taken")
    checkpoint_weights: str = option(
        "auto", "which of a checkpoint's: auto, the averaged ones if there are any | ema | raw"
    )
    output: str | None = option(
        None,
        "folder for the result; default <run>/evaluations/<dataset>-<split>-<inference>[-<activation>]; "
        "of a published file segtrain-out/evaluate/<file>/...",
    )
    split: str | None = option(None, "split to evaluate; default dataset.val_split")
    plugins: list[str] = plugins()
    device: str = option("auto", "auto | cuda | cpu")
    activation: str | None = option(
        None, "evaluate with leaky_relu | relu | elu | identity, instead of what was trained with (paper, Table 1)"
    )
    boundary: bool = option(False, "also Boundary IoU: classes compared within 2 % of the diagonal from their edges")
    position_prior: bool = option(True, "also score a predictor that knows the pixel's position only")
    pictures: int = option(6, "pictures drawn (image | target | prediction)")
    dataset: DatasetConfig = group(DatasetConfig)
    inference: InferenceConfig = group(InferenceConfig)
    loader: LoaderConfig = group(LoaderConfig)

    def check(self) -> "CommandConfig":
        require(self.pictures >= 0, "pictures", self.pictures, "give 0 or more")
        known = (None, "leaky_relu", "relu", "elu", "identity")
        require(self.activation in known, "activation", self.activation, "choose leaky_relu, relu, elu or identity")
        check_views(self.inference, self.dataset)
        if classifies(self.dataset):
            require(not self.boundary, "boundary", "true", f"dataset={self.dataset.name} has no labels of pixels")
        return super().check()


@dataclass
class ScoreConfig(CommandConfig):
    predictions: str | None = option(None, "folder of label PNGs, searched at any depth")
    predictions_encoding: str | None = option(
        None, "what their pixels are: ids | train_ids | pixelmap (cocostuff: id - 1); default: as the data set's labels"
    )
    output: str | None = option(None, "folder for the result; default segtrain-out/score")
    split: str | None = option(None, "split to score; default: the one that the data set's own script scores")
    boundary: bool = option(False, "also Boundary IoU: classes compared within 2 % of the diagonal from their edges")
    plugins: list[str] = plugins()
    dataset: DatasetConfig = group(DatasetConfig)

    def check(self) -> "CommandConfig":
        check_encoding(self.predictions_encoding, self.dataset.name)
        refuse_pictures(self.dataset)
        return super().check()


def check_encoding(encoding: str | None, dataset: str) -> None:
    known = (None, "ids", "train_ids", "pixelmap")
    require(encoding in known, "predictions_encoding", encoding, "choose ids, train_ids or pixelmap")
    require(
        encoding != "pixelmap" or dataset == "cocostuff", "predictions_encoding", encoding,
        f"only cocostuff has pixel maps, {dataset} has none; choose ids or train_ids",
    )  # fmt: skip


@dataclass
class SubmitConfig(CommandConfig):
    checkpoint: str | None = option(None, "checkpoint of a run, or published file of weights as downloaded")
    run: str | None = option(None, "instead: a run folder, whose last.pt is taken")
    checkpoint_weights: str = option(
        "auto", "which of a checkpoint's: auto, the averaged ones if there are any | ema | raw"
    )
    predictions: str | None = option(None, "instead: folder of label PNGs, searched at any depth")
    predictions_encoding: str | None = option(
        None, "what their pixels are: ids | train_ids | pixelmap (cocostuff: id - 1); default: as the data set's labels"
    )
    output: str | None = option(None, "folder for the archive; default segtrain-out/submit")
    split: str | None = option(None, "split to answer; default test")
    plugins: list[str] = plugins()
    device: str = option("auto", "auto | cuda | cpu")
    dataset: DatasetConfig = group(DatasetConfig)
    inference: InferenceConfig = group(InferenceConfig)

    def check(self) -> "CommandConfig":
        check_encoding(self.predictions_encoding, self.dataset.name)
        refuse_pictures(self.dataset)
        return super().check()


@dataclass
class PredictConfig(CommandConfig):
    input: str | None = option(None, "image, or folder of images (searched at any depth)")
    checkpoint: str | None = option(None, "checkpoint of a run, or published file of weights as downloaded")
    run: str | None = option(None, "instead: a run folder, whose last.pt is taken")
    checkpoint_weights: str = option(
        "auto", "which of a checkpoint's: auto, the averaged ones if there are any | ema | raw"
    )
    output: str | None = option(None, "folder for a folder of each of outputs; default segtrain-out/predict")
    outputs: list[str] = option(
        ["labels", "color", "overlay"],
        "which of labels (ids), color, overlay, palette (train ids as PNG with colours), raw (train ids), "
        "prob (255 x the class's probability)",
    )
    plugins: list[str] = plugins()
    device: str = option("auto", "auto | cuda | cpu")
    inference: InferenceConfig = group(InferenceConfig)

    def check(self) -> "CommandConfig":
        known = ("labels", "color", "overlay", "palette", "raw", "prob")
        some = len(self.outputs) >= 1 and set(self.outputs) <= set(known)
        require(some, "outputs", self.outputs, f"give one or more of {', '.join(known)}, as [palette,prob]")
        return super().check()


@dataclass
class StreetsCommandConfig(CommandConfig):
    output: str | None = option(None, "folder to write; default segtrain-out/streets")
    layout: str = option(
        "cityscapes", "cityscapes | kitti | vistas | cocostuff | imagenet, windows of them by what they show"
    )
    scenes: int = option(240, "training scenes")
    val_scenes: int = option(60, "validation scenes")
    night_scenes: int = option(30, "scenes of the night split (cityscapes layout only)")
    seed: int = option(0, "which scenes are drawn")
    size: list[int] = option([256, 512], "[height,width] of a scene in pixels; width = 2 x height")
    workers: int | None = option(None, "processes; default: one per CPU this process may use")

    def check(self) -> "StreetsCommandConfig":
        layouts = ("cityscapes", "kitti", "vistas", "cocostuff", "imagenet")
        require(self.layout in layouts, "layout", self.layout, f"choose {', '.join(layouts)}")
        require_size("size", self.size, 256)
        require(self.size[1] == 2 * self.size[0], "size", self.size, "the width must be twice the height")
        for key in ("scenes", "val_scenes", "night_scenes", "seed"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "give 0 or more")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "give 1 or more")
        return self


@dataclass
class CheckConfig(CommandConfig):
    split: str | None = option(None, "split to check; default: all that are there")
    output: str | None = option(None, "folder for report.json and contact.png; default segtrain-out/check")
    write_config: str | None = option(
        None, "dataset=folder: guess patterns, ids and colours from the files, and write this YAML file to correct"
    )
    plugins: list[str] = plugins()
    dataset: DatasetConfig = group(DatasetConfig)

    def check(self) -> "CommandConfig":
        if self.write_config is None:
            return super().check()
        return self


@dataclass
class InfoConfig(CommandConfig):
    checkpoint: str | None = option(None, "describe this checkpoint file instead of the machine")
    gpu_test: bool = option(False, "run the In-Place ABN kernels' tests and their benchmark on the CUDA device here")


@dataclass
class WeightsConfig(CommandConfig):
    verify: str | None = option(None, "say which of the published files this one is, by hash and by its tensors")


@dataclass
class ConvertConfig(CommandConfig):
    input: str | None = option(
        None, "file of weights: published, torchvision's, timm's, safetensors, checkpoint of a run"
    )
    output: str | None = option(
        None, "file to write: .safetensors, .pth, .pth.tar; classes, licences and what its norms are go along"
    )
    form: str = option(
        "segtrain",
        "names: segtrain (= official) | torchvision | torchvision_deeplabv3 | nvidia_deeplabv3plus | run: a checkpoint",
    )

    input_scale: str | None = option(
        None, "what norm layers of the input multiply with, where it does not say: abs, |weight| + eps | signed, weight"
    )

    classes: str | None = option(
        None,
        "what the rows of a segmentation classifier stand for, where the input does not say: cityscapes | vistas_v1.2 "
        "| vistas_v2.0 | cocostuff | FILE, a table as of dataset=folder",
    )

    def check(self) -> "CommandConfig":
        scales = (None, "abs", "signed")
        require(self.input_scale in scales, "input_scale", self.input_scale, "choose abs or signed")
        forms = ("segtrain", "torchvision", "torchvision_deeplabv3", "nvidia_deeplabv3plus", "run")
        require(self.form in forms, "form", self.form, f"choose {', '.join(forms)}")
        for key in ("input", "output"):
            require(getattr(self, key) is not None, key, None, "give input=FILE and output=FILE")
        return super().check()


def trained(old: dict[str, Any]) -> TrainConfig:
    """The same as the object that the training had."""
    given, made = with_defaults(old), TrainConfig()
    made.dataset = dataset_schema(given["dataset"])()
    for item in fields(made):
        value, part = given[item.name], getattr(made, item.name)
        kind: Any = type(part)
        setattr(made, item.name, kind(**value) if is_dataclass(part) else value)
    return made


def dataset_schema(options: dict[str, Any]) -> type[DatasetConfig]:
    return DATASET_CONFIGS.get(options.get("name", ""), DatasetConfig)


def with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """A training's configuration out of a checkpoint, with the options that its version did not have yet."""
    result = dict(old)
    loss = result.get("loss", {})
    if "hardest" in loss and "name" not in loss:  # format 1 had the share only
        result["loss"] = loss | {"name": "bootstrapped" if loss["hardest"] < 1 else "cross_entropy"}
    today = asdict(TrainConfig(dataset=dataset_schema(result.get("dataset", {}))()))
    return {
        name: value | result.get(name, {}) if isinstance(value, dict) else result.get(name, value)
        for name, value in today.items()
    }
