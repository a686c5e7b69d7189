"""What a step is planned with, against networks' own numbers; what fits, against brute force; and where it is used."""

from types import SimpleNamespace

import pytest
import torch

import segtrain
from segtrain.config import TrainConfig, option_of
from segtrain.config.keys import known_options
from segtrain.data.loader import Batch
from segtrain.distributed.group import World
from segtrain.engine.learner import Learner
from segtrain.engine.planning import automatic
from segtrain.engine.planning.solve import (
    Line,
    Needs,
    Question,
    largest,
    micro_batch,
    name_of,
    solve_all,
    ways,
    with_model,
)
from segtrain.engine.planning.trace import PHASES, Phases, StepTracer, loss_of
from segtrain.errors import SegtrainError
from segtrain.models import from_config
from segtrain.models.ledger import Ledger, reordered
from tests.helpers.checkout import TINY

SMALL = ("experiment=toy", f"plugins=[{TINY}]", "model.backbone=tiny", "augmentation.crop_size=[64,96]")


def small(*words: str) -> TrainConfig:
    return segtrain.compose(*SMALL, *words)


# ------------------------------------------------------------------------------------------------ the trace


@pytest.mark.parametrize(
    "words",
    [("model.norm=batch_norm",), (), ("model.keep=8bit",), ("model.recompute=blocks",), ("trainer.precision=bf16",),
     ("trainer.accumulation=2", "optimizer=adamw", "trainer.ema_decay=0.9")],
    ids=["batch_norm", "in_place", "8bit", "blocks", "bf16", "accumulated"],
)  # fmt: skip
def test_a_planned_step_is_the_real_one(words):
    """Six ways to train: the peak and kept bytes of a real step on the CPU, every allocation followed."""
    config = small(*words, "device=cpu", "optimizer.fused=false")
    traced = StepTracer(config, 19).trace(2, (64, 96))
    learner = Learner(from_config(config.model, 19), loss_of(config, 19), config, World(), torch.device("cpu"))
    batch = Batch(torch.zeros(2, 3, 64, 96, dtype=torch.uint8), torch.zeros(2, 64, 96, dtype=torch.uint8), [], [], [])
    batches = [batch] * config.trainer.accumulation
    learner.step(batches, 1e4, 0, 0.0)  # makes the optimizer's state
    learner.optimizer.zero_grad(set_to_none=True)
    average = [] if learner.average is None else [*learner.average.parameters(), *learner.average.buffers()]
    state = [t for one in learner.optimizer.state.values() for t in one.values() if torch.is_tensor(t)]
    there = [*learner.network.parameters(), *learner.network.buffers(), *state, *average]

    class Real(Ledger):
        """Follows real tensors: nothing is answered in their place, the batch counts as made inside."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else (result,):
                if isinstance(t, torch.Tensor):
                    self.add(t)
            self.use(reordered(func, args, result))
            return result

    with Real(1, there) as ledger:
        for t in batch[:2]:
            ledger.add(t)
        step = Phases(
            ledger,
            SimpleNamespace(learner=learner, forward=learner.model, loss=learner.loss, norm=learner.gradient_norm),
        )
        learner.step(batches, 1e4, 1, 0.1)
    gradients = ledger.numbers(p.grad for p in learner.network.parameters())
    assert traced.kept == ledger.size(ledger.alive_after(step.kept_at) - gradients)
    real = max(size for size, _ in ledger.peaks().values()) + sum(t.untyped_storage().nbytes() for t in there)
    assert traced.peak == pytest.approx(real, rel=0.01)
    static = sum(traced.static[name] for name in ("parameters", "optimizer", "averaged weights"))
    assert static == pytest.approx(sum(t.nbytes for t in there), rel=1e-3)
    assert traced.static["gradients"] == ledger.size(gradients)


def test_in_place_keeps_less_and_buckets_are_there_from_the_start():
    standard, ours = (StepTracer(small(f"model.norm={norm}"), 19) for norm in ("batch_norm", "inplace_abn"))
    assert ours.trace(2, (64, 96)).kept < standard.trace(2, (64, 96)).kept
    one, two = StepTracer(small(), 19), StepTracer(small(), 19, devices=2)
    alone, beside = one.trace(2, (64, 96), details=True), two.trace(2, (64, 96), details=True)
    gradients = alone.static["gradients"]
    buckets = two.static["gradients"]
    assert one.static["gradients"] == 0 and buckets == beside.static["gradients"] == pytest.approx(gradients, rel=0.01)
    assert beside.peaks["forward"] == alone.peaks["forward"] + buckets
    assert sum(beside.at_peak.values()) == beside.peak == max(beside.peaks.values())
    assert sum(beside.kept_by.values()) == beside.kept and list(beside.peaks) == list(PHASES)


@pytest.mark.parametrize("words", [("model.norm=batch_norm",), (), ("model.keep=8bit",), ("trainer.precision=bf16",)])
def test_what_grows_bounds_the_next_step(words):
    """Without a trace of it: an image more, and a larger crop, need at least this."""
    tracer = StepTracer(small(*words), 19)
    now = tracer.trace(4, (128, 192))
    assert now.peak + now.growing / 4 <= tracer.trace(5, (128, 192)).peak * 1.001
    assert now.peak + now.growing * 0.5625 <= tracer.trace(4, (160, 240)).peak * 1.001
    assert now.growing > 0


@pytest.mark.parametrize("keep", ["8bit", "4bit"])
def test_with_codes_a_deeplabv3plus_step_keeps_no_other_map_in_full(keep):
    """By module: all that is more than a fiftieth of it."""
    model = ("model.backbone=resnet18", "model.head=deeplabv3plus", "model.output_stride=16", f"model.keep={keep}")
    config = segtrain.compose("experiment=toy", *model, "device=cpu")
    trace = StepTracer(config, 19).trace(2, (256, 256), details=True)
    full = {key for key, size in trace.kept_by.items() if size > trace.kept / 50 and not key[1].endswith("codes")}
    assert full == {("outside", "loss"), ("cls", "Conv2d output")}


def test_a_synchronised_norm_is_solved_once():
    norms = ("inplace_abn", "inplace_abn_sync", "batch_norm_sync")
    asked = {norm: with_model(small(), norm, "none", "exact") for norm in norms}
    answers = solve_all(Question(name, way, 19, 1, 2 * 10**7) for name, way in asked.items())
    plain, ours, others = (answers[name] for name in norms)
    assert plain == ours._replace(name="inplace_abn", traces=0) and others.batch < ours.batch
    alone = StepTracer(asked["inplace_abn"], 19).trace(2, (64, 96))
    assert StepTracer(asked["inplace_abn_sync"], 19).trace(2, (64, 96)) == alone


def test_every_loss_can_be_planned():
    for name in ("cross_entropy", "bootstrapped", "max_pooling", "focal", "dice", "lovasz"):
        assert StepTracer(small(f"loss={name}"), 19).trace(2, (64, 96)).peaks["loss"] > 0


# ------------------------------------------------------------------------------------------------ the solver


@pytest.mark.parametrize("curve", [lambda n: 7 + 3 * n, lambda n: max(50, 7 + 3 * n), lambda n: 5 + n * n / 9])
@pytest.mark.parametrize("guess", [Line(0, 1), Line(0, 30), Line(-50, 0.01)])
@pytest.mark.parametrize("memory", [6, 12, 13, 40, 57, 60, 10**4])
@pytest.mark.parametrize("bounded", [False, True])
def test_the_largest_that_fits_is_brute_forces(curve, memory, guess, bounded):
    """bounded: with what grows at each number, and a step that was traced before."""
    asked = []

    def needs(n):
        asked.append(n)
        return Needs(curve(n), n * (curve(n + 1) - curve(n)) if bounded else 0)

    found, _ = largest(needs, lambda n: n, memory, (2, 99), guess, (90, curve(90)) if bounded else None)
    fitting = [n for n in range(2, 100) if curve(n) <= memory]
    assert found == (max(fitting) if fitting else 0)
    assert not found or found in asked  # no answer is extrapolated


def test_ways_follow_the_options_and_say_what_is_not_possible():
    possible, refused = ways(small())
    about = {key: option_of(item) for key, item in known_options(TrainConfig).items()}
    names = {name.partition("+")[2] for name in {**possible, **refused}}
    assert names >= {*about["model.recompute"].choices, *about["model.keep"].choices} - {"none", "exact"}
    assert {"batch_norm", "abn", "inplace_abn", "inplace_abn+blocks", "inplace_abn+8bit"} <= possible.keys()
    assert "batch_norm+8bit" in refused and not possible.keys() & refused.keys()
    both = small("model.keep=4bit", "model.norm=inplace_abn_sync", "model.norm_variant=two")
    assert "inplace_abn+grouped" not in possible and "no grouped convolution" in refused["inplace_abn+grouped"]
    assert name_of(both) == "inplace_abn_sync+4bit" and ways(both)[0]["batch_norm"].model.norm_variant == "one"


def test_answers_fit_and_the_next_ones_do_not():
    config = small("trainer.batch_size=12")
    tracer = StepTracer(config, 19, 2)
    memory = tracer.trace(5, (64, 96)).peak
    questions = [Question(name, way, 19, 2, memory) for name, way in ways(config)[0].items() if "+" not in name]
    answers = solve_all(questions)
    ours = answers["inplace_abn"]
    assert ours.batch == 10 and micro_batch(config, 2) == 6 == ours.now.images
    high, wide = ours.crop
    assert high % 16 == wide % 16 == 0 and tracer.trace(6, (high, wide)).peak <= memory
    assert memory < tracer.trace(6, (high + 16, round((high + 16) * 1.5 / 16) * 16)).peak
    assert answers["abn"].batch == answers["batch_norm"].batch < ours.batch


# ------------------------------------------------------------------------------------------------ in a training


def test_the_batch_is_chosen_once(words, monkeypatch):
    """A resume takes over the number, though other memory is free by then."""
    words = [word for word in words if not word.startswith(("trainer.batch_size", "trainer.max_steps"))]
    for steps in (1, 2):
        config = segtrain.compose(
            *words, "trainer.batch_size=auto", f"trainer.max_steps={steps}", "device=cpu", "run=auto"
        )
        if steps == 1:
            crop = (config.augmentation.crop_size[0], config.augmentation.crop_size[1])
            peak = StepTracer(config, 2).trace(3, crop).peak
            monkeypatch.setattr(automatic, "device_budget", lambda device, peak=peak: peak)
        else:
            monkeypatch.setattr(automatic, "device_budget", lambda device: pytest.fail("solved again"))
        segtrain.train(config)
        assert config.trainer.batch_size == 3
        stored = torch.load("auto/last.pt", weights_only=True)
        assert (stored["step"], stored["config"]["trainer"]["batch_size"]) == (steps, 3)


def test_what_auto_fit_has_chosen_is_kept_by_a_resume(words, monkeypatch):
    """Nothing is solved again, whatever memory is free by then."""
    words = [word for word in words if not word.startswith("trainer.max_steps")]
    found = {"model.keep": "8bit"}
    monkeypatch.setattr(automatic, "choose", lambda *_: found)
    for steps in (1, 2):
        config = segtrain.compose(
            *words, "trainer.auto_fit=true", f"trainer.max_steps={steps}", "device=cpu", "run=fit"
        )
        segtrain.train(config)
        stored = torch.load("fit/last.pt", weights_only=True)
        assert (stored["step"], stored["config"]["model"]["keep"]) == (steps, "8bit")
        monkeypatch.setattr(automatic, "choose", lambda *_: pytest.fail("solved again"))


def chosen(config, budget, images=1000):
    return automatic.choose(config, 19, 1, budget, torch.device("cpu"), images)


def test_auto_fit_keeps_the_configuration_that_fits_and_saves_otherwise():
    config = small("trainer.batch_size=8", "trainer.auto_fit=true", "device=cpu")
    peaks = {
        name: automatic.traced_now(way, 19, 1) for name, way in automatic.own_ways(config).items()
    }  # fmt: skip
    as_it_is = chosen(config, peaks["as configured"])
    assert as_it_is == {"model.recompute": "none", "model.keep": "exact"}
    budget = peaks["as configured"] - 1
    fitting = [name for name in peaks if peaks[name] <= budget]  # in their order: exact ones come first
    way = automatic.own_ways(config)[fitting[0]].model
    assert chosen(config, budget) == {"model.recompute": way.recompute, "model.keep": way.keep}
    assert chosen(config, min(peaks.values()) - 1).keys() == {"trainer.accumulation"}
    with pytest.raises(SegtrainError, match="nothing makes a step fit"):
        chosen(config, 10**6)


def test_an_epoch_bounds_the_batch_and_too_little_memory_is_refused():
    config = small("trainer.batch_size=auto", "device=cpu")
    assert chosen(config, 10**12, images=5)["trainer.batch_size"] == 5
    with pytest.raises(SegtrainError, match="not even 2 crops"):
        chosen(config, 10**6)


def test_running_out_of_memory_is_answered_with_the_plan(monkeypatch):
    config = small("trainer.batch_size=8", "device=cpu")
    peak = automatic.traced_now(config, 19, 1)
    monkeypatch.setattr(automatic, "whole_memory", lambda device: int(0.92 * peak))
    text = automatic.training_advice(config, 19, 1, torch.device("cpu"))
    assert "trainer.accumulation=2" in text and "trainer.batch_size=" in text and "model.keep=4bit" in text
    monkeypatch.setattr(automatic, "answer_for", lambda *a: 1 / 0)
    assert "the plan failed (ZeroDivisionError" in automatic.training_advice(config, 19, 1, torch.device("cpu"))
