"""`segtrain check`: verify a dataset. Findings, a report, a contact sheet."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.config import CheckConfig, DatasetConfig, channels_of, classifies
from segtrain.console import Progress, printable, say
from segtrain.data.classify.samples import ClassImages
from segtrain.data.images import read_image
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable
from segtrain.data.registry import (
    classification_spec,
    dataset_spec,
    label_table,
    list_images,
    parts_of,
    split_files,
)
from segtrain.data.sample import DatasetSpec, SplitFiles, read_sample_image
from segtrain.data.scenes.layouts import MANIFEST
from segtrain.data.verify.channels import measure_channels
from segtrain.data.verify.label_mistakes import Finding
from segtrain.data.verify.leakage import find_leakage
from segtrain.data.verify.splits import check_split
from segtrain.data.verify.write_config import write_guess
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.scoring import figures
from segtrain.threads import threaded_map

SHEET = 8  # images on the contact sheet
LISTED = 5
SHARES, RAREST = 30, 10  # classes whose shares are listed: all up to that number, else so many


def check(config: CheckConfig) -> dict[str, Any]:
    """Print the findings; write report.json and contact.png. DataError (exit status 1) for errors among them."""
    output = Path(config.output or "segtrain-out/check")
    if config.write_config is not None:
        write_guess(config.dataset, Path(config.write_config))
        return {}
    data = config.dataset
    if classifies(data):
        return check_classes(data, config.split, output)
    dataset, table = dataset_spec(data), label_table(data)
    mixture = parts_of(data)
    if mixture and config.split:
        raise UsageError(f"split={config.split}: of a mixture each part has its own, dataset.parts.<part>.split")
    where = "its parts" if mixture else str(data.folder())
    say(f"checking    {data.name} in {where}, {table.num_classes} classes of {table.source}")
    splits: dict[str, Any] = {}
    findings: list[Finding] = []
    panels: list[np.ndarray] = []
    for part in mixture:
        names = [part.split, *([data.val_split] if part.is_target else [])]
        say(f"part        {part.name}: {part.config.folder()}")
        check_dataset(part.config, names, f"{part.name} ", splits, findings, panels)
    if not mixture:
        wanted = [data.train_split, data.val_split, *dataset.published]
        names = [config.split] if config.split else list(dict.fromkeys(wanted))
        required = {config.split} if config.split else {data.train_split, data.val_split}
        check_dataset(data, names, "", splits, findings, panels, required)
        findings += check_leakage(data, dataset)
    if not any("images" in facts for facts in splits.values()):
        findings.append(Finding("error", "empty", f"no images at all in {where}"))
    if panels:
        figures.write_png(output / "contact.png", figures.sheet(panels, table))
    about = {"dataset": data.name, "root": where, "licence": dataset.licence, "classes": table.names}
    return write_report(output, about, splits, findings)


def write_report(
    output: Path, about: dict[str, Any], splits: dict[str, Any], findings: list[Finding]
) -> dict[str, Any]:  # fmt: skip
    """Print and write everything. DataError if there are errors."""
    findings.sort(key=lambda finding: finding.severity)  # errors first
    errors = [finding for finding in findings if finding.severity == "error"]
    report = about | {
        "splits": splits, "findings": [finding._asdict() for finding in findings], "ok": not errors,
    }  # fmt: skip
    print_splits(splits)
    print_shares({name: facts["class_pixels"] for name, facts in splits.items() if facts.get("class_pixels")})
    for finding in findings:
        say(str(finding))
    write_atomically(output / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    if not errors:
        say("nothing was found that would spoil training or scores")
    say(str(output / "report.json"))
    if errors:
        raise DataError(f"{len(errors)} finding{'s' * (len(errors) > 1)} in {about['dataset']}: {errors[0].text}")
    return report


def check_classes(data: DatasetConfig, split: str | None, output: Path) -> dict[str, Any]:
    """For image classification: the tree, the classes of both splits, and every file, decoded."""
    from segtrain.tasks.classification import refuse_other_classes  # which needs torch

    dataset = classification_spec(data)
    say(f"checking    {data.name} in {data.folder()}")
    splits: dict[str, Any] = {}
    findings: list[Finding] = []
    first: ClassImages | None = None
    for name in [split] if split else dict.fromkeys([data.train_split, data.val_split]):
        try:
            some = list_images(data, name)
        except DataError as error:
            findings.append(Finding("error", "tree", f"{name}: {error}"))
            continue
        try:
            refuse_other_classes(some, (first or some).classes, f"those of {(first or some).folder}")
        except DataError as error:
            findings.append(Finding("error", "classes", f"{name}: {error}"))
        first = first or some
        published = dataset.published.get(name) if dataset.complete(some) else None
        if published is not None and published != len(some):
            severity = "error" if name == data.val_split else "note"
            findings.append(Finding(severity, "count", f"{name}: {len(some)} images, published are {published}"))
        bad: list[str] = []
        progress = Progress(f"checking {name}", len(some))
        for done, wrong in enumerate(threaded_map(undecoded, (some.folder / one for one in some.names)), 1):
            bad += [wrong] if wrong else []
            progress.show(done)
        if bad:
            text = f"{name}: {len(bad)} of {len(some)} images cannot be read: {'; '.join(bad[:LISTED])}"
            findings.append(Finding("error", "unreadable", text))
        splits[name] = {"images": len(some), "labels": None, "instances": None, "published": published, "sizes": [],
                        "classes": len(some.classes), "bad_files": bad}  # fmt: skip
    classes = first.classes if first else []
    about = {"dataset": data.name, "root": str(data.folder()), "licence": dataset.licence, "classes": classes}
    return write_report(output, about, splits, findings)


def undecoded(path: Path) -> str:
    """Why an image cannot be read, or ''."""
    try:
        read_image(path)
    except DataError as error:
        return str(error)
    return ""


def check_dataset(
    data: DatasetConfig, names: list[str], prefix: str, splits: dict[str, Any], findings: list[Finding],
    panels: list[np.ndarray], required: Collection[str | None] = (),
) -> None:  # fmt: skip
    """Add facts, findings and panels of these splits. required: splits that must exist."""
    dataset, table = dataset_spec(data), label_table(data)
    built_in = (data.folder() / MANIFEST).is_file()
    if built_in:
        say("            built-in street scenes: counts are not compared with published ones")
    for name in dict.fromkeys(names):
        try:
            files = split_files(data, name)
        except DataError as error:
            if name in required or prefix:
                raise
            splits[name] = {"missing": str(error)}
            continue
        if not files.images and not files.labels:
            text = f"{prefix}{name}: no images in {data.folder()}"
            findings.append(Finding("error" if required == {name} or prefix else "note", "empty", text))
            continue
        expected = None if built_in else dataset.published.get(name)
        facts, found = check_split(name, files, table, dataset, data.cache_folder(), expected, name == data.train_split)
        splits[f"{prefix}{name}"] = facts
        known = {finding.text.partition(": ")[2] for finding in findings}  # a split may be part of another
        findings += [
            finding._replace(text=f"{prefix}{name}: {finding.text}") for finding in found if finding.text not in known
        ]
        if data.train_split == name and channels_of(data) is not None:
            say_channels(name, files)
        panels += contact(files, table, SHEET - len(panels)) if len(panels) < SHEET else []


def say_channels(name: str, files: SplitFiles) -> None:
    """Print mean and standard deviation of each channel, as options of the training."""
    found = measure_channels(files.with_images())
    if found is None:
        return  # no image can be read, which is among the findings
    say(f"channels    of {found.images} of {len(files.images)} images of {name}: {found}")
    for channel in found.constant:
        say(f"            channel {channel} has one value everywhere: its std is taken as 1/255")


def check_leakage(data: DatasetConfig, dataset: DatasetSpec) -> list[Finding]:
    """Images that are both trained on and validated on. Splits that share images by definition are not compared."""
    parts = [set(dataset.splits.get(split, split).split("+")) for split in (data.train_split, data.val_split)]
    if parts[0] & parts[1] or "trainval" in parts[0] | parts[1]:
        say(f"            {data.train_split} and {data.val_split} share images by definition: they are not compared")
        return []
    try:
        return find_leakage(
            {split: split_files(data, split).images for split in (data.train_split, data.val_split)},
            data.cache_folder(),
        )
    except DataError:
        return []  # a split is missing, which is reported before


def contact(files: SplitFiles, table: LabelTable, most: int) -> list[np.ndarray]:
    """Images beside their labels and with the labels laid over them, evenly spread over the split."""
    panels = []
    labelled = [sample for sample in files.labelled() if sample.name in files.images] if files.labels else []
    for sample in labelled[:: max(1, -(-len(labelled) // most))][:most]:
        try:
            assert sample.label is not None
            stored = read_label(sample.label, sample.replaced)
            image = read_sample_image(sample, stored.shape)
            if stored.shape == image.shape[:2]:
                target = table.encode_values(stored)
                panel = figures.beside(image, table.colorize(target), figures.overlay(image, target, table))
                panels.append(figures.captioned(panel, sample.image.name))
        except DataError:
            continue  # it is among the findings
    return panels


def print_shares(splits: dict[str, dict[str, int]]) -> None:
    """The share of each class in the labelled pixels of each split, in percent; of many classes the rarest.

    splits: name -> class -> number of pixels.
    """
    labelled = {name: sum(pixels.values()) for name, pixels in splits.items()}
    splits = {name: pixels for name, pixels in splits.items() if labelled[name]}
    if not splits:
        return
    first = next(iter(splits.values()))
    splits = {name: pixels for name, pixels in splits.items() if pixels.keys() == first.keys()}  # parts have their own
    classes = list(first) if len(first) <= SHARES else sorted(first, key=lambda name: first[name])[:RAREST]
    width = max(14, *(len(printable(name, inline=True)) for name in classes))
    say(f"{'pixels %':<{width}}" + "".join(f" {name:>9}" for name in splits))
    for one in classes:
        shares = [100 * pixels.get(one, 0) / labelled[name] for name, pixels in splits.items()]
        say(f"{printable(one, inline=True):<{width}}" + "".join(f" {share:>9.3g}" for share in shares))
    if len(classes) < len(first):
        say(f"the rarest of {len(first)} classes in {next(iter(splits))}; report.json has all")
    say("")


def print_splits(splits: dict[str, Any]) -> None:
    say(f"\n{'split':<14} {'images':>9} {'published':>10} {'labels':>8} {'instances':>10}  sizes (width x height)")
    for name, facts in splits.items():
        if "images" not in facts:
            say(f"{name:<14} {'not there':>9}")
            continue
        sizes = ", ".join(f"{s['width']}x{s['height']} ({s['pictures']})" for s in facts["sizes"][:3])
        more = ", ..." if len(facts["sizes"]) > 3 else ""
        columns = (facts["images"], facts["published"], facts["labels"], facts["instances"])
        shown = ["-" if value is None else str(value) for value in columns]
        say(f"{name:<14} {shown[0]:>9} {shown[1]:>10} {shown[2]:>8} {shown[3]:>10}  {sizes}{more}")
    say("")
