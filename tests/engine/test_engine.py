"""The training engine: several processes, accumulation, precision, averaged weights, bad steps, lengths."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segtrain import config
from segtrain.cli import entry as cli
from segtrain.config import IGNORE_INDEX
from segtrain.data.loader import Batch
from segtrain.data.order import MicroBatches
from segtrain.distributed.group import World, chunks
from segtrain.engine.learner import Learner
from segtrain.errors import DataError, UsageError
from segtrain.losses import build_loss
from segtrain.models.blocks import IdentityResidualBlock, Norm, conv
from segtrain.weights import checkpoint
from tests.helpers import processes, zygote
from tests.helpers.runs import black_box, ended, launch, refused, same, state, until

# ------------------------------------------------------------------------------------------------ which samples


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12))
def test_a_batch_is_divided_whole_in_order_and_evenly(batch, parts):
    pieces = chunks(batch, parts)
    assert [place for piece in pieces for place in piece] == list(range(batch))
    assert len(pieces) == parts
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2), (1, 4), (3, 2), (1, 1)])
def test_positions_do_not_depend_on_how_many_read_them(size, accumulation):
    every = [list(MicroBatches(10, 3, 6, rank, size, accumulation)) for rank in range(size)]
    for number, step in enumerate(range(3, 6)):
        mine = [every[rank][number * accumulation + part] for part in range(accumulation) for rank in range(size)]
        assert [position for piece in mine for position in piece] == list(range(10 * step, 10 * step + 10))


def test_a_training_by_the_clock_has_no_last_step():
    parts = iter(MicroBatches(2, 5, None))
    assert [next(parts) for _ in range(3)] == [[10, 11], [12, 13], [14, 15]]


# ------------------------------------------------------------------------------------------------ one step, exactly


class Plain(nn.Module):
    """A network without statistics, so that accumulation must equal the larger batch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 2, 1)
        self.cls = nn.Conv2d(4, 3, 1)

    def forward(self, x, upsample=True):
        return self.cls(torch.tanh(self.body(x)))


