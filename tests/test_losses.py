import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from segtrain import losses
from segtrain.data.labels import IGNORE
from segtrain.losses import upsampled_cross_entropy
from segtrain.memory import Allocations


def slow(logits, target, hardest):
    """Pixel by pixel in Python: the definition, written independently."""
    total, chosen = 0.0, 0
    for scores, labels in zip(logits.double().numpy(), target.numpy(), strict=True):
        losses = []
        for y, x in np.argwhere(labels != IGNORE):
            row = scores[:, y, x]
            losses.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[labels[y, x]])
        count = math.ceil(len(losses) * hardest)
        total += sum(sorted(losses, reverse=True)[:count])
        chosen += count
    return total / max(chosen, 1)


def plain(logits, target, hardest=1.0):
    """What others do, in torch's words: upsample everything, then the loss of every pixel."""
    every = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(every, target, ignore_index=IGNORE, reduction="none").flatten(1)
    shares = [math.ceil(n * hardest) for n in (target != IGNORE).flatten(1).sum(1).tolist()]
    return sum(row.topk(share).values.sum() for row, share in zip(loss, shares, strict=True)) / max(sum(shares), 1)


def drawn(classes, small, large, dtype=torch.float64, ignored=0.2, batch=2):
    generator = torch.Generator().manual_seed(classes + sum(small) + sum(large))
    logits = torch.randn(batch, classes, *small, generator=generator, dtype=torch.float64) * 3
    target = torch.randint(0, classes, (batch, *large), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE
    return logits.to(dtype), target


def gradient(loss, logits, *args):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, *args)
    value.backward()
    return value.detach(), logits.grad


def off(got, want):
    """Norm-wise relative."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), hardest=st.sampled_from([1.0, 0.25, 0.5, 0.07]), ignored=st.floats(0, 1))
def test_equals_the_definition(seed, hardest, ignored):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=generator).double()
    target = torch.randint(0, 4, (2, 5, 6), generator=generator)
    target[torch.rand(2, 5, 6, generator=generator) < ignored] = IGNORE
    value = upsampled_cross_entropy(logits, target, hardest).item()
    assert value == pytest.approx(slow(logits, target, hardest), abs=1e-12)


SIZES = [
    ((5, 6), (5, 6)),
    ((5, 7), (40, 56)),
    ((7, 3), (50, 19)),
    ((1, 1), (4, 5)),
    ((9, 9), (1, 4)),
    ((13, 6), (7, 9)),
]


@pytest.mark.parametrize("strip", [1, 300, 2**18])
@pytest.mark.parametrize("hardest", [1.0, 0.25])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_equals_upsampling_everything(small, large, hardest, strip, monkeypatch):
    """Value and gradient, however the rows are cut; sizes that divide, that do not, and that shrink."""
    monkeypatch.setitem(losses.STRIP, "cpu", strip)
    logits, target = drawn(6, small, large)
    value, got = gradient(upsampled_cross_entropy, logits, target, hardest)
    expected, want = gradient(plain, logits, target, hardest)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert off(got, want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hardest", [1.0, 0.25])
def test_precision(dtype, hardest):
    """Of given logits: float32 to 1e-6; half types to their own rounding of the gradient, once, at the very end."""
    logits, target = drawn(19, (24, 32), (192, 256), dtype)
    value, got = gradient(upsampled_cross_entropy, logits, target, hardest)
    expected, want = gradient(plain, logits.double(), target, hardest)
    assert value.dtype == torch.float32
    assert got.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    if dtype == torch.float32:
        assert off(got, want) < 1e-6
    else:
        value, scaled = gradient(lambda *a: upsampled_cross_entropy(*a) * 2**12, logits, target, hardest)
        assert off(scaled.double() / 2**12, want) < torch.finfo(dtype).eps / 2


def test_autocast_does_not_reach_the_loss():
    logits, target = drawn(5, (6, 6), (48, 48), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, got = gradient(upsampled_cross_entropy, logits, target)
    expected, want = gradient(upsampled_cross_entropy, logits, target)
    assert value == expected
    assert torch.equal(got, want)


def test_layout_and_repetition_change_nothing():
    """Bit for bit: a network's logits are channels-last, and a run repeated must be the same run."""
    logits, target = drawn(7, (9, 11), (70, 81), torch.float32)
    first = gradient(upsampled_cross_entropy, logits, target, 0.25)
    for again in (logits, logits.contiguous(memory_format=torch.channels_last)):
        value, got = gradient(upsampled_cross_entropy, again, target, 0.25)
        assert value == first[0]
        assert torch.equal(got, first[1])


@pytest.mark.parametrize("hardest", [1.0, 0.25])
def test_no_labelled_pixel_gives_zero_and_zero_gradient(hardest):
    logits = torch.randn(2, 4, 3, 3)
    value, got = gradient(upsampled_cross_entropy, logits, torch.full((2, 6, 6), IGNORE), hardest)
    assert value == 0
    assert got.abs().sum() == 0


def test_all_pixels_is_torchs_loss():
    logits, target = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    torch.testing.assert_close(upsampled_cross_entropy(logits, target), F.cross_entropy(logits, target))


def test_only_the_hardest_pixels_have_a_gradient():
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    _, got = gradient(upsampled_cross_entropy, logits, target, 0.25)
    touched = got.abs().sum(1) > 0
    every = F.cross_entropy(logits, target, reduction="none")
    assert touched.sum() == 4
    assert every[touched].min() > every[~touched].max()


def test_loss_alone_needs_no_gradient():
    logits, target = drawn(6, (5, 7), (40, 56))
    with torch.no_grad():
        value = upsampled_cross_entropy(logits, target, 0.25)
    assert not value.requires_grad
    assert value == gradient(upsampled_cross_entropy, logits, target, 0.25)[0]


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (3, 8, 8)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"are not \(N,C,h,w\) and \(N,H,W\)"):
        upsampled_cross_entropy(torch.randn(2, 4, 3, 3), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(("classes", "hardest", "bound"), [(19, 1.0, 0.4), (19, 0.25, 0.4), (171, 1.0, 0.2)])
def test_peak_memory(classes, hardest, bound):
    """2 x 768^2 from stride 8: the peak above the input, forward and backward. For the plain loss on fake tensors."""

    def peak(loss):
        logits = torch.randn(2, classes, 96, 96, requires_grad=True)
        target = torch.zeros(2, 768, 768, dtype=torch.int64)
        with Allocations() as allocations:
            loss(logits, target).backward()
        return allocations.peak

    def everything(logits, target):
        every = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(every, target, ignore_index=IGNORE)

    with FakeTensorMode():
        most = peak(everything)
    assert peak(lambda *a: upsampled_cross_entropy(*a, hardest)) <= bound * most
