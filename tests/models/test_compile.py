"""torch.compile of networks: one graph, the same numbers, no more memory kept for backward."""

import copy
import importlib
import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as partitioner

from segtrain.config import ModelConfig
from segtrain.errors import SegtrainError, UsageError
from segtrain.losses import CrossEntropy
from segtrain.models import build_model, compiled, execution, not_compilable
from segtrain.models.blocks import NORMS, IdentityResidualBlock, Norm, ResidualBlock, Stage, stage
from segtrain.models.execution import within_budget
from segtrain.models.memory import Saving, graphs_of, kept_bytes, training_step_costs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Remove the graphs of other tests."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would ask it for everything
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def step(model, call, x):
    """Loss, gradients and buffers after a step on x with seeded dropout, and the bytes that it kept."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = []
    kept = kept_bytes(lambda: out.append(call(x)) or out[0])
    loss = out[0].float().square().mean() if out[0].dtype == torch.bfloat16 else out[0].square().mean()
    loss.backward()
    found = {"loss": loss.detach(), "out": out[0].detach()}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}, kept


def check(model, compile_, x, tolerance, modes=(True, True, False)):
    """Compare training steps (True) and evaluations of a model and its compiled copy. Returns each one's kept bytes."""
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    graph = compile_(twin)
    kept = (0, 0)
    for training in modes:
        model.train(training)
        twin.train(training)
        before = x.clone()
        if training:
            (want, plain), (found, ours) = step(model, model, x), step(twin, graph, x)
            kept = ours, plain
        else:
            with torch.no_grad():
                want, found = {"out": model(x)}, {"out": graph(x)}
        assert torch.equal(x, before)
        assert want.keys() == found.keys()
        for name, a in want.items():
            if a.is_floating_point():
                assert (found[name] - a).norm() <= tolerance * (a.norm() + 1e-6), name
            else:
                assert torch.equal(found[name], a), name
    assert list(twin.state_dict()) == keys
    assert counters["stats"]["unique_graphs"] == len(set(modes))  # none in pieces, and none twice
    return kept


def blocks(norm, first=4, **options):
    """A block of each kind, one with dropout: (N, first, H, W) -> (N, 12, H / 2, W / 2)."""
    layers = Norm(norm, **options)
    return stage(
        IdentityResidualBlock(first, (4, 4), layers, dropout=0.3),
        IdentityResidualBlock(4, (4, 4, 8), layers, stride=2, groups=2),
        ResidualBlock(8, (8, 8), layers),
        ResidualBlock(8, (4, 4, 12), layers, dilation=2),
    )


def traced(model):
    return torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")


def test_blocks_as_one_graph():
    torch.manual_seed(0)
    model = blocks("inplace_abn").double().to(memory_format=torch.channels_last)
    ours, plain = check(model, traced, torch.randn(2, 4, 6, 8, dtype=torch.double), 1e-12)
    assert ours <= 1.05 * plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        *({"norm": norm} for norm in NORMS if norm != "inplace_abn"),
        {"norm": "inplace_abn", "variant": "two", "activation": "elu"},
        {"norm": "inplace_abn", "scale": "signed"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_blocks_of_every_norm_as_one_graph(options):
    torch.manual_seed(0)
    model = blocks(**options).double().to(memory_format=torch.channels_last)
    ours, plain = check(model, traced, torch.randn(2, 4, 6, 8, dtype=torch.double), 1e-12, modes=(True,))
    assert ours <= 1.05 * plain


@pytest.mark.slow
def test_blocks_under_autocast_as_one_graph():
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        check(blocks("inplace_abn"), traced, torch.randn(2, 4, 6, 8), 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50", "resnext101", "wider_resnet38"]
)
def test_every_backbone_is_one_graph(backbone):
    torch.manual_seed(0)
    model = build_model(backbone, num_classes=3, output_stride=16, head_channels=4)
    for part in model.modules():
        if isinstance(part, Stage):
            del part[2:]  # the blocks after the second are the second's kind
    model = model.double().to(memory_format=torch.channels_last)
    ours, plain = check(model, traced, torch.randn(2, 3, 32, 48, dtype=torch.double), 1e-11, modes=(True,))
    assert ours <= 1.05 * plain


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["inplace_abn", "batch_norm"])
def test_the_compiled_code_gives_the_models_numbers(norm):
    """With inductor and its C++ code; the masks of dropout are equal too."""
    torch.manual_seed(0)
    model = blocks(norm)[:2].double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 8, dtype=torch.double)
    ours, plain = check(model, lambda m: compiled(m, ModelConfig(norm=norm), CPU), x, 1e-9, modes=(True, True))
    assert ours <= 1.05 * plain