class Normed(nn.Module):
    """Norms in a row and in a residual block, dropout, and a pooled branch with one value a picture."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(conv(3, 6, 3, 2), norm(6), IdentityResidualBlock(6, (8, 8), norm, 2, dropout=0.3))
        self.pooled, self.pooled_norm = conv(8, 8, 1), norm(8)
        self.cls = nn.Conv2d(8, 3, 1)

    def forward(self, x, upsample=True):
        x = self.body(x)
        return self.cls(x + self.pooled_norm(self.pooled(x.mean((2, 3), keepdim=True))))


def small_network(norm):
    torch.manual_seed(0)
    network = Plain() if norm is None else Normed(Norm(norm))
    network.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    return network.double()


def batch(positions):
    """Pictures that depend on their positions only, with unequal numbers of labelled pixels."""
    images, targets = [], []
    for position in positions:
        rng = np.random.default_rng(position)
        images.append(rng.integers(0, 255, (3, 33, 47)))
        target = rng.integers(0, 3, (33, 47))
        target[: 3 * (position % 7)] = IGNORE_INDEX
        targets.append(target)
    tensors = (torch.tensor(np.stack(arrays).astype(np.uint8)) for arrays in (images, targets))
    return Batch(
        *tensors, [f"p{position}" for position in positions], list(positions), [[0, 0, 33, 47, 0]] * len(positions)
    )


def three_steps(world, norm, batch_size, accumulation, prepare=lambda network: None, **trainer):
    """Losses and weights of three steps."""
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(batch_size=batch_size, accumulation=accumulation, max_steps=3, **trainer)
    options.optimizer.lr = 0.05
    options.loss.hardest = 1.0
    options.loss.name = "cross_entropy"
    options.model.norm = norm or "abn"
    network = small_network(norm)
    prepare(network)
    learner = Learner(network, build_loss(options.loss, 3), options, world, torch.device("cpu"))
    parts = iter(MicroBatches(batch_size, 0, 3, world.rank, world.size, accumulation))
    losses, outcome = [], None
    for step in range(3):
        mine = [batch(next(parts)) for _ in range(accumulation)]
        divisor = world.all_reduce(sum(learner.loss.count(part.targets) for part in mine))[0]
        outcome = learner.step(mine, divisor, step, step / 3)
        losses.append(world.all_reduce(outcome.loss)[0])
    return losses, outcome.norm, {name: t.detach() for name, t in learner.network.named_parameters()}


def agree(one, other, tolerance):
    assert other[0] == pytest.approx(one[0], rel=tolerance)
    assert other[1] == pytest.approx(one[1], rel=tolerance)
    for name, value in one[2].items():
        assert (other[2][name] - value).norm() <= tolerance * max(value.norm(), 1e-3), name


def no_dropout(network):
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0


def sync_of_5(rank, world):
    return three_steps(World(rank, world), "inplace_abn_sync", 5, 1, no_dropout)


def sync_of_7(rank, world):
    return three_steps(World(rank, world), "inplace_abn_sync", 7, 1, no_dropout)


def groups_of_one(rank, world):
    return three_steps(World(rank, world), "inplace_abn_sync", 8, 1, sync_group="1")


def own_of_8(rank, world):
    return three_steps(World(rank, world), "inplace_abn", 8, 1)


@pytest.mark.parametrize(("function", "world", "size"), [(sync_of_5, 2, 5), (sync_of_7, 3, 7)])
def test_several_processes_are_one_to_float_tolerance(function, world, size, tmp_path):
    """With synchronised statistics, a batch that does not divide, and labels that do not either."""
    alone = three_steps(World(), "inplace_abn_sync", size, 1, no_dropout)
    for found in processes.run(function, world, tmp_path):
        agree(alone, found, 1e-9)


def test_processes_and_accumulated_parts_are_the_same(tmp_path):
    """Statistics are those of a part, so that 2 processes equal one with 2 parts; dropout is the same too."""
    accumulated = three_steps(World(), "inplace_abn", 8, 2)
    for function in (own_of_8, groups_of_one):  # who is synchronised with nobody
        for found in processes.run(function, 2, tmp_path):
            agree(accumulated, found, 1e-9)


def test_accumulation_equals_the_larger_batch_but_for_statistics():
    whole = three_steps(World(), None, 7, 1)
    for parts in (2, 3, 7):
        agree(whole, three_steps(World(), None, 7, parts), 1e-12)
    with_norms = three_steps(World(), "inplace_abn", 8, 1)
    assert three_steps(World(), "inplace_abn", 8, 2)[0][1] != pytest.approx(with_norms[0][1], rel=1e-6)


def test_the_gradient_is_clipped_as_a_whole():
    options = config.TrainConfig()
    options.optimizer.clip_norm, options.optimizer.lr, options.optimizer.momentum = 0.01, 1.0, 0.0
    options.optimizer.weight_decay = 0.0
    learner = Learner(small_network(None), build_loss(options.loss, 3), options, World(), torch.device("cpu"))
    before = [p.detach().clone() for p in learner.network.parameters()]
    part = batch([0, 1])
    outcome = learner.step([part], learner.loss.count(part.targets), 0, 0.0)
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, learner.network.parameters(), strict=True)])
    assert outcome.norm > 0.01
    assert float(moved.norm().detach()) == pytest.approx(0.01, rel=1e-3)


def test_averaged_weights_follow_the_formula():
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(max_steps=3, ema_decay=0.9)
    learner = Learner(small_network("abn"), build_loss(options.loss, 3), options, World(), torch.device("cpu"))
    weights, part = [], batch(range(4))
    for step in range(3):
        learner.step([part], learner.loss.count(part.targets), step, step / 3)
        weights.append({k: v.clone() for k, v in learner.network.state_dict().items()})
    for name, value in learner.average.module.state_dict().items():
        if value.is_floating_point():  # the first update takes the weights as they are
            expected = 0.9 * (0.9 * weights[0][name] + 0.1 * weights[1][name]) + 0.1 * weights[2][name]
            torch.testing.assert_close(value, expected)
    assert learner.evaluation_model() is learner.average.module


# ------------------------------------------------------------------------------------------------ bad steps


def poisoned(learner):
    """The network's next forward gives a loss that is no number."""
    network, forward = learner.network, learner.network.forward
    network.forward = lambda x, upsample=True: forward(x, upsample) * math.nan


