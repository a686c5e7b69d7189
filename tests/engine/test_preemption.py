"""Signals, exit statuses and the SLURM job script."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segtrain.cli.slurm import job_script
from segtrain.engine.preemption import Preempted, Preemption
from tests.helpers import zygote
from tests.helpers.checkout import ROOT, environment
from tests.helpers.runs import black_box, ended, launch, refused, state, until


def test_usr1_saves_within_a_step_and_asks_to_be_requeued(words):
    process = launch(*words, "run=r", "trainer.max_steps=100000", "trainer.save_every=100000")
    until(process, "step 2/")
    began = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    _, err = ended(process, 75)
    assert time.monotonic() - began < 20
    assert "the same command goes on" in err
    assert Path("r/requeue").exists()
    assert state("r/last.pt")["step"] == black_box("r")[-1]["step"]
    assert json.loads(Path("r/state.json").read_text())["state"] == "stopped"


def test_a_signal_before_the_first_step_asks_to_be_requeued(words):
    assert ended(launch(*words, "run=r", "trainer.max_steps=1"))
    program = (
        "import os, signal, sys; from segtrain.tasks.segmentation import Segmentation; from segtrain.cli import main; "
        "check = Segmentation.check; "
        "Segmentation.check = lambda self: (os.kill(os.getpid(), signal.SIGUSR1), check(self)); main(sys.argv[1:])"
    )
    answer = zygote.call(["-c", program, "train", *words, "run=r", "trainer.max_steps=2"])
    assert answer.returncode == 75, answer.stderr
    assert "stopped before the first step; what was saved is untouched" in answer.stderr
    assert Path("r/requeue").exists()
    assert state("r/last.pt")["step"] == 1


def test_a_schedulers_second_signal_only_hurries():
    with Preemption() as preemption:
        with pytest.raises(Preempted) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.exit_status == 75
        preemption.signal, preemption.stepping = 0, True
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.signal == 75
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_slurm_script_is_what_the_command_prints(segtrain):
    assert (ROOT / "scripts/slurm.sh").read_text() == job_script([], "scripts/slurm.sh")
    assert os.access(ROOT / "scripts/slurm.sh", os.X_OK)
    answer = segtrain("train", "--print-slurm", "experiment=toy", "name=it's")
    assert "options=(experiment=toy 'name=it'\"'\"'s' \"$@\")" in answer.out
    assert subprocess.run(["bash", "-n"], input=answer.out, text=True).returncode == 0
    refused(segtrain("train", "--print-slurm", "experiment=tio"), "experiment=tio")
    assert segtrain("train", "--print-run", "experiment=toy", "optimizer.lr=1").out == "runs/toy-optimizer.lr=1\n"


def test_a_job_that_is_preempted_goes_on_by_itself(words, tmp_path):
    """Scripts replace srun and scontrol: the job is warned before its time is up, requeued, and finishes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
        "segtrain": f'exec "{sys.executable}" -m segtrain "$@"',
    }
    for name, body in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    job = {**environment(), "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_NNODES": "1",
           "SLURM_JOB_NODELIST": "here", "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    options = [*words, "run=r", "model.norm=inplace_abn_sync", "trainer.max_steps=8"]
    Path("r").mkdir()
    Path("r/requeue").touch()  # of an older session, which must not count

    def submit():
        command = ["bash", str(ROOT / "scripts/slurm.sh"), *options]
        return subprocess.Popen(command, env=job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = submit()
    until(first, "step 2/")
    first.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@120 does
    ended(first)
    assert Path("requeued").read_text() == "requeue 77\n"
    cut = state("r/last.pt")["step"]
    assert 2 <= cut < 8
    out, _ = ended(submit())
    assert f"going on at step {cut}" in out
    assert Path("requeued").read_text() == "requeue 77\n"
    assert state("r/last.pt")["step"] == 8


def test_signals_are_given_back(folder_data, segtrain):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    root, overrides = folder_data
    assert segtrain("train", *overrides).status == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
