"""The command line: help, overrides, and one clear sentence for everything that is wrong."""

import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from segtrain.cli import entry as cli
from segtrain.cli.commands import COMMANDS, SECTIONS
from segtrain.cli.words import override, parse
from segtrain.config import flatten
from segtrain.config.compose import combinations, compose, to_options
from segtrain.config.locations import GROUP_FOLDERS
from segtrain.config.options import as_written
from segtrain.engine.monitor import varied_first
from segtrain.threads import describe_load
from tests.helpers.checkout import environment
from tests.helpers.own_parts import ODD
from tests.helpers.runs import refused, small_run

# ------------------------------------------------------------------------------------------------ help


def test_overview_has_the_four_groups(segtrain):
    for arguments in ([], ["--help"]):
        answer = segtrain(*arguments)
        assert answer.status == 0
        assert [line for line in answer.out.splitlines() if line in SECTIONS] == list(SECTIONS)


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_shows_every_option_and_three_examples(segtrain, verb):
    answer = segtrain(verb, "--help")
    for item in fields(COMMANDS[verb].schema):
        inner = fields(item.type) if is_dataclass(item.type) else [None]
        for field in inner:
            if field is not None and f"{item.name}.{field.name}" == "dataset.name":
                continue
            name = item.name if field is None else f"{item.name}.{field.name}"
            assert f"  {name}=" in answer.out
    assert len(COMMANDS[verb].examples) == 3
    assert all(example in answer.out for example in COMMANDS[verb].examples)


def flat(values, prefix=""):
    for key, value in values.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]


@pytest.mark.parametrize("verb", ["train", "verify-resume", "check", "streets", "runs"])
def test_help_shows_what_a_plain_command_uses(segtrain, verb):
    """As Hydra composes it; help does without Hydra."""
    shown = dict(reversed(re.findall(r"^  ([\w.]+)=(\S+)", segtrain(verb, "--help").out, re.M)))
    more = ["dataset=streets"] if verb == "check" else []
    composed = dict(flat(yaml.safe_load(segtrain(verb, *more, "--cfg", "job").out)))
    wanted = {key: as_written(value).split(" ")[0] for key, value in composed.items() if key != "dataset.name"}
    assert {key: shown.get(key, "").removesuffix(".0") for key in wanted} == {
        key: value.removesuffix(".0") for key, value in wanted.items()
    }


def test_help_names_every_flag(segtrain):
    assert "--print-run" in segtrain("train", "--help").out and "--print-slurm" in segtrain("train", "--help").out
    assert "--print-slurm" not in segtrain("evaluate", "--help").out


def test_a_folder_that_cannot_be_written_is_named_with_the_option_for_another():
    text, status = cli.as_sentence(PermissionError(13, "Permission denied", "segtrain-out/check"))
    assert status == 1 and "segtrain-out/check: " in text and ". output=FOLDER writes elsewhere. What was" in text
    assert "output=" not in cli.as_sentence(PermissionError(13, "Permission denied", "elsewhere"))[0]


def test_help_names_what_comes_from_the_checkpoint(segtrain):
    text = segtrain("evaluate", "--help").out
    assert "  inference.flip=(checkpoint's) " in text and "  dataset.root=(checkpoint's) " in text
    assert "  loader.prefetch=4 " in text and "  pictures=6 " in text


