"""What `segtrain predict` is given: an image, a folder, a list, a pattern, or the frames of a video."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from segtrain.data.folders import files_below, matching
from segtrain.data.images import SUFFIXES
from segtrain.errors import DataError, UsageError

LISTS = (".txt", ".lst")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")


class Input(NamedTuple):
    """An image to predict. name: of its outputs, without suffix. frame: its number in the video `path`, from 1."""

    path: Path
    name: str
    frame: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.frame is None else f"{self.path}, frame {self.frame}"


def find_inputs(text: str) -> list[Input]:
    """All images that input=TEXT means, in the order of their names, or of the list or video.

    UsageError if it is nothing that exists, or holds no images; DataError for a video that cannot be read.
    """
    source = Path(text)
    if source.is_dir():
        files = sorted(images_among(list(files_below(source))))
        if not files:
            raise UsageError(f"input={text}: the folder holds no images ({', '.join(SUFFIXES)})")
        return with_names(files, source)
    if source.is_file() and source.suffix.lower() in LISTS:
        return of_a_list(source)
    if source.is_file() and source.suffix.lower() in VIDEOS:
        return [Input(source, f"{source.stem}/{number:06}", number) for number in range(1, count_frames(source) + 1)]
    if source.exists():
        return with_names([source], source.parent)
    if not set(text) & {"*", "?"}:
        raise UsageError(f"input={text}: no such file or folder")
    return matched(text)


def images_among(files: list[Path]) -> list[Path]:
    """The images, or else the arrays of NumPy, which networks of other channels than RGB take."""
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    return found or [path for path in files if path.suffix == ".npy"]


def matched(pattern: str) -> list[Input]:
    """The images that a pattern such as photos/**/*.jpg fits; what is no image of another suffix is left out."""
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if set(part) & {"*", "?"})
    root = Path(*parts[:fixed])
    try:
        found = sorted({path for _, path in matching(root, "/".join(parts[fixed:]))}) if root.is_dir() else []
    except ValueError as error:
        raise UsageError(f"input={pattern}: {error}") from error
    files = images_among(found)
    if not files:
        raise UsageError(f"input={pattern}: it fits no images; quote it, so that the shell leaves it as it is")
    return with_names(files, root)


def of_a_list(source: Path) -> list[Input]:
    """The images of a text file, one path a line, relative to its folder; empty lines and those with # are skipped."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"input={source}: a list of images is UTF-8 text, a path a line: {error}") from error
    wanted = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not wanted:
        raise UsageError(f"input={source}: the list holds no paths: write one a line, relative to {source.parent}")
    files = list(dict.fromkeys(Path(os.path.normpath(source.parent / line)) for line in wanted))
    return with_names(files, Path(os.path.commonpath([path.absolute().parent for path in files])))


def with_names(files: list[Path], root: Path) -> list[Input]:
    """Paths below `root` without the suffix; `a_jpg` and `a_png` where a.jpg and a.png would collide."""
    relative = [path.absolute().relative_to(root.absolute()) for path in files]
    short = [path.with_suffix("").as_posix() for path in relative]
    return [
        Input(path, name if short.count(name) == 1 else f"{name}_{below.suffix[1:]}")
        for path, name, below in zip(files, short, relative, strict=True)
    ]


def opened_video(path: Path) -> cv2.VideoCapture:
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise DataError(f"{path} cannot be read as a video by OpenCV: convert it to an MP4 with H.264")
    return video


def count_frames(path: Path) -> int:
    """How many frames a video has, by reading it: what its header says is often wrong."""
    video, count = opened_video(path), 0
    while video.grab():
        count += 1
    video.release()
    if count == 0:
        raise DataError(f"{path} has no frame that OpenCV can read: convert it to an MP4 with H.264")
    return count


def read_frames(path: Path, wanted: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The frames of these numbers, from 1, in order: RGB uint8 (H, W, 3). DataError if the video ends before."""
    video = opened_video(path)
    try:
        for number in range(1, max(wanted, default=0) + 1):
            if not video.grab():
                raise DataError(f"{path} ends at frame {number - 1}: it has become shorter")
            if number in wanted:
                good, pixels = video.retrieve()
                if not good:
                    raise DataError(f"{path}, frame {number} cannot be decoded")
                yield number, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    finally:
        video.release()
