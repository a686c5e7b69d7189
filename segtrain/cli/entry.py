"""`segtrain COMMAND key=value ...`: the only importer of Hydra. Nothing heavy is imported before a command runs.

The way of an override: `main` picks the command, `compose` merges configs/COMMAND.yaml, the chosen groups and the
overrides into the command's dataclass (config.py), which checks itself and goes to the command's function.
"""

import difflib
import importlib
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from segtrain import __version__, config
from segtrain.cli.help import CONFIGS, GROUP_FOLDERS, Command, known_options, overview, usage
from segtrain.config import plugin_files as plugins
from segtrain.errors import SegtrainError, UsageError

COMMANDS = {
    "streets": Command(
        "data", "write the built-in street scenes", config.StreetsCommandConfig,
        "segtrain.data.sets.streets:streets", "output",
        ("segtrain streets output=scenes",
         "segtrain streets output=kitti_like layout=kitti scenes=20",
         "segtrain streets output=large size=[512,1024] seed=3"),
    ),
    "check": Command(
        "data", "verify a data set: files, sizes, labels and what they hold", config.CheckConfig,
        "segtrain.commands.check:check", None,
        ("segtrain check dataset=cityscapes dataset.root=/data/cityscapes",
         "segtrain check dataset=kitti split=val output=checked",
         "segtrain check dataset=folder dataset.root=/data/mine write_config=mine.yaml"),
    ),
    "train": Command(
        "train", "train a segmentation network, or go on with an interrupted run", config.TrainConfig,
        "segtrain.engine.train:train", None,
        ("segtrain train experiment=toy",
         "segtrain train model=resnext50 dataset=cityscapes dataset.root=/data/cityscapes",
         "segtrain train experiment=toy optimizer.lr=0.02 name=higher_rate"),
    ),
    "replay": Command(
        "train", "rebuild the batch of any step of a run, and draw it", config.ReplayConfig,
        "segtrain.commands.replay:replay", "run",
        ("segtrain replay runs/toy step=18",
         "segtrain replay run=runs/toy step=18 output=looked_at",
         "segtrain replay run=runs/cityscapes_resnext101 step=18204 root=/data/cityscapes"),
    ),
    "verify-resume": Command(
        "train", "prove that a killed run of your configuration goes on exactly", config.VerifyConfig,
        "segtrain.commands.verify_resume:verify_resume", None,
        ("segtrain verify-resume experiment=toy output=proof",
         "segtrain verify-resume dataset=cityscapes model=resnext50 trainer.batch_size=4 device=cuda",
         "segtrain verify-resume experiment=toy trainer.ema_decay=0.99 optimizer=adamw"),
    ),
    "runs": Command(
        "train", "list runs: how far, which score, when; or beside the paper's figures", config.RunsConfig,
        "segtrain.commands.runs:runs", "root",
        ("segtrain runs", "segtrain runs root=/data/runs", "segtrain runs table=paper"),
    ),
    "evaluate": Command(
        "results", "score a checkpoint on a split", config.EvaluateConfig,
        "segtrain.commands.evaluate:evaluate", "checkpoint",
        ("segtrain evaluate runs/toy/last.pt",
         "segtrain evaluate checkpoint=runs/toy/best.pt split=night dataset.night_scenes=20",
         "segtrain evaluate wide_resnet38_deeplab_vistas.pth.tar dataset=vistas inference=vistas_official"),
    ),
    "score": Command(
        "results", "score label PNGs made by anyone, by the data set's own rules", config.ScoreConfig,
        "segtrain.commands.score:score", "predictions",
        ("segtrain score predictions=results dataset=cityscapes dataset.root=/data/cityscapes",
         "segtrain score predictions=results dataset=kitti split=val predictions_encoding=train_ids",
         "segtrain score predictions=results dataset=cocostuff dataset.classes=stuff91 output=scores"),
    ),
    "submit": Command(
        "results", "write and verify the archive for a benchmark's server", config.SubmitConfig,
        "segtrain.commands.submit:submit", "checkpoint",
        ("segtrain submit checkpoint=runs/cityscapes_resnext101/last.pt dataset=cityscapes",
         "segtrain submit predictions=results dataset=kitti output=to_send",
         "segtrain submit run=runs/vistas_resnet50 dataset=vistas inference=tiled"),
    ),
    "predict": Command(
        "use", "label, colour, overlay and probability pictures for photographs", config.PredictConfig,
        "segtrain.commands.predict:predict", "input",
        ("segtrain predict checkpoint=runs/toy/last.pt input=photo.jpg",
         "segtrain predict run=runs/toy input=photos output=answers",
         "segtrain predict checkpoint=wide_resnet38_deeplab_vistas.pth.tar input=photos inference=vistas_official "
         "outputs=[palette,prob]"),
    ),
    "convert": Command(
        "use", "the same weights under other names or in another container", config.ConvertConfig,
        "segtrain.commands.convert:convert", "input",
        ("segtrain convert input=runs/toy/last.pt output=toy.safetensors",
         "segtrain convert input=resnet50-11ad3fa6.pth output=resnet50.safetensors",
         "segtrain convert input=wide_resnet38_deeplab_vistas.pth.tar output=vistas.pt form=run"),
    ),
    "weights": Command(
        "use", "published files of weights: where they are, md5, licence, accuracy", config.WeightsConfig,
        "segtrain.commands.weights:weights", "verify",
        ("segtrain weights", "segtrain weights verify=wide_resnet38_ipabn_lr_256.pth.tar",
         "segtrain weights resnext101_ipabn_lr_512.pth.tar"),
    ),
    "info": Command(
        "use", "driver, torch and kernels of this machine, or what a checkpoint holds", config.InfoConfig,
        "segtrain.commands.info:info", "checkpoint",
        ("segtrain info", "segtrain info checkpoint=runs/toy/last.pt", "segtrain info runs/toy/best.pt"),
    ),
}  # fmt: skip
# What people type who come from elsewhere.
ALIASES = {
    "val": "evaluate",
    "test": "evaluate",
    "eval": "evaluate",
    "infer": "predict",
    "doctor": "check",
    "pretrain": "train",
}