def test_help_imports_neither_torch_nor_hydra():
    program = (
        "import sys; from segtrain.cli.entry import run; run(['train', '--help']); "
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'cv2', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_examples_compose(segtrain):
    for example in (e for e in COMMANDS["train"].examples):
        answer = segtrain(*example.split()[1:], "--cfg", "job")
        assert answer.status == 0, answer


def test_version(segtrain):
    assert segtrain("--version").out.startswith("segtrain ")


@pytest.mark.parametrize(
    ("verb", "meant"),
    [("trian", "train"), ("val", "evaluate"), ("test", "evaluate"), ("eval", "evaluate"), ("infer", "predict"),
     ("doctor", "check"), ("pretrain", "train"), ("predcit", "predict")],
)  # fmt: skip
def test_unknown_verbs_suggest_the_nearest(segtrain, verb, meant):
    refused(segtrain(verb), f"`segtrain {meant}`")


def test_python_minus_m(tmp_path):
    result = subprocess.run([sys.executable, "-m", "segtrain", "--version"], env=environment(), capture_output=True)
    assert result.returncode == 0


# ------------------------------------------------------------------------------------------------ wrong overrides


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lrr=1"], ["no option optimizer.lrr", "did you mean optimizer.lr?", "momentum"]),
        (["optimiser.lr=1"], ["optimiser.lr", "did you mean optimizer.lr?"]),
        (["lr=1"], ["no option lr"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "number"]),
        (["trainer.batch_size=2.5"], ["trainer.batch_size", "2.5", "whole number"]),
        (["model.output_stride=wide"], ["model.output_stride", "wide"]),
        (["augmentation.crop_size=512"], ["augmentation.crop_size", "list of whole numbers"]),
        (["augmentation.crop_size=[a,b]"], ["augmentation.crop_size"]),
        (["dataset=citiscapes"], ["dataset=citiscapes", "did you mean dataset=cityscapes?", "kitti"]),
        (["model=resnet"], ["model=resnet", "resnet18"]),
        (["experiment=toi"], ["experiment=toi", "toy"]),
        (["dataset=cityscapes", "dataset.scenes=3"], ["no option dataset.scenes"]),
        (["+optimizer.typo=1"], ["+optimizer.typo=1", "cannot be added"]),
        (["~optimizer.lr"], ["cannot be taken away"]),
        (["--lr", "1"], ["no flag --lr"]),
        (["toy"], ["'toy' is not an override"]),
        (["optimizer.lr=[1"], ["optimizer.lr=[1"]),
        # impossible values and combinations
        (["optimizer.lr=-1"], ["optimizer.lr must be greater than 0, got -1"]),
        (["model.norm=groups"], ["model.norm must be one of inplace_abn, ", "batch_norm_sync, got groups"]),
        (["model.activation=relu"], ["model.activation=relu", "cannot invert"]),
        (["model.negative_slope=0"], ["model.negative_slope=0"]),
        (["model.output_stride=12"], ["model.output_stride must be one of 8, 16, 32, got 12"]),
        (
            ["trainer.batch_size=1"],
            [
                "trainer.batch_size must be at least 2, got 1: ",
                "DeepLabV3's pooled branch has one value per image and channel to normalise over",
            ],
        ),
        (["trainer.max_steps=10", "trainer.epochs=3"], ["trainer.max_steps=10", "trainer.epochs=3", "trainer.hours"]),
        (
            ["augmentation.crop_size=[512]"],
            ["augmentation.crop_size must be [height,width], each at least 32, got [512]"],
        ),
        (
            ["augmentation.scale=[2.0,1.0]"],
            ["augmentation.scale must be [least,most], ", "in ascending order, got [2.0, 1.0]"],
        ),
        (["loss.hardest=0"], ["loss.hardest must be greater than 0 and at most 1, got 0"]),
        (["inference.overlap=1"], ["inference.overlap must be at least 0 and less than 1, got 1"]),
        (["optimizer.momentum=0", "optimizer.nesterov=true"], ["optimizer.nesterov"]),
        (["dataset.size=[256,256]"], ["dataset.size", "twice the height"]),
        (["device=tpu"], ["device must be one of auto, cuda, cpu, got tpu"]),
        (
            ["model.backbone=resnet19"],
            ["model.backbone must be one of resnet18, ", "got resnet19; did you mean resnet"],
        ),
        (["loader.workers=-1"], ["loader.workers must be at least 0 or null, got -1"]),
    ],
)
def test_wrong_overrides_stop_before_anything_is_built(segtrain, overrides, words, tmp_path):
    refused(segtrain("train", *overrides), *words)
    assert not list(tmp_path.glob("*"))


def test_relu_is_possible_with_ordinary_layers(segtrain):
    assert segtrain("train", "model.norm=abn", "model.activation=relu", "--cfg", "job").status == 0


