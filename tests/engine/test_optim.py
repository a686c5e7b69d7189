"""Optimizers, their parameter groups, and schedules at hand-worked points."""

import math
import runpy
import sys

import pytest
import torch
import yaml
from torch import nn

from segtrain.config import OptimizerConfig, ScheduleConfig
from segtrain.engine.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate
from segtrain.errors import UsageError
from segtrain.models import build_model
from tests.helpers.checkout import ROOT, TINY
from tests.helpers.runs import black_box, same, state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.cls = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.cls(self.body(x).relu())


def trained(config, model=None, steps=4):
    """Parameters after several steps on the same gradients."""
    torch.manual_seed(0)
    model = model or Net()
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()], optimizer


# ------------------------------------------------------------------------------------------------ optimizers


def test_sgd_worked_by_hand():
    """w ** 2 / 2 from w = 1 with lr 0.1, momentum 0.5, decay 1: the gradient is 2 w. v: 2, 1 + 1.6; w: 0.8, 0.54."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(1))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, momentum=0.5, weight_decay=1))
    for want in (0.8, 0.54):
        optimizer.zero_grad()
        (model.w**2 / 2).sum().backward()
        optimizer.step()
        assert model.w.item() == pytest.approx(want)


def test_adamw_worked_by_hand():
    """The first step is lr for any gradient, after w is decayed by lr * weight_decay."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(model, OptimizerConfig("adamw", lr=0.1, weight_decay=0.5))
    (7 * model.w).sum().backward()
    optimizer.step()
    assert model.w.item() == pytest.approx(2 - 0.1 * 0.5 * 2 - 0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"momentum": 0.0}, {"name": "adamw", "betas": [0.8, 0.9]}],
)
@pytest.mark.parametrize("decay", [True, False])
def test_fused_equals_unfused(options, decay):
    found = {}
    for fused in (None, True, False):
        config = OptimizerConfig(**options, lr=0.02, weight_decay=0.1, decay_norm_and_bias=decay, fused=fused)
        found[fused], optimizer = trained(config)
        assert all(group["fused"] == (fused is not False) for group in optimizer.param_groups)
    for one, other, chosen in zip(found[True], found[False], found[None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert torch.equal(one, chosen)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_options_reach_torch(name):
    """Against torch's optimizers with the same arguments, bit for bit."""
    torch.manual_seed(0)
    model, kwargs = Net(), {"lr": 0.02, "weight_decay": 0.1, "fused": False}
    config = OptimizerConfig(name, **kwargs, **{"sgd": {"momentum": 0.7}, "adamw": {"betas": [0.7, 0.8]}}[name])
    if name == "sgd":
        other = torch.optim.SGD(model.parameters(), momentum=0.7, **kwargs)
    else:
        other = torch.optim.AdamW(model.parameters(), betas=(0.7, 0.8), **kwargs)
    for _ in range(4):
        other.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        other.step()
    for one, parameter in zip(trained(config)[0], model.parameters(), strict=True):
        assert torch.equal(one, parameter)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_where_there_is_no_kernel(name):
    model = Net()
    model.head = nn.Linear(2, 2, device="meta")
    assert not build_optimizer(model, OptimizerConfig(name)).param_groups[0]["fused"]
    with pytest.raises(UsageError, match=r"optimizer.fused=True is not possible: .*; give null or false"):
        build_optimizer(model, OptimizerConfig(name, fused=True))


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups_hold_each_parameter_once(name, decay, factor):
    """In a real network; the group of a parameter follows from its module."""
    with torch.device("meta"):
        model = build_model("resnet18", num_classes=3, norm="inplace_abn")
    options = OptimizerConfig(name, lr=0.5, weight_decay=0.25, decay_norm_and_bias=decay, backbone_lr_factor=factor)
    groups = build_optimizer(model, options).param_groups
    assert len(groups) == (1 if decay else 2) * (1 if factor == 1 else 2)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            group = group_of[id(parameter)]
            assert group["lr_factor"] == (factor if path.startswith("body.") else 1)
            assert group["lr"] == 0.5 * group["lr_factor"]
            plain = not isinstance(module, nn.Conv2d | nn.Linear) or key == "bias"
            assert group["weight_decay"] == (0 if plain and not decay else 0.25)


def test_default_is_one_group_in_the_models_order():
    """The optimizer state of an older checkpoint must fit."""
    model = Net()
    (group,) = build_optimizer(model, OptimizerConfig()).param_groups
    assert all(one is other for one, other in zip(group["params"], model.parameters(), strict=True))


def test_a_shared_parameter_is_held_once():
    model = Net()
    model.again = model.body[0]
    groups = build_optimizer(model, OptimizerConfig(decay_norm_and_bias=False)).param_groups
    assert sum(len(group["params"]) for group in groups) == 5


def test_a_backbone_factor_needs_a_backbone():
    with pytest.raises(UsageError, match=r"optimizer.backbone_lr_factor=0.5"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(backbone_lr_factor=0.5))
    build_optimizer(nn.Linear(2, 2), OptimizerConfig())


# ------------------------------------------------------------------------------------------------ schedules

AT = [0.0, 0.25, 0.5, 0.75]
HAND = [
    (ScheduleConfig(), [1, 0.75**0.9, 0.5**0.9, 0.25**0.9]),
    (ScheduleConfig(power=2.0), [1, 9 / 16, 1 / 4, 1 / 16]),
    (ScheduleConfig("linear"), [1, 0.75, 0.5, 0.25]),
    (ScheduleConfig("linear", end_factor=0.2), [1, 0.8, 0.6, 0.4]),
    (ScheduleConfig("cosine"), [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    (ScheduleConfig("cosine", end_factor=0.5), [1, 0.75 + 0.5**0.5 / 4, 0.75, 0.75 - 0.5**0.5 / 4]),
    (ScheduleConfig("step", milestones=[0.5, 0.6]), [1, 1, 0.1, 0.01]),
    (ScheduleConfig("step", milestones=[0.25], factor=0.5), [1, 0.5, 0.5, 0.5]),
    (ScheduleConfig("constant"), [1, 1, 1, 1]),
]


@pytest.mark.parametrize(("schedule", "want"), HAND)
def test_schedules_worked_by_hand(schedule, want):
    schedule.check()
    found = [learning_rate(OptimizerConfig(lr=3.0), schedule, int(100 * share), share) for share in AT]
    assert found == pytest.approx([3 * value for value in want], rel=1e-12)


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in HAND])
@pytest.mark.parametrize("warmup", [1, 7])
def test_warm_up_meets_the_schedule(schedule, warmup):
    """The rate rises linearly from warmup_factor times the schedule's to the schedule's own, and then equals it."""
    options = OptimizerConfig(lr=0.4)
    warm = ScheduleConfig(**{**vars(schedule), "warmup_steps": warmup, "warmup_factor": 0.3})
    warm.check()
    ratio = [learning_rate(options, warm, k, k / 50) / learning_rate(options, schedule, k, k / 50) for k in range(50)]
    assert ratio[0] == pytest.approx(0.3)
    assert ratio[warmup:] == [1] * (50 - warmup)
    rises = [after - before for before, after in zip(ratio[:warmup], ratio[1 : warmup + 1], strict=True)]
    assert rises == pytest.approx([0.7 / warmup] * warmup)


def published_step():
    return ScheduleConfig(**yaml.safe_load((ROOT / "configs" / "schedule" / "step.yaml").read_text()))


@pytest.mark.parametrize("per_epoch", [1, 7, 5005, 2502, 10009])
def test_epochs_30_and_60_of_90_fall_on_their_steps(per_epoch):
    """The published step schedule: x 0.1 after 30 and 60 epochs, for any number of steps in an epoch."""
    last = 90 * per_epoch
    for step, want in ((30 * per_epoch, 0.1), (60 * per_epoch, 0.01)):
        before, at = (learning_rate(OptimizerConfig(lr=1), published_step(), k, k / last) for k in (step - 1, step))
        assert (before, at) == pytest.approx((10 * want, want))


def test_the_published_linear_schedule():
    """ImageNet, 0.1 to 1e-6: 0.1 (1 - 2.222e-6 k) at step k, which 450 000 steps and end_factor 1e-4 meet exactly."""
    rate = OptimizerConfig(lr=0.1)
    for k in (0, 1, 1000, 225_000, 449_999):
        found = learning_rate(rate, ScheduleConfig("linear", end_factor=1e-4), k, k / 450_000)
        assert found == pytest.approx(0.1 * (1 - 2.222e-6 * k), rel=1e-8)
    paper = ScheduleConfig("linear", end_factor=1e-5)
    paper.check()
    assert learning_rate(rate, paper, 450_449, 450_449 / 450_450) == pytest.approx(1e-6, rel=0.3)


def test_every_schedule_falls_and_stays_positive():
    for schedule, _ in HAND:
        rates = [learning_rate(OptimizerConfig(lr=1), schedule, k, k / 97) for k in range(97)]
        assert rates[0] == 1
        assert all(0 < after <= before for before, after in zip(rates, rates[1:], strict=False))


# ------------------------------------------------------------------------------------------------ plugins


@pytest.fixture
def plugin():
    """The parts of tests/fixtures/plugins/my_optimizer.py, for one test."""
    before = dict(OPTIMIZERS), dict(SCHEDULES)
    runpy.run_path(str(ROOT / "tests" / "fixtures" / "plugins" / "my_optimizer.py"))
    yield
    for parts, known in zip((OPTIMIZERS, SCHEDULES), before, strict=True):
        for name in parts.keys() - known.keys():
            del parts[name]


def test_an_optimizer_and_a_schedule_of_a_plugin(plugin):
    """Lion moves w = 2 by lr, after a decay by lr * weight_decay; the rate falls in the last fifth."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(model, OptimizerConfig("lion", lr=0.1, weight_decay=0.5))
    (7 * model.w).sum().backward()
    optimizer.step()
    assert model.w.item() == pytest.approx(2 - 0.1 * 0.5 * 2 - 0.1)
    assert [group["lr_factor"] for group in optimizer.param_groups] == [1]
    schedule = ScheduleConfig("cool_down")
    rates = [learning_rate(OptimizerConfig(lr=2.0), schedule, step, step / 10) for step in (0, 5, 8, 9)]
    assert rates == pytest.approx([2, 2, 2, 1])


def test_a_plugins_optimizer_trains_and_resumes(segtrain, words, plugin):
    path = ROOT / "tests" / "fixtures" / "plugins" / "my_optimizer.py"
    chosen = [*words, f"plugins=[{TINY},{path}]", "optimizer.name=lion", "optimizer.lr=1e-3", "schedule.name=cool_down"]
    try:
        for steps, run in ((4, "whole"), (2, "cut"), (4, "cut")):
            # The shorter run too has a constant rate: the schedule falls in the last fifth only.
            answer = segtrain("train", *chosen, f"run={run}", f"trainer.max_steps={steps}")
            assert answer.status == 0, answer
    finally:
        sys.modules.pop("my_optimizer", None)
    whole, cut = state("whole/last.pt"), state("cut/last.pt")
    assert set(whole["optimizer"]["state"][0]) == {"mean"}
    assert [line["lr"] for line in black_box("whole")] == [1e-3] * 4
    assert same(whole["model"], cut["model"]) and same(whole["optimizer"], cut["optimizer"])


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UsageError, match=r"optimizer.name=lion .*sgd, adamw"):
        build_optimizer(Net(), OptimizerConfig("lion"))
    with pytest.raises(UsageError, match=r"schedule.name=cool_down .*poly, linear, step, cosine, constant"):
        learning_rate(OptimizerConfig(), ScheduleConfig("cool_down"), 0, 0.0)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OptimizerConfig("adam"), ["optimizer.name must be one of sgd, adamw, got adam"]),
        (OptimizerConfig("adamw", momentum=0.5), ["optimizer.momentum=0.5", "adamw does not read", "leave it at 0.9"]),
        (OptimizerConfig("adamw", nesterov=True), ["optimizer.nesterov=true", "leave it at false"]),
        (OptimizerConfig(betas=[0.9, 0.99]), ["optimizer.betas=[0.9, 0.99]", "optimizer=adamw"]),
        (OptimizerConfig("adamw", betas=[0.9]), ["optimizer.betas must be [beta1,beta2], ", "got [0.9]"]),
        (OptimizerConfig("adamw", betas=[0.9, 1.0]), ["optimizer.betas must", "less than 1, got [0.9, 1.0]"]),
        (OptimizerConfig(backbone_lr_factor=-1), ["optimizer.backbone_lr_factor must be at least 0, got -1"]),
        (OptimizerConfig(clip_norm=0), ["optimizer.clip_norm must be greater than 0 or null, got 0"]),
        (OptimizerConfig(lr=math.inf), ["optimizer.lr must be greater than 0 and finite, got inf"]),
        (ScheduleConfig("exponential"), ["schedule.name must be", "poly, linear, step, cosine, constant, got exp"]),
        (ScheduleConfig("cosine", power=1), ["schedule.power=1", "schedule=poly"]),
        (ScheduleConfig(end_factor=0.1), ["schedule.end_factor=0.1", "schedule=linear or cosine"]),
        (ScheduleConfig("linear", end_factor=-0.1), ["schedule.end_factor must be at least 0 and at most 1, got -0.1"]),
        (ScheduleConfig("step"), ["schedule.milestones=[]", "0.3333333333"]),
        (ScheduleConfig("step", milestones=[0.6, 0.3]), ["schedule.milestones=[0.6, 0.3]", "ascending"]),
        (ScheduleConfig("step", milestones=[30.0, 60.0]), ["schedule.milestones must", "greater than 0 and less than"]),
        (ScheduleConfig("step", milestones=[0.5], factor=1), ["schedule.factor must be", "less than 1, got 1"]),
        (ScheduleConfig(warmup_steps=-1), ["schedule.warmup_steps must be at least 0, got -1"]),
        (ScheduleConfig(warmup_factor=0.5), ["schedule.warmup_factor=0.5", "schedule.warmup_steps"]),
        (ScheduleConfig(warmup_steps=3, warmup_factor=2), ["schedule.warmup_factor must be", "at most 1, got 2"]),
    ],
)  # fmt: skip
def test_impossible_options(config, words):
    with pytest.raises(UsageError) as caught:
        config.check()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("group", ["loss", "optimizer", "schedule"])
def test_every_choice_of_the_groups_composes(segtrain, group):
    for path in (ROOT / "configs" / group).glob("*.yaml"):
        answer = segtrain("train", f"{group}={path.stem}", "--cfg", "job")
        assert answer.status == 0, answer


def test_options_from_the_command_line(segtrain):
    answer = segtrain(
        "train", "loss=max_pooling", "loss.p=inf", "optimizer=adamw", "optimizer.fused=false", "optimizer.clip_norm=1",
        "schedule=step", "schedule.milestones=[0.5]", "schedule.warmup_steps=5", "--cfg", "job",
    )  # fmt: skip
    composed = yaml.safe_load(answer.out)
    assert composed["loss"]["p"] == math.inf
    assert composed["optimizer"]["fused"] is False
    assert composed["optimizer"]["clip_norm"] == 1
    assert composed["schedule"]["milestones"] == [0.5]
