"""Recipes with one's own data, and files of datasets in sweeps: composed only, nothing is trained."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import segtrain
from segtrain.config.overrides import with_quoted_patterns
from segtrain.config.recipes import foreign_options, recipe_files
from tests.helpers.runs import refused


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: folder\nroot: here\nclasses: classes.csv\n")
    return tmp_path / "mine.yaml"


def groups(options):
    """All options but those of the dataset and of the run's name."""
    return {key: value for key, value in asdict(options).items() if key not in ("dataset", "name")}


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [
        ("toy", "mine.yaml"), ("toy", "kitti"), ("streets_resnet18", "mine.yaml"),
        ("cocostuff_resnext101_all171", "kitti"), ("cocostuff_resnext101", "mine.yaml"),  # classes means another thing
        ("cityscapes_kitti_wider_resnet38", "mine.yaml"), ("cityscapes_resnext101", "mine.yaml"),
    ],
)  # fmt: skip
def test_the_recipe_keeps_all_but_the_options_of_its_own_dataset(mine, recipe, dataset, capsys):
    made = segtrain.compose(f"experiment={recipe}", f"dataset={dataset}")
    said = capsys.readouterr().err
    assert groups(made) == groups(segtrain.compose(f"experiment={recipe}"))
    assert made.dataset == segtrain.compose(f"dataset={dataset}").dataset
    assert made.name == f"{recipe}-dataset={dataset}"
    keys = {key for _, content in recipe_files(recipe, []) for key in content.get("dataset") or {}}
    assert all(f"dataset.{key}" in said for key in keys) and bool(keys) == ("left out, as it is for dataset=" in said)


def test_what_is_typed_or_in_the_file_comes_first(mine, capsys):
    assert segtrain.compose("experiment=toy", "dataset=mine.yaml", "dataset.root=there").dataset.root == "there"
    assert "dataset.scenes, dataset.val_scenes left out, as it is for dataset=streets" in capsys.readouterr().err
    mine.write_text("name: streets\nscenes: 7\n")
    made = segtrain.compose("experiment=toy", "dataset=mine.yaml").dataset
    assert (made.scenes, made.val_scenes) == (7, 8)  # of the file; of the recipe, which is for streets too
    assert capsys.readouterr().err == (
        "segtrain: experiment=toy: its dataset.scenes left out, as the file of the dataset comes first\n"
    )
    assert segtrain.compose("experiment=toy", "dataset=streets").dataset.scenes == 24
    assert not capsys.readouterr().err


def test_a_recipe_of_ones_own_works_alike(mine, tmp_path):
    folder = tmp_path / "configs" / "experiment" / "deep"
    folder.mkdir(parents=True)
    (folder / "below.yaml").write_text("# @package _global_\ndataset: {scenes: 3, cache: decoded}\nmodel: {norm: abn}")
    (folder.parent / "own.yaml").write_text("# @package _global_\ndefaults: [deep/below]\noptimizer: {lr: 0.5}\n")
    made = segtrain.compose("experiment=own", "dataset=mine.yaml", config_dir=str(tmp_path / "configs"))
    assert (made.model.norm, made.optimizer.lr, made.dataset.classes) == ("abn", 0.5, "classes.csv")
    assert made.dataset.cache == "decoded"  # means the same for every dataset
    assert foreign_options("own", "folder", [], [str(tmp_path / "configs")]) == ("streets", ["scenes"])


def test_sweeps_take_files_of_datasets(mine, segtrain):
    Path("other (1).yaml").write_text("name: kitti\n")
    answer = segtrain(
        "train", "-m", "dataset=mine.yaml,streets", "experiment=toy", "optimizer.lr=0.1,0.2", "--cfg", "job"
    )
    assert answer.status == 0, answer
    found = [yaml.safe_load(text) for text in answer.out.split("---\n")]
    assert [one["dataset"]["name"] for one in found] == ["folder", "folder", "streets", "streets"]
    assert [one["optimizer"]["lr"] for one in found] == [0.1, 0.2, 0.1, 0.2]
    answer = segtrain("train", "-m", "dataset=other (1).yaml", "--cfg", "job")
    assert answer.status == 0 and yaml.safe_load(answer.out)["dataset"]["name"] == "kitti", answer


