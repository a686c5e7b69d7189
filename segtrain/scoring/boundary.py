"""Boundary IoU: classes compared close to their edges only (Cheng et al., CVPR 2021)."""

import cv2
import numpy as np

from segtrain.config import IGNORE_INDEX


def boundary_counts(target: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Count intersection and union of the classes' boundary bands: int64 (2, classes).

    target, prediction: uint8 (H, W) train ids. The band of a mask is the part of it within 2 % of the image's diagonal
    of its edge. Pixels without a label do not count.
    """
    result = np.zeros((2, classes), np.int64)
    width = max(1, round(0.02 * float(np.hypot(*target.shape))))
    labelled = target != IGNORE_INDEX

    def band(mask: np.ndarray) -> np.ndarray:
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        inner: np.ndarray = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
        return (mask > inner) & labelled

    for index in np.intersect1d(np.union1d(target, prediction), np.arange(classes)):
        truth, answer = (band((labels == index).astype(np.uint8)) for labels in (target, prediction))
        result[:, index] = (truth & answer).sum(), (truth | answer).sum()
    return result
