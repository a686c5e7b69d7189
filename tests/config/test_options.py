"""Descriptions of options: help, choices, readers, and what may change on resume."""

import re
from dataclasses import dataclass, field, fields, is_dataclass
from math import inf
from typing import get_args

import pytest

from segtrain import config
from segtrain.cli.commands import COMMANDS
from segtrain.config.keys import LENGTHS, is_safe, known_options
from segtrain.config.options import Group, as_written, default_of, is_mapping, option, option_of
from segtrain.errors import UsageError
from tests.helpers.checkout import ROOT
from tests.helpers.option_reads import option_reads, unread, without

SCHEMAS = [*config.DATASET_CONFIGS.values(), *(command.schema for command in COMMANDS.values())]
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "segtrain").rglob("*.py")}


def described():
    """(key, field, class that declares it) of every option of every command and dataset."""
    found = {}
    for schema in SCHEMAS:
        for item in fields(schema):
            kinds = [item.type] if is_dataclass(item.type) else []
            for owner, inner in [(kind, inner) for kind in kinds for inner in fields(kind)] or [(schema, item)]:
                mro = owner.__mro__[::-1]
                declared = next(kind for kind in mro if inner.name in getattr(kind, "__dataclass_fields__", ()))
                found[declared.__name__, inner.name] = (f"{declared.PREFIX}{inner.name}", inner)
    return found


OPTIONS = described()
NAMES = ("Boundary", "L2", "MLflow", "Nesterov", "RGB", "Weights", "YAML")  # begin with a capital letter


def test_every_group_has_a_file_of_its_name():
    """In segtrain/config, as in configs."""
    groups = {item.name: item.type for command in COMMANDS.values() for item in fields(command.schema)}
    found = {name: kind.__module__ for name, kind in groups.items() if is_dataclass(kind)}
    assert found == {name: f"segtrain.config.{name}" for name in found}
    folders = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert folders - {"experiment"} <= found.keys()


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(("owner", "name"), sorted(OPTIONS))
def test_a_help_text_is_a_short_noun_phrase_without_the_choices(owner, name):
    item = OPTIONS[owner, name][1]
    about = option_of(item)
    if (owner, name) == ("DatasetConfig", "name"):
        assert about.help == ""  # dataset=... sets it
        return
    assert 0 < len(about.help) <= 80, len(about.help)
    assert about.help[0].islower() or about.help.split(" ")[0] in NAMES
    assert not about.help.endswith(".") and " | " not in about.help
    assert not re.search(r"picture|\bshares? of|told|\bsaid\b|\bcards?\b|data set", about.help)
    listed = [choice for choice in about.choices if re.search(rf"\b{re.escape(str(choice))}\b", about.help)]
    assert len(listed) < max(2, len(about.choices)), listed


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_lists_the_choices(segtrain, verb):
    text = re.sub(r"\s+", " ", segtrain(verb, "--help").out.partition("options (key=value)")[2])
    for key, item in known_options(COMMANDS[verb].schema).items():
        if option_of(item).choices:
            start = text.index(f" {key}=")
            assert " | ".join(map(as_written, option_of(item).choices)) in text[start : start + 500], key
    options = segtrain(verb, "--help").out.partition("options (key=value)\n")[2]
    assert max(map(len, options.splitlines())) <= 120


# ------------------------------------------------------------------------------------------------ choices


def test_the_names_of_built_in_parts_are_those_of_the_dictionaries():
    from segtrain.data.registry import DATASETS
    from segtrain.engine.optim import OPTIMIZERS, SCHEDULES
    from segtrain.losses import LOSSES
    from segtrain.models import BACKBONES, HEADS

    for owner, name, parts, others in (
        ("ModelConfig", "backbone", BACKBONES, set()), ("ModelConfig", "head", HEADS, {"classifier"}),
        ("LossConfig", "name", LOSSES, set()), ("OptimizerConfig", "name", OPTIMIZERS, set()),
        ("ScheduleConfig", "name", SCHEDULES, set()),
    ):  # fmt: skip
        assert set(option_of(OPTIONS[owner, name][1]).choices) == set(parts) | others
    built_in = {name for name in config.DATASET_CONFIGS if not config.classifies(config.DATASET_CONFIGS[name])}
    assert built_in - {"mixture"} <= set(DATASETS) <= set(config.DATASET_CONFIGS)


