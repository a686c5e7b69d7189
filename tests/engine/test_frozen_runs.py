"""model.frozen in runs: in one process and in two, resumed, and refused on a changed resume."""

import pytest
import torch

from segtrain.config.compose import compose_training
from segtrain.engine.planning.trace import StepTracer
from tests.helpers.runs import Ranks, refused, same, state

FROZEN = ["model.frozen=[backbone]", "model.frozen_norm=true", "trainer.keep_last=3", "trainer.save_every=2"]


def changes(first, second):
    return {key for key in first if not torch.equal(first[key], second[key])}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_frozen_part_stays_to_the_bit(words, segtrain, ranks):
    options = [*words, *FROZEN, "run=r", "loader.workers=0"]
    if ranks == 1:
        answer = segtrain("train", *options)
        assert answer.status == 0, answer
        out = answer.out
    else:
        out, _ = Ranks(ranks, "train", *options).ended()
    assert "frozen     backbone, running statistics of 4 norm layers too: " in out
    assert out.count("WARNING    the frozen parts have random weights") == 1
    first, last = state("r/step_0000002.pt"), state("r/last.pt")
    moved = changes(first["model"], last["model"])
    assert not any(key.startswith("body.") for key in moved)
    assert {key for key in last["model"] if key.startswith(("head.", "cls."))} == moved
    own = [key for key in last["model"] if key.startswith(("head.", "cls.")) and key.endswith(("weight", "bias"))]
    assert sum(len(group["params"]) for group in last["optimizer"]["param_groups"]) == len(own)


def test_a_resume_goes_on_to_the_bit_and_refuses_other_parts(words, segtrain):
    options = [*words, *FROZEN, "loader.workers=0", "schedule=constant"]
    assert segtrain("train", *options, "run=whole").status == 0
    assert segtrain("train", *options, "run=cut", "trainer.max_steps=2").status == 0
    assert segtrain("train", *options, "run=cut").status == 0
    whole, cut = state("whole/last.pt"), state("cut/last.pt")
    assert cut["step"] == 6 and same(whole["model"], cut["model"]) and same(whole["optimizer"], cut["optimizer"])
    other = ["model.frozen=[head]", "model.frozen_norm=true"]
    refused(segtrain("train", *options, *other, "run=cut"), "model.frozen", "belongs to another", status=1)


@pytest.mark.parametrize("loss", ["cross_entropy", "bootstrapped"])
def test_a_plan_counts_no_state_of_frozen_parameters(words, loss):
    options = [*words, f"loss={loss}", "model.frozen=[backbone]"]
    tracer = StepTracer(compose_training(*options), 2)
    rest, body = (sum(p.numel() for p in part.parameters()) for part in (tracer.network, tracer.network.body))
    plain = StepTracer(compose_training(*options[:-1]), 2)
    found, every = (one.trace(2, (32, 48)).static for one in (tracer, plain))
    assert (found["optimizer"], every["optimizer"]) == (4 * (rest - body), 4 * rest)  # momentum; float32
    assert every["gradients"] - found["gradients"] >= 4 * body
