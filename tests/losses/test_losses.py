import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from segtrain import losses
from segtrain.config import IGNORE_INDEX, LossConfig
from segtrain.errors import UsageError
from segtrain.losses import LOSSES, Loss, build_loss, highest_weights
from segtrain.models.memory import Allocations


def bootstrapped(logits, target, hardest=1.0):
    return build_loss(LossConfig("bootstrapped", hardest), logits.shape[1]).mean(logits, target)


def slow(logits, target, hardest):
    """Pixel by pixel in Python: the definition, written independently."""
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


def plain(logits, target, hardest=1.0):
    """What others do, in torch's words: upsample everything, then the loss of every pixel."""
    every = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(every, target, ignore_index=IGNORE_INDEX, reduction="none").flatten(1)
    shares = [math.ceil(n * hardest) for n in (target != IGNORE_INDEX).flatten(1).sum(1).tolist()]
    return sum(row.topk(share).values.sum() for row, share in zip(loss, shares, strict=True)) / max(sum(shares), 1)


def drawn(classes, small, large, dtype=torch.float64, ignored=0.2, batch=2):
    generator = torch.Generator().manual_seed(classes + sum(small) + sum(large))
    logits = torch.randn(batch, classes, *small, generator=generator, dtype=torch.float64) * 3
    target = torch.randint(0, classes, (batch, *large), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE_INDEX
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


@pytest.mark.parametrize("strip", [1, 300, 2**18])
@pytest.mark.parametrize("hardest", [1.0, 0.25])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_equals_upsampling_everything(small, large, hardest, strip, monkeypatch):
    """Value and gradient, however the rows are cut; sizes that divide, that do not, and that shrink."""
    monkeypatch.setitem(losses.STRIP, "cpu", strip)
    logits, target = drawn(6, small, large)
    value, got = gradient(bootstrapped, logits, target, hardest)
    expected, want = gradient(plain, logits, target, hardest)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert off(got, want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hardest", [1.0, 0.25])
def test_precision(dtype, hardest):
    """Of given logits: float32 to 1e-6; half types to their own rounding of the gradient, once, at the very end."""
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
    """Bit for bit: a network's logits are channels-last, and a run repeated must be the same run."""
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
    """Values and gradient norms of the loss before it gave sums per picture, at the same logits."""
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
    """2 x 768^2 from stride 8: the peak above the input, forward and backward. For the plain loss on fake tensors."""

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


# ------------------------------------------------------------------------------------------------ every loss

C = 5
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0]


def enlarged(logits, target):
    return F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)


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


def slow_seamseg(share):
    def loss(logits, target):
        every = F.cross_entropy(enlarged(logits, target), target, ignore_index=IGNORE_INDEX, reduction="none")
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


def bounds(n, m, p):
    """gamma and tau of loss max-pooling."""
    gamma = n ** (1 / p - 1)
    return gamma, gamma * m ** (-1 / p)


def bisected_weights(losses, m, p):
    """Loss max-pooling by its multiplier: w = min(tau, (l / a) ** (1 / (p - 1))), with a such that ||w||_p = gamma."""
    gamma, tau = bounds(len(losses), m, p)
    low, high = 1e-30, 1e30
    for _ in range(400):
        a = math.sqrt(low * high)
        w = np.minimum(tau, (losses / a) ** (1 / (p - 1)))
        low, high = (a, high) if (w**p).sum() > gamma**p else (low, a)
    return w


def slow_max_pooling(share, p):
    def of_picture(scores, labels):
        losses = F.cross_entropy(scores, labels, reduction="none")
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
    "dice": (LossConfig("dice"), pictures(slow_dice)),
    "lovasz": (LossConfig("lovasz"), pictures(slow_lovasz)),
}
each_loss = pytest.mark.parametrize("case", CASES)


def built(case):
    config = CASES[case][0]
    config.check()
    return build_loss(config, C)


def three(small=(3, 4), large=(7, 10)):
    """A batch of three pictures, the second without any label, the third with two classes."""
    logits, target = drawn(C, small, large, batch=3)
    target[1] = IGNORE_INDEX
    target[2][target[2] == 3] = 1
    target[2][target[2] == 0] = 1
    return logits, target


