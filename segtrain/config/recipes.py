"""Recipes with another dataset than their own: experiment=toy dataset=mine.yaml."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segtrain.config.locations import CONFIGS
from segtrain.config.user_files import read_yaml

SHARED = ("cache", "cache_dir")  # options of a recipe's dataset that mean the same for any other
PREFIX = "without_dataset/"  # of the names of recipes that are composed without some of their options


def recipe_files(name: str, folders: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, content) of a recipe and of all that it starts from, those first. folders: the user's --config-dir."""
    places = [Path(folder) / "experiment" / f"{name}.yaml" for folder in [*folders, str(CONFIGS)]]
    path = next((place for place in places if place.is_file()), None)
    content = None if path is None else read_yaml(path)
    if not isinstance(content, dict):
        return
    for entry in content.get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_":
            yield from recipe_files(str(Path(name).parent / entry), folders)
    yield name, content


def dataset_of(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The dataset that a recipe chooses."""
    entries = [entry for _, content in files for entry in content.get("defaults") or [] if isinstance(entry, dict)]
    chosen = [str(entry["override /dataset"]) for entry in entries if "override /dataset" in entry]
    return chosen[-1] if chosen else "streets"


def foreign_options(recipe: str, dataset: str, own: Sequence[str], folders: Sequence[str]) -> tuple[str, list[str]]:
    """The dataset that a recipe is for, and its options dataset.KEY that do not hold for the dataset of the user.

    dataset: the name of the user's. own: the keys that the user's file sets; they come before the recipe's.
    """
    files = list(recipe_files(recipe, folders))
    its = dataset_of(files)
    keys = [key for _, content in files for key in (content.get("dataset") or {})]
    fallen = [key for key in dict.fromkeys(keys) if key in own or (its != dataset and key not in SHARED)]
    return its, fallen


def recipe_without(recipe: str, keys: Sequence[str], folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The recipe, as the last one, and all that it starts from, without these options of the dataset, by new names."""
    nodes = {}
    for name, content in recipe_files(recipe, folders):
        node, parent = dict(content), Path(name).parent
        if isinstance(node.get("dataset"), dict):
            node["dataset"] = {key: value for key, value in node["dataset"].items() if key not in keys}
        node["defaults"] = [
            entry if not isinstance(entry, str) or entry == "_self_" else f"/experiment/{PREFIX}{parent / entry}"
            for entry in node.get("defaults") or []
        ]
        nodes[PREFIX + name] = node
    return nodes