def test_a_skipped_step_leaves_no_trace():
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(max_steps=3, on_bad_step="skip", ema_decay=0.9)
    learner = Learner(small_network("inplace_abn"), build_loss(options.loss, 3), options, World(), torch.device("cpu"))
    part = batch(range(4))
    count = learner.loss.count(part.targets)
    learner.step([part], count, 0, 0.0)
    before = checkpoint.copied(learner.state())
    poisoned(learner)
    outcome = learner.step([part], count, 1, 0.3)
    assert outcome.skipped
    assert math.isnan(outcome.loss)
    after = learner.state()
    for group in before["optimizer"]["param_groups"] + after["optimizer"]["param_groups"]:
        del group["lr"]
    assert same(before, checkpoint.copied(after))


def test_a_spike_that_overflows_the_scale_is_no_divergence(segtrain, words, monkeypatch):
    """Half precision tries its scale out: an infinite gradient is skipped by the scaler, whatever else is said."""
    from segtrain.engine import learner

    forward_backward = learner.Learner.forward_backward

    def spike(self, part, divisor):
        if min(part.positions) == 4 * 24:
            self.scaler._scale.fill_(1e30)
            return forward_backward(self, part, divisor) * 1000
        return forward_backward(self, part, divisor)

    monkeypatch.setattr(learner.Learner, "forward_backward", spike)
    answer = segtrain("train", *words, "run=r", "trainer.precision=fp16", "trainer.max_steps=26")
    assert answer.status == 0, answer
    assert "times the median of the last 24 at step 25" in answer.out


def test_steps_that_are_skipped_for_ever_end_the_run(segtrain, words, monkeypatch):
    from segtrain.engine import learner
    from segtrain.engine import train as training

    monkeypatch.setattr(training, "SKIPPED_AT_MOST", 3)
    forward_backward = learner.Learner.forward_backward
    monkeypatch.setattr(learner.Learner, "forward_backward", lambda *a: forward_backward(*a) * math.nan)
    answer = segtrain("train", *words, "run=r", "trainer.on_bad_step=skip")
    refused(answer, "3 steps in a row were skipped", status=1)
    assert "NaN" not in Path("r/metrics.jsonl").read_text()


def test_a_spike_is_measured_by_the_median():
    options = config.TrainConfig()
    learner = Learner(small_network(None), build_loss(options.loss, 3), options, World(), torch.device("cpu"))
    learner.recent.extend([1.0] * 15 + [100.0] * 4)
    assert not learner.bad(50.0, 1.0)  # too few to judge by
    learner.recent.append(1.0)
    assert "50 times the median of the last 20" in learner.bad(50.0, 1.0)
    assert not learner.bad(9.9, 1.0)
    assert learner.bad(math.inf, 1.0) == "the loss is inf"
    assert learner.bad(1.0, math.nan) == "the gradient is nan"


POISON = """
import math, torch
from segtrain.engine import learner
forward_backward = learner.Learner.forward_backward
def once(self, batch, divisor):
    sums = forward_backward(self, batch, divisor)
    if any(4 * {step} <= position < 4 * {step} + 4 for position in batch.positions):
        sums = sums * math.nan
    return sums
learner.Learner.forward_backward = once
"""