@each_loss
@pytest.mark.parametrize("strip", [1, 90, 2**18])
@pytest.mark.parametrize(("small", "large"), [((3, 4), (7, 10)), ((6, 5), (4, 5))])
def test_equals_an_independent_version(case, strip, small, large, monkeypatch):
    monkeypatch.setitem(losses.STRIP, "cpu", strip)
    logits, target = three(small, large)
    value, got = gradient(built(case).mean, logits, target)
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
    """Ranks and accumulation: the parts' sums over the sum of their counts; a loss that cannot says so."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, C, 2, 3, generator=generator).double()
    target = torch.randint(0, C, (5, 4, 6), generator=generator)
    target[torch.rand(5, 4, 6, generator=generator) < ignored] = IGNORE_INDEX
    loss = built(case)
    assert loss.per_batch == (case == "over the batch")
    if loss.per_batch:
        return
    whole, want = gradient(loss.mean, logits, target)
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
        value, got = gradient(loss.mean, logits, target)
    expected, want = gradient(loss.mean, logits.double(), target)
    assert (value.dtype, got.dtype) == (torch.float32, dtype)
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)
    assert off(got, want) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


@each_loss
@pytest.mark.parametrize("scale", [1, 1e4])
def test_pictures_without_labels_and_ignored_pixels_count_nothing(case, scale):
    """Whatever the logits there, also where a probability is exactly 0 or 1."""
    logits, target = three((7, 10), (7, 10))
    logits, loss = (scale * logits).float(), built(case)
    sums = loss(logits.requires_grad_(), target)
    sums.sum().backward()
    assert sums.isfinite().all()
    assert sums[1] == 0
    assert logits.grad.isfinite().all()
    assert logits.grad.movedim(1, -1)[target == IGNORE_INDEX].abs().max() == 0
    assert loss.mean(logits, torch.full_like(target, IGNORE_INDEX)) == 0


@each_loss
def test_perfect_answers_cost_nothing(case):
    target = three()[1]
    logits = 200 * F.one_hot(target.where(target != IGNORE_INDEX, 0), C).movedim(3, 1).float()
    value, got = gradient(built(case).mean, logits, target)
    smoothed = built(case).label_smoothing if hasattr(built(case), "label_smoothing") else 0
    assert smoothed or value.item() == pytest.approx(0, abs=1e-6)
    assert smoothed or got.abs().max() < 1e-6
    assert got.isfinite().all()


# ------------------------------------------------------------------------------------------------ loss max-pooling


@pytest.mark.parametrize(("n", "share"), [(1, 0.5), (3, 0.4), (6, 0.25), (6, 0.5), (8, 1.0)])
@pytest.mark.parametrize("p", [1.1, 1.7, 3.0])
def test_the_weights_are_the_best_there_are(n, share, p):
    """Against a general optimiser, which knows nothing of sorting."""
    values = np.sort(np.random.default_rng(n).exponential(size=n))[::-1].copy()
    m = math.ceil(share * n)
    gamma, tau = bounds(n, m, p)
    found = highest_weights(torch.from_numpy(values), m, p).numpy()
    assert (found >= 0).all()
    assert found.max() <= tau * (1 + 1e-12)
    assert (found**p).sum() ** (1 / p) <= gamma * (1 + 1e-12)
    norm = NonlinearConstraint(lambda w: (np.abs(w) ** p).sum(), -np.inf, gamma**p)
    box = LinearConstraint(np.eye(n), 0, tau)
    best = minimize(lambda w: -(w @ values), np.full(n, 0.9 / n), method="SLSQP", constraints=[norm, box], tol=1e-12)
    assert found @ values == pytest.approx(-best.fun, rel=1e-6)


def test_weights_worked_by_hand():
    """p = 2, n = 4, m = 1: gamma = tau = 1 / 2; the weights are the losses, scaled to that length: no bound is met.
    m = 2: tau = 1 / sqrt 8. Of (3, 1, 1, 1) the first is bound; the others share what is left, 1 / 4 - 1 / 8."""
    of = torch.tensor([3.0, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(highest_weights(of, 1, 2.0), of / 12**0.5 / 2)
    want = torch.tensor([1 / 8, 1 / 24, 1 / 24, 1 / 24], dtype=torch.float64).sqrt()
    torch.testing.assert_close(highest_weights(of, 2, 2.0), want)


@pytest.mark.parametrize("p", [1.001, 1.7, 50.0])
@pytest.mark.parametrize("values", [[2.0, 2, 2, 2], [2.0, 1, 0, 0], [1e30, 1e-30, 1e-30, 1e-30], [0.0, 0, 0, 0]])
def test_weights_stay_finite_at_extremes(values, p):
    for m in (1, 2, 4):
        found = highest_weights(torch.tensor(values, dtype=torch.float64), m, p)
        gamma, tau = bounds(4, m, p)
        assert found.isfinite().all()
        assert found.max() <= tau * (1 + 1e-12)
        assert found.pow(p).sum() <= gamma**p * (1 + 1e-9)
        least = torch.tensor([1 / m] * m + [0] * (4 - m), dtype=torch.float64)  # allowed, so never better
        of = torch.tensor(values, dtype=torch.float64)
        assert found @ of >= (tau / (1 / m)) * (least @ of) * (1 - 1e-9)


# ------------------------------------------------------------------------------------------------ choosing a loss


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LossConfig(hardest=0.5), ["loss.hardest=0.5", "bootstrapped or max_pooling", "loss=cross_entropy"]),
        (LossConfig("bootstrapped", class_weights=[1.0]), ["loss.class_weights=[1.0]", "leave it at null"]),
        (LossConfig("lovasz", label_smoothing=0.1), ["loss.label_smoothing=0.1", "lovasz does not read it"]),
        (LossConfig("focal", label_smoothing=0.1), ["loss.label_smoothing"]),
        (LossConfig("dice", gamma=1), ["loss.gamma=1", "loss=focal"]),
        (LossConfig("dice", options={"a": 1}), ["loss.options={'a': 1}", "plugins"]),
        (
            LossConfig("bootstrapped", normalisation="mean"),
            ["loss.normalisation must be", "chosen, seamseg, got mean"],
        ),
        (LossConfig("bootstrapped", select="all"), ["loss.select must be one of image, batch, got all"]),
        (LossConfig("bootstrapped", 0.5, "seamseg", "batch"), ["loss.select=batch"]),
        (LossConfig("max_pooling", p=0.5), ["loss.p must be at least 1, got 0.5"]),
        (LossConfig("max_pooling", p=math.nan), ["loss.p must be at least 1, got nan"]),
        (LossConfig("focal", gamma=-1), ["loss.gamma must be at least 0, got -1"]),
        (LossConfig(label_smoothing=1), ["loss.label_smoothing must be at least 0 and less than 1, got 1"]),
        (LossConfig(class_weights=[0.0, 0.0]), ["loss.class_weights=[0.0, 0.0]"]),
        (
            LossConfig(class_weights=[1.0, -1.0]),
            ["loss.class_weights must", "at least 0, or null, got [1.0, -1.0]"],
        ),
    ],
)
def test_impossible_options(config, words):
    with pytest.raises(UsageError) as caught:
        config.check()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "groups", "words"),
    [
        (LossConfig("dise"), [], ["loss.name=dise", "cross_entropy, bootstrapped, max_pooling, focal, dice, lovasz"]),
        (LossConfig(class_weights=[1.0, 2.0]), [], ["loss.class_weights=[1.0, 2.0]", "give 5 numbers"]),
        (LossConfig("dice"), [(1, 2)], ["loss.name=dice", "cross_entropy"]),
        (LossConfig("lovasz"), [(1, 2)], ["loss.name=lovasz"]),
        (LossConfig(class_weights=WEIGHTS), [(1, 2)], ["loss.class_weights"]),
        (LossConfig(label_smoothing=0.1), [(1, 2)], ["loss.label_smoothing"]),
    ],
)
def test_losses_that_cannot_be_built(config, groups, words):
    with pytest.raises(UsageError) as caught:
        build_loss(config, C, groups)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("config", [LossConfig("max_pooling", 0.4, p=1.7), LossConfig("focal")])
def test_groups_in_other_losses(config):
    """A pixel of a group is that of a network whose members are one class; so is the gradient, by the chain rule."""
    logits, target = drawn(C, (3, 4), (3, 4))

    def merged(logits, target):
        either = logits[:, [1, 3]].logsumexp(1, keepdim=True)
        return build_loss(config, 4).mean(torch.cat([logits[:, [0, 2, 4]], either], 1), target)

    only = torch.where(target == 1, C, torch.where(target == 3, C, target))  # labels 0, 2, 4 and the group
    value, got = gradient(build_loss(config, C, [(1, 3)]).mean, logits, only)
    renamed = torch.full_like(only, IGNORE_INDEX)
    for new, old in enumerate((0, 2, 4, C)):
        renamed[only == old] = new
    expected, want = gradient(merged, logits, renamed)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert off(got, want) < 1e-12


@pytest.mark.parametrize("config", [LossConfig("max_pooling", 0.4, p=1.7), LossConfig("focal", gamma=0.5)])
def test_a_group_of_all_classes_costs_nothing(config):
    """Its probability may round to more than 1, and a power of what is less than 0 is NaN."""
    logits = drawn(C, (20, 20), (20, 20), torch.float32)[0]
    value, got = gradient(build_loss(config, C, [range(C)]).mean, logits, torch.full((2, 20, 20), C))
    assert 0 <= value < 1e-3
    assert got.isfinite().all()


class Squares(Loss):
    """A plugin's loss: Brier's."""

    def __init__(self, power):
        self.power = power

    def __call__(self, logits, target):
        known = target != IGNORE_INDEX
        wanted = F.one_hot(target.where(known, 0), logits.shape[1]).movedim(3, 1)
        missed = (enlarged(logits, target).softmax(1) - wanted).abs() ** self.power
        return (missed.sum(1) * known).sum((1, 2))


def test_a_loss_of_ones_own(monkeypatch):
    monkeypatch.setitem(LOSSES, "squares", lambda config, num_classes, groups, power=2: Squares(power))
    logits, target = three()
    for options, power in (({}, 2), ({"power": 3}, 3)):
        config = LossConfig("squares", options=options)
        config.check()
        value = build_loss(config, C).mean(logits, target)
        assert value == Squares(power)(logits, target).sum() / (target != IGNORE_INDEX).sum()
    for wrong in ({"pwer": 3}, {"config": 3}):
        with pytest.raises(UsageError, match=r"loss.options=.*loss.name=squares takes power") as caught:
            build_loss(LossConfig("squares", options=wrong), C)
        assert next(iter(wrong)) in str(caught.value)
    with pytest.raises(UsageError, match="loss.name=squares"):
        build_loss(LossConfig("squares"), C, [(1, 2)])


@pytest.mark.parametrize(
    ("case", "bound"),
    [("both", 0.4), ("focal", 0.4), ("seamseg", 0.4), ("over the batch", 0.7), ("max_pooling 1.7", 0.5), ("dice", 0.4),
     ("lovasz", 0.8)],
)  # fmt: skip
def test_no_loss_holds_the_enlarged_batch(case, bound, monkeypatch):
    """4 pictures of 32 x 32 from stride 8. Lovasz holds one of them, and one class's order of its pixels."""
    monkeypatch.setitem(losses.STRIP, "cpu", 2**12)
    logits, target = drawn(64, (4, 4), (32, 32), torch.float32, batch=4)
    config = replace(CASES[case][0], class_weights=CASES[case][0].class_weights and [1.0] * 64)
    with Allocations() as allocations:
        build_loss(config, 64).mean(logits.requires_grad_(), target).backward()
    assert allocations.peak < bound * target.numel() * 64 * logits.element_size()


def test_whole_networks_on_fake_tensors_can_have_any_pixelwise_mean():
    """segtrain/models/memory.py counts them."""
    with FakeTensorMode():
        for case in ("cross_entropy", "both", "focal, weights"):
            logits = torch.randn(2, C, 4, 4, requires_grad=True)
            built(case)(logits, torch.zeros(2, 32, 32, dtype=torch.int64)).sum().backward()
            assert logits.grad.shape == logits.shape