# Values of these are taken as they are, whatever signs they hold; Hydra's grammar applies to all others.
PATH_OPTIONS = (
    "input",
    "output",
    "run",
    "checkpoint",
    "predictions",
    "root",
    "name",
    "dataset.root",
    "dataset.cache_dir",
    "dataset.classes",
    "model.weights",
    "model.weights_taxonomy",
    "verify",
    "write_config",
)
LENGTHS = ("trainer.max_steps", "trainer.epochs", "trainer.hours")
# Where users name keys of their own.
MAPPINGS = ("dataset.splits.", "dataset.parts.", "model.backbone_options.", "model.backbone_options=",
            "loss.options.", "loss.options=")  # fmt: skip


@dataclass
class Arguments:
    """What stands on the command line: overrides, and the flags that are Hydra's."""

    overrides: list[str]
    config_dir: str | None = None
    show: bool = False  # --cfg job
    only: str = ""  # --print-run or --print-slurm, instead of training
    sweep: bool = False  # -m: Hydra itself runs each combination


def main(argv: list[str] | None = None) -> None:
    """Entry point of the program `segtrain`; ends the process with the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        run(arguments)
    except SegtrainError as error:
        stop(told(error), error.exit_status)
    except KeyboardInterrupt:
        stop("interrupted; nothing was saved since the last checkpoint", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        stop(f"cannot write or read{where}: {error.strerror or error}. What was saved before is untouched.", 1)


def told(error: SegtrainError) -> str:
    """The message; nothing where another process of this run says it."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if rank is None:
        return str(error)
    shared = error.everywhere or isinstance(error, UsageError)  # options are the same for all
    first = (rank if error.everywhere else os.environ.get("LOCAL_RANK", rank)) == "0"  # options: once a machine
    silent = getattr(error, "quiet", False) or (shared and not first)
    return "" if silent else f"{error}" if shared else f"rank {rank}: {error}"


