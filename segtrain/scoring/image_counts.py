"""Which classes were predicted where which were labelled, image by image: the content of images.npz.

The counts are sparse, because an image shows few classes: about 14 bytes for each pair of classes that occurs in it.
"""

import io
import json
import zipfile
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.data.rules import Rules
from segtrain.distributed.group import all_gather_values
from segtrain.errors import DataError
from segtrain.files import write_atomically

FILE = "images.npz"
FORMAT = 1


class ImageConfusions(NamedTuple):
    """The confusion matrices of a split's images, as entries that are not 0.

    names: of the N images, in the order of the split. identities: the same for the same image, wherever it was read
    from. classes: names of the C classes. sizes: int32 (N, 2), height and width. image: int32 (E,), number of the image
    of an entry, ascending. truth, prediction: int16 (E,), train ids; prediction C is anything outside the classes.
    pixels: int64 (E,). about: dataset, split, and the rules of averaging (source, absent_classes,
    ignored_predictions) as in `Rules`.
    """

    names: list[str]
    identities: list[str]
    classes: list[str]
    sizes: np.ndarray
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    pixels: np.ndarray
    about: dict[str, str]

    def evaluated(self) -> "ImageConfusions":
        """The same after the rule for predictions outside the classes."""
        if self.about["ignored_predictions"] != "dropped":
            return self
        kept = self.prediction < len(self.classes)
        return self._replace(
            image=self.image[kept], truth=self.truth[kept], prediction=self.prediction[kept], pixels=self.pixels[kept]
        )

    def confusion(self) -> np.ndarray:
        """int64 (C, C + 1), ground truth x prediction, over all images."""
        result = np.zeros((len(self.classes), len(self.classes) + 1), np.int64)
        np.add.at(result, (self.truth, self.prediction), self.pixels)
        return result

    def keys(self) -> list[str]:
        """A name of each image that is another for another image: its identity, unless several have the same."""
        return self.identities if len(set(self.identities)) == len(self.identities) else self.names

    def labelled(self) -> np.ndarray:
        """int64 (N, C): labelled pixels of each image and class."""
        return self.summed(self.truth)

    def parts(self) -> np.ndarray:
        """int64 (3, N, C): hits, labelled and predicted pixels of each image and class, from which all IoU follow."""
        inside = self.prediction < len(self.classes)
        hits = self.truth == self.prediction
        predicted = np.minimum(self.prediction, len(self.classes) - 1)
        return np.stack([self.summed(self.truth, hits), self.labelled(), self.summed(predicted, inside)])

    def summed(self, classes: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        result = np.zeros((len(self.names), len(self.classes)), np.int64)
        kept = slice(None) if where is None else where
        np.add.at(result, (self.image[kept], classes[kept]), self.pixels[kept])
        return result

    def of_image(self, number: int) -> np.ndarray:
        """int64 (C, C + 1): the confusion matrix of one image."""
        first, last = np.searchsorted(self.image, [number, number + 1])
        result = np.zeros((len(self.classes), len(self.classes) + 1), np.int64)
        result[self.truth[first:last], self.prediction[first:last]] = self.pixels[first:last]
        return result

    def write(self, folder: Path) -> Path:
        """Write images.npz, the same bytes for the same content."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: value for name, value in self._asdict().items() if name != "about"}
        arrays = {
            name: value if isinstance(value, np.ndarray) else packed_text(value) for name, value in arrays.items()
        }
        about = json.dumps(self.about | {"format": FORMAT}, sort_keys=True)
        np.savez_compressed(buffer, about=packed_text([about]), **arrays)
        write_atomically(folder / FILE, buffer.getvalue())
        return folder / FILE


def packed_text(values: list[str]) -> np.ndarray:
    """Text as UTF-8 bytes, a NUL after each: numpy would make every name as long as the longest."""
    return np.frombuffer("".join(f"{value}\0" for value in values).encode("utf-8", "surrogatepass"), np.uint8)


def unpacked_text(values: np.ndarray) -> list[str]:
    return values.tobytes().decode("utf-8", "surrogatepass").split("\0")[:-1]


def read_image_counts(path: Path) -> ImageConfusions:
    """Read an images.npz. DataError for a file that is missing, damaged, or of a version to come."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        about = json.loads(unpacked_text(found.pop("about"))[0])
        if about.pop("format") != FORMAT:
            raise DataError(f"{path} was written by a newer version of segtrain: evaluate again with this one")
        names, identities, classes = (unpacked_text(found.pop(key)) for key in ("names", "identities", "classes"))
        made = ImageConfusions(names, identities, classes, about=about, **found)
        require_sound(made)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: the evaluation is of an older version; `segtrain evaluate` writes it"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): `segtrain evaluate` writes it again") from error
    return made


