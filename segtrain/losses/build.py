"""The losses by name, and how one is built from the options."""

import inspect
from collections.abc import Callable

from segtrain.config import LossConfig, require
from segtrain.errors import UsageError
from segtrain.losses.base import Groups, Loss
from segtrain.losses.hard_pixels import Bootstrapped, MaxPooling
from segtrain.losses.pixelwise import CrossEntropy, Focal
from segtrain.losses.regions import Dice, Lovasz


def cross_entropy(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return CrossEntropy(groups, config.class_weights, config.label_smoothing)


def bootstrapped(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    weights = config.class_weights
    if config.hardest == 1 and config.normalisation == "chosen" and weights is None:
        return CrossEntropy(groups, None, config.label_smoothing)  # equal, and upsamples the image only once
    per_batch = config.select == "batch"
    return Bootstrapped(config.hardest, config.normalisation, per_batch, groups, config.label_smoothing, weights)


def max_pooling(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return MaxPooling(config.hardest, config.p, groups, config.label_smoothing, config.class_weights)


def focal(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return Focal(config.gamma, groups, config.class_weights)


def dice(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return Dice()


def lovasz(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return Lovasz()


# Name -> builder(config, num_classes, groups, **loss.options). Plugins add their own.
LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "bootstrapped": bootstrapped,
    "max_pooling": max_pooling,
    "focal": focal,
    "dice": dice,
    "lovasz": lovasz,
}


def build_loss(config: LossConfig, num_classes: int, groups: Groups = ()) -> Loss:
    """Build the loss that the options name.

    groups: a target C + g means that the pixel is one of the classes groups[g].
    Raises UsageError for a name that is not in LOSSES, for options that its builder does not take, for a number of
    class weights that is not num_classes, and for groups that the loss does not support.
    """
    require(config.name in LOSSES, "loss.name", config.name, f"choose {', '.join(LOSSES)}")
    builder = LOSSES[config.name]
    try:
        inspect.signature(builder).bind(config, num_classes, groups, **config.options)
    except TypeError as error:
        known = list(inspect.signature(builder).parameters)[3:]
        text = f"loss.name={config.name} takes {', '.join(known) or 'none'} ({error})"
        raise UsageError(f"loss.options={config.options} is not possible: {text}") from error
    weights = config.class_weights
    require(weights != "auto", "loss.class_weights", weights, "it is not known before the labels are counted")
    require(
        weights is None or len(weights) == num_classes, "loss.class_weights", weights,
        f"give {num_classes} numbers, one for each class, or null",
    )  # fmt: skip
    loss = builder(config, num_classes, groups, **config.options)
    if groups:
        able = [name for name in ("cross_entropy", "bootstrapped", "max_pooling", "focal") if name in LOSSES]
        require(
            loss.marginal, "loss.name", config.name,
            f"this data has labels that leave open which of several classes a pixel is; choose {', '.join(able)}",
        )  # fmt: skip
        require(
            weights is None, "loss.class_weights", weights, "a label that leaves several classes open has no weight"
        )
        require(
            config.label_smoothing == 0, "loss.label_smoothing", config.label_smoothing,
            "it is not defined for labels that leave several classes open; give 0",
        )  # fmt: skip
    return loss
