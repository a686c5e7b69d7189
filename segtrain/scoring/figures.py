"""Label maps and predictions as pictures."""

import io
import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segtrain.data.labels import LabelTable
from segtrain.files import write_atomically

GAP = 4  # pixels between the parts of a panel


def write(path: Path, picture: np.ndarray, palette: np.ndarray | None = None) -> None:
    """A PNG from uint8 (H, W) or (H, W, 3) RGB, in a folder that is made if need be.

    palette: RGB uint8 (n, 3) of the values 0 .. n - 1 of an (H, W) picture, which becomes one of mode P.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if palette is not None:
        image.putpalette(palette.tobytes())  # r, g, b of 0, r, g, b of 1, ...
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def overlay(image: np.ndarray, train_ids: np.ndarray, table: LabelTable, opacity: float = 0.5) -> np.ndarray:
    """The picture with its classes' colours laid over it: uint8 (H, W, 3)."""
    return np.asarray(cv2.addWeighted(table.colorize(train_ids), opacity, image, 1 - opacity, 0))


def triple(
    image: np.ndarray, target: np.ndarray, prediction: np.ndarray, table: LabelTable, height: int = 256
) -> np.ndarray:
    """image | target | prediction side by side, `height` pixels high; the prediction greyed where there is no label."""
    colored = table.colorize(prediction)
    unlabelled = target >= table.num_classes
    colored[unlabelled] = colored[unlabelled] // 3 + 60
    return beside(image, table.colorize(target), colored, height)


def beside(image: np.ndarray, first: np.ndarray, second: np.ndarray, height: int = 256) -> np.ndarray:
    """A picture and two of labels, RGB uint8 of one size, side by side, `height` pixels high."""
    size = (max(1, round(image.shape[1] * height / image.shape[0])), height)
    parts = [
        cv2.resize(image, size, interpolation=cv2.INTER_AREA),
        cv2.resize(first, size, interpolation=cv2.INTER_NEAREST_EXACT),
        cv2.resize(second, size, interpolation=cv2.INTER_NEAREST_EXACT),
    ]
    gap = np.full((height, GAP, 3), 255, np.uint8)
    return np.concatenate([parts[0], gap, parts[1], gap, parts[2]], axis=1)


def sheet(rows: list[np.ndarray], table: LabelTable) -> np.ndarray:
    """Panels below each other, with the classes' colours and names at the foot."""
    width = max(row.shape[1] for row in rows)
    padded = []
    for row in [*rows, legend(table, width)]:
        full = np.full((row.shape[0] + GAP, width, 3), 255, np.uint8)
        full[: row.shape[0], : row.shape[1]] = row
        padded.append(full)
    return np.concatenate(padded)


def legend(table: LabelTable, width: int) -> np.ndarray:
    """Colour patches with class names, `width` pixels wide."""
    cell, height = 150, 22
    columns = max(1, width // cell)
    picture = np.full((height * math.ceil(table.num_classes / columns), width, 3), 255, np.uint8)
    for i, (name, color) in enumerate(zip(table.names, table.colors, strict=True)):
        top, left = height * (i // columns), cell * (i % columns)
        picture[top + 3 : top + height - 3, left + 3 : left + 21] = color
        cv2.putText(picture, name[:18], (left + 26, top + 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def confusion(matrix: np.ndarray, table: LabelTable) -> np.ndarray:
    """A confusion matrix (C, C + 1) as shares of each row: uint8 (H, W, 3), dark where much is. Rows: ground truth;
    columns: prediction, the last one something outside the classes. Classes that were never labelled are grey."""
    classes = table.num_classes
    cell = max(4, min(28, 1400 // classes))
    named = cell >= 12
    left = 150 if named else 4
    labelled = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, labelled, out=np.zeros(matrix.shape), where=labelled > 0)
    tint = np.stack([255 - 225 * share, 255 - 175 * share, 255 - 95 * share], -1).astype(np.uint8)
    tint[labelled[:, 0] == 0] = 225
    grid = tint.repeat(cell, 0).repeat(cell, 1)
    picture = np.full((grid.shape[0] + 4 + left, grid.shape[1] + left + 4, 3), 255, np.uint8)
    picture[4 : 4 + grid.shape[0], left : left + grid.shape[1]] = grid
    if not named:
        return picture
    font, black = cv2.FONT_HERSHEY_SIMPLEX, (0, 0, 0)
    for index, name in enumerate([*table.names, "(other)"]):
        middle = index * cell + cell // 2 + 4
        if index < classes:
            cv2.putText(picture, name[:18], (4, 4 + middle), font, 0.4, black, 1, cv2.LINE_AA)
        strip = np.full((cell, left, 3), 255, np.uint8)
        cv2.putText(strip, name[:18], (0, cell // 2 + 4), font, 0.4, black, 1, cv2.LINE_AA)
        at = left + index * cell
        picture[grid.shape[0] + 4 :, at : at + cell] = np.rot90(strip, -1)
        if index < classes and share[index, index] >= 0.005 and cell >= 20:
            text = f"{100 * share[index, index]:.0f}"
            white = (255, 255, 255) if share[index, index] > 0.5 else black
            cv2.putText(picture, text, (at + 2, 4 + middle), font, 0.35, white, 1, cv2.LINE_AA)
    return picture
