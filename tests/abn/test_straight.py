"""Ordinary eager calls, which leave torch's dispatcher out: equal numbers, the same checks, remembered plans."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segtrain.abn import InPlaceABN, abn, inplace_abn, operators, straight
from segtrain.abn import functional as layer_functions
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_launch, cupy_layer
from segtrain.abn.backends import native as native_ops
from segtrain.abn.benchmark import host_table
from segtrain.abn.device_checks import check_layer
from tests.abn.cuda_emulator import emu
from tests.abn.cuda_emulator.launcher import Launcher, installed


class Watched(TorchDispatchMode):
    """Sees every operator, as tracing does."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


launcher = Launcher()


@pytest.fixture(params=["native", "aten", "cupy"])
def backend(request, monkeypatch):
    before = operators.chosen
    operators.use_backend("aten" if request.param == "cupy" else request.param)
    if request.param == "cupy":
        if emu.COMPILER is None:
            pytest.skip("no C++ compiler")
        monkeypatch.setitem(operators.resolved, "cpu", cupy_ops)
        launcher.orders = (0,)
        with installed(launcher):
            launcher.seen.clear()
            yield request.param
    else:
        yield request.param
    operators.use_backend(before)


CASES = {
    "plain": {},
    "signed": {"scale": "signed"},
    "elu": {"activation": "elu", "activation_param": 0.7},
    "identity, shortcut": {"activation": "identity", "shortcut": True},
    "shortcut": {"shortcut": True, "overwrite": False},
    "no affine": {"affine": False},
    "no statistics": {"tracked": False},
    "channels last": {"last": True, "shortcut": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "halves of parameters": {"vectors": torch.float16},
    "variant two": {"variant": "two"},
    "eval": {"training": False},
    "frozen": {"frozen": True},
}
OTHER_OPTIONS = {
    "momentum": {"momentum": 0.5}, "eps": {"eps": 0.3}, "slope": {"activation_param": 0.3},
    "signed form": {"scale": "signed"}, "other activation": {"activation": "elu"},
}  # fmt: skip


def results(case, mode=None, change=lambda t: t):
    """What a call changes and gives: z, the running statistics, all gradients."""
    options = dict((CASES | OTHER_OPTIONS)[case])
    dtype, last, affine = options.pop("dtype", torch.float32), options.pop("last", False), options.pop("affine", True)
    tracked, frozen, shortcut = options.pop("tracked", True), options.pop("frozen", False), options.pop("shortcut", 0)
    random = torch.Generator().manual_seed(0)
    kind = options.pop("vectors", torch.float64 if dtype == torch.float64 else torch.float32)

    def drawn(*shape):
        made = torch.randn(shape, generator=random).to(dtype if len(shape) == 4 else kind)
        return made.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else made

    x, dz, added = drawn(2, 5, 3, 4), drawn(2, 5, 3, 4), drawn(2, 5, 3, 4)
    weight, bias, mean, var = drawn(5), drawn(5), drawn(5), drawn(5).abs() + 0.5
    weight[2] = 0
    leaves = [t.requires_grad_() for t in (x, weight, bias, added)]
    if frozen:
        for t in (weight, bias):
            t.requires_grad_(False)
    with mode if mode is not None else torch.enable_grad():
        z = inplace_abn(
            change(x * 1), *((weight, bias) if affine else (None, None)), *((mean, var) if tracked else (None, None)),
            **options, **({"shortcut": added} if shortcut else {}),
        )  # fmt: skip
        z.backward(dz)
    return [z.detach(), mean, var, *(t.grad for t in leaves)]


def same(found, want):
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("case", CASES)
def test_eager_calls_equal_the_operators_to_the_bit(backend, case):
    watched = Watched()
    same(results(case), results(case, watched))
    assert any("segtrain_abn" in name for name in watched.seen)


def test_the_layer_against_float64(backend):
    failed = [str(result) for result in check_layer("cpu") if not result.good]
    assert not failed


def test_a_layer_on_cuda_is_six_launches_and_no_operation_of_torch(monkeypatch):
    names = []
    monkeypatch.setattr(cupy_ops, "launch", lambda kernel, *_: names.append(kernel.function))
    monkeypatch.setitem(operators.resolved, "cpu", cupy_ops)
    layer = InPlaceABN(8)
    x, dz = torch.randn(2, 8, 3, 4, requires_grad=True), torch.randn(2, 8, 3, 4)
    for _ in range(2):  # the second finds all plans
        given = x * 1
        names.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            z = layer(given)
            torch.autograd.grad(z, [given, layer.weight, layer.bias], dz)
    assert names == ["statistics", "merge_statistics", "normalise", "sums", "merge_sums", "gradient"]
    operations = {event.name for event in profile.events() if event.name.startswith("aten::")}
    makes = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "detach_", "alias"}
    # num_batches_tracked counts on by one operation, in BatchNorm too
    assert {name.removeprefix("aten::") for name in operations} - makes == {"add_"}, operations


def test_the_table_of_the_hosts_time_counts_launches():
    lines = list(host_table(1))
    assert [line.split()[0] for line in lines[-5:-1]] == ["torch", "cupy", "native", "aten"]
    assert "together 1.00" in lines[-5]
    assert lines[-1].startswith("cupy launches a call: 6 (statistics, ")
    assert operators.chosen == "auto"
    assert cupy_ops.launch is cupy_launch.launch


# --------------------------------------------------------------------------------------------------------- checks


