"""What `segtrain.compose` and `segtrain.evaluate` make of their arguments: the words of a command line, in Python."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from segtrain import config
from segtrain.cli.commands import COMMANDS
from segtrain.cli.words import override
from segtrain.config.compose import Request, compose, compose_training, load_plugins, to_options
from segtrain.config.options import as_written
from segtrain.errors import UsageError, meant


def compose_command(*words: str, config_dir: str | None = None) -> config.CommandConfig:
    """Return the options of a command, checked as on the command line.

    words: the name of a command (default: train), then key=value words, and the path that a command takes alone.
    config_dir: a folder with YAML files of your own. UsageError in one sentence for a word that is wrong.

    >>> options = segtrain.compose("experiment=toy", "optimizer.lr=0.02")
    >>> segtrain.train(options)
    >>> options = segtrain.compose("evaluate", "runs/toy/last.pt", "inference=multiscale")
    >>> options.inference.flip
    True
    >>> segtrain.evaluate(options)["miou"]
    """
    for word in words:
        require_type(word, str, "segtrain.compose", 'words, as "experiment=toy"')
    verb, rest = (words[0], words[1:]) if words and words[0] in COMMANDS else ("train", words)
    command = COMMANDS[verb]
    if verb == "train":
        if words and "=" not in words[0] and (near := meant(words[0], COMMANDS)) and verb not in words:
            raise UsageError(f"there is no command {words[0]!r}{near}")
        return compose_training(*rest, config_dir=config_dir)
    if any(word.startswith("-") for word in rest):
        raise UsageError("segtrain.compose takes key=value words, and config_dir=FOLDER, but no flags")
    load_plugins(command.schema, rest)
    quoted = [override(verb, command, word) for word in rest]
    request = Request(verb, command.schema, quoted, config_dir, stored_options)
    return to_options(request, compose(request))


def evaluate_checkpoint(
    checkpoint: "config.EvaluateConfig | str | Path", *words: str, **options: Any
) -> dict[str, Any]:
    """Score a checkpoint, print the table and write evaluation.json. Returns its content, with fractions.

    checkpoint: a file, a run folder, or what segtrain.compose("evaluate", ...) returns. words: further key=value words.
    options: the same as keywords; a group takes the name of a choice, a mapping, or its dataclass. UsageError in one
    sentence for what is wrong; DataError for data that cannot be scored.

    >>> segtrain.evaluate("runs/toy/last.pt")["miou"]
    >>> segtrain.evaluate("runs/toy", checkpoint_weights="raw", split="night")
    >>> segtrain.evaluate("runs/mine/last.pt", dataset={"name": "kitti", "root": "/data/kitti"}, inference="multiscale")
    """
    from segtrain.commands.evaluate import evaluate  # imports torch

    if isinstance(checkpoint, config.EvaluateConfig):
        if words or options:
            raise UsageError("segtrain.evaluate takes words beside a path, not beside composed options")
        if not checkpoint.dataset.name or not checkpoint.checkpoint:
            raise UsageError(
                'segtrain.evaluate needs a dataset and a checkpoint: segtrain.compose("evaluate", "checkpoint=FILE") '
                "returns options that have both, those of the checkpoint"
            )
        return evaluate(checkpoint)
    require_type(checkpoint, (str, Path), "segtrain.evaluate", "a checkpoint, a run folder or composed options")
    first = f"{'run' if Path(checkpoint).is_dir() else 'checkpoint'}={checkpoint}"
    made = {key: value for key, value in options.items() if is_dataclass(value)}
    plain = [word for key, value in options.items() for word in as_words(key, value)]
    composed = compose_command("evaluate", first, *words, *plain)
    assert isinstance(composed, config.EvaluateConfig)
    for key, value in made.items():
        setattr(composed, key, value)
    return evaluate(composed.check())


def as_words(key: str, value: Any) -> list[str]:
    """An option as words: {"dataset": {"name": "kitti", "root": "x"}} as dataset=kitti dataset.root=x."""
    if is_dataclass(value):
        return [f"{key}={value.name}"] if isinstance(value, config.DatasetConfig) else []
    if isinstance(value, Mapping):
        named = [f"{key}={value['name']}"] if "name" in value else []
        return [*named, *(f"{key}.{inner}={as_text(value[inner])}" for inner in value if inner != "name")]
    return [f"{key}={as_text(value)}"]


def as_text(value: Any) -> str:
    return f"[{','.join(map(as_text, value))}]" if isinstance(value, list | tuple) else as_written(value)


def require_type(value: Any, kind: Any, function: str, wanted: str) -> None:
    """UsageError in one sentence for an argument of another type."""
    if not isinstance(value, kind):
        raise UsageError(f"{function} takes {wanted}, got {type(value).__name__}")


def stored_options(checkpoint: Path) -> dict[str, Any]:
    """The options inside a checkpoint, which the command then reads without opening the file again."""
    from segtrain.weights.network_file import run_content

    stored: dict[str, Any] = run_content(checkpoint, keep=True)["config"]
    return stored
