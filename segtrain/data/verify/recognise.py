"""Recognise the annotations of labelling tools in a folder: their format, splits and classes."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any, NamedTuple

from segtrain.config import IGNORE_INDEX
from segtrain.config.user_files import read_text, read_yaml
from segtrain.console import Progress, say
from segtrain.data.folders import files_below
from segtrain.data.formats.coco import coco_categories
from segtrain.data.formats.label_studio import image_reference
from segtrain.data.formats.records import Fields, read_annotation
from segtrain.data.formats.yolo import label_path, yolo_names
from segtrain.data.images import SUFFIXES
from segtrain.data.labels import LabelTable
from segtrain.data.verify.guess import SPLITS, split_of
from segtrain.errors import DataError

BACKGROUND = ("background", "_background_", "bg", "unlabelled", "unlabeled")  # names of what is none of the classes
IGNORED = ("void", "ignore", "__ignore__", "unlabelled", "unlabeled")
MOST_CLASSES = 253
PEEKED = 6  # JSON files of a folder that are looked into


class ClassRow(NamedTuple):
    """A row of the class table that is written. color: as the table has it, '' for a default one."""

    id: int
    name: str
    color: str = ""
    ignore: str = ""


def table_rows(table: LabelTable) -> list[ClassRow]:
    """The rows of a table, as they are written."""
    return [
        ClassRow(row["id"], row["name"], hexadecimal(row["color"]), "true" if row["train_id"] == IGNORE_INDEX else "")
        for row in table.rows
    ]


def hexadecimal(color: Iterable[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


class Recognised(NamedTuple):
    """What a folder holds. splits, unlabelled: as of dataset.splits and dataset.unlabelled. rows: of the class table.
    pairs: image and label image of each split, for splits that no pattern describes."""

    format: str
    splits: dict[str, dict[str, str]]
    rows: list[ClassRow]
    unlabelled: str | None = None
    pairs: dict[str, list[tuple[Path, Path]]] = {}


class Tree(NamedTuple):
    """The files below a folder. json: those of each tool, by the name of its format."""

    root: Path
    images: list[Path]
    json: dict[str, list[Path]]
    others: list[Path]


def read_tree(root: Path) -> Tree:
    """The files by kind. Of a folder with many JSON files the first say what all are."""
    tree = Tree(root, [], defaultdict(list), [])
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in files_below(root):
        if path.suffix.lower() in SUFFIXES:
            tree.images.append(path)
        elif path.suffix.lower() == ".json":
            folders[path.parent].append(path)
        else:
            tree.others.append(path)
    for paths in folders.values():
        kinds = {path: kind_of_json(path) for path in paths[:PEEKED]}
        usual = max(kinds.values(), key=list(kinds.values()).count)
        for path in paths:
            tree.json[kinds.get(path, usual)].append(path)
    return tree


def kind_of_json(path: Path) -> str:
    """The format of a JSON file, '' for any other."""
    try:
        content = read_annotation(path)
    except DataError:
        return ""
    if isinstance(content, list):
        first = content[0] if content else None
        return "label_studio" if isinstance(first, dict) and {"data", "annotations"} <= first.keys() else ""
    if not isinstance(content, dict):
        return ""
    known = {
        "coco": {"images", "annotations", "categories"}, "labelme": {"shapes", "imagePath"},
        "supervisely": {"size", "objects"}, "supervisely_meta": {"classes"},
    }  # fmt: skip
    found = next((name for name, keys in known.items() if keys <= content.keys()), "")
    if found == "coco":
        some = content["annotations"]
        with_pixels = isinstance(some, list) and any(isinstance(one, dict) and one.get("segmentation") for one in some)
        return "coco" if with_pixels else ""
    return found


def rows_for(names: Iterable[str], ids: Sequence[int] | None = None) -> tuple[list[ClassRow], str]:
    """Rows for these classes, with background and void, and the guess which name pixels without an object have.

    ids: those of the tool, which are kept if 0 is free for the background. DataError for too many classes.
    """
    names = list(dict.fromkeys(names))
    if len(names) > MOST_CLASSES:
        raise DataError(f"found {len(names)} classes, but label images of 8 bits have at most {MOST_CLASSES}")
    background = next((name for name in names if name.lower() in BACKGROUND), None)
    classes = [name for name in names if name != background]
    kept = dict(zip(names, ids, strict=True)) if ids is not None and len(ids) == len(names) else {}
    fits = bool(kept) and all(0 < kept[name] < 255 for name in classes)
    rows = [ClassRow(0, background or "background")]
    rows += [ClassRow(kept[name] if fits else number, name, "", "true" if name.lower() in IGNORED else "")
             for number, name in enumerate(classes, 1)]  # fmt: skip
    if "void" not in names:
        rows.append(ClassRow(255, "void", "", "true"))
    return rows, background or "background"


def image_pattern(tree: Tree, references: Iterable[str], beside: Path, split: str) -> str:
    """A pattern for the images that annotations name. DataError if none of them is there.

    beside: the folder of the annotations. Of several folders that hold images of these names, the nearest counts.
    """
    wanted = {reference.replace("\\", "/").rpartition("/")[2] for reference in references}
    folders: dict[Path, set[str]] = defaultdict(set)
    for path in tree.images:
        if path.name in wanted:
            folders[path.parent].add(path.name)
    if not folders:
        some = next(iter(sorted(wanted)), "none")
        raise DataError(f"{tree.root} has annotations in {beside}, but none of their images, such as {some!r}")

    def nearness(folder: Path) -> tuple[int, bool, bool, int]:
        relative = folder.relative_to(tree.root)
        return len(folders[folder]), folder == beside, split_of(relative) == split, -len(relative.parts)

    best = max(folders, key=nearness)
    elsewhere = set().union(*folders.values()) - folders[best]
    return pattern_below(tree.root, list(folders) if elsewhere else [best], "*")


def pattern_below(root: Path, folders: list[Path], files: str) -> str:
    """One pattern for files in one folder, or at any depth of the folder that holds them all."""
    common = Path(commonpath(folders))
    depth = "" if len(set(folders)) == 1 else "**/"
    relative = common.relative_to(root).as_posix()
    return f"{'' if relative == '.' else relative + '/'}{depth}{files}"


def by_split(paths: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their path names; train if it names none."""
    splits: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        splits[split_of(path.relative_to(root).with_suffix(""))].append(path)
    return {name: splits[name] for name in SPLITS if name in splits}


