import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.data.labels import IGNORE
from segtrain.losses import cross_entropy


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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), hardest=st.sampled_from([1.0, 0.25, 0.5, 0.07]), ignored=st.floats(0, 1))
def test_equals_the_definition(seed, hardest, ignored):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=generator).double()
    target = torch.randint(0, 4, (2, 5, 6), generator=generator)
    target[torch.rand(2, 5, 6, generator=generator) < ignored] = IGNORE
    assert cross_entropy(logits, target, hardest).item() == pytest.approx(slow(logits, target, hardest), abs=1e-12)


@pytest.mark.parametrize("hardest", [1.0, 0.25])
def test_no_labelled_pixel_gives_zero_and_zero_gradient(hardest):
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3, 3), IGNORE), hardest)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_all_pixels_is_torchs_loss():
    logits, target = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    torch.testing.assert_close(cross_entropy(logits, target, 1.0), torch.nn.functional.cross_entropy(logits, target))


def test_only_the_hardest_pixels_have_a_gradient():
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    cross_entropy(logits, target, 0.25).backward()
    touched = logits.grad.abs().sum(1) > 0
    losses = torch.nn.functional.cross_entropy(logits.detach(), target, reduction="none")
    assert touched.sum() == 4
    assert losses[touched].min() > losses[~touched].max()