def test_a_launcher_of_hydra_takes_them_too(segtrain, folder_data):
    root, words = folder_data
    splits = {key: f"{key}/{{}}/*.png" for key in ("train", "val")}
    content = {"name": "folder", "root": str(root), "classes": "classes.csv", "splits": {
        key: {"images": pattern.format("images"), "labels": pattern.format("labels")} for key, pattern in splits.items()
    }}  # fmt: skip
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    chosen = [word for word in words if not word.startswith("dataset")]
    answer = segtrain(
        "train", "-m", "hydra/launcher=basic", "dataset=mine.yaml", "experiment=toy", *chosen, "model.norm=abn",
        "trainer.max_steps=1", "optimizer.lr=0.1,0.2",
    )  # fmt: skip
    assert answer.status == 0, answer
    names = sorted(path.name.rpartition("-")[0] for path in Path("runs").iterdir())
    assert names == ["toy-lr=0.1", "toy-lr=0.2"]
    composed = [yaml.safe_load(path.read_text()) for path in Path("runs").glob("*/config.yaml")]
    assert all(one["dataset"]["name"] == "folder" for one in composed)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("splits: [a, b]", "dataset=mine.yaml: splits must be a mapping, got a list"),
        ("splits: abc", "dataset=mine.yaml: splits must be a mapping, got text"),
        ("root: [1]", "dataset=mine.yaml: root must be text, got a list"),
    ],
)
def test_wrong_kinds_in_the_file_of_a_dataset_are_named_in_plain_words(mine, segtrain, text, sentence):
    mine.write_text(f"name: folder\n{text}\n")
    answer = refused(segtrain("train", "dataset=mine.yaml"), sentence)
    assert "Config" not in answer.err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optimizer: [1, 2]", "optimizer must be a mapping of options, got a list (set in the YAML of experiment=own)"),
        ("optimizer: 3", "optimizer must be a mapping of options, got a number"),
        ("dataset: [x]", "dataset must be a mapping of options, got a list"),
        ("model: {backbone_options: 3}", "model.backbone_options must be a mapping, got a number"),
    ],
)
def test_wrong_kinds_in_a_recipe_are_named_in_plain_words(tmp_path, segtrain, text, sentence):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/own.yaml").write_text(f"# @package _global_\n{text}\n")
    answer = refused(segtrain("train", "--config-dir", "own", "experiment=own"), sentence)
    assert "Config" not in answer.err and "full_key" not in answer.err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("model.freeze=true", "model.freeze; did you mean model.frozen?"),
        ("optimizer.momentm=0.9", "optimizer.momentm; did you mean optimizer.momentum?"),
        ("datset=kitti", "datset; did you mean dataset?"), ("optimzer=sgd", "optimzer; did you mean optimizer?"),
        ("optimzer.lr=1", "optimzer.lr; did you mean optimizer.lr?"), ("lr=1", "lr; did you mean optimizer.lr?"),
        ("trainer.lr=1", "trainer.lr; did you mean optimizer.lr?"),
    ],
)  # fmt: skip
def test_suggestions_are_near(segtrain, word, hint):
    refused(segtrain("train", word), f"there is no option {hint}")


@pytest.mark.parametrize("folder", ["Größe", "a b", "x(1)", "q&r", "k=v", "n#1", "c,d", "plain-1", "it's", "${x}"])
def test_patterns_are_taken_as_typed(folder):
    images, labels = f"{folder}/i/*.png", f"{folder}/l/*.png"
    if "'" in folder:  # a quote means that the user has quoted
        words = [f'dataset.splits.train={{images:"{images}",labels:"{labels}"}}']
    else:
        words = [f"dataset.splits.train={{images:{images},labels:{labels}}}"]
    for given in (words, [f"dataset.splits.train.images={images}", f"dataset.splits.train.labels={labels}"]):
        config = segtrain.compose("dataset=folder", "dataset.root=data", *given)
        assert config.dataset.splits == {"train": {"images": images, "labels": labels}}


def test_patterns_that_worked_are_passed_on_unchanged():
    for value in ("{images:train/*.jpg,labels:labels/*.png}", "{pairs:train.txt}", "{images:'a b/*',labels:\"c\"}",
                  "{images:a b/**/*.png}", "null", "5", "{other:ü}"):  # fmt: skip
        assert with_quoted_patterns(value) == value


def test_a_mapping_of_another_dataset_is_refused(segtrain):
    """Hydra would add it to any dataset, and nothing would read it."""
    for word in ("dataset.splits=[1]", "dataset.splits.train={images:a,labels:b}"):
        answer = segtrain("train", word)
        refused(answer, "dataset=streets has no option dataset.splits: it is of dataset=folder")
    refused(segtrain("train", "dataset=streets", "dataset.parts={}"), "it is of dataset=mixture")


def test_a_dataset_that_is_not_chosen_is_asked_for(segtrain):
    answer = segtrain("check", "dataset.root=mine")
    refused(answer, "dataset is not set: give dataset=NAME or a file of it. Available: cityscapes, ", "streets, vistas")
