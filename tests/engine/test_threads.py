"""The number of threads, which decides the last bits of sums, is recorded; a run tells or keeps it when it goes on."""

import json
from pathlib import Path

import pytest
import torch

from segtrain import config
from segtrain.distributed.group import World
from segtrain.engine import environment
from tests.helpers.runs import state


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(environment, "cpus", lambda: 4)
    torch.set_num_threads(1)  # the fixture of all tests gives the number back


def resumed(deterministic, before, monkeypatch, here=1):
    options = config.TrainConfig()
    options.trainer.deterministic = deterministic
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    session = environment.session_environment(options, World(), before)
    assert session["threads"] == torch.get_num_threads()
    return session["threads"]


@pytest.mark.parametrize(
    ("deterministic", "here", "threads", "text"),
    [
        (False, 1, 1, "WARNING    threads: 1 from here on, 2 before"),
        (False, 1, 1, "(OMP_NUM_THREADS=2 or trainer.deterministic=true keeps them)"),
        (True, 1, 2, "threads    2 as before, instead of 1: trainer.deterministic=true"),
        (True, 2, 2, "threads    2 as before"),
        (True, 3, 1, "(3 x 2 threads do not fit the 4 CPUs that this process may use)"),
    ],
)
def test_another_number_is_told_or_taken_back(monkeypatch, capsys, deterministic, here, threads, text):
    assert resumed(deterministic, {"environment": {"threads": 2}}, monkeypatch, here) == threads
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "saved", [None, {}, {"environment": {}}, *({"environment": {"threads": n}} for n in (1, "2", 0))]
)
def test_the_same_number_or_none_that_is_known_is_no_matter(monkeypatch, capsys, saved):
    assert resumed(True, saved, monkeypatch) == 1
    assert capsys.readouterr().out == ""


def test_a_run_keeps_its_threads_and_gives_them_back(segtrain, words):
    words = [*words, "run=r", "trainer.deterministic=true", "schedule=constant"]
    torch.set_num_threads(2)
    assert segtrain("train", *words, "trainer.max_steps=2").status == 0
    torch.set_num_threads(1)
    answer = segtrain("train", *words, "trainer.max_steps=3")
    assert answer.status == 0 and "threads    2 as before" in answer.out
    assert torch.get_num_threads() == 1
    assert state("r/last.pt")["environment"]["threads"] == 2
    assert [session["threads"] for session in json.loads(Path("r/environment.json").read_text())] == [2, 2]