def one_file(paths: list[Path], split: str, preferred: str = "instances") -> Path:
    """The one file of a split; of several that whose name is usual, and the others are named."""
    chosen = next((path for path in paths if preferred in path.name), paths[0])
    others = [str(path) for path in paths if path != chosen]
    if others:
        say(f"note: {split} is {chosen}; not used: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}")
    return chosen


def recognise_coco(tree: Tree) -> Recognised | None:
    splits: dict[str, dict[str, str]] = {}
    names: dict[Any, str] = {}
    for split, paths in by_split(tree.json["coco"], tree.root).items():
        path = one_file(paths, split)
        content = Fields(read_annotation(path), str(path))
        found = without_group(coco_categories(content, path), content.content)
        names |= {label: name for label, name in found.items() if name not in names.values()}
        files = [str(one.get("file_name")) for one in content.items("images") if isinstance(one, dict)]
        splits[split] = {
            "images": image_pattern(tree, files, path.parent, split),
            "labels": path.relative_to(tree.root).as_posix(),
        }  # fmt: skip
    if not splits:
        return None
    ids = [label for label in names if isinstance(label, int)]
    return Recognised("coco", splits, *rows_for(names.values(), ids))


def without_group(names: dict[Any, str], content: dict[str, Any]) -> dict[Any, str]:
    """The categories without one that only groups the others and has no annotation, as Roboflow writes it."""
    used = {str(one.get("category_id")) for one in content["annotations"] if isinstance(one, dict)}
    groups = {str(one.get("supercategory")) for one in content["categories"]}
    stray = [label for label, name in names.items() if str(label) not in used and name in groups and len(names) > 1]
    for label in stray:
        say(f"note: the category {names[label]!r} has no annotation and groups the others; it is left out")
    return {label: name for label, name in names.items() if label not in stray}


def recognise_yolo(tree: Tree) -> Recognised | None:
    for path in (path for path in tree.others if path.suffix in (".yaml", ".yml")):
        try:
            content = read_yaml(path, "data.yaml")
        except DataError:
            continue
        if not isinstance(content, dict) or "names" not in content or not {"train", "val"} & content.keys():
            continue
        splits: dict[str, dict[str, str]] = {}
        for split in SPLITS:
            folder = yolo_folder(tree.root, path, content, split)
            if folder is not None and any(is_polygon_file(label_path(image)) for image in images_in(tree, folder)):
                splits[split] = {
                    "images": pattern_below(tree.root, [folder], "*"),
                    "labels": path.relative_to(tree.root).as_posix(),
                }  # fmt: skip
        if splits:
            return Recognised("yolo", splits, *rows_for(yolo_names(path).values()))
    return None


