"""The random window of an image: seeds, padding, alignment of image and label."""

import cv2
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from segtrain.config import IGNORE_INDEX
from segtrain.data.augment import draw_span, resize_window
from tests.helpers.samples import augmentation


def coded(height=60, width=80):
    """An image whose pixels encode their position, and a label with the same boundary as the image."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 200
    target = np.where(image[..., 0] > 100, 1, 0).astype(np.uint8)
    return image, target


def test_same_seed_same_sample_other_seed_other_sample():
    augment = augmentation()
    image, target = coded()
    first = augment(image, target, (0, 5))
    for _ in range(3):  # whatever came in between
        augment(image, target, (0, 6))
    again = augment(image, target, (0, 5))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    different = [augment(image, target, (0, i)) for i in range(20)]
    assert len({(a.tobytes(), b.tobytes()) for a, b in different}) > 15


def test_transforms_draw_independently():
    """Flip and scale must not be correlated, as they are with the library's own seeding."""
    augment = augmentation(crop_size=[32, 32], scale=[0.5, 1.5])
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    image[0] = 10
    flips, small = [], []
    for i in range(300):
        _, target = augment(image, image[..., 0] // 255, (1, i))
        columns = np.where(target == 1)[1]
        padded = (target == IGNORE_INDEX).any()
        small.append(padded)
        centre = np.where(target != IGNORE_INDEX)[1].mean()
        flips.append(columns.mean() > centre if len(columns) else False)
    assert abs(np.corrcoef(flips, small)[0, 1]) < 0.2
    assert 0.35 < np.mean(flips) < 0.65


def test_padding_is_ignored_and_no_new_labels_appear():
    image, target = coded(20, 20)
    target[:] = 3
    target[:, 10:] = 9
    for i in range(30):
        out, label = augmentation(crop_size=[64, 64], scale=[0.5, 1.5])(image, target, (0, i))
        assert out.shape == (64, 64, 3)
        assert set(np.unique(label)) <= {3, 9, IGNORE_INDEX}
        assert (label == IGNORE_INDEX).any()


def test_image_and_label_stay_aligned():
    """The boundary in the label stays within half a pixel of the boundary in the image."""
    image, target = coded(64, 96)
    shifts = []
    for i in range(60):
        out, label = augmentation(crop_size=[32, 48], scale=[0.5, 2.0], flip=0.0)(image, target, (0, i))
        row, labels = out[16, :, 0].astype(float), label[16]
        if {0, 1} <= set(labels) and IGNORE_INDEX not in labels:
            edge = (200 - row).sum() / 200  # sub-pixel place of the step
            shifts.append(edge - (labels == 0).sum())
    assert len(shifts) > 10
    assert abs(np.mean(shifts)) < 0.12
    assert np.abs(shifts).max() <= 0.51


def test_no_augmentation_is_a_plain_crop():
    image, target = coded(48, 48)
    out, label = augmentation(scale=[1.0, 1.0], flip=0.0)(image, target, (0, 0))
    assert (out == image).all()
    assert (label == target).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(20, 90), st.integers(20, 90), st.floats(0.4, 2.5), st.integers(0, 10**6))
def test_the_window_is_that_of_a_float_resize(height, width, scale, seed):
    """The image is within a grey level of torch's bilinear resize; labels equal nearest-exact, except at ties."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8), (width, height))
    labels = rng.integers(0, 9, (height, width)).astype(np.uint8)
    crop = [40, 48]
    rows, columns = (draw_span((height, width)[a], crop[a], scale, np.random.default_rng(seed), None) for a in (0, 1))
    window = np.s_[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]
    found = resize_window(image[window], rows, columns, crop, cv2.INTER_LINEAR, (1, 2, 3))
    target = resize_window(labels[window], rows, columns, crop, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX)
    inside = np.s_[rows.place : rows.place + rows.size, columns.place : columns.place + columns.size]
    expected = interpolate(torch.from_numpy(image[window]).permute(2, 0, 1)[None].double(), (rows.size, columns.size),
                           mode="bilinear")[0].permute(1, 2, 0).numpy()  # fmt: skip
    assert np.abs(found[inside] - expected).max() <= 1
    exact = interpolate(torch.from_numpy(labels[window])[None, None].double(), (rows.size, columns.size),
                        mode="nearest-exact")[0, 0].numpy()  # fmt: skip

    def tied(span):
        at = (np.arange(span.size) + 0.5) * span.length / span.size
        return np.abs(at - np.round(at)) < 1e-6

    free = ~tied(rows)[:, None] & ~tied(columns)[None, :]
    assert (target[inside] == exact)[free].all()
    outside = np.ones(crop, bool)
    outside[inside] = False
    assert (target[outside] == IGNORE_INDEX).all()
    assert (found[outside] == (1, 2, 3)).all()


def test_a_window_contains_its_focus_and_lies_anywhere_around_it():
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(500):
        extent, crop = int(rng.integers(10, 100)), int(rng.integers(5, 120))
        focus = int(rng.integers(extent))
        span = draw_span(extent, crop, rng.uniform(0.5, 2), rng, focus)
        assert 0 <= span.start <= focus < span.start + span.length <= extent
        assert 0 <= span.place <= span.place + span.size <= crop
        starts.add(draw_span(100, 20, 1, rng, 50).start)
    assert starts == set(range(31, 51))


def test_colours_are_changed_and_labels_are_not():
    image, target = coded(48, 48)
    image[:, :, 1] = 120
    plain = augmentation(scale=[1.0, 1.0], flip=0.0)(image, target, (0, 0))
    augment = augmentation(scale=[1.0, 1.0], flip=0.0, color=0.4)
    changed = [augment(image, target, (0, i)) for i in (0, 1, 0)]
    assert all((label == plain[1]).all() for _, label in changed)
    assert (changed[0][0] == changed[2][0]).all()
    assert not (changed[0][0] == changed[1][0]).all()
    assert not (changed[0][0] == plain[0]).all()
