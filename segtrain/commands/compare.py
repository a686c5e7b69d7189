"""`segtrain compare`: which of several evaluations is better, and whether the images suffice to say so."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.commands.compare_picture import forest
from segtrain.commands.compare_tables import as_markdown, printed
from segtrain.config import CompareConfig, flatten, is_safe, with_defaults
from segtrain.config.stored import wrong_options
from segtrain.config.user_files import read_yaml
from segtrain.console import say
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.scoring import bootstrap
from segtrain.scoring.bootstrap import Estimate, Intervals
from segtrain.scoring.evaluation_file import StoredEvaluation, aligned, differences, read_evaluation
from segtrain.scoring.figures import write_png
from segtrain.scoring.seeds import difference_of_means, seed_spread, seeds_needed

SMALL = (0.0025, 0.005, 0.01, 0.02)  # differences of mIoU for which the number of seeds is printed
FEW = 10  # images with a class, below which its interval is marked


class Recipe(NamedTuple):
    """What a run was made of, but for its seed. options: None if it is not known, and then no other run is like it."""

    options: str | None
    seed: int | None


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare evaluations, print the table and write compare.json, .md and .png. Returns the content of compare.json.

    UsageError for an input that is no evaluation; DataError for evaluations of other images or by other rules.
    """
    evaluations = [read_evaluation(Path(path)) for path in config.inputs]
    require_distinct(evaluations, config.inputs)
    letters = [letter_of(number) for number in range(len(evaluations))]
    for letter, other in zip(letters[1:], evaluations[1:], strict=True):
        if found := list(differences(evaluations[0], other)):
            listed = "".join(f"\n  {text}" for text in found)
            raise DataError(
                f"{config.inputs[0]} (A) and {config.inputs[letters.index(letter)]} ({letter}) cannot be compared:"
                f"{listed}\nevaluate both on the same images by the same rules (`segtrain evaluate dataset= split=`)"
            )
    content = compared(config.inputs, evaluations, letters)
    say("\n".join(printed(content)))
    output = Path(config.output or "segtrain-out/compare")
    write_png(output / "compare.png", forest(content))
    write_atomically(output / "compare.md", as_markdown(content).encode("utf-8", "backslashreplace"))
    write_atomically(output / "compare.json", json.dumps(content, indent=2).encode() + b"\n")
    say(str(output / "compare.json"))
    return content


def require_distinct(evaluations: list[StoredEvaluation], inputs: list[str]) -> None:
    for (first, one), (second, other) in combinations(zip(inputs, evaluations, strict=True), 2):
        if one.path.resolve() == other.path.resolve():
            raise UsageError(f"{first} and {second} are the same evaluation; give two or more")


def letter_of(number: int) -> str:
    """A, B, ... Z, A2, B2, ..."""
    return f"{chr(ord('A') + number % 26)}{number // 26 + 1 if number >= 26 else ''}"


def compared(inputs: list[str], evaluations: list[StoredEvaluation], letters: list[str]) -> dict[str, Any]:
    """The content of compare.json: fractions; null where a figure is not defined."""
    first = evaluations[0]
    images, recipes = first.images, [recipe_of(one) for one in evaluations]
    described = []
    for letter, path, one, recipe in zip(letters, inputs, evaluations, recipes, strict=True):
        found = bootstrap.score_intervals(aligned(images, one.images)[1], one.absent)
        described.append({
            "letter": letter, "input": path, "checkpoint": one.result.get("checkpoint"), "step": one.result.get("step"),
            "inference": (one.result.get("inference") or {}).get("name"), "seed": recipe.seed,
            "rules": one.images.about["source"], **intervals_of(found, images.classes),
        })  # fmt: skip
    pairs = [pair_of(first, other, letter) for letter, other in zip(letters[1:], evaluations[1:], strict=True)]
    shown = (images.labelled() > 0).sum(0)
    return {
        "dataset": images.about["dataset"], "split": images.about["split"], "images": len(images.names),
        "rules": images.about["source"], "absent_classes": images.about["absent_classes"],
        "ignored_predictions": images.about["ignored_predictions"],
        "method": "paired bootstrap over images: percentiles, widened to the jackknife's error and Student's t",
        "level": bootstrap.LEVEL, "resamples": bootstrap.RESAMPLES, "seed": bootstrap.SEED,
        "images_with_class": dict(zip(images.classes, map(int, shown), strict=True)),
        "few_images": [name for name, count in zip(images.classes, shown, strict=True) if 0 < count < FEW],
        "inputs": described, "pairs": pairs, **of_seeds(evaluations, recipes, letters),
    }  # fmt: skip


