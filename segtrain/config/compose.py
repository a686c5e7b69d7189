"""Compose a command's options with Hydra: configs/COMMAND.yaml, the chosen groups, then the overrides.

The one module that imports Hydra and OmegaConf, both only when something is composed.

The way of an override: `cli.words.parse` quotes it, `compose` merges it into the command's dataclass, `to_options`
checks the result, which goes to the command's function.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from segtrain.config.commands import CommandConfig, TrainConfig, refuse_other_task
from segtrain.config.dataset import DATASET_CONFIGS, DatasetConfig
from segtrain.config.inference import InferenceConfig
from segtrain.config.keys import LENGTHS, described, enclosing_mapping, is_safe, known_options
from segtrain.config.locations import CONFIGS, group_choices
from segtrain.config.messages import explain, unknown_choice
from segtrain.config.options import is_list, is_mapping
from segtrain.config.plugin_files import load_plugin, loaded_parts, own_parts
from segtrain.config.results import EvaluateConfig, PredictConfig, SubmitConfig
from segtrain.errors import UsageError


@dataclass
class Request:
    """A command line to be composed.

    words: overrides in Hydra's grammar. config_dir: a folder with the user's own YAML files. stored_options: reads the
    options inside a checkpoint; needed for commands that take them from there.
    """

    verb: str
    schema: type[CommandConfig]
    words: list[str] = field(default_factory=list)
    config_dir: str | None = None
    stored_options: Callable[[Path], dict[str, Any]] | None = None

    def chosen(self, key: str) -> str | None:
        """The value of the first word key=VALUE."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{key}=")), None)


def compose_training(*overrides: str, config_dir: str | None = None) -> TrainConfig:
    """Return the options of `segtrain train` for these words, as `segtrain.compose("experiment=toy")`.

    config_dir: a folder with YAML files of your own. UsageError as on the command line.
    """
    words = []
    load_plugins(TrainConfig, overrides)
    for word in overrides:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise UsageError("segtrain.compose takes key=value words, and config_dir=FOLDER, but no flags")
        if not equals:
            raise UsageError(f"{word!r} is not an override: options are given as key=value")
        words.append(as_override(TrainConfig, key, value))
    request = Request("train", TrainConfig, words, config_dir)
    options = to_options(request, compose(request))
    assert isinstance(options, TrainConfig)
    return options


def compose(request: Request) -> Any:
    """Return the composed options as an OmegaConf; UsageError in one sentence for a wrong key, value or group."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    prepare(request)
    path = [f"hydra.searchpath=[file://{Path(request.config_dir).absolute()}]"] if request.config_dir else []
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS.absolute()), job_name="segtrain", version_base="1.3"):
        try:
            chosen = [
                f"dataset={file_choice(Path(word.partition('=')[2]))}" if is_dataset_file(word) else word
                for word in one_length(request.words)
            ]
            return hydra.compose(request.verb, [*path, *chosen])
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UsageError(explain(error, known_options(request.schema, request.words), request.words)) from error


def to_options(request: Request, composed: Any) -> CommandConfig:
    """The command's dataclass, complete and checked."""
    from omegaconf import OmegaConf

    options = OmegaConf.to_object(composed)
    assert isinstance(options, CommandConfig)
    for plugin in getattr(options, "plugins", []):  # those that a recipe names; others are there by now
        load_plugin(plugin)
    if isinstance(options, TrainConfig):
        options.experiment = request.chosen("experiment")
        options.name = options.name or run_name(options, request.words)
    if isinstance(options, EvaluateConfig | PredictConfig) or (
        isinstance(options, SubmitConfig) and options.predictions is None
    ):
        options.checkpoint = str(checkpoint_path(options.checkpoint, options.run))
    options.check()
    return options


