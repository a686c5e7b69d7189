"""Images of one split that another split has too, as the same file, or encoded or resized anew."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.console import Progress
from segtrain.data.images import opened
from segtrain.data.sample import Sample
from segtrain.data.verify.file_facts import FileFacts
from segtrain.data.verify.label_mistakes import Finding
from segtrain.errors import DataError
from segtrain.threads import portion, threaded_map

SIDE = 16  # cells of a thumbnail, in each direction
NEAR = 2.5  # root mean square difference [grey levels] below which two thumbnails are of one image
PLAIN = 6.0  # standard deviation [grey levels] below which a thumbnail says too little
LISTED = 5
BLOCK = 4096  # thumbnails that are compared at once


def find_leakage(splits: Mapping[str, Mapping[str, Path]], cache: Path, progress: bool = True) -> list[Finding]:
    """Compare the images of the first split, which is trained on, with those of the others.

    splits: name -> the images by name. The same content in two files is an error. The same file in two splits is a
    note, because the configuration says so. Thumbnails that are nearly equal, as after encoding or resizing an image
    again, are a note, because images of a video may be as alike.
    """
    (first, trained), *others = splits.items()
    if not others or not trained:
        return []
    known = facts_of(first, trained, cache, progress)
    by_content: dict[str, Path] = {content: path for path, (content, _) in known.items()}
    findings = []
    for name, images in others:
        found = facts_of(name, images, cache, progress)
        shared = found.keys() & known.keys()
        if shared:
            text = f"{len(shared)} of the {len(images)} images of {name} are the same files as in {first}"
            findings.append(Finding("note", "leakage", f"{text}: their score says nothing about other images"))
        new = {path: facts for path, facts in found.items() if path not in shared}
        same = [(path, by_content[content]) for path, (content, _) in new.items() if content in by_content]
        if same:
            text = f"{len(same)} of the {len(images)} images of {name} are in {first} too, with the same content"
            advice = "remove them from one of the splits: a score on images that were trained on is too high"
            findings.append(Finding("error", "leakage", f"{text}: {list_pairs(same)}; {advice}"))
        rest = {path: new[path] for path in new.keys() - {path for path, _ in same}}
        if near := near_pairs(rest, known):
            text = f"{len(near)} images of {name} are nearly equal to images of {first}, as if encoded or resized anew"
            findings.append(Finding("note", "leakage", f"{text}: {list_pairs(near)}"))
    return findings


def list_pairs(pairs: list[tuple[Path, Path]]) -> str:
    texts = [f"{path} = {other}" for path, other in sorted(pairs)[:LISTED]]
    return ", ".join(texts) + (", ..." if len(pairs) > LISTED else "")


def facts_of(
    name: str, images: Mapping[str, Path], cache: Path, progress: bool
) -> dict[Path, tuple[str, np.ndarray | None]]:  # fmt: skip
    """Path -> hash of its bytes, and its thumbnail; without the images that cannot be read, which are found before."""
    samples = [Sample(key, path, None) for key, path in sorted(images.items())]
    seen = FileFacts(cache, samples)
    line = Progress(f"comparing {name}", len(samples)) if progress else None

    def read(sample: Sample) -> tuple[str, np.ndarray | None] | None:
        try:
            content = seen.content(sample.image)
            digits = seen.fact(sample.image, "thumbnail", thumbnail, is_thumbnail)
        except DataError:
            return None
        return content, np.frombuffer(bytes.fromhex(digits), np.uint8) if digits else None

    result = {}
    for done, (sample, facts) in enumerate(
        zip(samples, threaded_map(read, samples, at_once=portion(len(samples))), strict=True), 1
    ):
        if facts is not None:
            result[sample.image] = facts
        if line is not None:
            line.show(done)
    seen.save()
    return result


def thumbnail(path: Path) -> str:
    """The image in grey, SIDE x SIDE, as hexadecimal digits; "" if it cannot be read or is all of one brightness."""
    try:
        with opened(path) as image:
            image.draft("L", (4 * SIDE, 4 * SIDE))  # a JPEG is decoded at a fraction of its size
            small = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    except DataError:
        return ""
    return small.tobytes().hex() if small.std() >= PLAIN else ""


def is_thumbnail(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(rf"([0-9a-f]{{{2 * SIDE * SIDE}}})?", value))


def near_pairs(
    images: Mapping[Path, tuple[str, np.ndarray | None]], others: Mapping[Path, tuple[str, np.ndarray | None]]
) -> list[tuple[Path, Path]]:
    """(image, the other one that is nearest to it) where their thumbnails are nearly equal."""
    here = [(path, small) for path, (_, small) in images.items() if small is not None]
    there = [(path, small) for path, (_, small) in others.items() if small is not None]
    if not here or not there:
        return []
    first = np.stack([small for _, small in here])
    best, place = np.full(len(here), np.inf), np.zeros(len(here), np.int64)
    for start in range(0, len(there), BLOCK):
        second = np.stack([small for _, small in there[start : start + BLOCK]]).astype(np.float32)
        squares = (second**2).sum(1)
        for row in range(0, len(here), 256):
            some = first[row : row + 256].astype(np.float32)
            distance = (some**2).sum(1)[:, None] + squares - 2 * some @ second.T
            nearest = distance.argmin(1)
            exact = ((some - second[nearest]) ** 2).mean(1)
            nearer = np.flatnonzero(exact < best[row : row + 256])
            best[row + nearer], place[row + nearer] = exact[nearer], start + nearest[nearer]
    return [(here[row][0], there[place[row]][0]) for row in np.flatnonzero(np.sqrt(best) < NEAR)]
