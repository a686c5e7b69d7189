"""Max-pooling with byte offsets against torch's own, bit for bit."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from segtrain.models.pooling import MaxPool2d
from tests.helpers.networks import kept_bytes


def compare(x, size=3, stride=2, padding=1, dz=None):
    found = []
    for layer in (MaxPool2d(size, stride, padding), nn.MaxPool2d(size, stride, padding)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(leaf)
        torch.manual_seed(5)
        gradient = torch.randn(out.shape).to(out.dtype) if dz is None else dz(out)
        out.backward(gradient)
        found.append((out.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(nan=12345.0), theirs.nan_to_num(nan=12345.0))
    assert found[0][0].is_contiguous() == found[1][0].is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(3, 13), st.integers(3, 13),
    st.sampled_from([(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 3, 0), (2, 1, 1)]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_equals_torch(n, c, h, w, window, channels_last, ties):
    torch.manual_seed(n + 7 * h + w)
    x = torch.randint(0, 3, (n, c, h, w)).float() if ties else torch.randn(n, c, h, w)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    compare(x, *window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types(dtype):
    compare(torch.randn(2, 3, 9, 8).to(dtype))


def test_nan_and_infinities():
    x = torch.randn(2, 3, 9, 9)
    x[0, 0, 2:4, 3] = float("nan")
    x[1, 1] = float("-inf")
    x[1, 2, 4, 4] = float("inf")
    compare(x)


@pytest.mark.parametrize("view", [lambda x: x[..., ::2], lambda x: x.transpose(2, 3), lambda x: x[:, 1:]])
def test_strided_inputs_and_gradients(view):
    x = torch.randn(2, 4, 10, 12)
    results = []
    for layer in (MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)):
        leaf = x.clone().requires_grad_()
        out = layer(view(leaf))
        out.backward(torch.arange(out.shape[-1], dtype=torch.float32).expand(out.shape))
        results.append((out, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_byte_per_output_is_kept():
    x = torch.randn(2, 8, 32, 32, requires_grad=True) * 1
    assert kept_bytes(lambda: MaxPool2d(3, 2, 1)(x)) == 2 * 8 * 16 * 16
    assert kept_bytes(lambda: nn.MaxPool2d(3, 2, 1)(x)) == x.nbytes + 8 * 2 * 8 * 16 * 16


def test_gradcheck_copies_and_recomputation():
    pool = MaxPool2d(3, 2, 1)
    x = torch.randperm(2 * 2 * 7 * 6).double().view(2, 2, 7, 6).requires_grad_()
    assert torch.autograd.gradcheck(pool, (x,))
    again = pickle.loads(pickle.dumps(copy.deepcopy(pool)))
    assert torch.equal(checkpoint(again, x, use_reentrant=False), pool(x))
    assert not list(pool.state_dict())
    with torch.no_grad():
        assert torch.equal(pool(x), nn.MaxPool2d(3, 2, 1)(x))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_alone(device):
    def shapes():
        x = torch.randn(2, 3, 9, 9, device="meta" if device == "meta" else "cpu", requires_grad=True)
        out = MaxPool2d(3, 2, 1)(x)
        out.sum().backward()
        return out.shape, x.grad.shape

    if device == "meta":
        assert shapes() == ((2, 3, 5, 5), (2, 3, 9, 9))
    else:
        with FakeTensorMode():
            assert shapes() == ((2, 3, 5, 5), (2, 3, 9, 9))


def test_a_window_too_large_for_a_byte_is_refused():
    with pytest.raises(ValueError, match="up to 16"):
        MaxPool2d(17, 2)