def sweep(request: Request, run: Callable[[CommandConfig], None]) -> None:
    """Run every combination of comma-separated values by Hydra's multirun, each as a run of its own name."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    prepare(request)

    def job(composed: Any) -> None:
        added = [f"{key}=null" for key in LENGTHS]
        words = [word for word in HydraConfig.get().overrides.task if word not in added]
        run(to_options(Request(request.verb, request.schema, words), composed))

    path = ["--config-dir", request.config_dir] if request.config_dir else []
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    sys.argv = ["segtrain", "-m", *path, *one_length(request.words), *quiet]
    hydra.main(version_base="1.3", config_path=str(CONFIGS.absolute()), config_name=request.verb)(job)()


def as_yaml(composed: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(composed)


def run_name(options: TrainConfig, words: list[str]) -> str:
    """The recipe and the overrides that change the run, so that the same command finds its run again."""
    base = options.experiment or f"{options.dataset.name}_{options.model.backbone}"
    chosen = [word for word in words if not is_safe(word.lstrip("+").partition("=")[0])]
    if options.experiment is None:
        named = (f"dataset={options.dataset.name}", f"model={options.model.backbone}")
        chosen = [word for word in chosen if word not in named]
    slug = "-".join([base, *(re.sub(r"[^\w.=+-]+", "_", word).strip("_") for word in sorted(chosen))])
    if len(slug) > 100:
        slug = f"{slug[:90]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
    return slug


# ---------------------------------------------------------------------------------------------------- Hydra's grammar


def as_override(schema: type, key: str, value: str) -> str:
    """One override of a command's options. Values of paths and names are quoted, so that they arrive as typed."""
    if mapping := enclosing_mapping(schema, key):
        paths = mapping[1].path
        is_path = isinstance(paths, tuple) and key.rpartition(".")[2] in paths
        return f"++{key}={quoted(value) if is_path and value != 'null' else value}"
    found = list(described(schema, key)) or list(described(TrainConfig, key))
    if any(is_mapping(item) for item, _ in found):
        return f"++{key}={value}"
    is_path = any(option.path is True or option.quote for _, option in found)
    if any(is_list(item) for item, _ in found):
        if is_path:
            return f"{key}=[{listed(value)}]"
        is_choice = any(option.choices for _, option in found) and re.fullmatch(r"\w+", value)
        return f"{key}=[{value}]" if is_choice else f"{key}={value}"  # a list of one needs no brackets
    is_sweep = value.startswith("[") and value.endswith("]")
    return f"{key}={quoted(value) if is_path and not is_sweep and value != 'null' else value}"


def listed(value: str) -> str:
    """The items of a list of paths, or a single path, quoted unless they are."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else None
    if inner is None:
        return quoted(value)
    if "'" in inner or '"' in inner:
        return inner
    return ",".join(quoted(item.strip()) for item in inner.split(",") if item.strip())


def quoted(value: str) -> str:
    """A string that Hydra's grammar reads back as exactly `value`."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def given(words: list[str], *keys: str) -> dict[str, Any]:
    """The values of these options, as Hydra reads them, before anything is composed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    words = [word for word in words if word.partition("=")[0] in keys]
    try:
        return {word.partition("=")[0]: OverridesParser.create().parse_override(word).value() for word in words}
    except HydraException as error:
        raise UsageError(f"{' '.join(words)} cannot be read: {str(error).splitlines()[0]}") from error


def one_length(words: list[str]) -> list[str]:
    """A length given on the command line replaces the recipe's, which may have another unit."""
    keys = {word.partition("=")[0] for word in words}
    given = [key for key in LENGTHS if key in keys]
    return words if len(given) != 1 else [*(f"{key}=null" for key in LENGTHS if key not in given), *words]


def refuse_additions(schema: type, words: list[str]) -> None:
    """Raise UsageError for Hydra's +key and ~key, except for keys that a mapping lets the user name."""
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        named = list(described(schema, key)) if enclosing_mapping(schema, key) is None else []
        own = enclosing_mapping(schema, key) is not None or any(is_mapping(item) for item, _ in named)
        if word[0] in "+~" and not (word.startswith("++") and own):
            raise UsageError(f"{word}: write {key}=... ; options cannot be added or taken away")


# ---------------------------------------------------------------------------------------------------- before composing


def prepare(request: Request) -> None:
    """Tell Hydra what the YAML files do not: the dataclasses, plugins' parts, dataset files, a checkpoint's options."""
    from hydra.core.config_store import ConfigStore

    refuse_additions(request.schema, request.words)
    refuse_bases(request)
    load_plugins(request.schema, request.words)
    store = ConfigStore.instance()
    store_parts(store)
    store.store(name=request.verb, group="schema", node=request.schema, package="_global_")
    for name, schema in DATASET_CONFIGS.items():
        store.store(name=name, group="dataset/schema", node=schema, package="dataset")
    for path in (Path(word.partition("=")[2]) for word in request.words if is_dataset_file(word)):
        store.store(name=file_choice(path), group="dataset", node=read_dataset_file(path))
    names = {item.name for item in fields(request.schema)}
    if {"checkpoint", "inference"} <= names:
        store_checkpoint(store, request, names)


