"""Cross-entropy and bootstrapping by tiles against upsampling everything: numbers, precision, memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from segtrain.config import IGNORE_INDEX, LossConfig
from segtrain.losses import build_loss, tiles
from segtrain.models.memory import Allocations
from tests.helpers.losses import drawn, gradient, off, plain, step_loss


def bootstrapped(logits, target, hardest=1.0):
    return step_loss(build_loss(LossConfig("bootstrapped", hardest), logits.shape[1]), logits, target)


def slow(logits, target, hardest):
    """The definition, pixel by pixel in Python, written independently."""
    total, chosen = 0.0, 0
    for scores, labels in zip(logits.double().numpy(), target.numpy(), strict=True):
        losses = []
        for y, x in np.argwhere(labels != IGNORE_INDEX):
            row = scores[:, y, x]
            losses.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[labels[y, x]])
        count = math.ceil(len(losses) * hardest)
        total += sum(sorted(losses, reverse=True)[:count])
        chosen += count
    return total / max(chosen, 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), hardest=st.sampled_from([1.0, 0.25, 0.5, 0.07]), ignored=st.floats(0, 1))
def test_equals_the_definition(seed, hardest, ignored):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=generator).double()
    target = torch.randint(0, 4, (2, 5, 6), generator=generator)
    target[torch.rand(2, 5, 6, generator=generator) < ignored] = IGNORE_INDEX
    value = bootstrapped(logits, target, hardest).item()
    assert value == pytest.approx(slow(logits, target, hardest), abs=1e-12)


# Hardest share, loss and norm of its gradient, of the version before losses were sums per picture.
BEFORE = [(1.0, 4.589401721954346, 0.008960463106632233), (0.25, 7.371840000152588, 0.01666153408586979)]
SIZES = [
    ((5, 6), (5, 6)),
    ((5, 7), (40, 56)),
    ((7, 3), (50, 19)),
    ((1, 1), (4, 5)),
    ((9, 9), (1, 4)),
    ((13, 6), (7, 9)),
]


@pytest.mark.parametrize("elements", [1, 300, 2**18])
@pytest.mark.parametrize("hardest", [1.0, 0.25])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_equals_upsampling_everything(small, large, hardest, elements, monkeypatch):
    """Value and gradient for any tiles, and for sizes that divide, do not divide, and shrink."""
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", elements)
    logits, target = drawn(6, small, large)
    value, got = gradient(bootstrapped, logits, target, hardest)
    expected, want = gradient(plain, logits, target, hardest)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert off(got, want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hardest", [1.0, 0.25])
def test_precision(dtype, hardest):
    """float32 to 1e-6; in half types the gradient is rounded only once, at the end."""
    logits, target = drawn(19, (24, 32), (192, 256), dtype)
    value, got = gradient(bootstrapped, logits, target, hardest)
    expected, want = gradient(plain, logits.double(), target, hardest)
    assert value.dtype == torch.float32
    assert got.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    if dtype == torch.float32:
        assert off(got, want) < 1e-6
    else:
        value, scaled = gradient(lambda *a: bootstrapped(*a) * 2**12, logits, target, hardest)
        assert off(scaled.double() / 2**12, want) < torch.finfo(dtype).eps / 2


def test_autocast_does_not_reach_the_loss():
    logits, target = drawn(5, (6, 6), (48, 48), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, got = gradient(bootstrapped, logits, target)
    expected, want = gradient(bootstrapped, logits, target)
    assert value == expected
    assert torch.equal(got, want)


def test_layout_and_repetition_change_nothing():
    """Bit for bit, because a network's logits are channels last, and a repeated run must be the same."""
    logits, target = drawn(7, (9, 11), (70, 81), torch.float32)
    first = gradient(bootstrapped, logits, target, 0.25)
    for again in (logits, logits.contiguous(memory_format=torch.channels_last)):
        value, got = gradient(bootstrapped, again, target, 0.25)
        assert value == first[0]
        assert torch.equal(got, first[1])


@pytest.mark.parametrize("hardest", [1.0, 0.25])
def test_no_labelled_pixel_gives_zero_and_zero_gradient(hardest):
    logits = torch.randn(2, 4, 3, 3)
    value, got = gradient(bootstrapped, logits, torch.full((2, 6, 6), IGNORE_INDEX), hardest)
    assert value == 0
    assert got.abs().sum() == 0


def test_all_pixels_is_torchs_loss():
    logits, target = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    torch.testing.assert_close(bootstrapped(logits, target), F.cross_entropy(logits, target))


def test_only_the_hardest_pixels_have_a_gradient():
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    _, got = gradient(bootstrapped, logits, target, 0.25)
    touched = got.abs().sum(1) > 0
    every = F.cross_entropy(logits, target, reduction="none")
    assert touched.sum() == 4
    assert every[touched].min() > every[~touched].max()


def test_loss_alone_needs_no_gradient():
    logits, target = drawn(6, (5, 7), (40, 56))
    with torch.no_grad():
        value = bootstrapped(logits, target, 0.25)
    assert not value.requires_grad
    assert value == gradient(bootstrapped, logits, target, 0.25)[0]


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (3, 8, 8)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"are not \(N,C,h,w\) and \(N,H,W\)"):
        bootstrapped(torch.randn(2, 4, 3, 3), torch.zeros(shape, dtype=torch.int64))


def test_a_single_process_gives_the_number_that_it_always_gave():
    """Values and gradient norms that an earlier version gave for the same logits."""
    logits, target = drawn(19, (24, 32), (192, 256), torch.float32)
    for hardest, known, norm in BEFORE:
        value, got = gradient(bootstrapped, logits, target, hardest)
        assert value.item() == pytest.approx(known, rel=1e-6)
        assert got.norm().item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    ("classes", "hardest", "bound"),
    [(19, 1.0, 0.4), (19, 0.25, 0.4), pytest.param(171, 1.0, 0.2, marks=pytest.mark.slow)],
)
def test_peak_memory(classes, hardest, bound):
    """Peak above the input of forward and backward, 2 x 768^2 from stride 8; the plain loss runs on fake tensors."""

    def peak(loss):
        logits = torch.randn(2, classes, 96, 96, requires_grad=True)
        target = torch.zeros(2, 768, 768, dtype=torch.int64)
        with Allocations() as allocations:
            loss(logits, target).backward()
        return allocations.peak

    def everything(logits, target):
        every = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(every, target, ignore_index=IGNORE_INDEX)

    with FakeTensorMode():
        most = peak(everything)
    assert peak(lambda *a: bootstrapped(*a, hardest)) <= bound * most