def stop(text: str, status: int) -> None:
    sys.stdout.flush()
    if text:
        print(f"segtrain: {text}", file=sys.stderr, flush=True)
    sys.exit(status)


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(COMMANDS))
        return
    if arguments[0] == "--version":
        print(f"segtrain {__version__}")
        return
    if arguments[0] in ("--completion", "--complete"):
        from segtrain.cli import completion

        if arguments[0] == "--completion":
            print(completion.script("".join(arguments[1:2])), end="")
        else:
            print("\n".join(completion.complete(arguments[1:], COMMANDS, PATH_OPTIONS)))
        return
    verb = arguments[0]
    if verb not in COMMANDS:
        near = ALIASES.get(verb) or next(iter(difflib.get_close_matches(verb, COMMANDS, 1, 0.5)), None)
        hint = f"did you mean `segtrain {near}`?" if near else "the commands are " + ", ".join(COMMANDS)
        raise UsageError(f"there is no command {verb!r}: {hint} (segtrain --help lists all)")
    command = COMMANDS[verb]
    if any(word in ("-h", "--help") for word in arguments[1:]):
        print(usage(verb, command))
        return
    parsed = parse(verb, command, arguments[1:])
    if parsed.sweep:
        sweep(verb, command, parsed)
        return
    composed = compose(verb, command, parsed)
    if parsed.show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(composed), end="")
        return
    options = checked(verb, composed, parsed.overrides)
    if parsed.only == "--print-run":
        assert isinstance(options, config.TrainConfig)
        print(config.run_folder(options))
        return
    if parsed.only == "--print-slurm":
        from segtrain.cli.slurm import script

        print(script(arguments[1:]), end="")
        return
    if isinstance(options, config.VerifyConfig):
        folder = [] if parsed.config_dir is None else ["--config-dir", parsed.config_dir]
        options.overrides = [*folder, *(word for word in parsed.overrides if not word.startswith("output="))]
    start(command, options)


def training_config(*overrides: str, config_dir: str | None = None) -> config.TrainConfig:
    """`segtrain.compose("experiment=toy", "optimizer.lr=0.1")`: what `segtrain train` makes of these words.

    config_dir: a folder with YAML files of your own. UsageError as on the command line.
    """
    command = COMMANDS["train"]
    arguments = parse("train", command, [*overrides])
    if arguments.sweep or arguments.show or arguments.config_dir:
        raise UsageError("segtrain.compose takes key=value words, and config_dir=FOLDER, but no flags")
    arguments.config_dir = config_dir
    options = checked("train", compose("train", command, arguments), arguments.overrides)
    assert isinstance(options, config.TrainConfig)
    return options


def start(command: Command, options: config.CommandConfig) -> None:
    module, function = command.function.split(":")
    getattr(importlib.import_module(module), function)(options)


# ---------------------------------------------------------------------------------------------------- the command line


def parse(verb: str, command: Command, words: list[str]) -> Arguments:
    """Split overrides from flags, quote paths, and give a bare path its name."""
    result, bare = Arguments([]), list[str]()
    words = list(words)
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            result.config_dir = value or (words.pop(0) if words else "")
            if not Path(result.config_dir).is_dir():
                raise UsageError(f"--config-dir {result.config_dir}: no such folder")
        elif flag in ("--cfg", "-c"):
            kind = value or (words.pop(0) if words else "")
            if kind != "job":
                raise UsageError(f"--cfg {kind}: only --cfg job is there, which prints the composed options")
            result.show = True
        elif verb == "train" and word in ("--print-run", "--print-slurm"):
            result.only = word
        elif word in ("-m", "--multirun"):
            result.sweep = True
        elif re.match(r"--?[a-zA-Z]", word):
            raise UsageError(f"there is no flag {word}; options are given as key=value (segtrain {verb} --help)")
        else:
            result.overrides.append(override(verb, command, word))
            if result.overrides[-1].startswith(f"{command.bare}=") and not word.startswith(f"{command.bare}="):
                bare.append(word)
    if bare and sum(word.startswith(f"{command.bare}=") for word in result.overrides) > 1:
        network = "; the network is checkpoint=FILE or run=FOLDER" if verb == "predict" else ""
        raise UsageError(f"{bare[0]}: a word alone is {command.bare}=, which is given twice so{network}")
    return result


