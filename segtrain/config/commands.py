"""Options of the commands: train, verify-resume, plan, replay, runs, streets, check, info, weights, convert and
convert-labels."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from segtrain.config.augmentation import AugmentationConfig
from segtrain.config.combined import check_channels, check_colours, check_untested, check_views
from segtrain.config.dataset import (
    COLUMNS,
    FORMATS,
    MANY,
    ORDER,
    ORDERS,
    SCENE_SIZE,
    SIZE,
    DatasetConfig,
    check_scene_size,
    classifies,
)
from segtrain.config.inference import InferenceConfig
from segtrain.config.loader import LoaderConfig
from segtrain.config.logging import LoggingConfig
from segtrain.config.loss import LossConfig
from segtrain.config.model import SCALES, ModelConfig
from segtrain.config.optimizer import OptimizerConfig
from segtrain.config.options import LARGEST_SEED, LARGEST_SIZE, MOST_PICTURES, MOST_STEPS, Group, group, option, require
from segtrain.config.plan import PlanConfig
from segtrain.config.sampling import SamplingConfig
from segtrain.config.schedule import ScheduleConfig
from segtrain.config.trainer import TrainerConfig
from segtrain.errors import UsageError

MOST_SHOWN = 1000  # samples on one sheet


@dataclass
class CommandConfig(Group):
    """Base of the options of every command; checking includes the groups."""

    def check(self) -> Any:
        super().check()
        for item in fields(self):
            inner = getattr(self, item.name)
            if isinstance(inner, Group):
                inner.check()
        return self


def plugins_option() -> Any:
    return option([], "your own files or modules that add parts, [./my_parts.py]", path=True, resume=True)


def device_option() -> Any:
    return option("auto", "device to compute on", choices=("auto", "cuda", "cpu"), resume=True)


def refuse_pictures(dataset: DatasetConfig) -> None:
    """Raise UsageError for a dataset of image classification, for commands about labels of pixels."""
    require(
        not classifies(dataset), "dataset", dataset.name,
        "its images have one class each and no labels of pixels; choose another, or segtrain train or evaluate",
    )  # fmt: skip


def refuse_other_task(checkpoint: Path, head: str, dataset: type[DatasetConfig], name: str) -> None:
    """Raise UsageError where the checkpoint and the dataset are of different tasks."""
    whole = classifies(dataset)
    if head == "classifier" and not whole:
        raise UsageError(names_pictures(checkpoint))
    if head != "classifier" and whole:
        raise UsageError(
            f"{checkpoint} labels pixels (model.head={head}), dataset={name} has one class per image: leave dataset= "
            "out for what it was trained on, or take another with the same classes"
        )


def names_pictures(checkpoint: Path) -> str:
    return (
        f"{checkpoint} classifies images (model.head=classifier): `segtrain evaluate dataset=imagenet` scores it, "
        "and model.weights= begins a segmentation network with its backbone"
    )


@dataclass
class TrainConfig(CommandConfig):
    experiment: str | None = option(None, "recipe, set by experiment=NAME", resume=True)
    name: str | None = option(
        None, "name of the run folder in runs/ (default: the recipe and what changes it)", quote=True, resume=True
    )
    run: str | None = option(None, "path of the run folder, instead of runs/<name>", path=True, resume=True)
    restart: bool = option(False, "new start; an old run of this name is moved aside", resume=True)
    plugins: list[str] = plugins_option()
    device: str = device_option()
    dataset: DatasetConfig = group(DatasetConfig)
    model: ModelConfig = group(ModelConfig)
    loss: LossConfig = group(LossConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    schedule: ScheduleConfig = group(ScheduleConfig)
    augmentation: AugmentationConfig = group(AugmentationConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    loader: LoaderConfig = group(LoaderConfig, resume=True)
    trainer: TrainerConfig = group(TrainerConfig)
    inference: InferenceConfig = group(InferenceConfig, resume=True)
    logging: LoggingConfig = group(LoggingConfig, resume=True)
    # Composing sets these, which are no options.
    mean_is_given = False  # whether model.mean or model.std was typed
    varied = tuple[str, ...]()  # keys or groups that a sweep varies; without one those that were typed

    def check(self) -> Any:
        require(
            self.name is None or all(part not in ("", ".", "..") for part in self.name.split("/")), "name", self.name,
            "give a name inside runs/, such as mine or sweep/mine; run=FOLDER takes any path",
        )  # fmt: skip
        require(
            not (self.optimizer.fused and self.trainer.precision == "fp16"), "optimizer.fused", "true",
            "torch's fused updates go wrong after a step that trainer.precision=fp16 skips; choose null, or bf16",
        )  # fmt: skip
        require(
            self.trainer.memory_budget is None or self.model.norm in ("batch_norm", "abn"), "trainer.memory_budget",
            self.trainer.memory_budget,
            f"the compiler computes outputs of model.norm=batch_norm and abn again, not of {self.model.norm}: choose "
            "one of them, or null",
        )  # fmt: skip
        check_untested(self.model, self.trainer)
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
                    f"dataset={self.dataset.name} has one class per image: choose {choice}, or a recipe: "
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
                    f"it is for image classification, dataset=imagenet; {self.dataset.name} has labels of pixels",
                )
        check_views(self.inference, self.dataset)
        checked = super().check()
        check_channels(self.model, self.dataset)
        check_colours(self.augmentation, self.dataset)
        return checked


def run_folder(config: TrainConfig) -> Path:
    return Path(config.run or Path("runs") / (config.name or f"{config.dataset.name}_{config.model.backbone}"))


@dataclass
class VerifyConfig(TrainConfig):
    """verify-resume: the options of train, which its two runs share."""

    output: str | None = option(None, "folder of the two runs (default: segtrain-out/verify-resume)", path=True)
    overrides: list[str] = option([], "words of the command line that both runs get; set by the command")

    def check(self) -> Any:
        require(
            isinstance(self.trainer.batch_size, int), "trainer.batch_size", self.trainer.batch_size,
            "both runs must be the same whatever memory is free; give a number",
        )  # fmt: skip
        return super().check()


@dataclass
class PlanCommandConfig(TrainConfig):
    """plan: the options of the training that is planned, and the devices that it is planned for."""

    output: str | None = option(None, "folder for plan.json and plan.png (default: segtrain-out/plan)", path=True)
    plan: PlanConfig = group(PlanConfig)


@dataclass
class RunCommandConfig(CommandConfig):
    """Base of the options of commands about one run."""

    run: str | None = option(None, "run folder", path=True)

    def check(self) -> Any:
        require(self.run is not None, "run", "null", "give the folder of a run")
        return super().check()


@dataclass
class ReplayConfig(RunCommandConfig):
    step: int = option(
        1, "step whose batch is rebuilt, counted from 1 as in the progress lines", low=1, limit=MOST_STEPS
    )
    root: str | None = option(None, "folder of the data, if it has moved", path=True)
    plugins: list[str] = plugins_option()
    output: str | None = option(None, "folder for the image (default: <run>/replay)", path=True)


@dataclass
class ShowConfig(CommandConfig):
    split: str | None = option(None, "split whose images are shown, augmented (default: dataset.train_split)")
    count: int = option(24, "number of samples", low=1, limit=MOST_SHOWN)
    seed: int = option(0, "seed of order and augmentation, as trainer.seed", low=0, limit=LARGEST_SEED)
    output: str | None = option(None, "folder for samples.png (default: segtrain-out/show)", path=True)
    plugins: list[str] = plugins_option()
    dataset: DatasetConfig = group(DatasetConfig)
    augmentation: AugmentationConfig = group(AugmentationConfig)
    sampling: SamplingConfig = group(SamplingConfig)

    def check(self) -> Any:
        refuse_pictures(self.dataset)
        check_colours(self.augmentation, self.dataset)
        return super().check()


@dataclass
class RunsConfig(CommandConfig):
    root: str = option("runs", "folder that holds the run folders", path=True)
    table: str | None = option(
        None, "table of the paper's results beside those of finished runs, instead of the list", choices=("paper",)
    )
    sort: str = option(
        "written", "order of the runs; miou, best: the highest first", choices=("written", "miou", "best", "name")
    )
    seeds: str = option("grouped", "runs that differ in trainer.seed only", choices=("grouped", "each"))
    output: str | None = option(None, "table to write too, as CSV: every run with all options that differ", path=True)

    def check(self) -> Any:
        for key, default in (("sort", "written"), ("seeds", "grouped"), ("output", None)):
            value = getattr(self, key)
            require(self.table is None or value == default, key, value, f"table={self.table} is not the list of runs")
        return super().check()


@dataclass
class CompareConfig(CommandConfig):
    inputs: list[str] = option([], "two or more runs, evaluation folders or evaluation.json files", path=True)
    output: str | None = option(None, "folder for compare.json, .md, .png (default: segtrain-out/compare)", path=True)

    def check(self) -> Any:
        require(
            len(self.inputs) >= 2, "inputs", f"[{','.join(self.inputs)}]",
            "give two or more runs or evaluations, as `segtrain compare runs/a runs/b`",
        )  # fmt: skip
        return super().check()


@dataclass
class ReportConfig(RunCommandConfig):
    output: str | None = option(None, "file to write (default: <run>/report.html)", path=True)
    root: str | None = option(None, "folder of the data, if it has moved", path=True)
    pictures: int = option(4, "number of best, of worst and of confused images shown; 0: none", low=0, high=24)
    plugins: list[str] = plugins_option()
    device: str = device_option()


@dataclass
class SuspectsConfig(RunCommandConfig):
    split: str | None = option(None, "split to examine (default: training and validation)")
    top: int = option(50, "number of regions to list", low=1, limit=MOST_PICTURES)
    root: str | None = option(None, "folder of the data, if it has moved", path=True)
    output: str | None = option(None, "folder for the CSV file and the sheet (default: <run>/suspects)", path=True)
    plugins: list[str] = plugins_option()
    device: str = device_option()


@dataclass
class StreetsCommandConfig(CommandConfig):
    output: str | None = option(None, "folder to write (default: segtrain-out/streets)", path=True)
    layout: str = option(
        "cityscapes", "layout of the files; imagenet: parts of the scenes by what they show",
        choices=("cityscapes", "kitti", "vistas", "cocostuff", "imagenet"),
    )  # fmt: skip
    scenes: int = option(240, "number of training scenes", low=0, limit=MANY)
    val_scenes: int = option(60, "number of validation scenes", low=0, limit=MANY)
    night_scenes: int = option(30, "number of scenes in the night split (layout=cityscapes)", low=0, limit=MANY)
    seed: int = option(0, "seed of the scenes", low=0, limit=LARGEST_SEED)
    size: list[int] = option([256, 512], SCENE_SIZE, items=SIZE, low=256, limit=LARGEST_SIZE)
    workers: int | None = option(None, "number of processes (default: one per CPU of this process)", low=1, limit=1024)

    def check(self) -> Any:
        super().check()
        check_scene_size("size", self.size)
        return self


@dataclass
class CheckConfig(CommandConfig):
    split: str | None = option(None, "split to check (default: all that exist)")
    output: str | None = option(None, "folder for report.json and contact.png (default: segtrain-out/check)", path=True)
    write_config: str | None = option(
        None, "YAML file for a guess of the options of dataset=folder, to be corrected", path=True
    )
    plugins: list[str] = plugins_option()
    dataset: DatasetConfig = group(DatasetConfig)

    def check(self) -> Any:
        return super().check() if self.write_config is None else self


@dataclass
class InfoConfig(CommandConfig):
    checkpoint: str | None = option(None, "checkpoint to describe, instead of the machine", path=True)
    gpu_test: bool = option(False, "tests and benchmark of the In-Place ABN kernels on this GPU")


@dataclass
class WeightsConfig(CommandConfig):
    verify: str | None = option(None, "file to identify among the published ones, by hash and tensors", path=True)
    fetch: str | None = option(None, "published file to download: its name, or torchvision:NAME", quote=True)
    output: str | None = option(None, "file to write with fetch=NAME (default: in the cache)", path=True)

    def check(self) -> Any:
        require(
            self.verify is None or self.fetch is None, "verify", self.verify, "fetch= downloads another file; give one"
        )
        require(self.output is None or self.fetch is not None, "output", self.output, "it is for fetch=NAME")
        return super().check()


@dataclass
class ConvertConfig(CommandConfig):
    input: str | None = option(
        None, "weights: published, torchvision's, timm's, safetensors, or a checkpoint", path=True
    )
    output: str | None = option(None, "file to write: .safetensors, .pth, .pth.tar", path=True)
    form: str = option(
        "segtrain", "names and structure; official: as its scripts load, run: a checkpoint",
        choices=("segtrain", "official", "torchvision", "torchvision_deeplabv3", "nvidia_deeplabv3plus", "run"),
    )  # fmt: skip
    input_scale: str | None = option(
        None, "scale of the input's norm layers, where the file does not say", choices=SCALES
    )
    classes: str | None = option(
        None, "classes of the input, where it does not say; a file as of dataset=folder",
        choices=("cityscapes", "vistas_v1.2", "vistas_v2.0", "cocostuff"), other="FILE", path=True,
    )  # fmt: skip

    def check(self) -> Any:
        for key in ("input", "output"):
            require(getattr(self, key) is not None, key, "null", "give input=FILE and output=FILE")
        return super().check()


@dataclass
class ConvertLabelsConfig(CommandConfig):
    input: str | None = option(None, "folder of images and labels, or a file of annotations in it", path=True)
    output: str | None = option(None, "folder to write (default: segtrain-out/convert-labels)", path=True)
    format: str = option("auto", "format of the labels", choices=("auto", "voc", "pairs", *FORMATS))
    order: str = option("last", ORDER, choices=ORDERS)
    classes: str | None = option(None, "class table, a file as of dataset=folder (default: the labels' own)", path=True)
    unlabelled: str | None = option(None, "class of the pixels that no object covers (default: a guess)", quote=True)
    columns: list[str] | None = option(None, COLUMNS, items=("image", "mask"))

    def check(self) -> Any:
        require(self.input is not None, "input", "null", "give the folder that holds your images and labels")
        return super().check()
