"""Check all files before the first step, so that a bad file stops the training now and not after nine hours.

Every file is read to its end and decoded (of a JPEG the end mark tells enough), image and label sizes are compared, and
the ids in the label images are looked up in the class table. What is found is saved, so that a second start only reads
what has changed.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from segtrain.data.labels import LabelTable
from segtrain.data.orientation import AS_STORED, describe_tags
from segtrain.data.sample import Sample
from segtrain.data.verify.file_facts import FileFacts
from segtrain.data.verify.label_mistakes import NOTHING_KNOWN, Expected, Finding, find_mistakes
from segtrain.data.verify.whole_answers import Answer, save_answer, saved_answer, state_of_files
from segtrain.errors import DataError
from segtrain.threads import portion, threaded_map

LABELS_READ = 5000  # number of label images whose ids are looked up; the others are checked when they are read
ERRORS_SHOWN = 5


def check_samples(
    samples: list[Sample],
    table: LabelTable,
    cache_folder: Path,
    say: Callable[[str], None],
    expected: Expected = NOTHING_KNOWN,
    training: bool = True,
) -> tuple[int, int]:
    """Largest height and width of the images. DataError lists the faulty files, the first few of them in full, or
    names the mistake if the label images do not hold what the table says. training: as of `find_mistakes`."""
    every = max(1, -(-len(samples) // LABELS_READ))
    if every > 1:
        say(f"checking the files of {len(samples)} samples, the label ids of every {every}th")
    answer = saved_answer(cache_folder, samples, every)
    if answer is not None and not answer.histogram[~table.known].any():
        if answer.turns:
            say(answer.turns)
        refuse(find_mistakes(answer.histogram, table, expected, len(samples), [], training), [], len(samples), say)
        return answer.largest
    seen = FileFacts(cache_folder, samples)
    errors: list[str] = []
    unknown: list[str] = []
    sizes: set[tuple[int, int]] = set()
    histogram, unknown_values = np.zeros(256, np.int64), ~table.known
    started = shown = time.monotonic()

    def examine(item: tuple[int, Sample]) -> tuple[tuple[int, int], np.ndarray | None] | DataError:
        number, sample = item
        try:
            return seen.sample(sample, read_labels=number % every == 0)
        except DataError as error:
            return error

    for number, result in enumerate(threaded_map(examine, enumerate(samples), at_once=portion(len(samples))), 1):
        if isinstance(result, DataError):
            errors.append(str(result))
        else:
            sizes.add(result[0])
            if result[1] is not None:
                histogram += result[1]
                sample = samples[number - 1]
                if result[1][unknown_values].any() and sample.label is not None:
                    unknown.append(str(table.unknown_ids(result[1], sample.label)))
                    errors.append(unknown[-1])
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            left = (shown - started) * (len(samples) - number) / number
            say(f"checking files: {number} of {len(samples)}, about {left:.0f} s left")
    seen.save()
    turns = f"exif       {describe_turns(seen.tags, samples)}" if seen.tags else ""
    if turns:
        say(turns)
    largest = max((h for h, _ in sizes), default=0), max((w for _, w in sizes), default=0)
    if not errors:
        save_answer(cache_folder, state_of_files(samples, every, seen.stamp), Answer(largest, histogram, turns))
    refuse(find_mistakes(histogram, table, expected, len(samples), unknown, training), errors, len(samples), say)
    return largest


def refuse(findings: list[Finding], errors: list[str], samples: int, say: Callable[[str], None]) -> None:
    """Print what is worth a warning; DataError for a mistake, or for faulty files. errors: one for each of them."""
    for finding in findings:
        if (finding.severity, finding.kind) == ("note", "one class"):
            say(f"WARNING    {finding.text}")
    mistakes = [finding for finding in findings if finding.severity == "error"]
    if mistakes and mistakes[0].kind != "unknown ids":
        raise DataError(mistakes[0].text)
    if errors:
        left = len(errors) - ERRORS_SHOWN
        more = f"\n... and {left} more: segtrain check lists them in report.json" if left > 0 else ""
        heading = "" if len(errors) == 1 else f"{len(errors)} of {samples} samples cannot be used:\n"
        raise DataError(heading + "\n".join(errors[:ERRORS_SHOWN]) + more)


def content_hashes(samples: Sequence[Sample], folder: Path) -> list[int]:
    """The first 64 bits, as a signed number, of the hash of each image file: the same for a copy under another name.

    What was hashed before is taken from the cache `folder`. DataError for a file that cannot be read.
    """
    seen = FileFacts(folder, samples)
    digits = list(threaded_map(seen.content, (sample.image for sample in samples)))
    seen.save()
    return [int.from_bytes(bytes.fromhex(one)[:8], "big", signed=True) for one in digits]


def describe_turns(tags: dict[Path, tuple[int, int]], samples: list[Sample]) -> str:
    """What is done with images that have an EXIF orientation, in words. tags: as of `FileFacts`."""
    rules = sorted({sample.exif for sample in samples})
    applied = sum(turn != AS_STORED for _, turn in tags.values())
    counts = describe_tags(Counter(tag for tag, _ in tags.values()))
    return (
        f"{len(tags)} of {len(samples)} images have an orientation: {counts}; {applied} turned by it, "
        f"{len(tags) - applied} left as stored (dataset.exif={'/'.join(rules)})"
    )
