"""Your own images: file patterns or lists of pairs, and a class table, all by configuration."""

from pathlib import Path

from segtrain.config import IGNORE_INDEX, FolderConfig
from segtrain.config.user_files import read_text
from segtrain.data.folders import WILDCARDS, matching
from segtrain.data.formats.class_masks import CLASS
from segtrain.data.formats.splits import painted_split, source_of
from segtrain.data.images import SUFFIXES
from segtrain.data.labels import LabelTable, read_user_table
from segtrain.data.rules import PLAIN
from segtrain.data.sample import DatasetSpec, SplitFiles, expect_folder, expect_split
from segtrain.errors import DataError, UsageError, meant

TREE = """any folder with images and label images, described by
  dataset.splits.train={{images:train/*.jpg,labels:train_labels/*.png}}  (the same for val), or {{pairs:train.txt}}
  dataset.classes=classes.csv  with the columns id, name, color, ignore"""


def table(config: FolderConfig) -> LabelTable:
    if config.classes is None:
        raise UsageError("dataset.classes is not set: give a CSV or YAML file with the columns id, name, color, ignore")
    path = Path(config.classes).expanduser()
    known = read_user_table(next((p for p in (config.folder() / path, path) if p.is_file()), path))
    return with_ignored(known, config.ignore_values) if config.ignore_values else known


def with_ignored(table: LabelTable, values: list[int]) -> LabelTable:
    """The table with further ignored ids: those of the values that have 8 bits, and one for the others to become."""
    rows = {int(row["id"]): row for row in table.rows}
    classes = [value for value in values if rows.get(value, {}).get("train_id", IGNORE_INDEX) != IGNORE_INDEX]
    if classes:
        raise UsageError(f"dataset.ignore_values={values} has {classes[0]}, which is a class in {table.source}")
    small = [value for value in values if 0 <= value <= 255]
    if not small and not table.ignored_ids:
        small = [next(value for value in range(255, -1, -1) if value not in rows)]
    for value in small:
        rows.setdefault(value, {"id": value, "name": "ignored", "color": [0, 0, 0], "train_id": IGNORE_INDEX})
    return LabelTable(rows.values(), table.source)


def files(config: FolderConfig, split: str) -> SplitFiles:
    root = config.folder()
    if config.root is None:
        raise UsageError("dataset.root is not set: give the folder of your images")
    expect_folder(root, "folder", TREE)
    expect_split(split, config.splits, root)
    entry = config.splits[split]
    if "pairs" in entry:
        found = read_pairs(root, entry["pairs"])
    elif config.format in ("masks", "colors"):
        found = match_patterns(root, entry["images"], entry.get("labels"), f"dataset.splits.{split}")
    else:
        found = match_sources(root, entry["images"], entry["labels"], f"dataset.splits.{split}", config.format)
    if "list" in entry:
        found = only_listed(found, root / entry["list"])
    if config.format != "masks":
        classes = table(config)
        columns = None if config.columns is None else (config.columns[0], config.columns[1])
        source = source_of(root, found.images, entry["labels"], found.labels or {}, classes, config.format, columns)
        images, labels, lost = painted_split(config, split, source, classes)
        found = SplitFiles(images, labels, lost=lost)
    channels = None if config.channels is None else tuple(config.channels)
    found = found._replace(value_range=config.levels(), exif=config.exif, channels=channels)
    return found._replace(replaced=replaced(config))


def replaced(config: FolderConfig) -> dict[int, int] | None:
    """dataset.ignore_values of more than 8 bits, and what they become."""
    wide = [value for value in config.ignore_values if not 0 <= value <= 255]
    if not wide:
        return None
    known = table(config)  # which has the stand-in as an ignored id
    return dict.fromkeys(wide, known.void_id)


def match_sources(root: Path, images: str, labels: str, key: str, form: str) -> SplitFiles:
    """Images by name, and the files of labels that a reader of their format asks for."""
    found = matches(root, images, f"{key}.images")
    if form == "parquet":
        return SplitFiles({}, found)
    pictures = {name: path for name, path in found.items() if path.suffix.lower() in SUFFIXES}
    return SplitFiles(without_suffix(pictures), {} if CLASS in labels else matches(root, labels, f"{key}.labels"))