def override(verb: str, command: Command, word: str) -> str:
    """One override in Hydra's grammar, the value of a path option quoted."""
    key, equals, value = word.partition("=")
    known = {item.name for item in fields(command.schema)}
    if not equals or (key.split(".")[0] not in known and Path(word).exists()):
        if word.startswith("~"):
            raise UsageError(f"{word}: an option cannot be taken away; set it to null instead")
        if command.bare is None:
            raise UsageError(f"{word!r} is not an override: options are given as key=value (segtrain {verb} --help)")
        key, value = command.bare, word
    if key.startswith("dataset.parts.") and key.endswith((".root", ".taxonomy")) and value != "null":
        return f"++{key}={quoted(value)}"
    if key == "plugins":
        return f"plugins=[{listed(value)}]"
    if key == "outputs" and re.fullmatch(r"\w+", value):
        return f"outputs=[{value}]"  # a list of one
    if key in PATH_OPTIONS and not (value.startswith("[") and value.endswith("]")) and value != "null":
        return f"{key}={quoted(value)}"
    if word.startswith(MAPPINGS):
        return f"++{word}"
    return word


def listed(value: str) -> str:
    """The items of a list of paths, or a path alone, quoted; unless they are."""
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


# ---------------------------------------------------------------------------------------------------- composing


