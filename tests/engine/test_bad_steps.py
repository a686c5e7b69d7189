"""Steps that are skipped or end the run, and their record: the guard, the black box and replay."""

import json
import math
from pathlib import Path

import torch
from PIL import Image

from segtrain import config
from segtrain.distributed.group import World
from segtrain.engine.checkpoint_writer import copy_to_cpu
from segtrain.engine.guard import Guard
from segtrain.engine.learner import Learner
from segtrain.losses import build_loss
from segtrain.weights import checkpoint
from tests.helpers import zygote
from tests.helpers.runs import black_box, refused, same
from tests.helpers.steps import batch, small_network

# ------------------------------------------------------------------------------------------------ the guard


def poisoned(learner):
    """Make the loss of the network's next forward NaN."""
    network, forward = learner.network, learner.network.forward
    network.forward = lambda x, upsample=True: forward(x, upsample) * math.nan


def test_a_skipped_step_leaves_no_trace():
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(max_steps=3, on_bad_step="skip", ema_decay=0.9)
    learner = Learner(small_network("inplace_abn"), build_loss(options.loss, 3), options, World(), torch.device("cpu"))
    part = batch(range(4))
    count = learner.loss.count(part.targets)
    learner.step([part], count, 0, 0.0)
    before = copy_to_cpu(learner.state_dict())
    poisoned(learner)
    outcome = learner.step([part], count, 1, 0.3)
    assert outcome.skipped
    assert math.isnan(outcome.loss)
    after = learner.state_dict()
    for group in before["optimizer"]["param_groups"] + after["optimizer"]["param_groups"]:
        del group["lr"]
    assert same(before, copy_to_cpu(after))


def test_a_spike_that_overflows_the_scale_is_no_divergence(segtrain, words, monkeypatch):
    """In half precision the scaler skips an infinite gradient, because it tries out its scale."""
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
    from segtrain.engine import guard, learner

    monkeypatch.setattr(guard, "MAX_SKIPPED", 3)
    forward_backward = learner.Learner.forward_backward
    monkeypatch.setattr(learner.Learner, "forward_backward", lambda *a: forward_backward(*a) * math.nan)
    answer = segtrain("train", *words, "run=r", "trainer.on_bad_step=skip")
    refused(answer, "3 steps in a row were skipped", status=1)
    assert "NaN" not in Path("r/metrics.jsonl").read_text()


def test_a_spike_is_measured_by_the_median():
    options = config.TrainConfig()
    guard = Guard(options, World())
    guard.recent.extend([1.0] * 15 + [100.0] * 4)
    assert not guard.why_bad(50.0, 1.0)  # too few to judge by
    guard.recent.append(1.0)
    assert "50 times the median of the last 20" in guard.why_bad(50.0, 1.0)
    assert not guard.why_bad(9.9, 1.0)
    assert guard.why_bad(math.inf, 1.0) == "the loss is inf"
    assert guard.why_bad(1.0, math.nan) == "the gradient is nan"
    assert not Guard(options, World(), scaled=True).why_bad(1.0, math.inf)  # only its scale is too large


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

    Image.new("L", (64, 48), 5).save(folder_data[0] / "train/labels/p2.png")
    answer = segtrain("train", *words, "run=r", "trainer.check_data=false")
    refused(answer, "p2.png: label id 5", status=1)


# ------------------------------------------------------------------------------------------------ replay


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
    from segtrain.engine.start import task_of

    trained = config_of_run(Path("r"), None)
    data = task_of(trained)(trained).data()
    for place, position in enumerate(range(4, 8)):
        image, target, name, _, window = data[position]
        assert window == black_box("r")[1]["samples"][place]["window"]
        part = seen[1][0]
        assert part.names[place] == name
        assert torch.equal(part.images[place], torch.from_numpy(image).permute(2, 0, 1))
        assert torch.equal(part.targets[place], torch.from_numpy(target))
