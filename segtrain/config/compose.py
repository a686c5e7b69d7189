"""Compose a command's options with Hydra: configs/COMMAND.yaml, the chosen groups, then the overrides.

The one module that imports Hydra and OmegaConf, both only when something is composed.

The way of an override: `cli.words.parse` quotes it, `compose` merges it into the command's dataclass, `to_options`
checks the result, which goes to the command's function.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from segtrain.config.chosen_checkpoint import checkpoint_path
from segtrain.config.commands import CommandConfig, TrainConfig, refuse_other_task
from segtrain.config.dataset import DATASET_CONFIGS, DatasetConfig
from segtrain.config.inference import InferenceConfig
from segtrain.config.keys import LENGTHS, group_names, known_options, swept_keys
from segtrain.config.locations import CONFIGS, group_choices
from segtrain.config.messages import explain, mismatch, unknown_choice
from segtrain.config.options import as_written
from segtrain.config.overrides import as_override, literal, name_run, one_length, refuse_additions, shorten_warm_up
from segtrain.config.plugin_files import load_plugin, loaded_parts, own_parts
from segtrain.config.recipes import PREFIX, foreign_options, recipe_without
from segtrain.config.results import settle_checkpoint
from segtrain.config.stored import earlier_values
from segtrain.config.user_files import read_yaml
from segtrain.console import warn
from segtrain.errors import DataError, UsageError


@dataclass
class Request:
    """A command line to be composed.

    words: overrides in Hydra's grammar. config_dir: a folder with the user's own YAML files. stored_options: reads the
    options inside a checkpoint; needed for commands that take them from there. swept: the keys that a sweep varies.
    """

    verb: str
    schema: type[CommandConfig]
    words: list[str] = field(default_factory=list)
    config_dir: str | None = None
    stored_options: Callable[[Path], dict[str, Any]] | None = None
    swept: tuple[str, ...] = ()

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

    with explained(request):
        prepare(request)
        require_sound_files(request.config_dir)
        path = [f"hydra.searchpath=[file://{Path(request.config_dir).absolute()}]"] if request.config_dir else []
        chosen = [hydra_word(request, word) for word in one_length(request.words) if word != "experiment=null"]
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONFIGS.absolute()), job_name="segtrain", version_base="1.3"):
            return hydra.compose(request.verb, [*path, *chosen])


def hydra_word(request: Request, word: str) -> str:
    """The word that Hydra gets: a file of a dataset, and a recipe for another dataset, are stored under other names."""
    if is_dataset_file(word):
        return f"dataset={file_choice(dataset_file(word))}"
    return f"experiment={PREFIX}{chosen_recipe(request)}" if is_recipe(word) and fallen_options(request)[1] else word


def is_recipe(word: str) -> bool:
    return word.startswith("experiment=")


def fallen_options(request: Request) -> tuple[str, list[str]]:
    """The dataset that the recipe is for, and its options dataset.KEY that fall away because another one is typed."""
    typed = [word for word in request.words if word.startswith("dataset=")]
    recipe = chosen_recipe(request)
    if not typed or recipe is None or not re.fullmatch(r"[\w./-]+", recipe) or "," in typed[-1]:
        return "", []
    name, own = typed[-1].partition("=")[2], list[str]()
    if is_dataset_file(typed[-1]):
        content = read_yaml(dataset_file(typed[-1]))
        name, own = (str(content.get("name")), list(content)) if isinstance(content, dict) else ("", [])
    return foreign_options(recipe, name, own, [request.config_dir] if request.config_dir else [])


@contextlib.contextmanager
def explained(request: Request) -> Iterator[None]:
    """Raise UsageError in one sentence for what Hydra and OmegaConf refuse inside: the one guard around both."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError, UnicodeError) as error:
        raise UsageError(explain(error, known_options(request.schema, request.words), request.words)) from error


def to_options(request: Request, composed: Any) -> CommandConfig:
    """The command's dataclass, complete and checked."""
    from omegaconf import OmegaConf

    with explained(request):
        options = OmegaConf.to_object(composed)
    assert isinstance(options, CommandConfig)
    refuse_foreign_mapping(composed, options)
    for plugin in getattr(options, "plugins", []):  # those that a recipe names; others are there by now
        load_plugin(plugin)
    if isinstance(options, TrainConfig):
        options.experiment = chosen_recipe(request)
        its, fallen = fallen_options(request)
        if fallen:
            listed = ", ".join(f"dataset.{key}" for key in fallen)
            why = "the file of the dataset comes first" if its == options.dataset.name else f"it is for dataset={its}"
            warn(f"experiment={options.experiment}: its {listed} left out, as {why}")
        options.mean_is_given = any(word.startswith(("model.mean=", "model.std=")) for word in request.words)
        name_run(options, request.words, request.swept)
        shorten_warm_up(options, request.words)
    settle_checkpoint(options)
    options.check()
    return options


