"""Trainings in several processes: one run folder, sharded weights, processes that die, errors reported once."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from segtrain.cli.entry import message_of
from segtrain.errors import DataError, UsageError
from tests.helpers.checkout import environment
from tests.helpers.runs import ONE_THREAD, Ranks, black_box, ended, launch, state, until

# ------------------------------------------------------------------------------------------------ together


def messages(err):
    """The error messages, without those about libraries that are compiled, which several processes may print."""
    lines = [line for line in err.splitlines() if line.startswith("segtrain: ")]
    return [line for line in lines if not line.startswith("segtrain: compiling ")]


def test_two_processes_keep_one_run_folder_and_go_on_as_any_number(words, tmp_path):
    """Two ranks that are stopped, then three, then one. They read each image once, in the order of one process."""
    options = [*words, "run=r", "trainer.batch_size=6", "model.norm=inplace_abn_sync", "loader.workers=0"]
    process = Ranks(2, "train", *options)
    seen = until(process, "step 2/")
    assert sum("processes  2, ddp" in line for line in seen) == 1
    process.send_signal(signal.SIGUSR1)
    out, err = process.ended(75)
    assert "the same command goes on" in err
    assert len(messages(err)) == 1
    cut = state("r/last.pt")["step"]
    assert Path("r/requeue").read_text() == f"step {cut}\n"
    second = Ranks(3, "train", *options)
    assert f"going on at step {cut}" in "".join(until(second, "step"))
    second.processes[1].send_signal(signal.SIGTERM)  # one is enough
    second.ended(75)
    ended(launch(*options))
    assert not Path("r/requeue").exists()
    ended(launch(*options[:-4], "run=whole", *options[-3:]))
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
    scores = [json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1]) for run in ("r", "whole")]
    assert scores[0]["train_sample/loss"] == pytest.approx(scores[1]["train_sample/loss"], rel=0.05)
    assert scores[0]["val/loss"] == pytest.approx(scores[1]["val/loss"], rel=0.05)


@pytest.mark.slow
def test_torchrun_hands_a_signal_on(words):
    """With torchrun itself, unlike the other tests: it passes the signal on, and exits with its own status."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    options = [*words, "run=r", "trainer.max_steps=100000", "model.norm=inplace_abn_sync"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "segtrain", "train", *options], env={**environment(), **ONE_THREAD},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(process, "step 2/")
    process.send_signal(signal.SIGUSR1)
    _, err = ended(process, 1)
    before, found, after = err.partition("(torchrun itself ends with status 1; the traceback that follows")
    assert "the same command goes on" in before and found and "Traceback" not in before
    assert "SignalException" in after
    assert len(messages(err)) == 1
    assert Path("r/requeue").read_text() == f"step {state('r/last.pt')['step']}\n"


COUNTING = """
import json, os, sys
from torch import distributed
from segtrain.cli import main
from segtrain.engine.learner import Learner
calls, step = [], Learner.step
def counted(name, call):
    return lambda *arguments, **options: (calls.append(name), call(*arguments, **options))[1]
for name in ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_to_all", "barrier",
             "broadcast", "broadcast_object_list", "reduce", "reduce_scatter", "scatter", "gather", "gather_object"):
    setattr(distributed, name, counted(name, getattr(distributed, name)))
def traced(*arguments):
    calls.append("step begins")
    result = step(*arguments)
    calls.append("step ends")
    return result
Learner.step = traced
try:
    main(sys.argv[1:])
finally:
    with open(f"calls{os.environ['RANK']}.json", "w") as file:
        json.dump(calls, file)
"""


@pytest.mark.parametrize(("more", "inside"), [([], []), (["trainer.on_bad_step=skip"], ["all_reduce"])])
def test_a_step_has_one_control_collective(words, more, inside):
    """DDP's collectives for gradients are not counted. To skip a step, its loss is needed before the weights change."""
    options = [*words, "run=r", "logging.every=100", "trainer.save_every=100", "trainer.validate_every=100", *more]
    Ranks(2, "-c", COUNTING, "train", *options).ended()
    for rank in range(2):
        calls = json.loads(Path(f"calls{rank}.json").read_text())
        first, last = calls.index("step begins"), len(calls) - calls[::-1].index("step ends")
        step = ["step begins", *inside, "step ends"]
        assert calls[first - 1 : last] == ["all_reduce", *[*step, "all_reduce"] * 5, *step]
    losses = [[line["loss"] for line in black_box("r", rank)] for rank in range(2)]
    parts = [[math.fsum(s["loss"] for s in line["samples"]) for line in black_box("r", rank)] for rank in range(2)]
    assert losses[0] == losses[1] == [one + other for one, other in zip(*parts, strict=True)]
    assert len(losses[0]) == 6


