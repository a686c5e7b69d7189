"""Trainings with trainer.compile=true: in several processes, resumed, with a memory budget, and what is refused."""

import pytest

from tests.helpers import zygote
from tests.helpers.checkout import ROOT
from tests.helpers.runs import ONE_THREAD, Ranks, ended, refused, same, state

TRACED = f"{ROOT}/tests/helpers/traced.py"


@pytest.fixture
def graphs(words):
    """Words of a compiled training of which torch makes graphs, and no code; its rate is constant."""
    plugins = next(word for word in words if word.startswith("plugins="))
    others = [word for word in words if word != plugins and "max_steps" not in word]
    return [
        *others, f"{plugins[:-1]},{TRACED}]", "model.norm=batch_norm", "trainer.compile=true", "schedule=constant",
        "model.backbone_options={dropout: 0.3}", "trainer.memory_budget=0.2", "loader.workers=0",
    ]  # fmt: skip


def distance(first, second):
    """Largest relative distance of two mappings' tensors."""
    assert first.keys() == second.keys()
    return max(float((first[k].double() - second[k].double()).norm() / first[k].double().norm()) for k in first)


def test_compiled_processes_train_as_one_and_go_on(graphs):
    """Two ranks see the micro-batches that one process sees with trainer.accumulation=2, dropout included."""
    out, _ = Ranks(2, "train", *graphs, "run=whole", "trainer.max_steps=4").ended()
    assert "float32, compiled with a memory budget of 0.2\n" in out and "processes  2, ddp" in out
    Ranks(2, "train", *graphs, "run=cut", "trainer.max_steps=2").ended()
    out, _ = Ranks(2, "train", *graphs, "run=cut", "trainer.max_steps=4").ended()
    assert "run        cut, going on at step 2\n" in out
    whole, cut = state("whole/last.pt"), state("cut/last.pt")
    for key in ("model", "optimizer", "recent"):
        assert same(whole[key], cut[key]), key
    assert whole["config"]["trainer"]["memory_budget"] == 0.2
    one = ["train", *graphs, "trainer.max_steps=4", "trainer.accumulation=2"]
    for run, more in (("compiled", []), ("eager", ["trainer.compile=false", "trainer.memory_budget=null"])):
        ended(zygote.start([*one, f"run={run}", *more], ONE_THREAD))
        found = state(f"{run}/last.pt")
        weights = {key: t for key, t in found["model"].items() if "running" not in key and "tracked" not in key}
        assert distance(weights, {key: whole["model"][key] for key in weights}) < 1e-4, run
        assert found["recent"] == pytest.approx(whole["recent"], rel=1e-4)
        if run == "compiled":
            statistics = found["model"]
    assert distance(statistics, found["model"]) < 1e-4  # one process has the same with and without compilation


def test_a_run_goes_on_as_it_was_compiled(graphs):
    ended(zygote.start(["train", *graphs, "run=r", "trainer.max_steps=1"], ONE_THREAD))
    for word, found in (("trainer.memory_budget=0.4", "0.2 in the run, 0.4 asked for"),
                        ("trainer.memory_budget=null", "0.2 in the run, None asked for")):  # fmt: skip
        answer = zygote.call(["train", *graphs, "run=r", "trainer.max_steps=2", word])
        assert answer.returncode == 1 and f"trainer.memory_budget: {found}" in answer.stderr, answer
    assert state("r/last.pt")["step"] == 1


@pytest.mark.slow
def test_code_in_two_processes_gives_the_numbers_without(words):
    options = [*words, "model.norm=batch_norm", "loader.workers=0", "trainer.max_steps=2"]
    for run, more in (("plain", []), ("compiled", ["trainer.compile=true", "trainer.memory_budget=0.3"])):
        Ranks(2, "train", *options, f"run={run}", *more).ended()
    assert distance(state("plain/last.pt")["model"], state("compiled/last.pt")["model"]) < 1e-4


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["trainer.memory_budget=0.3", "model.norm=batch_norm"],
         "trainer.memory_budget=0.3 is not possible: it is the compiler's; add trainer.compile=true"),
        (["trainer.memory_budget=0.3", "trainer.compile=true"], "again, not of inplace_abn"),
        (["trainer.memory_budget=0.3", "trainer.compile=true", "model.norm=batch_norm_sync"], "not of batch_norm_sync"),
        (["trainer.memory_budget=2", "trainer.compile=true", "model.norm=abn"], "at most 1 or null, got 2"),
        (["trainer.compile=true", "trainer.parallel=fsdp"], "FSDP gathers weights between the blocks"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_with_a_budget_is_refused(segtrain, words, more, text):
    refused(segtrain("train", *words, "run=r", *more), text)


def test_norms_that_exchange_statistics_are_refused_in_several_processes(words):
    _, err = Ranks(2, "train", *words, "run=r", "trainer.compile=true", "model.norm=inplace_abn_sync").ended(2)
    assert "model.norm=inplace_abn_sync exchanges between the processes: choose model.norm=inplace_abn" in err