def pair_of(first: StoredEvaluation, other: StoredEvaluation, letter: str) -> dict[str, Any]:
    """One evaluation minus the first."""
    one, two = aligned(first.images, other.images)
    found = bootstrap.paired_intervals(one, two, first.absent)
    identical = bool((one == two).all())
    better = None if not found.mean.excludes_zero else letter if found.mean.value > 0 else "A"
    named = {"first": "A", "second": letter, "identical_counts": identical, "better": better}
    return named | intervals_of(found, first.images.classes)


def intervals_of(found: Intervals, classes: list[str]) -> dict[str, Any]:
    by_class = {name: estimate_of(one) for name, one in zip(classes, found.classes, strict=True)}
    return {"miou": estimate_of(found.mean), "per_class": by_class}


def estimate_of(one: Estimate) -> dict[str, float | None]:
    return {key: None if value != value else value for key, value in one._asdict().items()}


# -------------------------------------------------------------------------------------------------------- seeds


def recipe_of(evaluation: StoredEvaluation) -> Recipe:
    """The configuration of the run that an evaluation lies in, and how it was evaluated."""
    folder = evaluation.path.parent
    places = [folder, folder.parent.parent] if folder.parent.name == "evaluations" else [folder]
    path = next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)
    if path is None:
        return Recipe(None, None)
    stored = read_yaml(path)
    if list(wrong_options(stored)):
        return Recipe(None, None)
    options = {key: value for key, value in flatten(with_defaults(stored)).items() if not is_safe(key)}
    seed = options.pop("trainer.seed")
    card = evaluation.result.get("protocol", {})
    how = [evaluation.result.get("inference"), evaluation.result.get("step"), card.get("weights"), card.get("taxonomy"),
           card.get("selected_on")]  # fmt: skip
    return Recipe(json.dumps([options, how], sort_keys=True, default=str), seed)


def of_seeds(evaluations: list[StoredEvaluation], recipes: list[Recipe], letters: list[str]) -> dict[str, Any]:
    """{"recipes": spread of each recipe with several seeds, "recipe_differences": between two of these}."""
    groups: dict[str, dict[int | None, int]] = {}
    for number, recipe in enumerate(recipes):
        if recipe.options is not None:
            groups.setdefault(recipe.options, {}).setdefault(recipe.seed, number)
    found: list[dict[str, Any]] = []
    scores: list[list[float]] = []
    for numbers in (list(seeds.values()) for seeds in groups.values() if len(seeds) > 1):
        scores.append([evaluations[number].result["miou"] for number in numbers])
        spread = seed_spread(scores[-1])
        asked = sorted({*SMALL, *(abs(spread.mean - one["mean"]) for one in found[:1])} - {0.0})
        needed = {f"{d:.6g}": seeds_needed(spread.deviation, d) for d in asked}
        found.append({"letters": [letters[number] for number in numbers], **spread._asdict(), "seeds_needed": needed})
    pairs = []
    for one, two in combinations(range(len(found)), 2):
        value, low, high = difference_of_means(scores[one], scores[two])
        estimate = Estimate(value, low, high)
        pairs.append({
            "first": found[one]["letters"], "second": found[two]["letters"], **estimate_of(estimate),
            "differ": estimate.excludes_zero,
        })  # fmt: skip
    return {"recipes": found, "recipe_differences": pairs}
