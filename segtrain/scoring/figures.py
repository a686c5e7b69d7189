"""Labels, predictions and confusion matrices drawn as images, and the PNG files of them."""

import io
import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segtrain.data.labels import LabelTable
from segtrain.files import write_atomically

GAP = 4  # pixels between the parts of a panel
RUNS_ONLY = 3  # zlib's Z_RLE
OFF_DIAGONAL = 0.05  # fraction of a class's pixels from which a confusion is worth a figure


def write_png(path: Path, pixels: np.ndarray, palette: np.ndarray | None = None, quick: bool = False) -> None:
    """Write uint8 (H, W) or RGB uint8 (H, W, 3) as PNG, creating the folder if it is missing.

    palette: RGB uint8 (n, 3), colours of the values 0 to n - 1 of an (H, W) image, which is written in mode P. quick:
    for photographs and their labels, in a fraction of the time; drawings with text become larger.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())  # r, g, b of 0, r, g, b of 1, ...
    # zlib's strategy Z_RLE looks for runs only, and for no repetition further back: photographs have none.
    fast = {"compress_level": 1, "compress_type": RUNS_ONLY} if quick else {}
    image.save(buffer, "PNG", **fast)
    write_atomically(path, buffer.getvalue())


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) as RGB (H, W, 3): its first three channels, or the first as grey where there are fewer."""
    if image.shape[2] == 3:
        return image
    return np.ascontiguousarray(image[..., :3] if image.shape[2] > 3 else np.repeat(image[..., :1], 3, axis=2))


def overlay(image: np.ndarray, train_ids: np.ndarray, table: LabelTable, opacity: float = 0.5) -> np.ndarray:
    """The image with its classes' colours laid over it: uint8 (H, W, 3)."""
    return np.asarray(cv2.addWeighted(table.colorize(train_ids), opacity, as_rgb(image), 1 - opacity, 0))


def triple(
    image: np.ndarray, target: np.ndarray, prediction: np.ndarray, table: LabelTable, height: int = 256
) -> np.ndarray:
    """image | target | prediction side by side, `height` pixels high; where there is no label, the prediction is grey.

    image: RGB uint8 (H, W, 3). target, prediction: train ids uint8 (H, W).
    """
    colored = table.colorize(prediction)
    unlabelled = target >= table.num_classes
    colored[unlabelled] = colored[unlabelled] // 3 + 60
    return beside(image, table.colorize(target), colored, height)


def beside(image: np.ndarray, first: np.ndarray, second: np.ndarray, height: int = 256) -> np.ndarray:
    """An image and two label images, RGB uint8 of one size, side by side, `height` pixels high."""
    size = (max(1, round(image.shape[1] * height / image.shape[0])), height)
    parts = [
        cv2.resize(as_rgb(image), size, interpolation=cv2.INTER_AREA),
        cv2.resize(first, size, interpolation=cv2.INTER_NEAREST_EXACT),
        cv2.resize(second, size, interpolation=cv2.INTER_NEAREST_EXACT),
    ]
    gap = np.full((height, GAP, 3), 255, np.uint8)
    return np.concatenate([parts[0], gap, parts[1], gap, parts[2]], axis=1)


def sheet(rows: list[np.ndarray], table: LabelTable) -> np.ndarray:
    """Panels below each other, with a legend of the classes at the foot."""
    width = max(row.shape[1] for row in rows)
    padded = []
    for row in [*rows, legend(table, width)]:
        full = np.full((row.shape[0] + GAP, width, 3), 255, np.uint8)
        full[: row.shape[0], : row.shape[1]] = row
        padded.append(full)
    return np.concatenate(padded)


