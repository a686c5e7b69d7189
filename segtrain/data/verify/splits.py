"""Verify a split: files, sizes, label values and instance maps, as findings and as facts for a report."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.console import Progress
from segtrain.data.images import read_header, read_image
from segtrain.data.label_files import read_instances, read_label
from segtrain.data.labels import LabelTable
from segtrain.data.orientation import OrientationError
from segtrain.data.sample import DatasetSpec, Sample, SplitFiles
from segtrain.data.verify.file_facts import FileFacts
from segtrain.data.verify.files import describe_turns
from segtrain.data.verify.label_mistakes import Finding, counts_by_class, find_mistakes, first_of
from segtrain.errors import DataError
from segtrain.threads import portion, threaded_map

INSTANCES_READ = 200  # at most so many instance maps of a split are compared with the labels
LISTED = 5

CHOSEN = "channels"  # in place of Pillow's mode where they are chosen


class Scan(NamedTuple):
    """What reading all files of a split gives. sizes: number of images by (height, width). modes: by Pillow's mode.
    histogram: int64 (256,), label pixels by value. bad: kind of finding -> its texts, one a file. unknown: the message
    about each label image with ids that are not in the table. tags: as of `FileFacts`."""

    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    histogram: np.ndarray
    bad: dict[str, list[str]]
    unknown: list[str]
    tags: dict[Path, tuple[int, int]]


def check_split(
    name: str,
    files: SplitFiles,
    table: LabelTable,
    dataset: DatasetSpec,
    cache: Path,
    published: int | None,
    training: bool = False,
) -> tuple[dict[str, Any], list[Finding]]:
    """Facts for the report, and findings. published: number of images as published, None: unknown. training: as of
    `find_mistakes`."""
    labels = files.labels if files.labels is not None else {}
    samples = files.with_images()
    scan = scan_files(name, samples, table, cache)
    findings = [*check_pairs(files), *check_count(name, files, dataset, published)]
    findings += [Finding("error", "lost labels", text) for text in files.lost]
    for kind, texts in scan.bad.items():
        findings.append(Finding("error", kind, first_of(texts)))
    mistakes = find_mistakes(scan.histogram, table, dataset.expected, len(samples), scan.unknown, training)
    if "unknown ids" in {finding.kind for finding in mistakes}:
        scan.bad["unknown ids"] = scan.unknown
    findings += mistakes
    findings += check_instances(samples, table, dataset)
    if scan.tags:
        findings.append(Finding("note", "exif", describe_turns(scan.tags, samples)))
    strange = {mode: count for mode, count in scan.modes.items() if mode != "RGB" and not mode.startswith(CHOSEN)}
    if strange:
        listed = ", ".join(f"{count} of mode {mode}" for mode, count in strange.items())
        findings.append(Finding("note", "modes", f"images that are not RGB are converted to RGB: {listed}"))
    facts = {
        "images": len(files.images), "labels": None if files.labels is None else len(labels),
        "instances": len(files.instances), "published": published, "image_modes": dict(scan.modes),
        "sizes": [{"height": h, "width": w, "pictures": count} for (h, w), count in scan.sizes.most_common(20)],
        "label_values": {int(value): int(scan.histogram[value]) for value in np.flatnonzero(scan.histogram)},
        "class_pixels": dict(zip(table.names, counts_by_class(scan.histogram, table).tolist(), strict=True)),
        "bad_files": {kind: list(texts) for kind, texts in scan.bad.items()},
    }  # fmt: skip
    return facts, findings


def check_pairs(files: SplitFiles) -> list[Finding]:
    """Images without labels and the reverse, and labels without instance maps, if there are any."""
    if files.labels is None:
        return []
    findings = []
    for what, other, here, there in (
        ("image", "label", files.images, files.labels), ("label", "image", files.labels, files.images),
    ):  # fmt: skip
        alone = sorted(set(here) - set(there))
        if alone:
            some = listing(here[key] for key in alone)
            findings.append(Finding("error", "pairs", f"{len(alone)} {what}s have no {other}: {some}"))
    without = sorted(set(files.labels) - set(files.instances)) if files.instances else []
    if without:
        some = listing(files.labels[key] for key in without)
        findings.append(
            Finding("error", "instances", f"{len(without)} labels have no instance map (no iIoU then): {some}")
        )
    return findings


def listing(paths: Iterable[Path]) -> str:
    return ", ".join(str(path) for path in itertools.islice(paths, LISTED))


def check_count(name: str, files: SplitFiles, dataset: DatasetSpec, published: int | None) -> list[Finding]:
    if published is None or published == len(files.images):
        return []
    severity = "error" if name == dataset.scored and files.labels is not None else "note"
    return [Finding(severity, "count", f"{len(files.images)} images, published are {published}")]


def scan_files(name: str, samples: list[Sample], table: LabelTable, cache: Path) -> Scan:
    """Read every file of the samples to its end; files that have not changed since the last time are not read again."""
    seen = FileFacts(cache, samples)
    scan = Scan(Counter(), Counter(), np.zeros(256, np.int64), {}, [], seen.tags)
    progress = Progress(f"checking {name}", len(samples))

    def examine(sample: Sample) -> tuple[tuple[int, int], np.ndarray | None, str] | Finding:
        try:
            if sample.channels is not None:
                return *seen.sample(sample), f"{CHOSEN} {list(sample.channels)}"
            return *seen.sample(sample), seen.fact(sample.image, "mode", mode_of, lambda value: isinstance(value, str))
        except DataError as error:
            return explain_error(sample, error, table, seen)

    for done, (sample, result) in enumerate(
        zip(samples, threaded_map(examine, samples, at_once=portion(len(samples))), strict=True), 1
    ):
        if isinstance(result, Finding):
            scan.bad.setdefault(result.kind, []).append(result.text)
        else:
            size, values, mode = result
            scan.sizes[size] += 1
            scan.modes[mode] += 1
            if values is not None:
                scan.histogram[:] += values
                if values[~table.known].any() and sample.label is not None:
                    scan.unknown.append(str(table.unknown_ids(values, sample.label)))
        progress.show(done)
    seen.save()
    return scan


def mode_of(path: Path) -> str:
    """Pillow's name of an image's pixel format."""
    return read_header(path)[2]


def explain_error(sample: Sample, error: DataError, table: LabelTable, seen: FileFacts) -> Finding:
    """The finding about a faulty file, with the cause of the error where it can be recognised."""
    if isinstance(error, OrientationError):
        return Finding("error", "exif", str(error))
    try:
        assert sample.label is not None
        (height, width), label = seen.image_size(sample), seen.size(sample.label)
        if label == (width, height) and height != width and sample.image not in seen.tags:
            return Finding("error", "swapped size", f"{error} (height and width are swapped: the label was written "
                                                    "transposed, or only one of the two was rotated)")  # fmt: skip
        if label == (height, width):
            mode = mode_of(sample.label)
            if mode in ("RGB", "RGBA"):
                return Finding("error", "colours", explain_colours(sample.label, table))
            if mode.startswith("I"):
                return Finding("error", "16 bits", str(error))
        return Finding("error", "sizes", str(error))
    except (DataError, AssertionError, OSError):
        return Finding("error", "unreadable", str(error))


def explain_colours(path: Path, table: LabelTable) -> str:
    """What is wrong with a colour image in place of a label image."""
    shown = {tuple(color) for color in np.unique(read_image(path).reshape(-1, 3), axis=0).tolist()}
    known = {tuple(row["color"]) for row in table.rows}
    remedy = "give images with one class id per pixel (Cityscapes: *_labelIds.png, KITTI: semantic/)"
    if shown <= known and len(known) == len(table.rows):
        return f"{path} shows the classes' colours: dataset=folder reads them with dataset.format=colors, or {remedy}"
    if shown <= known:
        return f"{path} shows the classes' colours, which are not unique: {remedy}"
    if len(shown) > 256:
        return (
            f"{path} has {len(shown)} colours: it was interpolated or compressed with loss, labels are lost at "
            f"every edge; {remedy}, resized with the nearest pixel"
        )
    return f"{path} has {len(shown)} colours, {len(shown & known)} of them in {table.source}: {remedy}"


def check_instances(samples: list[Sample], table: LabelTable, dataset: DatasetSpec) -> list[Finding]:
    """Whether the instance maps, decoded as the dataset's rules say, agree with the labels."""
    divisor, single = dataset.rules.divisor, dataset.rules.single
    with_both = [sample for sample in samples if sample.instances is not None and sample.label is not None]
    if divisor is None or single is None or not with_both:
        return []
    agreeing = {1000: 0, 256: 0}
    total = 0
    for sample in with_both[:: max(1, -(-len(with_both) // INSTANCES_READ))]:
        assert sample.instances is not None and sample.label is not None
        try:
            values, ids = (
                read_instances(sample.instances).astype(np.int64),
                table.to_ids(read_label(sample.label, sample.replaced)),
            )
        except DataError as error:
            if str(sample.instances) in str(error):  # errors in labels are findings already
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
            "Take the maps that came with this dataset",
        )]  # fmt: skip
    return []
