"""trainer.batch_size=auto and trainer.auto_fit in several processes: one solves, all take its answer, once."""

from pathlib import Path

import segtrain
from segtrain.engine.planning import automatic
from segtrain.engine.planning.trace import StepTracer
from tests.helpers.runs import Ranks, state

# A process of a command, in which rank 1 has less memory than rank 0, and each counts what it solves and trains on.
PROCESS = """
import os, sys
from torch._subclasses.fake_tensor import is_fake
from segtrain.cli import main
from segtrain.engine.learner import Learner
from segtrain.engine.planning import automatic
rank, budgets = int(os.environ["RANK"]), {budgets}
choose, step = automatic.choose, Learner.step
def note(name, value):
    with open(f"{{name}}{{rank}}", "a") as file:
        file.write(f"{{value}}\\n")
def solved(*arguments):
    note("solved", arguments[3])
    return choose(*arguments)
def trained(self, batches, *arguments):
    if not is_fake(batches[0].images):  # of a trace
        note("trained", [len(batch.images) for batch in batches] + [self.config.model.keep])
    return step(self, batches, *arguments)
automatic.device_budget = lambda device: budgets[rank]
automatic.choose, Learner.step = solved, trained
main(sys.argv[1:])
"""


def notes(name, rank):
    path = Path(f"{name}{rank}")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_one_process_solves_for_all_and_a_resume_does_not(words):
    """The batch that the least memory of a process allows. The synchronised norm that is traced waits for nobody."""
    dropped = ("trainer.batch_size", "trainer.max_steps")
    words = [word for word in words if not word.startswith(dropped)]
    words += [
        "model.norm=inplace_abn_sync",
        "trainer.batch_size=auto",
        "trainer.auto_fit=true",
        "device=cpu",
        "loader.workers=0",
    ]
    config = segtrain.compose(*words, "trainer.max_steps=1")
    crop = (config.augmentation.crop_size[0], config.augmentation.crop_size[1])
    peaks = {
        name: StepTracer(way, 2, 2).trace(2, crop).peak for name, way in automatic.own_ways(config).items()
    }  # fmt: skip
    first, *others = [name for name in peaks if "4bit" not in name]
    budget = peaks[first] - 1  # not as configured: by the first other way that holds two crops a process
    way = next(name for name in others if peaks[name] <= budget)
    process = PROCESS.format(budgets=[10 * budget, budget])
    for steps in (1, 2):
        Ranks(2, "-c", process, "train", *words, f"trainer.max_steps={steps}", "run=r").ended()
        assert [notes("solved", rank) for rank in (0, 1)] == ([[str(budget)], []] if steps == 1 else [[], []])
        stored = state("r/last.pt")
        batch, keep = stored["config"]["trainer"]["batch_size"], stored["config"]["model"]["keep"]
        assert (stored["step"], keep) == (steps, automatic.own_ways(config)[way].model.keep)
        assert batch >= 4 and batch % 2 == 0
        assert [notes("trained", rank) for rank in (0, 1)] == [[str([batch // 2, keep])]] * 2


def test_no_process_waits_where_nothing_fits(words):
    words = [word for word in words if not word.startswith("trainer.batch_size")]
    process = PROCESS.format(budgets=[10**5, 10**5])
    ranks = Ranks(2, "-c", process, "train", *words, "trainer.batch_size=auto", "device=cpu", "run=r")
    out, err = ranks.ended(1)
    assert "not even 2 crops at a time fit" in err and not Path("r/last.pt").exists(), out