def test_typo_in_a_recipe_of_ones_own(segtrain, tmp_path):
    recipes = tmp_path / "mine" / "experiment"
    recipes.mkdir(parents=True)
    (recipes / "a.yaml").write_text("# @package _global_\noptimizer:\n  lrr: 1\n")
    (recipes / "b.yaml").write_text("# @package _global_\noptimizer:\n  lr: fast\n")
    (recipes / "c.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.5\n")
    flag = ["--config-dir", str(tmp_path / "mine")]
    refused(segtrain("train", "experiment=a", *flag), "optimizer.lrr", "did you mean optimizer.lr?", "experiment=a")
    refused(segtrain("train", "experiment=b", *flag), "optimizer.lr", "'fast'", "experiment=b")
    answer = segtrain("train", "experiment=c", *flag, "--cfg", "job")
    assert yaml.safe_load(answer.out)["optimizer"]["lr"] == 0.5
    refused(segtrain("train", "--config-dir", "nowhere"), "no such folder")


# ------------------------------------------------------------------------------------------------ paths and names


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["input", "checkpoint"])
def test_values_of_path_options_arrive_as_typed(value, key):
    word = override("predict", COMMANDS["predict"], f"{key}={value}")
    composed = compose_predict(word)
    assert getattr(composed, key) == value


@pytest.mark.parametrize("value", ODD)
def test_names_arrive_as_typed(value):
    composed = compose(request([f"name={value}", f"dataset.root={value}"]))
    assert composed.name == value
    assert composed.dataset.root == value


def request(words):
    """`segtrain train WORDS`, before it is composed."""
    return cli.request_of("train", COMMANDS["train"], parse("train", COMMANDS["train"], list(words)))