def require_sound(made: ImageConfusions) -> None:
    """ValueError unless the arrays fit each other."""
    images, classes = len(made.names), len(made.classes)
    entries = [made.image, made.truth, made.prediction, made.pixels]
    shapes = {made.sizes.shape == (images, 2), len(made.identities) == images, len(made.image.shape) == 1}
    shapes |= {array.shape == made.image.shape for array in entries}
    shapes |= {array.dtype.kind == "i" for array in [made.sizes, *entries]}
    for values, limit in ((made.image, images), (made.truth, classes), (made.prediction, classes + 1)):
        shapes.add(not len(values) or (values.min() >= 0 and values.max() < limit))
    shapes |= {bool((made.pixels > 0).all()), bool((np.diff(made.image) >= 0).all())}
    shapes.add(made.about.keys() >= {"dataset", "split", "source", "absent_classes", "ignored_predictions"})
    if False in shapes:
        raise ValueError("its arrays contradict each other")


class ImageCounts:
    """Collects the entries of images as they are counted. Processes count different images; `all_gather` joins them."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.names: list[str] = []
        self.sizes = array("i")
        self.entries = array("i")  # of each image
        self.cells = array("i")  # truth * (C + 1) + prediction
        self.pixels = array("q")

    def add(self, name: str, size: tuple[int, ...], pixels: np.ndarray, class_of: np.ndarray) -> None:
        """Note one image. size: height and width. pixels: int64 (256, 256), label id x predicted id; class_of: id ->
        train id, uint8 (256,)."""
        there = np.flatnonzero(pixels)
        truth, prediction = (np.minimum(class_of[ids], self.classes) for ids in (there >> 8, there & 255))
        evaluated = truth < self.classes
        cells = (truth.astype(np.int64) * (self.classes + 1) + prediction)[evaluated]
        unique, place = np.unique(cells, return_inverse=True)
        counts = np.zeros(len(unique), np.int64)
        np.add.at(counts, place, pixels.ravel()[there[evaluated]])
        self.names.append(name)
        self.sizes.extend(size)
        self.entries.append(len(unique))
        self.cells.extend(unique.tolist())
        self.pixels.extend(counts.tolist())

    def all_gather(self) -> None:
        """Join the images of all processes of this command. A collective call."""
        mine = self.names, self.sizes, self.entries, self.cells, self.pixels
        parts = all_gather_values(mine)
        self.names = [name for part in parts for name in part[0]]
        for number, name in enumerate(("sizes", "entries", "cells", "pixels"), 1):
            joined = array(parts[0][number].typecode)
            for part in parts:
                joined.extend(part[number])
            setattr(self, name, joined)

    def in_order(
        self, names: Iterable[str], identities: list[str], classes: list[str], rules: Rules, of: Mapping[str, str]
    ) -> ImageConfusions:
        """The images in the order of `names`, those of the split. of: dataset and split. DataError unless each was
        counted once."""
        place = {name: number for number, name in enumerate(self.names)}
        names = list(names)
        if len(place) != len(self.names) or sorted(place) != sorted(names):
            raise DataError(f"{len(self.names)} images were counted, not the {len(names)} of the split: this is a bug")
        order = np.array([place[name] for name in names], np.int64)
        entries = np.array(self.entries, np.int64)
        starts = np.cumsum(entries) - entries
        image = np.repeat(np.arange(len(names)), entries[order])
        within = np.arange(len(image)) - np.repeat(np.cumsum(entries[order]) - entries[order], entries[order])
        chosen = np.repeat(starts[order], entries[order]) + within
        cells = np.array(self.cells, np.int64)[chosen]
        about = {**of, "source": rules.source, "absent_classes": rules.absent,
                 "ignored_predictions": rules.ignored_prediction}  # fmt: skip
        return ImageConfusions(
            names, identities, list(classes), np.array(self.sizes, np.int32).reshape(-1, 2)[order],
            image.astype(np.int32), (cells // (self.classes + 1)).astype(np.int16),
            (cells % (self.classes + 1)).astype(np.int16), np.array(self.pixels, np.int64)[chosen], about,
        )  # fmt: skip
