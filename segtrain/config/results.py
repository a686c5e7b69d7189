"""Options of the commands that use a checkpoint or predictions: evaluate, score, submit, predict."""

from dataclasses import dataclass
from typing import Any

from segtrain.config.commands import CommandConfig, check_views, device_option, plugins_option, refuse_pictures
from segtrain.config.dataset import DatasetConfig, classifies
from segtrain.config.inference import InferenceConfig
from segtrain.config.loader import LoaderConfig
from segtrain.config.model import ACTIVATIONS
from segtrain.config.options import MOST_PICTURES, group, option, require

OUTPUTS = ("labels", "color", "overlay", "palette", "raw", "prob")
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
        if classifies(self.dataset):
            require(
                self.taxonomy == "none", "taxonomy", self.taxonomy, f"dataset={self.dataset.name} has no pixel labels"
            )
            require(not self.boundary, "boundary", "true", f"dataset={self.dataset.name} has no labels of pixels")
        return super().check()


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
    input: str | None = option(None, "image, or folder of images, searched at any depth", path=True)
    checkpoint: str | None = checkpoint_option()
    run: str | None = run_option()
    checkpoint_weights: str = checkpoint_weights_option()
    taxonomy: str = taxonomy_option()
    taxonomy_rest: str = taxonomy_rest_option()
    output: str | None = option(None, "folder with a folder for each output (default: segtrain-out/predict)", path=True)
    outputs: list[str] = option(
        ["labels", "color", "overlay"], "kinds of PNG; labels: ids, raw: train ids, palette: both, prob: 255 x p",
        choices=OUTPUTS,
    )  # fmt: skip
    plugins: list[str] = plugins_option()
    device: str = device_option()
    inference: InferenceConfig = group(InferenceConfig)

    def check(self) -> Any:
        check_taxonomy(self.taxonomy, self.taxonomy_rest)
        text = f"give one or more of {', '.join(OUTPUTS)}, as [palette,prob]"
        require(len(self.outputs) >= 1, "outputs", self.outputs, text)
        return super().check()
