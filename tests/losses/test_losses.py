"""Every loss against an independent version of it."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from segtrain.config import IGNORE_INDEX, LossConfig
from segtrain.losses import build_loss, tiles
from segtrain.models.memory import Allocations
from tests.helpers.losses import WEIGHTS, C, drawn, enlarged, gradient, off, plain, step_loss, three
from tests.helpers.max_pooling import bisected_weights


def torchs(**options):
    def loss(logits, target):
        return F.cross_entropy(enlarged(logits, target), target, ignore_index=IGNORE_INDEX, **options)

    return loss


def pictures(of_picture):
    """The mean, over the pictures that have labels, of of_picture(logits (n, C), labels (n,)) of labelled pixels."""

    def loss(logits, target):
        found = []
        for scores, labels in zip(enlarged(logits, target), target, strict=True):
            if (labels != IGNORE_INDEX).any():
                found.append(of_picture(scores[:, labels != IGNORE_INDEX].T, labels[labels != IGNORE_INDEX]))
        return sum(found) / len(found)

    return loss


def slow_focal(gamma, weights):
    def loss(logits, target):
        known = target != IGNORE_INDEX
        p = enlarged(logits, target).movedim(1, -1)[known].softmax(1)[range(int(known.sum())), target[known]]
        w = torch.tensor(weights, dtype=p.dtype)[target[known]]
        return sum(-a * (1 - q) ** gamma * torch.log(q) for a, q in zip(w, p, strict=True)) / w.sum()

    return loss


def slow_seamseg(share, weight=None):
    def loss(logits, target):
        every = F.cross_entropy(
            enlarged(logits, target), target, weight, ignore_index=IGNORE_INDEX, reduction="none"
        )  # fmt: skip
        means = []
        for picture in every.flatten(1):
            highest = sorted(picture, key=Tensor.item, reverse=True)[: math.ceil(share * len(picture))]
            means.append(sum(highest) / len(highest))
        return sum(means) / len(means)

    return loss


def slow_batch(share):
    def loss(logits, target):
        losses = F.cross_entropy(enlarged(logits, target), target, ignore_index=IGNORE_INDEX, reduction="none")
        highest = sorted(losses[target != IGNORE_INDEX], key=Tensor.item, reverse=True)
        highest = highest[: math.ceil(share * len(highest))]
        return sum(highest) / len(highest)

    return loss


def slow_max_pooling(share, p, weight=None):
    def of_picture(scores, labels):
        losses = F.cross_entropy(scores, labels, weight, reduction="none")
        m = math.ceil(share * len(losses))
        if p == 1:
            return losses.sort().values[-m:].mean()
        if p == math.inf:
            return losses.mean()
        return losses @ torch.from_numpy(bisected_weights(losses.detach().numpy(), m, p))

    return pictures(of_picture)


def slow_dice(scores, labels):
    p = scores.softmax(1)
    found = []
    for c in sorted({*labels.tolist()}):
        overlap = sum(p[i, c] for i, label in enumerate(labels) if label == c)
        found.append(1 - 2 * overlap / (p[:, c].sum() + (labels == c).sum()))
    return sum(found) / len(found)


def slow_lovasz(scores, labels):
    """The Lovasz extension by its definition: errors in descending order, each times what its pixel adds to the set
    function, the Jaccard loss of the set of wrong pixels."""
    p, labels = scores.softmax(1), labels.tolist()
    found = []
    for c in sorted({*labels}):
        own = {i for i, label in enumerate(labels) if label == c}
        errors = [1 - q if i in own else q for i, q in enumerate(p[:, c])]
        wrong, value, before = set(), 0.0, 0.0
        for i in sorted(range(len(errors)), key=lambda i: -errors[i].item()):
            wrong = wrong | {i}
            after = 1 - len(own - wrong) / len(own | wrong)
            value = value + errors[i] * (after - before)
            before = after
        found.append(value)
    return sum(found) / len(found)


WEIGHT = torch.tensor(WEIGHTS, dtype=torch.float64)
CASES = {
    "cross_entropy": (LossConfig(), torchs()),
    "weights": (LossConfig(class_weights=WEIGHTS), torchs(weight=torch.tensor(WEIGHTS, dtype=torch.float64))),
    "smoothing": (LossConfig(label_smoothing=0.2), torchs(label_smoothing=0.2)),
    "both": (
        LossConfig(class_weights=WEIGHTS, label_smoothing=0.3),
        torchs(weight=torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=0.3),
    ),
    "focal": (LossConfig("focal"), slow_focal(2, [1.0] * C)),
    "focal, weights": (LossConfig("focal", gamma=0.5, class_weights=WEIGHTS), slow_focal(0.5, WEIGHTS)),
    "bootstrapped": (LossConfig("bootstrapped", 0.25), lambda logits, target: plain(logits, target, 0.25)),
    "seamseg": (LossConfig("bootstrapped", 0.25, "seamseg"), slow_seamseg(0.25)),
    "seamseg, all": (LossConfig("bootstrapped", 1.0, "seamseg"), slow_seamseg(1.0)),
    "over the batch": (LossConfig("bootstrapped", 0.25, select="batch"), slow_batch(0.25)),
    "max_pooling 1": (LossConfig("max_pooling", 0.3, p=1), slow_max_pooling(0.3, 1)),
    "max_pooling 1.02": (LossConfig("max_pooling", 0.3, p=1.02), slow_max_pooling(0.3, 1.02)),
    "max_pooling 1.7": (LossConfig("max_pooling", 0.3, p=1.7), slow_max_pooling(0.3, 1.7)),
    "max_pooling 6": (LossConfig("max_pooling", 0.1, p=6), slow_max_pooling(0.1, 6)),
    "max_pooling inf": (LossConfig("max_pooling", 0.3, p=math.inf), slow_max_pooling(0.3, math.inf)),
    "bootstrapped, weights": (
        LossConfig("bootstrapped", 0.25, class_weights=WEIGHTS),
        lambda logits, target: plain(logits, target, 0.25, WEIGHT),
    ),
    "bootstrapped, all, weights": (
        LossConfig("bootstrapped", class_weights=WEIGHTS),
        lambda logits, target: plain(logits, target, 1.0, WEIGHT),
    ),
    "seamseg, weights": (
        LossConfig("bootstrapped", 0.25, "seamseg", class_weights=WEIGHTS),
        slow_seamseg(0.25, WEIGHT),
    ),
    "max_pooling 1, weights": (
        LossConfig("max_pooling", 0.3, p=1, class_weights=WEIGHTS),
        slow_max_pooling(0.3, 1, WEIGHT),
    ),
    "max_pooling 1.7, weights": (
        LossConfig("max_pooling", 0.3, p=1.7, class_weights=WEIGHTS),
        slow_max_pooling(0.3, 1.7, WEIGHT),
    ),
    "dice": (LossConfig("dice"), pictures(slow_dice)),
    "lovasz": (LossConfig("lovasz"), pictures(slow_lovasz)),
}
each_loss = pytest.mark.parametrize("case", CASES)


def built(case):
    config = CASES[case][0]
    config.check()
    return build_loss(config, C)


@each_loss
@pytest.mark.parametrize("elements", [1, 90, 2**18])
@pytest.mark.parametrize(("small", "large"), [((3, 4), (7, 10)), ((6, 5), (4, 5))])
def test_equals_an_independent_version(case, elements, small, large, monkeypatch):
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", elements)
    logits, target = three(small, large)
    value, got = gradient(partial(step_loss, built(case)), logits, target)
    expected, want = gradient(CASES[case][1], logits, target)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert off(got, want) < 1e-9


@each_loss
def test_gradcheck(case):
    logits, target = three((2, 2), (3, 5))
    weights = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)  # each picture's sum has a factor of its own
    loss = built(case)
    assert torch.autograd.gradcheck(lambda x: loss(x, target) @ weights, logits.requires_grad_())


@each_loss
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), cuts=st.sets(st.integers(1, 4)), ignored=st.sampled_from([0.0, 0.5, 0.97]))
def test_a_batch_in_parts_is_the_batch(case, seed, cuts, ignored):
    """Over ranks and micro-batches, the loss is the sum of sums over the sum of counts, or it is per_batch."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, C, 2, 3, generator=generator).double()
    target = torch.randint(0, C, (5, 4, 6), generator=generator)
    target[torch.rand(5, 4, 6, generator=generator) < ignored] = IGNORE_INDEX
    loss = built(case)
    assert loss.per_batch == (case == "over the batch")
    if loss.per_batch:
        return
    whole, want = gradient(partial(step_loss, loss), logits, target)
    edges = [0, *sorted(cuts), 5]
    parts = [slice(*edge) for edge in itertools.pairwise(edges)]
    total = sum(loss.count(target[part].to(torch.uint8)) for part in parts) or 1
    split = [gradient(lambda a, b: loss(a, b).sum() / total, logits[part], target[part]) for part in parts]
    assert sum(value for value, _ in split).item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in split]), want, rtol=1e-10, atol=1e-14)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_loss_is_reckoned_in_float32(case, dtype):
    logits, target = three()
    logits, loss = logits.to(dtype), built(case)
    with torch.autocast("cpu", torch.bfloat16):
        value, got = gradient(partial(step_loss, loss), logits, target)
    expected, want = gradient(partial(step_loss, loss), logits.double(), target)
    assert (value.dtype, got.dtype) == (torch.float32, dtype)
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)
    assert off(got, want) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