def legend(table: LabelTable, width: int, texts: list[str] | None = None) -> np.ndarray:
    """Colour patches with the classes' names, or other texts, `width` pixels wide."""
    cell, height = 150 if texts is None else 200, 22
    columns = max(1, width // cell)
    canvas = np.full((height * math.ceil(table.num_classes / columns), width, 3), 255, np.uint8)
    for i, (name, color) in enumerate(zip(texts or table.names, table.colors, strict=True)):
        top, left = height * (i // columns), cell * (i % columns)
        canvas[top + 3 : top + height - 3, left + 3 : left + 21] = color
        write(canvas, name[: cell // 8], (left + 26, top + 16))
    return canvas


def confusion(matrix: np.ndarray, table: LabelTable) -> np.ndarray:
    """Draw a confusion matrix (C, C + 1) in percent of each row's pixels: RGB uint8 (H, W, 3), dark for high fractions.

    Rows: ground truth. Columns: prediction; the last one is anything outside the classes. Classes without a label
    are grey. Figures stand on the diagonal, and off it from OFF_DIAGONAL on.
    """
    classes = table.num_classes
    cell = max(4, min(28, 1400 // classes))
    named = cell >= 12
    left = 150 if named else 4
    labelled = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, labelled, out=np.zeros(matrix.shape), where=labelled > 0)
    tint = np.stack([255 - 225 * share, 255 - 175 * share, 255 - 95 * share], -1).astype(np.uint8)
    tint[labelled[:, 0] == 0] = 225
    cells = tint.repeat(cell, 0).repeat(cell, 1)
    if named:
        for row, column in np.argwhere(share >= 0.005) if cell >= 20 else ():
            value = share[row, column]
            if row == column or value >= OFF_DIAGONAL:
                color = (255, 255, 255) if value > 0.5 else (0, 0, 0)
                write(cells, f"{100 * value:.0f}", (column * cell + 2, row * cell + cell // 2 + 4), 0.35, color)
        rows = np.full((cells.shape[0], left, 3), 255, np.uint8)
        columns = np.full((left, cells.shape[1], 3), 255, np.uint8)
        for index, name in enumerate([*table.names, "(other)"]):
            if index < classes:
                write(rows, name[:18], (4, index * cell + cell // 2 + 4))
            strip = np.full((cell, left, 3), 255, np.uint8)
            write(strip, name[:18], (0, cell // 2 + 4))
            columns[:, index * cell : (index + 1) * cell] = np.rot90(strip, -1)
        corner = np.full((left, left, 3), 255, np.uint8)
        cells = np.concatenate([np.concatenate([rows, cells], 1), np.concatenate([corner, columns], 1)])
    return explained_matrix(np.pad(cells, ((4, 4), (4, 4), (0, 0)), constant_values=255), named)


def explained_matrix(drawn: np.ndarray, named: bool) -> np.ndarray:
    """The drawing of a confusion matrix, RGB uint8 (H, W, 3), between what its axes and colours mean."""
    above = ["rows: ground truth; columns: prediction", "figures and colours: % of the row's labelled pixels"]
    below = ["(other), the last column:", "predicted as an id outside the classes", "grey rows: not labelled"]
    if not named:
        above.append("both in the order of the classes in evaluation.json")
    width = max(drawn.shape[1], max(7 * len(line) + 10 for line in [*above, *below]))
    drawn = np.pad(drawn, ((0, 0), (0, width - drawn.shape[1]), (0, 0)), constant_values=255)
    blocks = [np.full((16 * len(lines) + 8, width, 3), 255, np.uint8) for lines in (above, below)]
    for block, lines in zip(blocks, (above, below), strict=True):
        for number, line in enumerate(lines):
            write(block, line, (6, 16 * number + 15))
    return np.concatenate([blocks[0], drawn, blocks[1]])


def write(
    canvas: np.ndarray, text: str, place: tuple[int, int], size: float = 0.4, color: tuple[int, int, int] = (0, 0, 0)
) -> None:
    """Write text into RGB uint8 (H, W, 3), its baseline beginning at (x, y). The font has ASCII only."""
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, plain, place, cv2.FONT_HERSHEY_SIMPLEX, size, color, 1, cv2.LINE_AA)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """uint8 (h, w, 3) with a line of text below."""
    line = np.full((18, image.shape[1], 3), 255, np.uint8)
    write(line, text[: image.shape[1] // 7], (2, 13))
    return np.concatenate([image, line])


def grid(panels: list[np.ndarray], columns: int = 6) -> np.ndarray:
    """Panels of one size in rows of `columns`."""
    blank = np.full_like(panels[0], 255)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = min(columns, len(panels))
    return np.concatenate([np.concatenate(row + [blank] * (width - len(row)), axis=1) for row in rows])