def test_a_loss_that_is_no_number_names_step_and_picture(segtrain, words, tmp_path):
    (tmp_path / "poison.py").write_text(POISON.format(step=3))
    program = "import runpy, sys; runpy.run_path('poison.py'); from segtrain.cli import main; main(sys.argv[1:])"
    command = ["-c", program, "train", *words, "run=r", "trainer.save_every=2"]
    answer = zygote.call(command)
    assert answer.returncode == 1, answer.stderr
    named = black_box("r")[3]["samples"][0]["name"]
    for text in ("the loss is nan at step 4", f"rank 0: {named} nan", "diverged", "segtrain replay run=r step=4",
                 "optimizer.lr", "trainer.on_bad_step=skip"):  # fmt: skip
        assert text in answer.stderr
    assert checkpoint.load(Path("r/last.pt"))["step"] == 2
    assert json.loads(Path("r/state.json").read_text())["state"] == "failed"
    resumed = zygote.call([*command, "trainer.on_bad_step=skip"])
    assert resumed.returncode == 0, resumed.stderr
    assert "going on at step 2" in resumed.stdout
    assert "The step is skipped" in resumed.stdout
    assert [line["skipped"] for line in black_box("r")] == [False, False, False, True, False, False]


def test_a_bad_label_names_file_and_id(segtrain, words, folder_data):
    from PIL import Image

    Image.new("L", (64, 48), 5).save(folder_data[0] / "train/labels/p2.png")
    answer = segtrain("train", *words, "run=r", "trainer.check_data=false")
    refused(answer, "p2.png: label id 5", status=1)


def test_replay_rebuilds_any_step(segtrain, words):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=3", "augmentation.color=0.2").status == 0
    answer = segtrain("replay", "r", "step=2")
    assert answer.status == 0, answer
    assert answer.out.splitlines()[-1] == "r/replay/step_0000002.png"
    assert "recorded   loss" in answer.out
    for sample in black_box("r")[1]["samples"]:
        assert f"{sample['position']}  {sample['name']}" in answer.out
    assert segtrain("replay", "r", "step=900").status == 0  # not yet trained
    refused(segtrain("replay", "nothing"), "nothing is no run", status=1)
    refused(segtrain("replay"), "give the folder of a run")


def test_replay_shows_what_the_network_saw(segtrain, words, monkeypatch):
    from segtrain.engine import learner

    seen = []
    step = learner.Learner.step
    monkeypatch.setattr(
        learner.Learner, "step", lambda self, batches, *more: (seen.append(batches), step(self, batches, *more))[1]
    )
    segtrain("train", *words, "run=r", "trainer.max_steps=2", "augmentation.color=0.3")
    from segtrain.commands.replay import config_of_run
    from segtrain.engine.train import task_of

    trained = config_of_run(Path("r"), config.ReplayConfig(run="r"))
    data = task_of(trained)(trained).data()
    for place, position in enumerate(range(4, 8)):
        image, target, name, _, window = data[position]
        assert window == black_box("r")[1]["samples"][place]["window"]
        part = seen[1][0]
        assert part.names[place] == name
        assert torch.equal(part.images[place], torch.from_numpy(image).permute(2, 0, 1))
        assert torch.equal(part.targets[place], torch.from_numpy(target))


# ------------------------------------------------------------------------------------------------ lengths and options


def test_lengths_on_the_command_line_are_instead_of_the_recipes(segtrain):
    for word, expected in (("trainer.max_steps=7", (7, None, None)), ("trainer.epochs=2", (None, 2, None)),
                           ("trainer.hours=0.5", (None, None, 0.5))):  # fmt: skip
        composed = yaml.safe_load(segtrain("train", "experiment=toy", word, "--cfg", "job").out)["trainer"]
        assert (composed["max_steps"], composed["epochs"], composed["hours"]) == expected


def test_hours_end_a_training_by_the_clock(segtrain, words):
    words = [word for word in words if not word.startswith(("trainer.max_steps", "trainer.epochs"))]
    answer = segtrain("train", *words, "run=r", f"trainer.hours={4 / 3600}")
    assert answer.status == 0, answer
    last = state("r/last.pt")
    assert last["elapsed"] >= 4
    assert last["step"] == len(black_box("r")) >= 1
    assert "hours in steps" in answer.out
    assert "is finished" in segtrain("train", *words, "run=r", f"trainer.hours={4 / 3600}").out
    rates = [line["lr"] for line in black_box("r")]
    assert rates == sorted(rates, reverse=True)