@each_loss
@pytest.mark.parametrize("scale", [1, 1e4])
def test_pictures_without_labels_and_ignored_pixels_count_nothing(case, scale):
    """For any logits there, also if a probability is exactly 0 or 1."""
    logits, target = three((7, 10), (7, 10))
    logits, loss = (scale * logits).float(), built(case)
    sums = loss(logits.requires_grad_(), target)
    sums.sum().backward()
    assert sums.isfinite().all()
    assert sums[1] == 0
    assert logits.grad.isfinite().all()
    assert logits.grad.movedim(1, -1)[target == IGNORE_INDEX].abs().max() == 0
    assert step_loss(loss, logits, torch.full_like(target, IGNORE_INDEX)) == 0


@each_loss
def test_perfect_answers_cost_nothing(case):
    target = three()[1]
    logits = 200 * F.one_hot(target.where(target != IGNORE_INDEX, 0), C).movedim(3, 1).float()
    value, got = gradient(partial(step_loss, built(case)), logits, target)
    smoothed = built(case).label_smoothing if hasattr(built(case), "label_smoothing") else 0
    assert smoothed or value.item() == pytest.approx(0, abs=1e-6)
    assert smoothed or got.abs().max() < 1e-6
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("case", "bound"),
    [("both", 0.4), ("focal", 0.4), ("seamseg", 0.4), ("over the batch", 0.7), ("max_pooling 1.7", 0.5), ("dice", 0.4),
     ("lovasz", 0.8)],
)  # fmt: skip
def test_no_loss_holds_the_enlarged_batch(case, bound, monkeypatch):
    """4 images of 32 x 32 from stride 8. Lovasz holds one image, and the order of its pixels for one class."""
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 2**12)
    logits, target = drawn(64, (4, 4), (32, 32), torch.float32, batch=4)
    config = replace(CASES[case][0], class_weights=CASES[case][0].class_weights and [1.0] * 64)
    with Allocations() as allocations:
        step_loss(build_loss(config, 64), logits.requires_grad_(), target).backward()
    assert allocations.peak < bound * target.numel() * 64 * logits.element_size()


def test_whole_networks_on_fake_tensors_can_have_any_pixelwise_mean():
    """segtrain/models/memory.py counts bytes on fake tensors."""
    with FakeTensorMode():
        for case in ("cross_entropy", "both", "focal, weights"):
            logits = torch.randn(2, C, 4, 4, requires_grad=True)
            built(case)(logits, torch.zeros(2, 32, 32, dtype=torch.int64)).sum().backward()
            assert logits.grad.shape == logits.shape