def test_a_call_that_fitted_excuses_no_other(backend):
    def call(**changed):
        given = {"weight": torch.ones(5), "bias": torch.zeros(5), "running_mean": torch.zeros(5)}
        given |= {"running_var": torch.ones(5), "x": torch.randn(2, 5, 3, 4)}
        return inplace_abn(**{**given, **changed})

    call()
    for name in ("weight", "bias", "running_mean", "running_var"):
        for wrong in (torch.ones(4), torch.ones(1), torch.ones(5, dtype=torch.int32), torch.ones(5, device="meta")):
            with pytest.raises(ValueError, match=name):
                call(**{name: wrong})
    with pytest.raises(ValueError, match="share memory"):
        call(running_var=torch.ones(1).expand(5))
    x = torch.randn(2, 5, 3, 4)
    call(x=x, shortcut=torch.randn(2, 5, 3, 4))
    with pytest.raises(ValueError, match="the shortcut is the input"):
        call(x=x, shortcut=x)
    with pytest.raises(ValueError, match="expanded view"):
        call(x=torch.randn(1, 5, 3, 4).expand(2, 5, 3, 4))
    with pytest.raises(ValueError, match="empty"):
        call(x=torch.randn(0, 5, 3, 4))
    odd, plain = torch.ones(10)[::2].fill_(0.3), torch.full((5,), 0.3)
    assert torch.equal(call(x=x.clone(), weight=odd), call(x=x.clone(), weight=plain))
    gaps = torch.randn(2, 5, 3, 8)[..., ::2]
    assert torch.equal(call(x=gaps.clone()), call(x=gaps))


@pytest.mark.parametrize("case", ["plain", "channels last", "no affine"])
def test_saved_tensors_that_hooks_replace_are_looked_at_again(backend, case):
    def odd(t):
        if t.dim() == 4:
            return t.contiguous() if not t.is_contiguous() else t.contiguous(memory_format=torch.channels_last)
        return torch.stack([t, t], 1)[:, 0] if t.dim() == 1 else t

    want = results(case)
    with torch.autograd.graph.saved_tensors_hooks(odd, lambda t: t):
        found = results(case)
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_stored_with_the_other_sign(backend):
    want = results("plain")
    found = results("plain", change=lambda t: torch._neg_view(-t))
    assert torch._neg_view(torch.ones(1)).is_neg()
    same(found, want)


def test_second_derivatives_are_refused(backend):
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    z = inplace_abn(x * 1, torch.ones(5, requires_grad=True), None, None, None)
    (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# --------------------------------------------------------------------------------------------------------- tracing


def test_what_traces_sees_operators():
    x = torch.randn(2, 5, 3, 4)
    assert operators.primitives(x) is operators.primitives(torch.nn.Parameter(x)) is operators.direct
    assert operators.primitives(x.to("meta")) is torch.ops.segtrain_abn
    with torch._subclasses.FakeTensorMode() as fake:
        assert operators.primitives(fake.from_tensor(x)) is torch.ops.segtrain_abn
        assert operators.primitives(x) is torch.ops.segtrain_abn
    with Watched():
        assert operators.primitives(x) is torch.ops.segtrain_abn
    found = []
    torch.jit.trace(lambda t: found.append(operators.primitives(t)) or t + 1, x, check_trace=False)
    assert found == [torch.ops.segtrain_abn]


# ------------------------------------------------------------------------------------------------- what is remembered


def test_what_is_remembered_of_one_call_holds_for_no_call_with_other_options(backend):
    """On tensors of one shape, layout and dtype. The same back end's operators would remember the same.

    At the weight that is 0, what is recovered of the input, and with it that weight's gradient, is right to 1 %.
    """
    cases = [case for case in ("plain", *OTHER_OPTIONS) for _ in range(2)]
    found = [results(case) for case in cases]
    operators.use_backend("aten")
    for case, mine in zip(cases, found, strict=True):
        for a, b in zip(mine, results(case), strict=True):
            bound = torch.full((5,), 1e-4)
            bound[2] = 1e-2  # of the weight that is 0
            bound = bound if b is None or b.dim() == 1 else bound.view(5, 1, 1)
            assert (a is None and b is None) or ((a - b).abs() <= bound * (1 + b.abs())).all(), case


def test_plans_are_made_once_and_their_number_is_bounded(backend, monkeypatch):
    memories = [layer_functions.examined_calls, straight.straight_backward, native_ops.plans, cupy_ops.plans]
    memories.append(cupy_layer.plans)
    monkeypatch.setattr(straight, "MOST_SIGNATURES", 3)
    for ops in (native_ops, cupy_ops):
        monkeypatch.setattr(ops, "MOST_PLANS", 3)
    for memory in memories:
        memory.clear()
    for _ in range(2):
        results("plain")
        made = [dict(memory) for memory in memories]
    results("plain")
    assert [dict(memory) for memory in memories] == made
    assert [bool(memory) for memory in made] == [
        True, True, backend == "native", backend == "cupy", backend == "cupy"
    ]  # fmt: skip
    for size in range(2, 10):
        x = torch.randn(2, 3, size, requires_grad=True)
        z = inplace_abn(x * 1, None, None, None, None)
        want = abn(x.double(), None, None, None, None, eps=1e-5)
        assert torch.allclose(z.double(), want, atol=1e-4)
        z.sum().backward()
    assert all(len(memory) <= 3 for memory in memories)