def test_defaults_are_allowed_and_named_readers_exist():
    for (owner, _), (key, item) in OPTIONS.items():
        about, default = option_of(item), default_of(item)
        if about.choices and not about.other and default is not None:
            assert set(default if isinstance(default, list) else [default]) <= set(about.choices), key
        for reader in about.only or ():
            assert reader in option_of(OPTIONS[owner, "name"][1]).choices, (key, reader)


@dataclass
class Sample(Group):
    PREFIX = "sample."

    name: str = option("a", "kind", choices=("a", "b"))
    many: list[str] = option(["x"], "letters", choices=("x", "y"))
    only_a: int = option(1, "of a", only=("a",))
    size: list[int] | None = option(None, "size [pixels]", items=("height", "width"), low=32)
    order: list[float] = option([0.1, 0.2], "range", items=("least", "most"), above=0, high=1, ascending=True)
    rate: float = option(0.5, "rate", above=0, below=1)
    steps: int | None = option(None, "duration [steps]", low=1)
    place: str = option("here", "place", choices=("here",), other="FILE")
    label: str = option("x", "name of a folder", component=True)
    count: int = option(1, "number", low=0, limit=1000)
    any_norm: float = option(1.0, "norm", low=1, limit=inf)
    plain: int = 3
    entries: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "c"}, "sample.name must be one of a, b, got c"),
        ({"many": ["x", "yy"]}, "sample.many must be one or more of x, y, got ['x', 'yy']; did you mean y?"),
        ({"name": "b", "only_a": 2}, "sample.only_a=2 has no effect: sample.name=b does not read it, it is for "
         "sample=a; leave it at 1, or write sample=b, which sets all options of the group"),
        ({"size": [64]}, "sample.size must be [height,width], each at least 32, or null, got [64]"),
        ({"size": [64, 16]}, "sample.size must be [height,width], each at least 32, or null, got [64, 16]"),
        ({"order": [0.2, 0.1]}, "sample.order must be [least,most], each greater than 0 and at most 1, in ascending "
         "order, got [0.2, 0.1]"),
        ({"rate": 1.0}, "sample.rate must be greater than 0 and less than 1, got 1.0"),
        ({"rate": float("nan")}, "sample.rate must be greater than 0 and less than 1, got nan"),
        ({"steps": 0}, "sample.steps must be at least 1 or null, got 0"),
        ({"count": -1}, "sample.count must be at least 0, got -1"),
        ({"count": 10**23}, f"sample.count must be at least 0 and at most 1000, got {10**23}"),
        ({"rate": 1e-300}, "sample.rate must be greater than 0 and less than 1 and at least 1e-12, got 1e-300"),
        ({"any_norm": float("nan")}, "sample.any_norm must be at least 1, got nan"),
        ({"order": [[0.1], 0.2]}, "sample.order must be [least,most], each greater than 0 and at most 1, in ascending "
         "order, got [[0.1], 0.2]"),
        ({"entries": []}, "sample.entries must be a mapping, got []"),
        ({"many": "x"}, "sample.many must be a list of texts, got x"),
        ({"label": "a/../b"}, "sample.label must be a name for a file: not empty, no slash, control character or .., "
         "got 'a/../b'"),
        ({"label": ".."}, "sample.label must be a name for a file: not empty, no slash, control character or .., got "
         "'..'"),
        ({"label": "\x1b"}, "sample.label must be a name for a file: not empty, no slash, control character or .., got "
         "'\\x1b'"),
    ],
)  # fmt: skip
def test_what_an_option_does_not_allow_is_refused(changes, message):
    with pytest.raises(UsageError) as caught:
        Sample(**changes).check()
    assert str(caught.value) == message


def test_every_number_has_a_limit():
    """Else a typing error such as 10^23 is taken, and hangs or overflows somewhere."""

    def is_numeric(kind):
        return kind in (int, float) or any(map(is_numeric, get_args(kind)))

    for key, item in OPTIONS.values():
        about = option_of(item)
        if is_numeric(item.type) and not is_mapping(item) and not about.choices:
            assert any(bound is not None for bound in (about.high, about.below, about.limit)), key


def test_what_an_option_allows_passes():
    Sample().check()
    Sample("b", ["y", "x"], size=[32, 64], order=[0.5, 0.5], steps=1, place="any file", plain=-1).check()
    Sample(count=1000, any_norm=inf, label="caf\udce9 (1)", rate=1e-12).check()


# ------------------------------------------------------------------------------------------------ readers


