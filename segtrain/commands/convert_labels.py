"""`segtrain convert-labels`: write labels of any known format as label images of class ids."""

import json
from pathlib import Path
from typing import Any

from segtrain.config import ConvertLabelsConfig
from segtrain.config.dataset import WITH_OBJECTS
from segtrain.console import say
from segtrain.data.formats.masks import read_masks
from segtrain.data.formats.painted import PaintReport, paint_all
from segtrain.data.formats.parquet import extract_parquet
from segtrain.data.formats.splits import READERS, painting_of, source_of
from segtrain.data.labels import LabelTable, read_user_table
from segtrain.data.sample import SplitFiles
from segtrain.data.sets.folder import match_patterns, match_sources, only_listed
from segtrain.data.verify.recognise import Recognised, table_rows
from segtrain.data.verify.write_config import recognise, say_guesses, table_csv
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically

ALONE = {".json": ("coco", "label_studio"), ".yaml": ("yolo",), ".yml": ("yolo",), ".parquet": ("parquet",)}
LISTED = 10


def convert_labels(config: ConvertLabelsConfig) -> dict[str, Any]:
    """Write output/SPLIT/NAME.png, classes.csv, a list of pairs for each split, and report.json. Returns the report.

    Label images that are there from the same labels are not written again. DataError (exit status 1), after everything
    else is written, if labels could not be used or were not drawn.
    """
    root, found = look_at(config)
    output = Path(config.output or "segtrain-out/convert-labels")
    if output.resolve() == root.resolve():
        raise UsageError(f"output={output} is the input itself: give another folder")
    table = own_table(config, found, output)
    unlabelled = (config.unlabelled or found.unlabelled) if found.format in WITH_OBJECTS else None
    say(f"input       {root}: {found.format}, splits {', '.join(distinct(found.splits))}")
    say(f"classes     {', '.join(table.names[:12])}{', ...' if len(table.names) > 12 else ''}")
    if unlabelled is not None and config.unlabelled is None:
        say_guesses(found)
    report: dict[str, Any] = {
        "input": str(root), "format": found.format, "order": config.order, "unlabelled": unlabelled, "splits": {},
    }  # fmt: skip
    findings = []
    painting = painting_of(table, config.order, unlabelled)
    for split in distinct(found.splits):
        painted = convert_split(config, found, split, root, output, table)
        report["splits"][split] = painted.as_json(painting.classes)
        say(f"{split:<11} {', '.join(painted.lines())}")
        write_pairs(output / f"{split}.txt", painted)
        findings += [f"{split}: {text}" for text in (*painted.errors, *painted.warnings())]
    report |= {"findings": findings, "ok": not findings}
    write_atomically(output / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    for text in findings[:LISTED]:
        say(f"error: {text}")
    if len(findings) > LISTED:
        say(f"... and {len(findings) - LISTED} more")
    pairs = ",".join(f"{split}:{{pairs:{split}.txt}}" for split in distinct(found.splits))
    say(f"then        segtrain check dataset=folder dataset.root={output} dataset.classes=classes.csv "
        f"'dataset.splits={{{pairs}}}'")  # fmt: skip
    say(str(output / "report.json"))
    if findings:
        raise DataError(f"{len(findings)} finding{'s' * (len(findings) > 1)} in {root}: {findings[0]}")
    return report


def distinct(splits: dict[str, dict[str, str]]) -> list[str]:
    """The splits without those that are another one again."""
    names = list(splits)
    return [name for number, name in enumerate(names) if not splits[name] or all(
        splits[name] != splits[other] for other in names[:number]
    )]  # fmt: skip


def look_at(config: ConvertLabelsConfig) -> tuple[Path, Recognised]:
    """The folder of images and labels, and what it holds. UsageError or DataError if that is not known."""
    given = Path(str(config.input)).expanduser()
    if not given.exists():
        raise UsageError(f"input={given}: no such file or folder")
    if given.is_dir():
        return given, recognise(given, config.format)
    kinds = ALONE.get(given.suffix.lower(), ())
    wanted = [kind for kind in kinds if config.format in ("auto", kind)]
    if not wanted:
        raise UsageError(f"input={given}: give a folder, or a file {', '.join(ALONE)}; format={config.format}")
    for root in (given.parent, given.parent.parent):
        for kind in wanted:
            try:
                found = recognise(root, kind)
            except DataError:
                continue
            name = given.relative_to(root).as_posix()
            splits = {split: entry | {"labels": name} for split, entry in found.splits.items()
                      if kind == "yolo" or entry["labels"] == name or kind == "parquet"}  # fmt: skip
            if splits:
                return root, found._replace(splits=splits)
    raise DataError(f"{given} holds no annotations with segmentations whose images are below {given.parent.parent}")


def own_table(config: ConvertLabelsConfig, found: Recognised, output: Path) -> LabelTable:
    """The class table, which is written to output/classes.csv."""
    path = output / "classes.csv"
    if config.classes is not None:
        table = read_user_table(Path(config.classes).expanduser())
        write_atomically(path, table_csv(table_rows(table)))
        return table
    write_atomically(path, table_csv(found.rows))
    return read_user_table(path)


def convert_split(
    config: ConvertLabelsConfig, found: Recognised, split: str, root: Path, output: Path, table: LabelTable
) -> PaintReport:  # fmt: skip
    """Write the label images of one split."""
    entry = found.splits[split]
    columns = None if config.columns is None else (config.columns[0], config.columns[1])
    errors: list[str] = []
    form = found.format
    if split in found.pairs:
        names = [str(image.relative_to(root).with_suffix("")) for image, _ in found.pairs[split]]
        images, labels = zip(*found.pairs[split], strict=True)
        files = SplitFiles(dict(zip(names, images, strict=True)), dict(zip(names, labels, strict=True)))
    elif form in ("masks", "colors"):
        files = match_patterns(root, entry["images"], entry["labels"], split)
    else:
        files = match_sources(root, entry["images"], entry["labels"], split, form)
    if "list" in entry:
        files = only_listed(files, root / entry["list"])
    if form == "parquet":
        *extracted, errors = extract_parquet(files.labels or {}, columns, output / "parquet" / split)
        files, form = SplitFiles(extracted[0], extracted[1]), "masks"
    unlabelled = (config.unlabelled or found.unlabelled) if form in WITH_OBJECTS else None
    source = source_of(root, files.images, entry.get("labels", ""), files.labels or {}, table, form)
    reader = read_masks if form == "masks" else READERS[form]
    report = paint_all(
        reader(source), output / split, painting_of(table, config.order, unlabelled), f"labels of {split}"
    )
    report.errors[:0] = errors
    return report


def write_pairs(path: Path, report: PaintReport) -> None:
    """A list `image,label` a line, as dataset.splits.SPLIT={pairs:...} reads it."""
    pairs = [(str(report.images[name].absolute()), str(label.relative_to(path.parent))) for name, label in
             sorted(report.labels.items())]  # fmt: skip
    lines = [f"{image},{label}" for image, label in pairs if "\n" not in image + label]
    write_atomically(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
