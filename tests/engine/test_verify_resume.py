"""`segtrain verify-resume` proves an exact resume, and finds what a checkpoint lacks."""

import pytest
import torch

from segtrain.commands import verify_resume as verify
from segtrain.engine.checkpoint_writer import copy_to_cpu
from segtrain.errors import UsageError
from tests.helpers import zygote
from tests.helpers.checkout import TINY


def proof(*options):
    return zygote.call(["verify-resume", *options])


def test_verify_resume_proves_it(words):
    answer = proof(*words, "output=proof", "trainer.batch_size=3", "trainer.ema_decay=0.9", "loader.workers=1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1].startswith("EXACT: ")
    again = proof(*words, "output=proof")
    assert again.returncode == 2
    assert "holds runs already" in again.stderr


BROKEN = {
    "optimizer": "content['optimizer']['state'] = {}",
    "running statistics": "[t.zero_() for k, t in content['model'].items() if 'running_' in k]",
    "averaged weights": "content['ema'] = {k: v.clone() for k, v in content['model'].items()}",
}


BREAK_STATE = """
from segtrain.engine import learner
from segtrain.engine.checkpoint_writer import copy_to_cpu
state = learner.Learner.state_dict
def broken(self):
    content = copy_to_cpu(state(self))
    %s
    return content
learner.Learner.state_dict = broken
"""


BREAK_POSITION = """
from segtrain.data import order
start = order.MicroBatches.__init__
def from_the_beginning(self, batch_size, begin, *more):
    start(self, batch_size, begin, *more)
    self.shift = begin
def positions(self):
    for step, piece in enumerate(whole(self)):
        yield [position - self.shift * self.batch_size for position in piece]
whole = order.MicroBatches.__iter__
order.MicroBatches.__init__, order.MicroBatches.__iter__ = from_the_beginning, positions
"""


BREAK_RANDOM = """
import torch
from segtrain.engine import learner
seed = torch.manual_seed
began = []
def once(number):
    if not began or number < 1000:
        began.append(number)
        return seed(number)
torch.manual_seed = once
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", [*BROKEN, "position", "random numbers"])
def test_verify_resume_finds_what_a_checkpoint_lacks(words, what, tmp_path):
    text = {"position": BREAK_POSITION, "random numbers": BREAK_RANDOM}.get(what) or BREAK_STATE % BROKEN[what]
    (tmp_path / "breaks.py").write_text(text)
    more = ["trainer.ema_decay=0.9"] if what == "averaged weights" else []
    more += ["model.backbone_options={dropout:0.5}"] if what == "random numbers" else []
    answer = proof(*words, "output=proof", "trainer.batch_size=3", f"plugins=[{TINY},./breaks.py]", *more)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert "NOT EXACT" in answer.stderr.splitlines()[-1]


LATE = """
from segtrain.commands import verify_resume as verify
kill, tries = verify.kill_between, []
def late(every, steps, *rest):
    tries.append(kill(every, steps, *rest))
    return steps if len(tries) <= %d else tries[-1]
verify.kill_between = late
"""


@pytest.mark.slow
@pytest.mark.parametrize(("late", "status"), [(1, 0), (3, 1)])
def test_a_training_that_is_killed_too_late_is_trained_once_more(words, late, status, tmp_path):
    (tmp_path / "late.py").write_text(LATE % late)
    answer = proof(*words, "output=proof", "trainer.batch_size=3", f"plugins=[{TINY},./late.py]")
    assert answer.returncode == status, answer.stdout + answer.stderr
    assert answer.stdout.count("once more from the start") == min(late, 2)
    if status:
        assert answer.stderr.splitlines()[-1].startswith("segtrain: nothing proven: in 3 trainings no kill came")
    else:
        assert answer.stdout.splitlines()[-1].startswith("EXACT: ")


def test_the_kill_comes_inside_an_epoch_and_between_two_saves():
    for batch, samples in ((4, 24), (3, 4), (16, 2975), (5, 7), (2, 6), (2, 4)):
        every, steps = verify.schedule(batch, samples)
        assert every * batch % samples
        assert any(step * batch % samples for step in range(every + 1, 2 * every))
        assert 2 * every < steps
    assert 2 * verify.schedule(16, 2975)[0] * 16 % 2975
    with pytest.raises(UsageError, match="every step ends an epoch"):
        verify.schedule(8, 4)


def test_digests_tell_bits_apart():
    value = {"a": torch.tensor([0.0]), "b": [1, {"c": torch.ones(2)}]}
    assert verify.digest(value) == verify.digest(copy_to_cpu(value))
    assert verify.digest(value) != verify.digest(value | {"a": torch.tensor([-0.0])})
    assert verify.digest(torch.zeros(2)) != verify.digest(torch.zeros(2, dtype=torch.int32))