def refuse_foreign_mapping(composed: Any, options: CommandConfig) -> None:
    """Refuse a mapping of another dataset, such as dataset.splits without dataset=folder, which Hydra's ++ adds."""
    data: Any = getattr(options, "dataset", None)
    for key in composed.dataset if data is not None else ():
        if key not in data.__dataclass_fields__:
            others = sorted(name for name, kind in DATASET_CONFIGS.items() if key in kind.__dataclass_fields__)
            raise UsageError(f"dataset={data.name} has no option dataset.{key}: it is of dataset={' or '.join(others)}")


def chosen_recipe(request: Request) -> str | None:
    """experiment=NAME as typed; None without one."""
    name = request.chosen("experiment")
    return None if name == "null" else name


def combinations(request: Request) -> list[Request]:
    """What -m asks for: a request for each combination of comma-separated values."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with explained(request):
        overrides = OverridesParser.create().parse_overrides(request.words)
        jobs = BasicSweeper.split_arguments(overrides, None)[0]
    return [replace(request, words=words, swept=swept_keys(jobs)) for words in jobs]


def launch_by_hydra(request: Request, run: Callable[[CommandConfig], None]) -> None:
    """Let Hydra's launcher, which hydra/launcher=... names, run every combination, each as a run of its own name."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    def job(composed: Any) -> None:
        added = [f"{key}=null" for key in LENGTHS]
        words = [typed.get(word, word) for word in HydraConfig.get().overrides.task if word not in added]
        run(to_options(replace(request, words=words, swept=jobs[0].swept), composed))

    typed: dict[str, str] = {}  # what Hydra gets for the files of datasets -> what was typed
    sent = []
    for word in one_length(request.words):
        choices = []
        for item in dataset_choices(word):
            one = f"dataset={item}"
            choices.append(hydra_word(request, one).partition("=")[2] if is_dataset_file(one) else item)
            typed[f"dataset={choices[-1]}"] = one
        sent.append(f"dataset={','.join(choices)}" if choices else hydra_word(request, word))
        typed.setdefault(sent[-1], word)
    path = ["--config-dir", request.config_dir] if request.config_dir else []
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    sys.argv = ["segtrain", "-m", *path, *sent, *quiet]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints what is raised, and ends the process with 1
    for job_request in (jobs := combinations(request)):
        prepare(job_request)
    with explained(request):
        hydra.main(version_base="1.3", config_path=str(CONFIGS.absolute()), config_name=request.verb)(job)()


