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


def write_png(path: Path, pixels: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Write uint8 (H, W) or RGB uint8 (H, W, 3) as PNG, creating the folder if it is missing.

    palette: RGB uint8 (n, 3), colours of the values 0 to n - 1 of an (H, W) image, which is written in mode P.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())  # r, g, b of 0, r, g, b of 1, ...
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def overlay(image: np.ndarray, train_ids: np.ndarray, table: LabelTable, opacity: float = 0.5) -> np.ndarray:
    """The image with its classes' colours laid over it: uint8 (H, W, 3)."""
    return np.asarray(cv2.addWeighted(table.colorize(train_ids), opacity, image, 1 - opacity, 0))


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
        cv2.resize(image, size, interpolation=cv2.INTER_AREA),
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
        cv2.putText(
            canvas, name[: cell // 8], (left + 26, top + 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA
        )
    return canvas


def confusion(matrix: np.ndarray, table: LabelTable) -> np.ndarray:
    """Draw a confusion matrix (C, C + 1) as fractions of each row: RGB uint8 (H, W, 3), dark for high fractions.

    Rows: ground truth. Columns: prediction; the last one is anything outside the classes. Classes without a label
    are grey.
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
    canvas = np.full((cells.shape[0] + 4 + left, cells.shape[1] + left + 4, 3), 255, np.uint8)
    canvas[4 : 4 + cells.shape[0], left : left + cells.shape[1]] = cells
    if not named:
        return canvas
    font, black = cv2.FONT_HERSHEY_SIMPLEX, (0, 0, 0)
    for index, name in enumerate([*table.names, "(other)"]):
        middle = index * cell + cell // 2 + 4
        if index < classes:
            cv2.putText(canvas, name[:18], (4, 4 + middle), font, 0.4, black, 1, cv2.LINE_AA)
        strip = np.full((cell, left, 3), 255, np.uint8)
        cv2.putText(strip, name[:18], (0, cell // 2 + 4), font, 0.4, black, 1, cv2.LINE_AA)
        at = left + index * cell
        canvas[cells.shape[0] + 4 :, at : at + cell] = np.rot90(strip, -1)
        if index < classes and share[index, index] >= 0.005 and cell >= 20:
            text = f"{100 * share[index, index]:.0f}"
            white = (255, 255, 255) if share[index, index] > 0.5 else black
            cv2.putText(canvas, text, (at + 2, 4 + middle), font, 0.35, white, 1, cv2.LINE_AA)
    return canvas


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """uint8 (h, w, 3) with a line of text below."""
    line = np.full((18, image.shape[1], 3), 255, np.uint8)
    cv2.putText(line, text[: image.shape[1] // 7], (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([image, line])


def grid(panels: list[np.ndarray], columns: int = 6) -> np.ndarray:
    """Panels of one size in rows of `columns`."""
    blank = np.full_like(panels[0], 255)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = min(columns, len(panels))
    return np.concatenate([np.concatenate(row + [blank] * (width - len(row)), axis=1) for row in rows])