def test_every_option_is_read_somewhere():
    """An option that nothing reads is a bug. A read counts for the class that declares the option, not for its name."""
    assert set(unread(SOURCES, OPTIONS)) == set()


@pytest.mark.parametrize(
    ("owner", "name", "namesake"),
    [
        ("ModelConfig", "scale", ("AugmentationConfig", "scale")), ("TrainerConfig", "seed", ("StreetsConfig", "seed")),
        ("InferenceConfig", "flip", ("AugmentationConfig", "flip")), ("LoaderConfig", "prefetch", None),
        ("OptimizerConfig", "betas", None), ("LossConfig", "options", None), ("EvaluateConfig", "boundary", None),
        ("KittiConfig", "val_list", None), ("CocoStuffConfig", "split", ("EvaluateConfig", "split")),
    ],
)  # fmt: skip
def test_an_option_whose_readers_are_removed_is_found(owner, name, namesake):
    found = [read for read in option_reads(SOURCES) if (read.owner, read.name) == (owner, name)]
    assert found
    missing = unread(without(SOURCES, found), OPTIONS)
    assert (owner, name) in missing
    assert namesake not in missing


READERS = """
from dataclasses import dataclass

@dataclass
class A:
    x: int = 0
    y: int = 0

    def check(self):
        return self.x

@dataclass
class B:
    a: A
    x: int = 0

@dataclass
class C(A):
    z: int = 0
"""


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("def f(b: B): return b.x", {"B.x"}),
        ("def f(b: B): return b.a.x", {"B.a", "A.x"}),
        ("def f(b: 'B | None'): return b.a and b.a.y", {"B.a", "A.y"}),
        ("def f(b: B):\n  a, n = b.a, 0\n  return lambda: a.y", {"B.a", "A.y"}),
        ("def f(c: C): return c.y", {"A.y"}),
        ("def f(a: A): return isinstance(a, C) and a.z", {"C.z"}),
        ("def f(a: A): return a.z", set()),
        ("def f(x): return x.x", set()),
        ("def f(b: B): b.x = 1", set()),
        ("def f() -> A: ...\ndef g(): return f().y", {"A.y"}),
        ("def f(a: A): return getattr(a, 'y', 0)", {"A.y"}),
        ("class D:\n  def __init__(self, a: A): self.a = a\n  def f(self): return self.a.y", {"A.y"}),
    ],
)
def test_how_reads_are_resolved(code, read):
    found = option_reads({"classes.py": READERS, "code.py": code})
    assert {f"{one.owner}.{one.name}" for one in found if one.path == "code.py"} == read


# ------------------------------------------------------------------------------------------------ resume


def test_what_may_change_on_resume():
    safe = {key for key in known_options(config.TrainConfig, ["dataset=mixture"]) if is_safe(key)}
    assert safe == {
        "experiment", "name", "run", "restart", "device", "plugins", "model.backend", "dataset.root", "dataset.cache",
        "dataset.cache_dir", "loader.workers", "loader.prefetch", "logging.every", "logging.pictures", "logging.wandb",
        "logging.mlflow", "logging.project", "trainer.save_every", "trainer.validate_every", "trainer.check_data",
        "trainer.keep_last", "trainer.patience", "trainer.accumulation", "trainer.parallel", "trainer.on_bad_step",
        "trainer.spike_factor", "trainer.cuda_graphs", "inference.name", "inference.scales", "inference.flip",
        "inference.tile", "inference.overlap", "inference.longest_side", "inference.resize",
        "inference.crop", "inference.crops", "inference.precision", "inference.batch_size", "inference.compile",
        "logging.train_sample",
    }  # fmt: skip
    assert LENGTHS == ("trainer.max_steps", "trainer.epochs", "trainer.hours")
    assert is_safe("dataset.parts.kitti.root") and not is_safe("dataset.parts.kitti.version")
    for key in ("dataset", "loader", "dataset.parts", "model.backbone_options.width", "loss.options.root", "nothing"):
        assert not is_safe(key), key


def test_an_inference_names_what_the_network_sees():
    assert str(config.InferenceConfig()) == "inference whole in fp32"
    given = config.InferenceConfig("mine", [0.5, 0.75], True, [64, 96], longest_side=300, precision="bf16")
    assert str(given) == ("inference mine (scales=[0.5, 0.75] flip=true tile=[64, 96] longest_side=300) in bf16")