def only_listed(found: SplitFiles, path: Path) -> SplitFiles:
    """The images that a list names, one a line, by their names with or without folders and ending."""
    by_name = {form: name for name, image in found.images.items() for form in (image.name, image.stem, name)}
    names: dict[str, None] = {}
    for number, line in enumerate(read_text(path, "the list of images").splitlines(), 1):
        wanted = line.strip()
        if not wanted or wanted.startswith("#"):
            continue
        last = wanted.replace("\\", "/").rpartition("/")[2]
        name = next((by_name[form] for form in (wanted, last, Path(last).stem) if form in by_name), None)
        if name is None:
            raise DataError(f"{path}, line {number}: no image of the name {wanted!r}{meant(wanted, by_name)}")
        names[name] = None
    labels = found.labels
    if labels:
        chosen = {name: path for name, path in labels.items() if name in names or Path(name).stem in names}
        labels = chosen or labels
    return found._replace(images={name: found.images[name] for name in names}, labels=labels)


def match_patterns(root: Path, images: str, labels: str | None, key: str) -> SplitFiles:
    """Images, and labels for which the `*`, `**` and `?` of the two patterns stand for the same text.

    Where more of them do so without the endings .jpg and .png of that text, these are left out.
    """
    found = matches(root, images, f"{key}.images")
    if labels is None:
        return SplitFiles(found, None)
    if len(WILDCARDS.findall(images)) != len(WILDCARDS.findall(labels)):
        raise UsageError(
            f"{key}: the patterns {images} and {labels} need the same number of * to pair by, as in "
            "{images:left/*_L.png,labels:masks/*.png}, where * is IMG_001 for both"
        )
    masks = matches(root, labels, f"{key}.labels")
    short = without_suffix(found), without_suffix(masks)
    if found.keys().isdisjoint(masks) or len(short[0].keys() ^ short[1].keys()) < len(found.keys() ^ masks.keys()):
        found, masks = short
    return SplitFiles(found, masks)


def without_suffix(files: dict[str, Path]) -> dict[str, Path]:
    """The files by their names without .png and the like; as they were if two would have the same name."""
    short = {name.removesuffix(path.suffix): path for name, path in files.items()}
    return short if len(short) == len(files) else files


def matches(root: Path, pattern: str, key: str) -> dict[str, Path]:
    """Files below root that match, by the text that the wildcards stand for, joined by '/'."""
    found: dict[str, Path] = {}
    try:
        for name, path in matching(root, pattern):
            if name in found:
                raise DataError(f"{key}={pattern} means {found[name]} and {path} by the same name {name!r}: rename one")
            found[name] = path
    except ValueError as error:
        raise UsageError(f"{key}={pattern} is not a pattern below {root}: {error}") from error
    return found


def is_below(path: Path, root: Path) -> bool:
    return path.is_relative_to(root) and ".." not in path.relative_to(root).parts


def read_pairs(root: Path, name: str) -> SplitFiles:
    """One `image,label` (or `image label`) a line, paths below root or absolute; # begins a comment."""
    path = root / name
    lines = read_text(path, "the list of pairs").splitlines()
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("\ufeff")
        if not text or text.startswith("#") or (number == 1 and text.lower() in HEADERS):
            continue
        image, label = pair_in_line(root, text, f"{path}, line {number}")
        key = (image.relative_to(root) if is_below(image, root) else Path(image.name)).with_suffix("").as_posix()
        if key in images:
            raise DataError(f"{path}, line {number}: {image} and {images[key]} have the same name {key!r}")
        images[key], labels[key] = image, label
    return SplitFiles(images, labels)


HEADERS = ("image,label", "image,mask", "images,labels", "images,masks")


def pair_in_line(root: Path, text: str, where: str) -> tuple[Path, Path]:
    """Image and label of a line, in which a file's name may have spaces, commas and #. DataError for anything else."""
    plain = text.split("#", 1)[0].strip()
    missing = []
    for line in dict.fromkeys((text, plain)):  # a comment may follow
        for mark in [mark for mark in ("\t", ",", ";", " ") if mark in line]:
            places = [place for place, letter in enumerate(line) if letter == mark]
            for place in places:
                parts = [part.strip().strip('"') for part in (line[:place], line[place + 1 :])]
                files = [listed_path(root, part) for part in parts if part]
                absent = [str(file) for file in files if not file.is_file()]
                if len(files) == 2 and not absent:
                    return files[0], files[1]
                if len(files) == 2 and len(places) == 1 and line == plain:
                    missing.append(absent)
    if missing:
        raise DataError(f"{where}: no such file {', '.join(missing[0])}")
    raise DataError(f"{where}: expected 'image,label', found {plain!r}")


def listed_path(root: Path, part: str) -> Path:
    """A path in a list: below root, or absolute; VOC's lists begin those below root with a slash too."""
    path = root / part
    inside = root / part.lstrip("/\\")
    return inside if part.startswith("/") and not path.exists() and inside.exists() else path


DATASET = DatasetSpec(table, files, PLAIN, options=FolderConfig, splits={})