def as_yaml(composed: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(composed)


def given(words: list[str], *keys: str) -> dict[str, Any]:
    """The values of these options, as Hydra reads them, before anything is composed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words = [word for word in words if word.partition("=")[0] in keys]
    try:
        found = {word.partition("=")[0]: OverridesParser.create().parse_override(word).value() for word in words}
        result: Any = OmegaConf.to_container(OmegaConf.create(found), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"{' '.join(words)} cannot be read: {str(error).splitlines()[0]}") from error
    return dict(result)


# ---------------------------------------------------------------------------------------------------- before composing


def prepare(request: Request) -> None:
    """Tell Hydra what the YAML files do not: the dataclasses, plugins' parts, dataset files, a checkpoint's options."""
    from hydra.core.config_store import ConfigStore

    refuse_additions(request.schema, request.words)
    refuse_choices(request)
    load_plugins(request.schema, request.words)
    store = ConfigStore.instance()
    store_parts(store)
    store.store(name=request.verb, group="schema", node=request.schema, package="_global_")
    for name, schema in DATASET_CONFIGS.items():
        store.store(name=name, group="dataset/schema", node=schema, package="dataset")
    for path in (path for word in request.words for path in dataset_files(word)):
        store.store(name=file_choice(path), group="dataset", node=read_dataset_file(path))
    if (recipe := chosen_recipe(request)) is not None and (fallen := fallen_options(request)[1]):
        folders = [request.config_dir] if request.config_dir else []
        for name, node in recipe_without(recipe, fallen, folders).items():
            place = Path("experiment", name)
            store.store(name=place.name, group=place.parent.as_posix(), node=node, package="_global_")
    names = {item.name for item in fields(request.schema)}
    if "checkpoint" in names and names & {"dataset", "inference"}:
        store_checkpoint(store, request, names)


def load_plugins(schema: type[CommandConfig], words: Sequence[str]) -> None:
    """Import what plugins=... names, so that the options of a plugin's dataset are known; then register these."""
    known = any(item.name == "plugins" for item in fields(schema))
    named = [as_override(schema, *word.split("=", 1)) for word in words if known and word.startswith("plugins=")]
    for plugin in given(named, "plugins").get("plugins") or []:
        load_plugin(str(plugin))
    for name, spec in loaded_parts("dataset.name").items():
        DATASET_CONFIGS.setdefault(name, getattr(spec, "options", None) or DatasetConfig)


def require_sound_files(config_dir: str | None) -> None:
    """UsageError for a YAML file of the user's folder that is no YAML, or that grows without end by its aliases."""
    own = [] if config_dir is None else [*Path(config_dir).glob("*.yaml"), *Path(config_dir).glob("*/*.yaml")]
    for path in sorted(own):
        try:
            read_yaml(path)
        except DataError as error:
            raise UsageError(str(error)) from error


def refuse_choices(request: Request) -> None:
    """Raise UsageError for a choice of a group that is no name, and for experiment=base/..., which recipes share."""
    words = [word for word in request.words if word != "experiment=null"]  # the default
    for key, value in given(words, *group_names(request.schema), "experiment").items():
        choices = value if isinstance(value, list) and key == "experiment" else [value]
        for choice in choices:
            if not isinstance(choice, str) or not choice or choice.startswith("base/"):
                own = [] if request.config_dir is None else [request.config_dir]
                raise UsageError(unknown_choice(key, as_written(choice), group_choices(key, own)))


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
    return word.startswith("dataset=") and word.strip("'\"").endswith((".yaml", ".yml"))


def dataset_file(word: str) -> Path:
    return Path(given([word], "dataset")["dataset"])


def dataset_files(word: str) -> list[Path]:
    """The files among the choices of dataset=a.yaml,b.yaml,streets, which a launcher of Hydra's gets at once."""
    return [dataset_file(f"dataset={item}") for item in dataset_choices(word) if is_dataset_file(f"dataset={item}")]


def dataset_choices(word: str) -> list[str]:
    """The choices of dataset=a,b; [] for any other word. In quotes a comma is part of a file's name."""
    return re.findall(r"'(?:[^'\\]|\\.)*'|[^,]+", word.partition("=")[2]) if word.startswith("dataset=") else []


def file_choice(path: Path) -> str:
    return "file_" + re.sub(r"\W", "_", str(path))


def read_dataset_file(path: Path) -> Any:
    """The options of a dataset in a YAML file, checked against its schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise UsageError(f"dataset={path}: no such file")
    content, name = None, None
    try:
        content = read_yaml(path)
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str) or name not in DATASET_CONFIGS:
            raise UsageError(f"{path}: name must be one of {', '.join(DATASET_CONFIGS)}, got {name}")
        return OmegaConf.merge(OmegaConf.structured(DATASET_CONFIGS[name]), content)
    except (DataError, OmegaConfBaseException) as error:
        first, key = str(error).splitlines()[0], getattr(error, "full_key", None) or ""
        raise UsageError(f"dataset={path}: {mismatch(first, key or wrong_key(content, name)) or first}") from error


def wrong_key(content: Any, name: Any) -> str:
    """The first option in the file of a dataset that its schema does not take; "" if none is found."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, value in content.items() if isinstance(content, dict) else ():
        try:
            OmegaConf.merge(OmegaConf.structured(DATASET_CONFIGS[name]), {key: value})
        except OmegaConfBaseException:
            return str(key)
    return ""


# ---------------------------------------------------------------------------------------------------- checkpoints


def store_checkpoint(store: Any, request: Request, names: set[str]) -> None:
    """Make the options of the checkpoint the choice `from_checkpoint` of dataset and inference."""
    from omegaconf import OmegaConf

    stored: dict[str, Any] = {}
    named = given(request.words, "checkpoint", "run")
    alone = request.chosen("engine") is not None and not named
    if alone and request.chosen("dataset") is None:
        raise UsageError("engine=FILE alone: give dataset=NAME, or checkpoint=FILE, whose dataset is then taken")
    if request.chosen("predictions") is None and not alone:  # else no network is asked
        several = named.get("checkpoint")
        path = checkpoint_path(several[0] if isinstance(several, list) and several else several, named.get("run"))
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
        values = stored.get(group, {})
        if group == "dataset":
            values = values | earlier_values(schemas[group], values)
        node = OmegaConf.merge(OmegaConf.structured(schemas[group]), literal(values))
        store.store(name="from_checkpoint", group=group, node=node)


def refuse_other_datasets(checkpoint: Path, stored: dict[str, Any], words: list[str]) -> None:
    """Reject a dataset of another task before composing, which would mix its options with the checkpoint's."""
    for word in words:
        key, _, name = word.partition("=")
        if key == "dataset":
            name = read_dataset_file(dataset_file(word)).name if is_dataset_file(word) else name
            schema = DATASET_CONFIGS.get(name, DatasetConfig)
            refuse_other_task(checkpoint, stored["model"].get("head", ""), schema, name)