def test_patience_ends_a_training_early(segtrain, words):
    options = [
        *words,
        "run=r",
        "trainer.max_steps=40",
        "trainer.validate_every=1",
        "trainer.patience=2",
        "optimizer.lr=1e-9",
    ]
    answer = segtrain("train", *options)
    assert answer.status == 0, answer
    assert "ending early: 2 validations no better" in answer.out
    last = state("r/last.pt")
    assert last["step"] == last["best"]["step"] + 2 < 40
    assert "is finished" in segtrain("train", *options).out


def test_overfit_trains_and_validates_on_the_same_few(segtrain, words):
    answer = segtrain("train", *words, "run=r", "trainer.overfit=2")
    assert answer.status == 0, answer
    assert {s["name"] for line in black_box("r") for s in line["samples"]} == {"p0", "p1"}
    result = json.loads(Path("r/evaluation.json").read_text())
    assert (result["images"], result["split"]) == (2, "train")


def test_averaged_weights_are_validated_evaluated_and_said(segtrain, words):
    answer = segtrain("train", *words, "run=r", "trainer.ema_decay=0.5")
    assert answer.status == 0, answer
    assert "averaged weights 0.5" in answer.out
    last = state("r/last.pt")
    assert not same(last["ema"], last["model"])
    own = json.loads(Path("r/evaluation.json").read_text())
    assert own["protocol"]["weights"] == "averaged"
    found = {}
    for choice in ("ema", "raw"):
        evaluated = segtrain("evaluate", "run=r", "device=cpu", f"checkpoint_weights={choice}", f"output={choice}")
        assert evaluated.status == 0, evaluated
        assert ("averaged weights" if choice == "ema" else "raw weights") in evaluated.out
        found[choice] = json.loads(Path(choice, "evaluation.json").read_text())
    assert found["ema"]["per_class"] == own["per_class"]
    assert found["raw"]["confusion_matrix"] != own["confusion_matrix"]
    Path("plain").mkdir()
    assert segtrain("train", *words, "run=plain").status == 0
    refused(segtrain("evaluate", "run=plain", "device=cpu", "checkpoint_weights=ema"), "no averaged weights")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_float32_weights(segtrain, words, precision):
    answer = segtrain("train", *words, "run=r", f"trainer.precision={precision}", "trainer.max_steps=2")
    assert answer.status == 0, answer
    assert precision in answer.out
    assert {t.dtype for t in state("r/last.pt")["model"].values()} <= {torch.float32, torch.int64}
    assert all(math.isfinite(line["loss"]) for line in black_box("r"))


