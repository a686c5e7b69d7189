"""`segtrain check`: is this data what the configuration says it is? Findings, a report, a contact sheet."""

import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segtrain.config import CheckConfig, DatasetConfig, FolderConfig, MixtureConfig, classifies
from segtrain.console import Progress, say
from segtrain.data.dataset import dataset_spec, label_table, split_files
from segtrain.data.images import read_image
from segtrain.data.label_files import read_instances, read_label
from segtrain.data.labels import LabelTable
from segtrain.data.sample import DatasetSpec, Sample, SplitFiles
from segtrain.data.scenes.layouts import MANIFEST
from segtrain.data.sets.mixture import parts
from segtrain.data.verify.files import FileFacts
from segtrain.data.verify.guess import write_guess
from segtrain.data.verify.label_mistakes import Finding, find_mistakes
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.scoring import figures as pictures
from segtrain.threads import threaded_map

SHEET = 8  # pictures on the contact sheet
INSTANCES_READ = 200  # at most so many instance maps of a split are compared with the labels
LISTED = 5


def check(config: CheckConfig) -> dict[str, Any]:
    """Prints what was found; writes report.json and contact.png. DataError (exit status 1) if a score would suffer."""
    output = Path(config.output or "segtrain-out/check")
    if config.write_config is not None:
        if not isinstance(config.dataset, FolderConfig):
            raise UsageError(f"write_config is for dataset=folder; dataset={config.dataset.name} has its own layout")
        write_guess(config.dataset.folder(), config.dataset.root, Path(config.write_config))
        return {}
    data = config.dataset
    if classifies(data):
        return check_pictures(data, config.split, output)
    dataset, table = dataset_spec(data), label_table(data)
    mixture = isinstance(data, MixtureConfig)
    if mixture and config.split:
        raise UsageError(f"split={config.split}: of a mixture each part has its own, dataset.parts.<part>.split")
    where = "its parts" if mixture else str(data.folder())
    say(f"checking    {data.name} in {where}, {table.num_classes} classes of {table.source}")
    splits: dict[str, Any] = {}
    findings: list[Finding] = []
    panels: list[np.ndarray] = []
    if isinstance(data, MixtureConfig):
        for item in parts(data):
            names = [item.split, *([data.val_split] if item.name == data.target else [])]
            say(f"part        {item.name}: {item.config.folder()}")
            check_data_set(item.config, names, f"{item.name} ", splits, findings, panels)
    else:
        wanted = [data.train_split, data.val_split, *dataset.published]
        names = [config.split] if config.split else list(dict.fromkeys(wanted))
        required = {config.split} if config.split else {data.train_split, data.val_split}
        check_data_set(data, names, "", splits, findings, panels, required)
    if not any("images" in facts for facts in splits.values()):
        findings.append(Finding("error", "empty", f"no pictures at all in {where}"))
    if panels:
        pictures.write_png(output / "contact.png", pictures.sheet(panels, table))
    return reported(output, {"dataset": data.name, "root": where, "classes": table.names}, splits, findings)