def register(verb: str, command: Command, overrides: list[str]) -> None:
    """Tell Hydra the dataclass of the command and of every data set, parts of the user's own, and what a checkpoint
    was trained with."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for plugin in given(overrides, "plugins").get("plugins") or []:
        plugins.load(str(plugin))
    for group, option, name in plugins.own_parts():
        node: Any = {option: name}
        if group == "dataset":
            own = getattr(sys.modules["segtrain.data.dataset"].DATASETS[name], "options", None)
            schema = config.DATASET_CONFIGS.setdefault(name, own or config.DatasetConfig)
            node = OmegaConf.merge(OmegaConf.structured(schema), node)
        store.store(name=name, group=group, node=node)
    store.store(name=verb, group="schema", node=command.schema, package="_global_")
    for name, schema in config.DATASET_CONFIGS.items():
        store.store(name=name, group="dataset/schema", node=schema, package="dataset")
    names = {item.name for item in fields(command.schema)}
    for path in (Path(word.partition("=")[2]) for word in overrides if is_dataset_file(word)):
        store.store(name=file_choice(path), group="dataset", node=read_dataset_file(path))
    if "checkpoint" in names and "inference" in names:
        alone = any(word.startswith("predictions=") for word in overrides)  # no network is asked
        trained = {} if alone else trained_with(overrides)
        if trained and "dataset" in names:
            refuse_other_task(trained, overrides)
        schemas: dict[str, type] = {"inference": config.InferenceConfig}
        if "dataset" in names and verb != "submit" and not any(word.startswith("dataset=") for word in overrides):
            known = trained["dataset"]["name"]
            if known not in config.DATASET_CONFIGS:
                raise UsageError(
                    f"the checkpoint was trained on dataset={known}, which is not known here: give plugins=[FILE] with "
                    "the file that defines it, or another dataset="
                )
            schemas["dataset"] = config.DATASET_CONFIGS[known]
        for group in sorted(names & schemas.keys()):
            node = OmegaConf.merge(OmegaConf.structured(schemas[group]), trained.get(group, {}))
            store.store(name="from_checkpoint", group=group, node=node)


def is_dataset_file(word: str) -> bool:
    """dataset=mine.yaml: a file that `segtrain check write_config=` wrote, or one like it."""
    return word.startswith("dataset=") and word.endswith((".yaml", ".yml"))


def file_choice(path: Path) -> str:
    return "file_" + re.sub(r"\W", "_", str(path))


def read_dataset_file(path: Path) -> Any:
    """The options of a data set in a YAML file, checked against its schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise UsageError(f"dataset={path}: no such file")
    try:
        content: Any = OmegaConf.load(path)
        name = content.get("name")
        if name not in config.DATASET_CONFIGS:
            raise UsageError(f"{path}: name: {name} is no data set; there is {', '.join(config.DATASET_CONFIGS)}")
        return OmegaConf.merge(OmegaConf.structured(config.DATASET_CONFIGS[name]), content)
    except (YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise UsageError(f"dataset={path}: {str(error).splitlines()[0]}") from error


def given(overrides: list[str], *keys: str) -> dict[str, Any]:
    """The values of these options, as Hydra reads them, before anything is composed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    words = [word for word in overrides if word.partition("=")[0] in keys]
    try:
        return {word.partition("=")[0]: OverridesParser.create().parse_override(word).value() for word in words}
    except HydraException as error:
        raise UsageError(f"{' '.join(words)} cannot be read: {str(error).splitlines()[0]}") from error


def trained_with(overrides: list[str]) -> dict[str, Any]:
    """The configuration inside the checkpoint that the overrides name."""
    named = given(overrides, "checkpoint", "run")
    path = checkpoint_path(named.get("checkpoint"), named.get("run"))
    from segtrain.weights.network_file import run_content

    trained: dict[str, Any] = run_content(path, keep=True)["config"]
    return trained


def refuse_other_task(trained: dict[str, Any], overrides: list[str]) -> None:
    """Before a checkpoint's other options meet those of a data set that it cannot be used on."""
    named = given(overrides, "checkpoint", "run")
    path, head = checkpoint_path(named.get("checkpoint"), named.get("run")), trained["model"].get("head", "")
    for word in overrides:
        key, _, name = word.partition("=")
        if key == "dataset":
            name = read_dataset_file(Path(name)).name if is_dataset_file(word) else name
            config.refuse_other_task(path, head, config.DATASET_CONFIGS.get(name, config.DatasetConfig), name)


def checkpoint_path(checkpoint: Any, run: Any) -> Path:
    if (checkpoint is None) == (run is None):
        raise UsageError("give checkpoint=FILE or run=FOLDER, one of them: a run keeps last.pt and best.pt")
    return Path(str(checkpoint)) if checkpoint is not None else Path(str(run)) / "last.pt"


def compose(verb: str, command: Command, arguments: Arguments) -> Any:
    """The composed options as OmegaConf; UsageError in one sentence for a wrong key, value or group."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    refuse_additions(arguments.overrides)
    refuse_bases(arguments)
    register(verb, command, arguments.overrides)
    path = [f"hydra.searchpath=[file://{Path(arguments.config_dir).absolute()}]"] if arguments.config_dir else []
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS.absolute()), job_name="segtrain", version_base="1.3"):
        try:
            chosen = [
                f"dataset={file_choice(Path(word.partition('=')[2]))}" if is_dataset_file(word) else word
                for word in one_length(arguments.overrides)
            ]
            return hydra.compose(verb, [*path, *chosen])
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UsageError(explain(error, verb, command, arguments.overrides)) from error


def one_length(overrides: list[str]) -> list[str]:
    """A length on the command line is instead of the recipe's, which may be in another unit."""
    keys = {word.partition("=")[0] for word in overrides}
    given = [key for key in LENGTHS if key in keys]
    return overrides if len(given) != 1 else [*(f"{key}=null" for key in LENGTHS if key not in given), *overrides]


def refuse_additions(overrides: list[str]) -> None:
    for word in overrides:
        if word[0] in "+~" and not word.startswith(tuple(f"++{mapping}" for mapping in MAPPINGS)):
            key = word.lstrip("+~").partition("=")[0]
            raise UsageError(f"{word}: write {key}=... ; options cannot be added or taken away")


def refuse_bases(arguments: Arguments) -> None:
    """What recipes share is in experiment/base/, which Hydra would take as recipes."""
    for word in arguments.overrides:
        key, _, value = word.partition("=")
        base = next((choice for choice in re.split(r"[\[\],\s'\"]+", value) if choice.startswith("base/")), None)
        if key == "experiment" and base is not None:
            from segtrain.cli.completion import choices_of_group

            own = [] if arguments.config_dir is None else ["--config-dir", arguments.config_dir]
            raise UsageError(unknown_choice(key, base, choices_of_group(key, own)))


def explain(error: Exception, verb: str, command: Command, overrides: list[str]) -> str:
    """One sentence from what Hydra or OmegaConf says: the key, the value, what is allowed."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)  # type: ignore[arg-type]
    texts = [str(item) for item in chain]
    text = "\n".join(texts)
    known = known_options(command.schema, overrides)
    if match := re.search(
        r"Could not find '?([\w]+)/([^'\s]+?)'?\s*\n+\s*Available options in '\w+':\n((?:\t.*\n?)+)", text
    ):
        options = [option.strip() for option in match[3].split("\n") if option.strip() not in ("", "from_checkpoint")]
        return unknown_choice(match[1], match[2], options)
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1], known)
    if match := re.search(r"Key '(\w+)' (?:not in|is not in struct)[\s\S]*?full_key: ([\w.\[\]]+)", text):
        return unknown_key(match[2], known) + where_in_yaml(match[2], overrides)
    if match := re.search(r"full_key: ([\w.\[\]]+)", text):
        key = re.sub(r"\[\d+\]", "", match[1])
        told = [item for item in texts if "full_key" in item][-1].splitlines()
        first = next(line for line in told if not line.startswith("In '"))
        wanted = f"; it is: {known[key][0]}, {known[key][1]}" if key in known else ""
        return f"{key}: {first[0].lower() + first[1:]}{wanted}" + where_in_yaml(key, overrides)
    return re.sub(r"\s+", " ", texts[0]) + f" (given: {' '.join(overrides) or 'no overrides'})"


def unknown_choice(group: str, choice: str, options: list[str]) -> str:
    near = difflib.get_close_matches(choice, options, 1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    own = " (parts of your own: plugins=[FILE])" if group in plugins.PARTS else ""
    return f"{group}={choice}: there is none of that name; {hint}There is {', '.join(options)}{own}"


def where_in_yaml(key: str, overrides: list[str]) -> str:
    """Names the recipe where the key is not on the command line."""
    given = [word.lstrip("+").partition("=")[0] for word in overrides]
    if any(key == name or key.startswith(f"{name}.") for name in given):
        return ""
    files = [word for word in overrides if word.partition("=")[0] in ("experiment", *GROUP_FOLDERS)]
    return f" (set in the YAML of {', '.join(files)})" if files else " (set in a YAML file)"


def unknown_key(key: str, known: dict[str, tuple[str, str]]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.6)
    prefix = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == prefix]
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no option {key}: {hint}There is {', '.join(siblings or sorted({n.split('.')[0] for n in known}))}"


def checked(verb: str, composed: Any, overrides: list[str]) -> config.CommandConfig:
    """The command's dataclass, complete and checked."""
    from omegaconf import OmegaConf

    options = OmegaConf.to_object(composed)
    assert isinstance(options, config.CommandConfig)
    for plugin in (
        options.plugins if hasattr(options, "plugins") else []
    ):  # those that a recipe names; others are there by now
        plugins.load(plugin)
    if isinstance(options, config.TrainConfig):
        options.experiment = next((w.partition("=")[2] for w in overrides if w.startswith("experiment=")), None)
        options.name = options.name or run_name(options, overrides)
    if isinstance(options, config.EvaluateConfig | config.PredictConfig) or (
        isinstance(options, config.SubmitConfig) and options.predictions is None
    ):
        options.checkpoint = str(checkpoint_path(options.checkpoint, options.run))
    return options.check()


def run_name(options: config.TrainConfig, overrides: list[str]) -> str:
    """The recipe and the overrides that change the run, so that the same command finds its run again."""
    import hashlib

    from segtrain.engine.run import is_safe

    base = options.experiment or f"{options.dataset.name}_{options.model.backbone}"
    chosen = [word for word in overrides if not is_safe(word.lstrip("+").partition("=")[0])]
    if options.experiment is None:
        chosen = [
            word
            for word in chosen
            if word not in (f"dataset={options.dataset.name}", f"model={options.model.backbone}")
        ]
    slug = "-".join([base, *(re.sub(r"[^\w.=+-]+", "_", word).strip("_") for word in sorted(chosen))])
    if len(slug) > 100:
        slug = f"{slug[:90]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
    return slug


def sweep(verb: str, command: Command, arguments: Arguments) -> None:
    """Hydra's multirun: every combination of comma-separated values, each a run of its own name."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    refuse_additions(arguments.overrides)
    refuse_bases(arguments)
    register(verb, command, arguments.overrides)

    def job(composed: Any) -> None:
        added = [f"{key}=null" for key in LENGTHS]
        words = [word for word in HydraConfig.get().overrides.task if word not in added]
        start(command, checked(verb, composed, words))

    path = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    sys.argv = [
        "segtrain",
        "-m",
        *path,
        *one_length(arguments.overrides),
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    hydra.main(version_base="1.3", config_path=str(CONFIGS.absolute()), config_name=verb)(job)()


if __name__ == "__main__":
    main()