def test_deterministic_says_so_and_is_given_back(segtrain, words):
    assert (
        "deterministic" in segtrain("train", *words, "run=r", "trainer.deterministic=true", "trainer.max_steps=1").out
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_recorded_rate_is_the_steps_own(segtrain, words):
    """Also where a step is looked at only after the next one."""
    assert segtrain("train", *words, "run=r", "logging.every=100", "trainer.save_every=100").status == 0
    expected = [0.0025 * (1 - step / 6) ** 0.9 for step in range(6)]
    assert [line["lr"] for line in black_box("r")] == pytest.approx(expected)


def test_a_full_disk_ends_a_training_only_at_its_end(segtrain, words, monkeypatch):
    write, tries = checkpoint.write_atomically, []

    def sometimes(path, data):
        tries.append(path)
        if 2 <= len(tries) <= 3:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", sometimes)
    answer = segtrain("train", *words, "run=r", "trainer.save_every=1", "trainer.validate_every=2")
    assert answer.status == 0, answer
    assert "WARNING    cannot write the checkpoint in r: No space left" in answer.out
    assert state("r/last.pt")["step"] == 6


def test_other_parts_are_other_statistics_and_that_is_said(segtrain, words):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=3", "trainer.accumulation=2")
    assert answer.status == 0, answer
    assert "norms see 2 crops at a time from here on, and saw 4 before" in answer.out


def test_what_is_recorded_of_the_machine(segtrain, words):
    segtrain("train", *words, "run=r", "trainer.max_steps=1")
    segtrain("train", *words, "run=r", "trainer.max_steps=2")
    first, second = json.loads(Path("r/environment.json").read_text())
    assert first["torch"] == torch.__version__
    assert first["seed"] == 0
    assert set(first["git"]) == {"segtrain", "here"}
    assert second["processes"] == 1
    assert "mIoU" in Path("r/summary.txt").read_text()
    assert json.loads(Path("r/state.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("overrides", "words_"),
    [
        (["trainer.precision=int8"], ["trainer.precision=int8", "fp32, bf16, fp16"]),
        (["trainer.accumulation=0"], ["trainer.accumulation=0"]),
        (["trainer.max_steps=3", "trainer.hours=1"], ["trainer.max_steps=3", "trainer.hours=1"]),
        (["trainer.ema_decay=1"], ["trainer.ema_decay=1"]),
        (["trainer.parallel=tensor"], ["trainer.parallel=tensor", "ddp, fsdp"]),
        (["trainer.parallel=fsdp", "trainer.ema_decay=0.9"], ["trainer.ema_decay=0.9", "trainer.parallel=ddp"]),
        (["trainer.parallel=fsdp", "trainer.precision=fp16"], ["trainer.precision=fp16"]),
        (["trainer.sync_group=some"], ["trainer.sync_group=some", "all, node"]),
        (["trainer.on_bad_step=cry"], ["stop, skip"]),
        (["trainer.spike_factor=0.5"], ["trainer.spike_factor=0.5"]),
        (["trainer.batch_size=4", "trainer.accumulation=3"], ["trainer.batch_size=4", "trainer.accumulation=3", "6"]),
        (["trainer.batch_size=4", "trainer.accumulation=5"], ["need a picture each"]),
        (["loader.prefetch=0"], ["loader.prefetch=0"]),
    ],
)
def test_options_that_cannot_be(segtrain, words, overrides, words_):
    plain = [word for word in words if not word.startswith(("trainer.max_steps", "trainer.epochs"))]
    length = [] if any("max_steps" in word for word in overrides) else ["trainer.max_steps=2"]
    refused(segtrain("train", *plain, *length, *overrides), *words_)
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------ processes together


def test_two_processes_keep_one_run_folder_and_go_on_as_any_number(words, tmp_path):
    """Two ranks, one that is told to stop; then three; then one. Every picture once, in the order of one process."""
    options = [*words, "run=r", "trainer.batch_size=6", "model.norm=inplace_abn_sync", "loader.workers=0"]
    process = launch(2, *options)
    seen = until(process, "step 2/")
    assert sum("processes  2, ddp" in line for line in seen) == 1
    process.send_signal(signal.SIGUSR1)  # torchrun hands it on
    out, err = ended(process, 1)
    assert "the same command goes on" in err
    assert err.count("segtrain: ") == 1
    cut = state("r/last.pt")["step"]
    assert Path("r/requeue").read_text() == f"step {cut}\n"
    second = launch(3, *options)
    assert f"going on at step {cut}" in "".join(until(second, "step"))
    second.send_signal(signal.SIGTERM)
    ended(second, 1)
    ended(launch(1, *options))
    assert not Path("r/requeue").exists()
    ended(launch(1, *options[:-4], "run=whole", *options[-3:]))
    where = ("position", "name", "window")
    expected = {line["step"]: [[s[key] for key in where] for s in line["samples"]] for line in black_box("whole")}
    found = {step: [] for step in expected}
    for rank in range(3):
        for line in black_box("r", rank):
            found[line["step"]] += [[s[key] for key in where] for s in line["samples"]]
    assert {step: sorted(some) for step, some in found.items()} == expected
    environments = json.loads(Path("r/environment.json").read_text())
    assert [session["processes"] for session in environments] == [2, 3, 1]
    lines = [json.loads(line)["step"] for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6, 6]


def workers_of(process):
    """Process ids of the ranks, by rank."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    found = {}
    for pid in children.split():
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((item for item in environ if item.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank[5:])] = int(pid)
    return found


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_run_with_the_reason(words, dead):
    process = launch(
        2, *words, "run=r", "trainer.max_steps=100000", "model.norm=inplace_abn_sync", "trainer.save_every=1"
    )
    until(process, "step 2/")
    os.kill(workers_of(process)[dead], signal.SIGKILL)
    began = time.monotonic()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) != 0
    assert time.monotonic() - began < 60
    assert "lost the connection" in err or "no sign of life" in err or "has ended" in err, err
    assert "Traceback" not in err.split("elastic")[0], err
    assert state("r/last.pt")["step"] >= 1


@pytest.mark.slow
def test_a_frozen_process_ends_the_run_with_the_reason(words):
    process = launch(2, *words, "run=r", "trainer.max_steps=100000", "model.norm=inplace_abn_sync")
    until(process, "step 2/")
    frozen = workers_of(process)[1]
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    process.stdout.close()
    while not (line := process.stderr.readline()).startswith("segtrain: rank"):
        assert line, "no reason given"
    assert time.monotonic() - began < 60
    assert "rank 1 has given no sign of life" in line
    os.kill(frozen, signal.SIGKILL)
    process.stderr.read()
    assert process.wait(60) != 0


def test_an_error_in_one_process_is_told_once(words, folder_data):
    from PIL import Image

    process = launch(2, *words, "run=r", "trainer.max_steps=100000", "model.norm=inplace_abn_sync")
    until(process, "step 2/")
    Image.new("L", (64, 48), 5).save(folder_data[0] / "train/labels/p2.png")
    out, err = ended(process, 1)
    told = [line for line in err.splitlines() if line.startswith("segtrain: ")]
    assert len(told) == 1, err
    assert "the batch of step " in told[0]
    assert "p2.png: label id 5" in told[0]
    assert told[0].startswith("segtrain: rank ")


@pytest.mark.slow
def test_sharded_weights_train_validate_and_go_on_unsharded(words):
    """FSDP2 on two processes: the numbers of DDP, a whole checkpoint, three pictures validated on two processes."""
    options = [*words, "model.norm=inplace_abn_sync", "trainer.max_steps=3", "trainer.batch_size=4"]
    ended(launch(2, *options, "run=sharded", "trainer.parallel=fsdp"))
    ended(launch(2, *options, "run=ddp"))
    one, other = state("sharded/last.pt"), state("ddp/last.pt")
    assert one["model"].keys() == other["model"].keys()
    for key, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][key], rtol=1e-3, atol=1e-4)
    assert [len(group["params"]) for group in one["optimizer"]["param_groups"]] == [
        len(list(one["optimizer"]["state"]))
    ]
    ended(launch(1, *options, "run=sharded", "trainer.max_steps=4"))
    assert state("sharded/last.pt")["step"] == 4
    ended(launch(2, *options, "run=sharded", "trainer.parallel=fsdp", "trainer.max_steps=5"))
    assert state("sharded/last.pt")["step"] == 5


@pytest.mark.parametrize(("rank", "local", "told"), [("0", "0", True), ("1", "1", False), ("8", "0", True)])
def test_wrong_options_are_told_once_a_machine(monkeypatch, rank, local, told):
    for name, value in (("WORLD_SIZE", "16"), ("RANK", rank), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, value)
    assert bool(cli.told(UsageError("no such file"))) == told
    assert cli.told(DataError("of this process alone")) == f"rank {rank}: of this process alone"


def test_groups_of_statistics_are_refused_where_there_are_none(segtrain, words):
    refused(segtrain("train", *words, "trainer.sync_group=node"), "trainer.sync_group=node", "inplace_abn_sync")


def test_loss_select_over_the_batch_is_refused_with_several(words, segtrain):
    refused(segtrain("train", *words, "loss=bootstrapped", "loss.select=batch", "trainer.accumulation=2"),
            "loss.select=batch", "trainer.accumulation=2", "loss.select=image")  # fmt: skip
