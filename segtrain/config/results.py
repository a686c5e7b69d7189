"""Options of the commands that use a checkpoint or predictions: evaluate, score, submit, predict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segtrain.config.chosen_checkpoint import checkpoint_path
from segtrain.config.combined import check_views
from segtrain.config.commands import CommandConfig, device_option, plugins_option, refuse_pictures
from segtrain.config.dataset import SIZE, DatasetConfig, classifies
from segtrain.config.inference import InferenceConfig
from segtrain.config.loader import LoaderConfig
from segtrain.config.model import ACTIVATIONS
from segtrain.config.options import LARGEST_SIZE, MOST_PICTURES, group, option, require
from segtrain.errors import UsageError

ENGINES = {"onnx": ".onnx", "torch_export": ".pt2", "state_dict": ".safetensors"}  # format -> suffix of its file
OUTPUTS = ("labels", "color", "overlay", "palette", "raw", "prob", "probabilities")
BOUNDARY = "Boundary IoU too: classes within 2 % of the diagonal from their edges"


def checkpoint_option() -> Any:
    return option(None, "checkpoint of a run, or published weights as downloaded; with run=: last, best", path=True)


def run_option() -> Any:
    return option(None, "run folder; takes last.pt, and best.pt if the run has trainer.patience", path=True)


def checkpoint_weights_option() -> Any:
    return option(
        "auto", "weights of the checkpoint; auto: the averaged ones if it has any", choices=("auto", "ema", "raw")
    )


def taxonomy_option() -> Any:
    return option(
        "none", "mapping of the network's classes; their probabilities are added up",
        choices=("none", "vistas_to_cityscapes", "vistas_v2.0_to_cityscapes"), other="NAME:COLUMN or YAML FILE",
        path=True,
    )  # fmt: skip


def taxonomy_rest_option() -> Any:
    return option("void", "classes that the taxonomy leads nowhere: void, or no candidates", choices=("void", "drop"))


def predictions_option(help: str) -> Any:
    return option(None, help, path=True)


def predictions_encoding_option() -> Any:
    return option(
        None,
        "values of their pixels (default: as the dataset's labels)",
        choices=("ids", "train_ids", "pixelmap"),
        other="a plugin's",
    )


def check_taxonomy(taxonomy: str, rest: str) -> None:
    """Raise UsageError for taxonomy_rest without a taxonomy, which nothing reads."""
    require(
        rest == "void" or taxonomy != "none", "taxonomy_rest", rest,
        "without taxonomy=NAME or taxonomy=FILE there is nothing to map; give it, or leave this out",
    )  # fmt: skip


@dataclass
class EvaluateConfig(CommandConfig):
    checkpoint: str | None = checkpoint_option()
    run: str | None = run_option()
    engine: str | None = option(
        None, "file of `segtrain export` to score; beside checkpoint=, if both are given", path=True
    )
    checkpoint_weights: str = checkpoint_weights_option()
    taxonomy: str = taxonomy_option()
    taxonomy_rest: str = taxonomy_rest_option()
    output: str | None = option(
        None, "folder for the result (default: in <run>/evaluations or segtrain-out/evaluate)", path=True
    )
    split: str | None = option(None, "split to evaluate (default: dataset.val_split)")
    plugins: list[str] = plugins_option()
    device: str = device_option()
    activation: str | None = option(
        None, "activation instead of the one it was trained with (paper, Table 1)", choices=ACTIVATIONS
    )
    boundary: bool = option(False, BOUNDARY)
    position_prior: bool = option(True, "score of a predictor that knows only the pixel's position, for comparison")
    pictures: int = option(6, "number of images drawn with target and prediction", low=0, limit=MOST_PICTURES)
    dataset: DatasetConfig = group(DatasetConfig)
    inference: InferenceConfig = group(InferenceConfig)
    loader: LoaderConfig = group(LoaderConfig)

    def check(self) -> Any:
        check_views(self.inference, self.dataset)
        check_taxonomy(self.taxonomy, self.taxonomy_rest)
        if self.engine is not None:
            check_engine(self)
        if classifies(self.dataset):
            require(
                self.taxonomy == "none", "taxonomy", self.taxonomy, f"dataset={self.dataset.name} has no pixel labels"
            )
            require(not self.boundary, "boundary", "true", f"dataset={self.dataset.name} has no labels of pixels")
        return super().check()


def check_engine(options: EvaluateConfig) -> None:
    """Raise UsageError for what an engine cannot do, whose network is fixed and on the CPU."""
    refuse_pictures(options.dataset)
    for key, value, unread in (
        ("taxonomy", options.taxonomy, "none"), ("activation", options.activation, None),
        ("boundary", options.boundary, False),
    ):  # fmt: skip
        require(value == unread, key, value, "engine=FILE is scored as it is; leave this out")
    require(
        options.checkpoint_weights == "auto" or options.checkpoint is not None or options.run is not None,
        "checkpoint_weights", options.checkpoint_weights,
        "engine=FILE has the weights that it was exported with; give checkpoint=FILE too, or leave this out",
    )  # fmt: skip
    require(options.device != "cuda", "device", options.device, "engines run on the CPU; leave this out")


@dataclass
class ScoreConfig(CommandConfig):
    predictions: str | None = predictions_option("folder of label PNGs, searched at any depth")
    predictions_encoding: str | None = predictions_encoding_option()
    output: str | None = option(None, "folder for the result (default: segtrain-out/score)", path=True)
    split: str | None = option(None, "split to score (default: the one that the dataset's own script scores)")
    boundary: bool = option(False, BOUNDARY)
    plugins: list[str] = plugins_option()
    dataset: DatasetConfig = group(DatasetConfig)

    def check(self) -> Any:
        refuse_pictures(self.dataset)
        return super().check()


@dataclass
class SubmitConfig(CommandConfig):
    checkpoint: str | None = checkpoint_option()
    run: str | None = run_option()
    checkpoint_weights: str = checkpoint_weights_option()
    taxonomy: str = taxonomy_option()
    taxonomy_rest: str = taxonomy_rest_option()
    predictions: str | None = predictions_option("folder of label PNGs, searched at any depth, instead of checkpoint")
    predictions_encoding: str | None = predictions_encoding_option()
    output: str | None = option(None, "folder for the archive (default: segtrain-out/submit)", path=True)
    split: str | None = option(None, "split to submit (default: test)")
    plugins: list[str] = plugins_option()
    device: str = device_option()
    dataset: DatasetConfig = group(DatasetConfig)
    inference: InferenceConfig = group(InferenceConfig)

    def check(self) -> Any:
        refuse_pictures(self.dataset)
        check_taxonomy(self.taxonomy, self.taxonomy_rest)
        require(
            self.predictions is None or self.taxonomy == "none", "taxonomy", self.taxonomy,
            "predictions=FOLDER holds classes, not probabilities; give the network as checkpoint=FILE",
        )  # fmt: skip
        return super().check()


@dataclass
class PredictConfig(CommandConfig):
    input: str | None = option(None, "image, folder, list of paths (.txt), pattern with * or video", path=True)
    checkpoint: Any = option(
        None, "checkpoint, or weights as downloaded; with run=: last, best; [A,B]: averaged", path=True
    )
    run: str | None = run_option()
    checkpoint_weights: str = checkpoint_weights_option()
    taxonomy: str = taxonomy_option()
    taxonomy_rest: str = taxonomy_rest_option()
    output: str | None = option(None, "folder with a folder for each output (default: segtrain-out/predict)", path=True)
    outputs: list[str] = option(
        ["labels", "color", "overlay"], "kinds of file; labels: ids, raw: train ids, palette: both, prob: 255 x p",
        choices=OUTPUTS,
    )  # fmt: skip
    overwrite: bool = option(False, "predict again what is finished in the output folder")
    in_memory: float | None = option(
        None, "decoded size above which an image is read in windows [GB]; null: 1/4 of memory", low=0, limit=1e6
    )
    plugins: list[str] = plugins_option()
    device: str = device_option()
    inference: InferenceConfig = group(InferenceConfig)

    def check(self) -> Any:
        check_taxonomy(self.taxonomy, self.taxonomy_rest)
        several = self.checkpoints()
        sound = len(several) >= 1 and all(isinstance(one, str) for one in several)
        require(sound or self.run is not None, "checkpoint", self.checkpoint, "give FILE, or [FILE,FILE,...]")
        text = f"give one or more of {', '.join(OUTPUTS)}, as [palette,prob]"
        require(len(self.outputs) >= 1, "outputs", self.outputs, text)
        return super().check()

    def checkpoints(self) -> list[str]:
        """The files, one or several, whose probabilities are averaged."""
        return self.checkpoint if isinstance(self.checkpoint, list) else [self.checkpoint]


@dataclass
class ExportConfig(CommandConfig):
    checkpoint: str | None = checkpoint_option()
    run: str | None = run_option()
    checkpoint_weights: str = checkpoint_weights_option()
    format: str = option("onnx", "kind of file; state_dict: tensors, and a Python file", choices=tuple(ENGINES))
    output: str | None = option(None, "file to write (default: in segtrain-out/export)", path=True)
    size: list[int] | None = option(
        None, "height and width of all images [pixels]; null: any", items=SIZE, low=1, limit=LARGEST_SIZE
    )
    include: list[str] = option(
        ["normalise", "argmax"], "what is inside: uint8 images in, labels out", choices=("normalise", "argmax")
    )
    plugins: list[str] = plugins_option()
    dataset: DatasetConfig = group(DatasetConfig)

    def check(self) -> Any:
        refuse_pictures(self.dataset)
        if self.output is not None:
            wanted = ENGINES[self.format]
            require(
                Path(self.output).suffix == wanted, "output", self.output, f"format={self.format}: end it in {wanted}"
            )
        return super().check()


def settle_checkpoint(options: Any) -> None:
    """Replace checkpoint= and run= by the file that they name, for the commands that ask a network."""
    if needs_checkpoint(options) and not isinstance(options.checkpoint, list):
        options.checkpoint = str(checkpoint_path(options.checkpoint, options.run))
    elif isinstance(options, PredictConfig) and options.run is not None:
        raise UsageError("give checkpoint=[FILE,FILE,...] or run=FOLDER, one of them")


def needs_checkpoint(options: CommandConfig) -> bool:
    """Whether the command asks a network that checkpoint= or run= must name."""
    if isinstance(options, EvaluateConfig):
        return options.engine is None or options.checkpoint is not None or options.run is not None
    if isinstance(options, SubmitConfig):
        return options.predictions is None
    return isinstance(options, PredictConfig | ExportConfig)