# ------------------------------------------------------------------------------------------------ a memory budget


@pytest.mark.parametrize("norm", ["batch_norm", "abn"])
def test_a_budget_keeps_fewer_bytes_and_the_same_numbers(norm, monkeypatch):
    """The graphs as torch divides them by the budget; running statistics move once, the masks of dropout are equal."""
    monkeypatch.setattr(execution, "inductor", graphs_of)
    torch.manual_seed(0)
    model = blocks(norm)[:3].double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 24, 32, dtype=torch.double)
    ours, plain = check(model, lambda m: compiled(m, ModelConfig(norm=norm), CPU, 0.2), x, 1e-12, modes=(True, True))
    assert ours <= 0.3 * plain  # the input is kept anyway


def test_a_graph_that_draws_again_in_backward_is_refused(monkeypatch):
    monkeypatch.setattr(execution, "inductor", graphs_of)
    monkeypatch.setattr(execution.KeepRandom, "__call__", lambda self, graph: None)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Dropout2d(0.5), nn.Conv2d(2, 2, 3))
    with pytest.raises(SegtrainError, match="would draw random numbers of forward again in backward"):
        compiled(model, ModelConfig(norm="abn"), CPU, 0.01)(torch.randn(2, 2, 8, 8)).sum().backward()


def test_what_is_counted_of_a_compiled_step():
    """Without a limit it computes and keeps what the network does; with one it computes more and keeps less."""
    importlib.import_module("tests.helpers.tiny")  # adds its backbone, for this test
    forms = [Saving("", "batch_norm"), *(Saving("", "batch_norm", budget=budget) for budget in (1.0, 0.3))]
    plain, free, limited = (training_step_costs(form, "tiny", CrossEntropy(), 2, (64, 64)) for form in forms)
    assert free.flops == plain.flops < limited.flops < 1.05 * plain.flops
    assert free.kept == pytest.approx(plain.kept, rel=0.02)
    assert limited.kept <= 0.6 * plain.kept  # the rest is of the loss, and its input
    assert plain.kept < plain.peak and limited.peak < free.peak


def test_a_budget_is_torchs_own_only_while_it_compiles():
    seen = []
    backend = within_budget(lambda graph, inputs: seen.append(partitioner.activation_memory_budget), 0.25)
    assert backend(None, []) is None
    assert seen == [0.25] and partitioner.activation_memory_budget == 1.0


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recompute": "blocks"}, "model.recompute=blocks must be none"),
        ({"recompute": "both"}, "model.recompute=both must be none"),
        ({"keep": "8bit"}, "choose model.keep=exact"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(options, words):
    with pytest.raises(UsageError, match=f"trainer.compile=true is not possible: .*{words}"):
        compiled(nn.Conv2d(1, 1, 1), ModelConfig(**options), CPU)


def test_compilation_is_refused_without_a_compiler_or_its_headers(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="no C\\+\\+ compiler 'no-such-compiler' .*apt install g"):
        compiled(nn.Conv2d(1, 1, 1), ModelConfig(), CPU)
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(execution.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="Python.h .*python3-dev"):
        compiled(nn.Conv2d(1, 1, 1), ModelConfig(), CPU)


def test_only_norms_that_exchange_statistics_need_one_process(monkeypatch):
    monkeypatch.setattr(execution, "group_or_none", lambda group: object())
    for norm in NORMS:
        reason = not_compilable(ModelConfig(norm=norm), CPU)
        if norm.endswith("_sync"):
            assert f"model.norm={norm} exchanges" in reason and f"choose model.norm={norm[:-5]}, or" in reason
        else:
            assert not reason


def test_what_a_gpu_needs(monkeypatch, tmp_path):
    """Triton, a GPU that it knows, a C compiler and Python's headers; no C++ compiler."""
    gpu, capability, found = torch.device("cuda"), [8, 0], {"gcc"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(execution.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(execution, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not_compilable(ModelConfig(norm="batch_norm"), gpu) == not_compilable(ModelConfig(), gpu) == ""
    found.clear()
    assert "no C compiler 'gcc' or 'clang'" in not_compilable(ModelConfig(), gpu)
    monkeypatch.setenv("CC", "mine")
    assert "no C compiler 'mine'" in not_compilable(ModelConfig(), gpu)
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    assert "needs Triton" in not_compilable(ModelConfig(), gpu)
    capability[:] = [6, 1]
    assert "7.0 and newer, and this GPU has 6.1" in not_compilable(ModelConfig(), gpu)
