"""Results of operations on fake tensors that are made again: they are torch's, and a traced step is the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import segtrain
from segtrain.engine.planning.trace import StepTracer
from segtrain.models import ledger, remembered


class Asked(TorchDispatchMode):
    """Runs every operation by `remembered`. asked: how often torch was asked."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device

        def call(*args, **kwargs):
            self.asked += 1
            return func(*args, **kwargs)

        return remembered.remembered(func, call, args, kwargs or {})


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(remembered, "KNOWN", {})


def facts(t):
    return t.shape, t.stride(), t.dtype, t.storage_offset(), t.untyped_storage().nbytes(), t.device


CALLS = {
    "sum of two dtypes": lambda x: x + x.half(),
    "broadcast": lambda x: x * x[:1, :, :1, :1].clone(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) * 2,
    "reduction": lambda x: x.mean((2, 3), keepdim=True),
    "several results": lambda x: torch.cat([one.clone() for one in x.split(1)]),
    "largest": lambda x: x.topk(2).values,
    "convolution": lambda x: torch.nn.functional.conv2d(x, x[:, :, :3, :3].clone()),
    "memory that two arguments share": lambda x: torch.stack(x.unbind(1)) * x[:1, :1, :1, :1],
    "into another": lambda x: x.clone().copy_(x[:, :1]),
    "expanded": lambda x: x[:1].expand(4, 3, 6, 8).mul(2),
    "view of a view": lambda x: x[:, 1:].transpose(2, 3)[..., ::2],
    "changed shape": lambda x: x.clone().unsqueeze_(0).transpose_(1, 2),
    "bits": lambda x: (x > 0).to(torch.uint8).bitwise_right_shift(3),
}

LEFT = "changed shape", "memory that two arguments share"


@pytest.mark.parametrize("name", CALLS)
def test_the_second_time_results_are_torchs(name):
    """Shape, strides, dtype, offset and bytes, for three inputs of other strides and dtypes."""
    found = []
    with FakeTensorMode():
        inputs = [torch.empty(2, 3, 6, 8), torch.empty(2, 3, 8, 6).transpose(2, 3), torch.empty(2, 3, 6, 8).double()]
        wanted = [facts(CALLS[name](x)) for x in inputs]
        with Asked() as asked:
            for _ in range(2):
                found.append([facts(CALLS[name](x)) for x in inputs])
                first, asked.asked = asked.asked, 0
    assert found == [wanted, wanted]
    assert (first == 0) == (name not in LEFT)  # torch is not asked the second time


def test_results_are_their_arguments_or_share_memory_with_them():
    with FakeTensorMode(), Asked():
        for _ in range(2):
            a, b = torch.empty(4, 5), torch.empty(5)
            assert a.add_(b) is a
            row = a[2]
            assert row.untyped_storage()._cdata == a.untyped_storage()._cdata != b.untyped_storage()._cdata
            assert (a * b).untyped_storage()._cdata not in {t.untyped_storage()._cdata for t in (a, b)}
            assert row._base is a and a._version == 1
            row.add_(1)
            assert a._version == 2


def test_numbers_that_are_equal_are_not_the_same():
    with FakeTensorMode(), Asked():
        x = torch.empty(3, dtype=torch.int64)
        assert [(x * n).dtype for n in (1, 1.0, True, 1.0)] == [torch.int64, torch.float32, torch.int64, torch.float32]


def test_an_error_is_one_every_time():
    with FakeTensorMode(), Asked():
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"size|broadcast"):
                torch.empty(3) + torch.empty(4)


def test_constants_real_and_complex_tensors_are_left_to_torch():
    with FakeTensorMode(allow_non_fake_inputs=True), Asked():
        _ = torch.empty((), dtype=torch.int64).add_(1) + 1  # the same operations, remembered
        for _ in range(2):
            assert int(torch.tensor(5).add_(1)) == int(torch.tensor(5) + 1) == 6
            assert torch.empty(3, dtype=torch.complex64).conj().is_conj()
    assert not any(
        made for made in remembered.KNOWN.values() if made and any(r.view and r.view[2].is_complex for r in made[1])
    )


@pytest.mark.parametrize("words", [[], ["model.keep=4bit"], ["model.recompute=blocks", "trainer.precision=bf16"]])
def test_a_step_is_the_same(words, monkeypatch):
    """To the byte."""
    config = segtrain.compose("experiment=toy", *words)
    asked = []

    def by_torch(func, call, args, kwargs):
        asked.append(func)
        return call(*args, **kwargs)

    steps = [(2, (64, 64)), (3, (64, 96)), (2, (64, 64))]
    found = []
    for _ in range(2):
        tracer = StepTracer(config, 19)
        found.append([tracer.trace(*step, details=True) for step in steps])
        monkeypatch.setattr(ledger, "remembered", by_torch)
    assert found[0] == found[1] and len(asked) > 1000