def reported(
    output: Path, about: dict[str, Any], splits: dict[str, Any], findings: list[Finding]
) -> dict[str, Any]:  # fmt: skip
    """Prints and writes all of it. DataError if there are errors."""
    findings.sort(key=lambda finding: finding.severity)  # errors first
    errors = [finding for finding in findings if finding.severity == "error"]
    report = about | {
        "splits": splits, "findings": [finding._asdict() for finding in findings], "ok": not errors,
    }  # fmt: skip
    print_splits(splits)
    for finding in findings:
        say(str(finding))
    write_atomically(output / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    if not errors:
        say("nothing was found that would spoil a training or a score")
    print(output / "report.json", flush=True)
    if errors:
        raise DataError(f"{len(errors)} finding{'s' * (len(errors) > 1)} in {about['dataset']}: {errors[0].text}")
    return report


def check_pictures(data: DatasetConfig, split: str | None, output: Path) -> dict[str, Any]:
    """Of whole pictures: the tree, the classes of both splits, and every file, decoded."""
    from segtrain.data.classify.images import PUBLISHED, Pictures, list_pictures
    from segtrain.tasks.classification import refuse_other_classes  # which needs torch

    say(f"checking    {data.name} in {data.folder()}")
    splits: dict[str, Any] = {}
    findings: list[Finding] = []
    first: Pictures | None = None
    for name in [split] if split else dict.fromkeys([data.train_split, data.val_split]):
        try:
            some = list_pictures(data, name)
        except DataError as error:
            findings.append(Finding("error", "tree", f"{name}: {error}"))
            continue
        try:
            refuse_other_classes(some, (first or some).classes, f"those of {(first or some).folder}")
        except DataError as error:
            findings.append(Finding("error", "classes", f"{name}: {error}"))
        first = first or some
        whole = len(some.classes) == 1000 and all(re.fullmatch(r"n\d{8}", one) for one in some.classes)
        published = PUBLISHED.get(name) if whole else None
        if published is not None and published != len(some):
            severity = "error" if name == data.val_split else "note"
            findings.append(Finding(severity, "count", f"{name}: {len(some)} pictures, published are {published}"))
        bad: list[str] = []
        progress = Progress(f"checking {name}", len(some))
        for done, wrong in enumerate(threaded_map(undecoded, (some.folder / one for one in some.names)), 1):
            bad += [wrong] if wrong else []
            progress.show(done)
        if bad:
            text = f"{name}: {len(bad)} of {len(some)} pictures cannot be read: {'; '.join(bad[:LISTED])}"
            findings.append(Finding("error", "unreadable", text))
        splits[name] = {"images": len(some), "labels": None, "instances": None, "published": published, "sizes": [],
                        "classes": len(some.classes), "bad_files": bad[:20]}  # fmt: skip
    about = {"dataset": data.name, "root": str(data.folder()), "classes": first.classes if first else []}
    return reported(output, about, splits, findings)


def undecoded(path: Path) -> str:
    """Why a picture cannot be read, if it cannot."""
    try:
        read_image(path)
    except DataError as error:
        return str(error)
    return ""


def check_data_set(
    data: DatasetConfig, names: list[str], prefix: str, splits: dict[str, Any], findings: list[Finding],
    panels: list[np.ndarray], required: Collection[str | None] = (),
) -> None:  # fmt: skip
    """Adds facts, findings and panels of these splits. required: splits whose names must exist."""
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
            text = f"{prefix}{name}: no pictures in {data.folder()}"
            findings.append(Finding("error" if required == {name} or prefix else "note", "empty", text))
            continue
        expected = None if built_in else dataset.published.get(name)
        facts, found = check_split(name, files, table, dataset, data.name, data.cache_folder(), expected)
        splits[f"{prefix}{name}"] = facts
        told = {finding.text.partition(": ")[2] for finding in findings}  # KITTI's trainval says all of it again
        findings += [
            finding._replace(text=f"{prefix}{name}: {finding.text}") for finding in found if finding.text not in told
        ]
        panels += contact(files, table, SHEET - len(panels)) if len(panels) < SHEET else []


def check_split(
    name: str, files: SplitFiles, table: LabelTable, dataset: DatasetSpec, kind: str, cache: Path, published: int | None
) -> tuple[dict[str, Any], list[Finding]]:
    """Facts for the report, and what was found."""
    findings: list[Finding] = []
    labels = files.labels if files.labels is not None else {}
    for what, here, there in (("image", files.images, labels), ("label", labels, files.images)):
        alone = sorted(set(here) - set(there)) if files.labels is not None else []
        if alone:
            other = "label" if what == "image" else "image"
            some = ", ".join(str(here[key]) for key in alone[:LISTED])
            findings.append(Finding("error", "pairs", f"{len(alone)} {what}s have no {other}: {some}"))
    without = sorted(set(labels) - set(files.instances)) if files.instances else []
    if without:
        some = ", ".join(str(labels[key]) for key in without[:LISTED])
        findings.append(
            Finding("error", "instances", f"{len(without)} labels have no instance map (no iIoU then): {some}")
        )
    if published is not None and published != len(files.images):
        severity = "error" if name == dataset.scored and files.labels is not None else "note"
        findings.append(Finding(severity, "count", f"{len(files.images)} pictures, published are {published}"))
    samples = [Sample(n, p, labels.get(n), files.instances.get(n)) for n, p in sorted(files.images.items())]
    seen = FileFacts(cache, samples)
    histogram = np.zeros(256, np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    bad: dict[str, list[str]] = {}
    progress = Progress(f"checking {name}", len(samples))

    def examine(sample: Sample) -> tuple[tuple[int, int], np.ndarray | None, str, list[Finding]]:
        try:
            size, values = seen.sample(sample)
            return size, values, seen.fact(sample.image, "mode", mode_of), []
        except DataError as error:
            return (0, 0), None, "", [explained(sample, error, table, seen)]

    for done, (size, values, mode, found) in enumerate(threaded_map(examine, samples), 1):
        for finding in found:
            bad.setdefault(finding.kind, []).append(finding.text)
        if not found:
            sizes[size] += 1
            modes[mode] += 1
        if values is not None:
            histogram += values
        progress.show(done)
    seen.save()
    for what, texts in bad.items():
        more = f" (and {len(texts) - 1} more like this)" if len(texts) > 1 else ""
        findings.append(Finding("error", what, texts[0] + more))
    findings += find_mistakes(histogram, table, kind, len(samples))
    findings += check_instances(samples, table, dataset)
    strange = {mode: count for mode, count in modes.items() if mode != "RGB"}
    if strange:
        listed = ", ".join(f"{count} of mode {mode}" for mode, count in strange.items())
        findings.append(Finding("note", "modes", f"pictures that are not RGB are turned into RGB: {listed}"))
    ids = {int(value): int(histogram[value]) for value in np.flatnonzero(histogram)}
    facts = {
        "images": len(files.images), "labels": None if files.labels is None else len(labels),
        "instances": len(files.instances), "published": published, "image_modes": dict(modes),
        "sizes": [{"height": h, "width": w, "pictures": count} for (h, w), count in sizes.most_common(20)],
        "label_values": ids, "bad_files": {kind: texts[:20] for kind, texts in bad.items()},
    }  # fmt: skip
    return facts, findings


def mode_of(path: Path) -> str:
    """Pillow's name of what a picture's pixels are."""
    with Image.open(path) as picture:
        return str(picture.mode)


def explained(sample: Sample, error: DataError, table: LabelTable, seen: FileFacts) -> Finding:
    """A faulty file, with the mistake that is behind it where that shows."""
    try:
        assert sample.label is not None
        (height, width), label = seen.size(sample.image), seen.size(sample.label)
        if label == (width, height) and height != width:
            return Finding("error", "swapped size", f"{error} (height and width are swapped: the label was written "
                                                    "transposed, or only one of the two was rotated)")  # fmt: skip
        if label == (height, width):
            with Image.open(sample.label) as picture:
                if picture.mode in ("RGB", "RGBA"):
                    return Finding("error", "colours", colours(sample.label, table))
                if picture.mode.startswith("I"):
                    return Finding("error", "16 bits", str(error))
        return Finding("error", "sizes", str(error))
    except (DataError, AssertionError, OSError):
        return Finding("error", "unreadable", str(error))


def colours(path: Path, table: LabelTable) -> str:
    """What is wrong with a label picture in colours."""
    found = {tuple(color) for color in np.unique(read_image(path).reshape(-1, 3), axis=0).tolist()}
    known = {tuple(row["color"]) for row in table.rows}
    remedy = "give the pictures with one class id per pixel (Cityscapes: *_labelIds.png, KITTI: semantic/)"
    if found <= known:
        return f"{path} shows the classes' colours, which are not unique: {remedy}"
    if len(found) > 256:
        return (
            f"{path} has {len(found)} colours: it was interpolated or compressed with loss, labels are lost at "
            f"every edge; {remedy}, resized with the nearest pixel"
        )
    return f"{path} has {len(found)} colours, {len(found & known)} of them in {table.source}: {remedy}"


def check_instances(samples: list[Sample], table: LabelTable, dataset: DatasetSpec) -> list[Finding]:
    """Whether the instance maps, read as this data set has them, agree with the labels."""
    divisor, single = dataset.rules.divisor, dataset.rules.single
    with_both = [sample for sample in samples if sample.instances is not None and sample.label is not None]
    if divisor is None or single is None or not with_both:
        return []
    agreeing = {1000: 0, 256: 0}
    total = 0
    for sample in with_both[:: max(1, -(-len(with_both) // INSTANCES_READ))]:
        assert sample.instances is not None and sample.label is not None
        try:
            values, ids = read_instances(sample.instances).astype(np.int64), table.to_ids(read_label(sample.label))
        except DataError as error:
            if str(sample.instances) in str(error):  # the labels' faults are known by now
                return [Finding("error", "unreadable", str(error))]
            continue
        if values.shape != ids.shape:
            continue
        objects = values > 255
        total += int(objects.sum())
        for candidate in agreeing:
            agreeing[candidate] += int((values[objects] // candidate == ids[objects]).sum())
    other = 256 if divisor == 1000 else 1000
    if total and agreeing[divisor] < 0.5 * total:
        names = {1000: "Cityscapes' (id * 1000 + k)", 256: "KITTI's and Vistas' (id * 256 + k)"}
        fits = f": they are {names[other]}" if agreeing[other] > 0.9 * total else ""
        return [Finding(
            "error", "instances",
            f"the instance maps do not agree with the labels when read as {names[divisor]}{fits}; iIoU would be wrong. "
            "Take the maps that came with this data set",
        )]  # fmt: skip
    return []


def contact(files: SplitFiles, table: LabelTable, most: int) -> list[np.ndarray]:
    """Pictures beside their labels and with the labels laid over them, evenly spread over the split."""
    panels = []
    labelled = [sample for sample in files.labelled() if sample.name in files.images] if files.labels else []
    for sample in labelled[:: max(1, -(-len(labelled) // most))][:most]:
        try:
            assert sample.label is not None
            image, stored = read_image(sample.image), read_label(sample.label)
            if stored.shape == image.shape[:2]:
                target = table.encode_values(stored)
                panels.append(pictures.beside(image, table.colorize(target), pictures.overlay(image, target, table)))
        except DataError:
            continue  # it is among the findings
    return panels


def print_splits(splits: dict[str, Any]) -> None:
    print(f"\n{'split':<14} {'pictures':>9} {'published':>10} {'labels':>8} {'instances':>10}  sizes (width x height)")
    for name, facts in splits.items():
        if "images" not in facts:
            print(f"{name:<14} {'not there':>9}")
            continue
        sizes = ", ".join(f"{s['width']}x{s['height']} ({s['pictures']})" for s in facts["sizes"][:3])
        more = ", ..." if len(facts["sizes"]) > 3 else ""
        columns = (facts["images"], facts["published"], facts["labels"], facts["instances"])
        shown = ["-" if value is None else str(value) for value in columns]
        print(f"{name:<14} {shown[0]:>9} {shown[1]:>10} {shown[2]:>8} {shown[3]:>10}  {sizes}{more}")
    print(flush=True)
