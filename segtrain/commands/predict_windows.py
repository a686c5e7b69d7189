"""`segtrain predict` for images larger than memory: TIFF files, read and written row by row of tiles."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.commands.predict_outputs import EVERY, draw_output, is_finished, made_by, output_place
from segtrain.config import PredictConfig
from segtrain.console import Progress, say
from segtrain.data import tiff_writer
from segtrain.data.images import MOST_PIXELS
from segtrain.data.inputs import Input
from segtrain.data.orientation import AS_STORED
from segtrain.data.tiff_windows import REWRITE, Stored, TiffWindows, stored_form
from segtrain.device import main_memory
from segtrain.engine.planning.automatic import advising
from segtrain.errors import DataError, UsageError
from segtrain.scoring.predictor import Predictor, naming_image
from segtrain.scoring.row_stream import predict_rows

SHARE = 4  # of memory, which a decoded image and what is made of it need
WHOLE_COLOURS = ("color", "overlay")  # outputs with three channels


class Limit(NamedTuple):
    """Decoded bytes up to which an image is predicted in memory, and where the number comes from."""

    size: float
    why: str

    def exceeded_by(self, form: Stored) -> str:
        """What the image has, and the limit that it is above; "" for one that fits."""
        size = f"{form.size / 1e9:.3g} GB" if form.height == 0 else str(form)
        if form.size > self.size:
            return f"{size}, above {self.why}"
        return f"{size}, above {MOST_PIXELS} pixels" if form.height * form.width > MOST_PIXELS else ""


def memory_limit(option: float | None) -> Limit:
    """The limit that in_memory= gives, or a quarter of the memory; no limit where the system does not say."""
    if option is not None:
        return Limit(option * 1e9, f"in_memory={option:g} GB")
    found = main_memory()
    if found is None:
        return Limit(float("inf"), "in_memory=null, on a system that does not say how much memory it has")
    return Limit(found / SHARE, f"{found / SHARE / 1e9:.3g} GB, a quarter of the memory (in_memory=null)")


def large_images(inputs: Sequence[Input], limit: Limit) -> list[int]:
    """The numbers of the TIFF files that are read in windows, by their headers. It prints them."""
    found = []
    for number, one in enumerate(inputs):
        is_named_so = one.frame is None and one.path.suffix.lower() in (".tif", ".tiff")
        form = stored_form(one.path) if is_named_so else None
        above = limit.exceeded_by(form) if form is not None and form.is_tiff else ""
        if above:
            say(f"windows     {one}: {above}: by rows of tiles, into tiled TIFF files")
            found.append(number)
    return found


def require_fitting(path: Path, limit: Limit) -> None:
    """DataError for an image that is too large for memory, by its header, before it is decoded."""
    form = stored_form(path)
    above = "" if form is None else limit.exceeded_by(form)
    if form is None or not above:
        return
    if form.is_tiff:
        remedy = f"rename it to {path.stem}.tif, which is read in windows"
    elif form.height == 0:
        remedy = "write it as a tiled TIFF, which is read in windows"
    else:
        remedy = f"write it as a tiled TIFF, which is read in windows, by `{REWRITE.format(path.name)}`"
    raise DataError(f"{path} has {above}, and only TIFF files can be read in part: {remedy}")


def require_windows(config: PredictConfig, first: Input) -> None:
    """UsageError for options that an image in windows cannot have, before anything is predicted."""
    for key, value, wrong, remedy in (
        ("inference.tile", "null", config.inference.tile is None, "give inference=tiled, or inference.tile=[H,W]"),
        ("inference.longest_side", config.inference.longest_side, config.inference.longest_side is not None,
         "it needs the whole image; give inference.scales= instead"),
        ("outputs", EVERY, EVERY in config.outputs, "they take more than the image; give prob, or smaller images"),
    ):  # fmt: skip
        if wrong:
            raise UsageError(f"{key}={value} is not possible for {first}, which is larger than in_memory=: {remedy}")


def predict_large(
    inputs: Sequence[Input], predictor: Predictor, config: PredictConfig, output: Path
) -> tuple[int, list[str], Counter[int]]:
    """Predict these images. Returns how many were, what could not be read, and the EXIF tags found."""
    done, errors, tags = 0, list[str](), Counter[int]()
    for one in inputs:
        try:
            with TiffWindows(one.path, predictor.channels, predictor.value_range) as image:
                predict_one(one, image, predictor, config, output)
                tags.update([image.tag] if image.tag != AS_STORED else [])
                done += 1
        except DataError as error:
            errors.append(str(error))
    return done, errors, tags


def predict_one(one: Input, image: TiffWindows, predictor: Predictor, config: PredictConfig, output: Path) -> None:
    """Write all outputs of one image, a row of TIFF tiles at a time, and go on where a killed process has stopped."""
    height, width = image.size
    predictor.require_channels(image.window(0, 1, 0, 1).shape[2])
    made, options = common_to_rows(one, predictor, config), config.inference
    assert options.tile is not None
    with ExitStack() as stack:
        writers = {}
        for kind in config.outputs:
            if is_finished(one, output, [kind], is_large=True):  # a process was killed between this one and the next
                continue
            samples = 3 if kind in WHOLE_COLOURS else 1
            palette = predictor.table.colors if kind == "palette" else None
            place = output_place(one, output, kind, is_large=True)
            writer = tiff_writer.TiledWriter(place, image.size, samples, made, palette, image.geography)
            writers[kind] = stack.enter_context(writer)
        start = 0 if config.overwrite else min(writer.rows for writer in writers.values())
        for writer in writers.values():
            writer.back_to(start)
        if start:
            say(f"resumed     {one}: {start} of its {height} rows are written")
        rows = predict_rows(
            predictor.networks(options), image, options, predictor.device, tiff_writer.TILE, start,
            "prob" in config.outputs, predictor.mapping,
        )  # fmt: skip
        progress = Progress(f"rows of {one.path.name}", height)
        answering = advising(predictor.options, predictor.table.num_classes, options, predictor.device)
        with answering, naming_image(f"{one}, in rows of tiles", (min(height, options.tile[0]), width)):
            for (top, bottom), found in rows:
                pixels = image.band(top, bottom) if "overlay" in writers else np.empty(0)
                for kind, writer in writers.items():
                    writer.write(draw_output(kind, pixels, found, predictor.table))
                progress.show(bottom)
        for writer in writers.values():
            writer.finish()


def common_to_rows(one: Input, predictor: Predictor, config: PredictConfig) -> dict[str, Any]:
    """What rows of an unfinished image must have in common with those that follow."""
    stat = one.path.stat()
    file = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
    return {**made_by(config, predictor), "checkpoint": "", "image": file}