def load_plugins(schema: type[CommandConfig], words: Sequence[str]) -> None:
    """Import what plugins=... names, so that the options of a plugin's dataset are known; then register these."""
    known = any(item.name == "plugins" for item in fields(schema))
    named = [as_override(schema, *word.split("=", 1)) for word in words if known and word.startswith("plugins=")]
    for plugin in given(named, "plugins").get("plugins") or []:
        load_plugin(str(plugin))
    for name, spec in loaded_parts("dataset.name").items():
        DATASET_CONFIGS.setdefault(name, getattr(spec, "options", None) or DatasetConfig)


def refuse_bases(request: Request) -> None:
    """Raise UsageError for experiment=base/..., which recipes share and Hydra would take as recipes."""
    for word in request.words:
        key, _, value = word.partition("=")
        base = next((choice for choice in re.split(r"[\[\],\s'\"]+", value) if choice.startswith("base/")), None)
        if key == "experiment" and base is not None:
            own = [] if request.config_dir is None else [request.config_dir]
            raise UsageError(unknown_choice(key, base, group_choices(key, own)))


def store_parts(store: Any) -> None:
    """Make GROUP=NAME choose a part of a plugin."""
    from omegaconf import OmegaConf

    for key, name in own_parts():
        group, _, option = key.partition(".")
        node: Any = {option: name}
        if group == "dataset":
            node = OmegaConf.merge(OmegaConf.structured(DATASET_CONFIGS[name]), node)
        store.store(name=name, group=group, node=node)


def is_dataset_file(word: str) -> bool:
    """dataset=mine.yaml: a file that `segtrain check write_config=` wrote, or one like it."""
    return word.startswith("dataset=") and word.endswith((".yaml", ".yml"))


def file_choice(path: Path) -> str:
    return "file_" + re.sub(r"\W", "_", str(path))


def read_dataset_file(path: Path) -> Any:
    """The options of a dataset in a YAML file, checked against its schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise UsageError(f"dataset={path}: no such file")
    try:
        content: Any = OmegaConf.load(path)
        name = content.get("name")
        if name not in DATASET_CONFIGS:
            raise UsageError(f"{path}: name must be one of {', '.join(DATASET_CONFIGS)}, got {name}")
        return OmegaConf.merge(OmegaConf.structured(DATASET_CONFIGS[name]), content)
    except (YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise UsageError(f"dataset={path}: {str(error).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_path(checkpoint: Any, run: Any) -> Path:
    """The checkpoint that the options name. UsageError unless exactly one of them is given."""
    if (checkpoint is None) == (run is None):
        raise UsageError("give checkpoint=FILE or run=FOLDER, one of them: a run keeps last.pt and best.pt")
    return Path(str(checkpoint)) if checkpoint is not None else Path(str(run)) / "last.pt"


def store_checkpoint(store: Any, request: Request, names: set[str]) -> None:
    """Make the options of the checkpoint the choice `from_checkpoint` of dataset and inference."""
    from omegaconf import OmegaConf

    stored: dict[str, Any] = {}
    if request.chosen("predictions") is None:  # else no network is asked
        named = given(request.words, "checkpoint", "run")
        path = checkpoint_path(named.get("checkpoint"), named.get("run"))
        assert request.stored_options is not None
        stored = request.stored_options(path)
        if "dataset" in names:
            refuse_other_datasets(path, stored, request.words)
    schemas: dict[str, type] = {"inference": InferenceConfig}
    if "dataset" in names and request.verb != "submit" and request.chosen("dataset") is None:
        known = stored["dataset"]["name"]
        if known not in DATASET_CONFIGS:
            raise UsageError(
                f"the checkpoint was trained on dataset={known}, which is not known here: give plugins=[FILE] with "
                "the file that defines it, or another dataset="
            )
        schemas["dataset"] = DATASET_CONFIGS[known]
    for group in sorted(names & schemas.keys()):
        node = OmegaConf.merge(OmegaConf.structured(schemas[group]), stored.get(group, {}))
        store.store(name="from_checkpoint", group=group, node=node)


def refuse_other_datasets(checkpoint: Path, stored: dict[str, Any], words: list[str]) -> None:
    """Reject a dataset of another task before composing, which would mix its options with the checkpoint's."""
    for word in words:
        key, _, name = word.partition("=")
        if key == "dataset":
            name = read_dataset_file(Path(name)).name if is_dataset_file(word) else name
            schema = DATASET_CONFIGS.get(name, DatasetConfig)
            refuse_other_task(checkpoint, stored["model"].get("head", ""), schema, name)
