"""Options of the commands: what train, verify-resume, replay, runs, streets, check, info, weights and convert read."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from segtrain.config.augmentation import AugmentationConfig, LoaderConfig, SamplingConfig
from segtrain.config.dataset import DatasetConfig, ImageNetConfig, classifies
from segtrain.config.inference import InferenceConfig, LoggingConfig
from segtrain.config.loss import LossConfig
from segtrain.config.model import ModelConfig
from segtrain.config.optimizer import OptimizerConfig, ScheduleConfig
from segtrain.config.options import option, require, require_size
from segtrain.config.trainer import TrainerConfig
from segtrain.errors import UsageError


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