@pytest.mark.slow
def test_sharded_weights_train_validate_and_go_on_unsharded(words):
    """FSDP2 on two processes: the numbers of DDP, an unsharded checkpoint, and a validation of three images."""
    options = [*words, "model.norm=inplace_abn_sync", "trainer.max_steps=3", "trainer.batch_size=4"]
    Ranks(2, "train", *options, "run=sharded", "trainer.parallel=fsdp").ended()
    Ranks(2, "train", *options, "run=ddp").ended()
    one, other = state("sharded/last.pt"), state("ddp/last.pt")
    assert one["model"].keys() == other["model"].keys()
    for key, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][key], rtol=1e-3, atol=1e-4)
    assert [len(group["params"]) for group in one["optimizer"]["param_groups"]] == [
        len(list(one["optimizer"]["state"]))
    ]
    ended(launch(*options, "run=sharded", "trainer.max_steps=4"))
    assert state("sharded/last.pt")["step"] == 4
    Ranks(2, "train", *options, "run=sharded", "trainer.parallel=fsdp", "trainer.max_steps=5").ended()
    assert state("sharded/last.pt")["step"] == 5


# ------------------------------------------------------------------------------------------------ failures


def test_ranks_with_other_options_are_refused(words, folder_data):
    """A path may be another on each machine; the learning rate may not."""
    same = ["dataset.cache_dir=here"], ["dataset.cache_dir=there", "loader.prefetch=2"]
    Ranks(2, "train", *words, "run=same", "trainer.max_steps=1", own=same).ended()
    process = Ranks(2, "train", *words, "run=r", own=(["optimizer.lr=0.1"], ["optimizer.lr=0.2"]))
    out, err = process.ended(2)
    told = messages(err)
    assert len(told) == 1, err
    assert "rank 1 was given other options than rank 0: optimizer.lr=0.2 and not 0.1" in told[0]
    assert not Path("r").exists()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_run_with_the_reason(words, dead):
    process = Ranks(
        2, "train", *words, "run=r", "trainer.max_steps=100000", "model.norm=inplace_abn_sync", "trainer.save_every=1"
    )
    until(process, "step 2/")
    process.processes[dead].kill()
    began = time.monotonic()
    other = process.processes[1 - dead]
    other.stdout.close()
    err = other.stderr.read()
    assert other.wait(60) != 0
    assert time.monotonic() - began < 60
    assert "lost the connection" in err or "no sign of life" in err or "has ended" in err, err
    assert "Traceback" not in err, err
    assert state("r/last.pt")["step"] >= 1


@pytest.mark.slow
def test_a_frozen_process_ends_the_run_with_the_reason(words):
    process = Ranks(2, "train", *words, "run=r", "trainer.max_steps=100000", "model.norm=inplace_abn_sync")
    until(process, "step 2/")
    first, frozen = process.processes
    frozen.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    first.stdout.close()
    while not (line := first.stderr.readline()).startswith("segtrain: rank"):
        assert line, "no reason given"
    assert time.monotonic() - began < 60
    assert "rank 1 has given no sign of life" in line
    frozen.kill()
    first.stderr.read()
    assert first.wait(60) != 0


def test_an_error_in_one_process_is_told_once(words, folder_data):
    process = Ranks(2, "train", *words, "run=r", "trainer.max_steps=100000", "model.norm=inplace_abn_sync")
    until(process, "step 2/")
    Image.new("L", (64, 48), 5).save("bad.png")
    Path("bad.png").replace(folder_data[0] / "train/labels/p2.png")  # at once: half a file would be another error
    out, err = process.ended(1)
    told = messages(err)
    assert len(told) == 1, err
    assert "the batch of step " in told[0]
    assert "p2.png: label id 5" in told[0]
    assert told[0].startswith("segtrain: rank ")


@pytest.mark.parametrize(("rank", "local", "told"), [("0", "0", True), ("1", "1", False), ("8", "0", True)])
def test_wrong_options_are_told_once_a_machine(monkeypatch, rank, local, told):
    address = ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")
    for name, value in (("WORLD_SIZE", "16"), ("RANK", rank), ("LOCAL_RANK", local), *address):
        monkeypatch.setenv(name, value)
    assert bool(message_of(UsageError("no such file"))) == told
    assert message_of(DataError("of this process alone")) == f"rank {rank}: of this process alone"
