"""A sample is a picture and, where there is one, its label picture."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from segtrain.errors import DataError


class Sample(NamedTuple):
    """name is unique within its split and becomes the name of the prediction."""

    name: str
    image: Path
    label: Path | None


def pair(images: Mapping[str, Path], labels: Mapping[str, Path]) -> list[Sample]:
    """Samples sorted by name, where every image has a label and the reverse; DataError names what is left over."""
    for what, other, keys in (
        ("image", "label", set(images) - set(labels)),
        ("label", "image", set(labels) - set(images)),
    ):
        if keys:
            found = images if what == "image" else labels
            some = ", ".join(str(found[key]) for key in sorted(keys)[:3])
            raise DataError(
                f"{len(keys)} of {len(found)} {what}s have no {other} picture: {some}"
                f"{', ...' if len(keys) > 3 else ''}; add the missing files or take these away"
            )
    return [Sample(name, images[name], labels[name]) for name in sorted(images)]


def expect_folder(root: Path, what: str, tree: str) -> None:
    """DataError with the expected tree, and where to get the data, if there is no such folder."""
    if not root.is_dir():
        expected = tree.format(root=root).replace("\n", "\n  ")
        raise DataError(
            f"no {what} data at {root} (set dataset.root=FOLDER, or SEGTRAIN_DATA to its parent folder). Expected:\n"
            f"  {expected}"
        )


def expect_split(split: str, known: Collection[str], root: Path) -> None:
    """DataError naming the splits that exist, if `split` is not one of them."""
    if split not in known:
        there = ", ".join(sorted(known)) or "none"
        raise DataError(
            f"no split {split!r} in {root}: there is {there}; set dataset.train_split and dataset.val_split"
        )