def images_in(tree: Tree, folder: Path) -> list[Path]:
    return [path for path in tree.images if path.parent == folder][:200]


def yolo_folder(root: Path, path: Path, content: dict[str, Any], split: str) -> Path | None:
    """The folder of a split's images, as data.yaml names it from `path`, from its own place, or one level too high."""
    entry = content.get(split)
    if not isinstance(entry, str):
        return None
    bases = [path.parent / str(content.get("path") or ""), path.parent, root]
    for base in bases:
        for relative in (entry, re.sub(r"^(\.\./)+", "", entry)):
            folder = Path(base, relative).resolve()
            if folder.is_dir() and folder.is_relative_to(root.resolve()):
                return root / folder.relative_to(root.resolve())
    return None


def is_polygon_file(path: Path) -> bool:
    """Whether a line has more numbers than a box."""
    return path.is_file() and any(len(line.split()) > 6 for line in read_text(path, "the labels").splitlines())


def recognise_labelme(tree: Tree) -> Recognised | None:
    splits: dict[str, dict[str, str]] = {}
    names: dict[str, None] = {}
    for split, paths in by_split(tree.json["labelme"], tree.root).items():
        references = []
        progress = Progress(f"reading annotations of {split}", len(paths))
        for done, path in enumerate(paths, 1):
            progress.show(done)
            try:
                content = read_annotation(path)
                references.append(str(content["imagePath"]))
                names |= dict.fromkeys(str(shape["label"]) for shape in content["shapes"])
            except (DataError, LookupError, TypeError, AttributeError):
                continue  # converting reports it
        splits[split] = {
            "images": image_pattern(tree, references, paths[0].parent, split),
            "labels": pattern_below(tree.root, [path.parent for path in paths], "*.json"),
        }  # fmt: skip
    return Recognised("labelme", splits, *rows_for(sorted(names))) if splits else None


def recognise_label_studio(tree: Tree) -> Recognised | None:
    splits: dict[str, dict[str, str]] = {}
    names: dict[str, None] = {}
    there = {path.name for path in tree.images}
    for split, paths in by_split(tree.json["label_studio"], tree.root).items():
        path = one_file(paths, split)
        references = []
        for task in read_annotation(path):
            try:
                named = image_reference(Fields(task["data"], str(path)), str(path))
                references.append(next((name for name in named if name.rpartition("/")[2] in there), named[0]))
                for annotation in task["annotations"]:
                    names |= dict.fromkeys(label for region in annotation["result"] for label in region_labels(region))
            except (DataError, LookupError, TypeError, AttributeError):
                continue
        splits[split] = {
            "images": image_pattern(tree, references, path.parent, split),
            "labels": path.relative_to(tree.root).as_posix(),
        }  # fmt: skip
    return Recognised("label_studio", splits, *rows_for(sorted(names))) if splits else None


def region_labels(region: dict[str, Any]) -> list[str]:
    """The labels of a region with an area."""
    if str(region.get("type")) not in ("polygonlabels", "brushlabels", "rectanglelabels", "labels"):
        return []
    return [str(name) for key, names in region["value"].items() if key.endswith("labels") for name in names]


def recognise_supervisely(tree: Tree) -> Recognised | None:
    for path in (path for path in tree.json["supervisely_meta"] if path.name == "meta.json"):
        content = read_annotation(path)
        if not isinstance(content["classes"], list):
            continue
        names = [str(one.get("title")) for one in content["classes"] if isinstance(one, dict)]
        datasets = sorted(
            {one.parent.parent for one in tree.json["supervisely"] if (one.parent.parent / "img").is_dir()}
        )
        splits: dict[str, dict[str, str]] = {}
        for split, folders in by_split(datasets, tree.root).items():
            if 1 < len(folders) < len(datasets):
                say(f"note: {split} has several datasets; only {folders[0]} is used")
                folders = folders[:1]
            parent = pattern_below(tree.root, folders[:1], "") if len(folders) == 1 else pattern_below(
                tree.root, [path.parent], "*/"
            )  # fmt: skip
            splits[split] = {"images": f"{parent}img/*", "labels": f"{parent}ann/*.json"}
        if splits:
            return Recognised("supervisely", splits, *rows_for(names))
    return None
