"""How a run normalises its images: as those that its initial weights were trained on, unless others are given."""

from typing import Any

from segtrain.config import ModelConfig, TrainConfig
from segtrain.console import say


def is_given(config: TrainConfig) -> bool:
    """Whether model.mean or model.std was typed, or set by a recipe or a program."""
    default = ModelConfig()
    return config.mean_is_given or (config.model.mean, config.model.std) != (default.mean, default.std)


def take_normalisation(config: TrainConfig, usual: tuple[list[float], list[float]] | None) -> bool:
    """Take mean and std of the initial weights' images, `usual`, and print it. Returns whether the options changed.

    usual: None if the file does not tell. If the user gave others, they stay, and that is printed.
    """
    model = config.model
    if usual is None or usual == (model.mean, model.std) or len(usual[0]) != model.in_channels:
        return False
    if is_given(config):
        say(f"its images were normalised differently: add model.mean={usual[0]} model.std={usual[1]}")
        return False
    model.mean, model.std = usual
    say(f"normalised  as the images of {model.weights}: model.mean={model.mean} model.std={model.std}; give others to "
        "change it")  # fmt: skip
    return True


def keep_normalisation(config: TrainConfig, saved: dict[str, Any]) -> None:
    """On resuming, take mean and std of the run, which may be those of its initial weights. saved: its options."""
    if config.model.weights != "none" and not is_given(config):
        model = saved["model"]
        config.model.mean = list(model.get("mean", config.model.mean))
        config.model.std = list(model.get("std", config.model.std))