def compose_predict(word):
    """The options that Hydra composes from one override, without a checkpoint."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    override = OverridesParser.create().parse_override(word)
    return OmegaConf.create({override.key_or_group: override.value()})


@pytest.mark.parametrize("value", ["photo (1).jpg", "epoch=3.pt", "it's.jpg", "a,b.jpg"])
def test_bare_paths(tmp_path, value):
    (tmp_path / value).touch()
    word = override("evaluate", COMMANDS["evaluate"], value)
    assert compose_predict(word).checkpoint == value


def test_a_bare_path_beside_its_option_is_refused(segtrain, tmp_path):
    for name in ("last.pt", "photo.jpg"):
        (tmp_path / name).touch()
    for words in (["last.pt", "input=photo.jpg"], ["input=photo.jpg", "last.pt"], ["last.pt", "photo.jpg"]):
        answer = segtrain("predict", *words)
        refused(answer, "last.pt: a word alone stands for input=, which is given twice; the network is checkpoint=FILE")
    refused(segtrain("evaluate", "last.pt", "checkpoint=photo.jpg"), "last.pt: a word alone stands for checkpoint=")


def test_lists_of_paths_are_hydras():
    word = "input=[a,b]"
    assert override("predict", COMMANDS["predict"], word) == word


def test_one_output_needs_no_brackets():
    for word in ("outputs=palette", "outputs=[palette]"):
        assert compose_predict(override("predict", COMMANDS["predict"], word)).outputs == ["palette"]


def run_names(*commands):
    result = []
    for words in commands:
        asked = request(words)
        result.append(to_options(asked, compose(asked)).name)
    return result


def test_the_name_follows_from_the_overrides_that_change_the_run():
    plain, same, safe, other, swapped, sorted_, named = run_names(
        ["experiment=toy"],
        ["experiment=toy"],
        ["experiment=toy", "loader.workers=0", "device=cpu", "dataset.root=/x y", "logging.every=3"],
        ["experiment=toy", "optimizer.lr=0.5"],
        ["experiment=toy", "optimizer.lr=0.5", "trainer.seed=3"],
        ["experiment=toy", "trainer.seed=3", "optimizer.lr=0.5"],
        ["experiment=toy", "name=2024_01"],
    )
    assert plain == same == safe == "toy"
    assert other == "toy-optimizer.lr=0.5"
    assert swapped == sorted_ != other
    assert named == "2024_01"
    assert run_names([], ["dataset=kitti", "model=resnext50"]) == ["streets_resnet18", "kitti_resnext50"]
    many = ["model.mean=[0.1234567,0.7654321,0.5]", "model.std=[0.1234567,0.2,0.3]", "augmentation.scale=[0.123,0.654]"]
    long = run_names(["experiment=toy", *many])[0]
    assert len(long) <= 100
    assert "/" not in long


def test_swept_options_stay_in_the_names_of_a_sweep(segtrain):
    fixed = ["model.mean=[0.1234567,0.7654321,0.5]", "model.std=[0.1234567,0.2,0.3]", "augmentation.scale=[0.12,0.654]"]
    words = ["train", "-m", "experiment=toy", *fixed, "optimizer.lr=0.1,0.02", "trainer.seed=1,2", "--print-run"]
    names = segtrain(*words).out.splitlines()
    assert [name.rpartition("-")[0] for name in names] == [
        f"runs/toy-lr={rate}-seed={seed}" for rate in (0.1, 0.02) for seed in (1, 2)
    ]
    other = segtrain(*(word.replace("0.654", "0.655") for word in words)).out.splitlines()
    assert len({*names, *other}) == 8
    first = ["train", "experiment=toy", *fixed, "optimizer.lr=0.1", "trainer.seed=1", "--print-run"]
    earlier = segtrain(*first).out.strip()
    Path(earlier).mkdir(parents=True)  # a sweep begun when its names were cut
    assert segtrain(*words).out.splitlines() == [earlier, *names[1:]]
    short = segtrain("train", "-m", "experiment=toy", "optimizer.lr=0.1,0.02", "--print-run").out.splitlines()
    assert short == ["runs/toy-optimizer.lr=0.1", "runs/toy-optimizer.lr=0.02"]  # as of a command alone


def test_options_know_what_is_varied():
    asked = request(["experiment=toy", "optimizer.lr=0.1,0.2", "trainer.max_steps=3", "device=cpu"])
    swept = combinations(asked)[1]
    assert to_options(swept, compose(swept)).varied == ("optimizer.lr",)
    alone = request(["experiment=toy", "optimizer=adamw", "device=cpu"])
    options = to_options(alone, compose(alone))
    assert options.varied == ("optimizer",)
    first = list(varied_first(options))
    assert first[0] == "optimizer.name" and sorted(first) == sorted(flatten(asdict(options)))


def test_a_sweep_runs_each_combination_under_its_own_name(segtrain, scenes):
    words = small_run(scenes, "trainer.max_steps=1", "trainer.seed=1,2")
    command = [sys.executable, "-m", "segtrain", "train", "-m", *words]
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    configs = [yaml.safe_load(path.read_text()) for path in Path("runs").glob("*/config.yaml")]
    assert sorted(composed["trainer"]["seed"] for composed in configs) == [1, 2]
    assert len(list(Path("runs").glob("*/evaluation.json"))) == 2


def test_group_names_are_those_of_the_contract():
    assert set(GROUP_FOLDERS) <= {
        "experiment", "dataset", "model", "loss", "optimizer", "schedule", "augmentation", "sampling", "loader",
        "trainer", "inference", "logging", "plan",
    }  # fmt: skip


def test_broken_yaml_of_ones_own_is_named(segtrain, tmp_path):
    recipes = tmp_path / "mine" / "experiment"
    recipes.mkdir(parents=True)
    (recipes / "broken.yaml").write_text("optimizer: {lr: 0.1\n")
    refused(segtrain("train", "experiment=broken", "--config-dir", str(tmp_path / "mine")), "broken.yaml")
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (recipes / "broken.yaml").write_text(f"a0: &a0 [1]\n{bomb}")
    answer = segtrain("train", "experiment=broken", "--config-dir", str(tmp_path / "mine"))
    refused(answer, "broken.yaml, line ", "by aliases of aliases")


# ------------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", None)),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "7"}, (None, "7")),
    ],
)
def test_threads_sleep_while_they_wait_unless_the_user_chose(monkeypatch, segtrain, given, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert segtrain("--version").status == 0
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == expected


def test_the_import_leaves_the_environment_alone():
    code = "import os; before = dict(os.environ); import segtrain; segtrain.load; "
    code += "assert 'OMP_WAIT_POLICY' not in os.environ"
    clean = {name: value for name, value in environment().items() if not name.startswith(("OMP", "GOMP"))}
    assert subprocess.run([sys.executable, "-c", code], env=clean).returncode == 0


def test_a_busy_machine_is_named(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, text in (
        (1.9, None),
        (2.0, None),
        (7.96, "load 8.0 on 2 cores: other programs compute too"),
    ):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        found = describe_load()
        assert found is None if text is None else found.startswith(text)
