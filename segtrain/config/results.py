"""Options of the commands that use a checkpoint or predictions: evaluate, score, submit, predict."""

from dataclasses import dataclass

from segtrain.config.augmentation import LoaderConfig
from segtrain.config.commands import CommandConfig, check_views, group, plugins, refuse_pictures
from segtrain.config.dataset import DatasetConfig, classifies
from segtrain.config.inference import InferenceConfig
from segtrain.config.options import option, require


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
