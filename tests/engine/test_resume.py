"""Checkpoints that survive anything, and runs that go on from them exactly: killed, preempted, moved."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from segtrain.cli.slurm import job_script
from segtrain.commands import verify_resume as verify
from segtrain.config import with_defaults
from segtrain.errors import DataError, SegtrainError, UsageError
from segtrain.weights import checkpoint
from tests.helpers import zygote
from tests.helpers.checkout import ROOT, TINY, environment
from tests.helpers.runs import black_box, ended, launch, refused, same, state, until

# ------------------------------------------------------------------------------------------------ files


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")


def test_the_newest_are_kept_and_the_best(tmp_path):
    keeper = checkpoint.CheckpointWriter(tmp_path, keep=2)
    with keeper.open():
        for step in (1, 2, 3, 4):
            keeper.save({"step": step}, best=step == 2)
    assert kept(tmp_path) == ["best.pt", "last.pt", "step_0000003.pt", "step_0000004.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert (tmp_path / "last.pt").stat().st_ino == (tmp_path / "step_0000004.pt").stat().st_ino  # no second copy


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing"])
def test_a_torn_checkpoint_is_replaced_by_the_one_before(tmp_path, damage, capsys):
    keeper = checkpoint.CheckpointWriter(tmp_path, keep=2)
    with keeper.open():
        for step in (10, 20):
            keeper.save({"step": step, "weights": torch.arange(10000.0) + step})
    last = tmp_path / "last.pt"
    content = bytearray(last.read_bytes())
    if damage == "missing":
        last.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)  # the same inode as step_20: both are damaged
    else:
        last.write_bytes(content[:-100] if damage == "cut" else b"")
    found = checkpoint.newest(tmp_path)
    assert found["step"] == (20 if damage == "missing" else 10)
    assert torch.equal(found["weights"], torch.arange(10000.0) + found["step"])
    if damage != "missing":
        assert "damaged" in capsys.readouterr().out


def test_none_that_can_be_read_is_an_error(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 no more")
    (tmp_path / "step_0000001.pt").write_bytes(b"")
    with pytest.raises(checkpoint.Damaged, match=r"last\.pt"):
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path / "empty") is None


def test_what_is_saved_is_the_state_at_that_moment(tmp_path, monkeypatch):
    """Training goes on while the file is written, and must not get into it."""
    going = threading.Event()
    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (going.wait(10), write(*arguments)))
    weights = torch.zeros(5)
    keeper = checkpoint.CheckpointWriter(tmp_path, keep=1)
    with keeper.open():
        keeper.save({"step": 1, "model": {"w": weights}, "list": [weights]})
        assert not (tmp_path / "last.pt").exists()  # nobody waited
        weights += 1
        going.set()
    content = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(content["model"]["w"], torch.zeros(5))
    assert torch.equal(content["list"][0], torch.zeros(5))


def test_a_full_disk_in_the_middle_is_told_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    keeper = checkpoint.CheckpointWriter(tmp_path, keep=1)
    full = True
    write = checkpoint.write_atomically

    def maybe(path, data):
        if full:
            raise OSError(28, "No space left on device")
        write(path, data)

    with keeper.open():
        keeper.save({"step": 1})
        keeper.wait()
        monkeypatch.setattr(checkpoint, "write_atomically", maybe)
        keeper.save({"step": 2})
        keeper.save({"step": 3})  # says that 2 was not written
        assert "cannot write the checkpoint" in capsys.readouterr().out
        with pytest.raises(SegtrainError, match="No space left on device. What was saved before is untouched"):
            keeper.close()
        assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
        full = False
        keeper.save({"step": 4})
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert not list(tmp_path.glob(".*"))


def test_files_of_a_killed_writer_go(segtrain, words):
    Path("r").mkdir()
    Path("r/.last.pt.123.tmp").write_bytes(b"half")
    assert segtrain("train", *words, "run=r", "trainer.max_steps=1").status == 0
    assert not list(Path("r").glob(".*.tmp"))


def test_a_newer_file_that_is_damaged_does_not_push_out_the_one_it_went_back_to(tmp_path):
    (tmp_path / "step_0000009.pt").write_bytes(b"damaged")
    keeper = checkpoint.CheckpointWriter(tmp_path, keep=1)
    with keeper.open():
        keeper.save({"step": 3})
    assert checkpoint.load(tmp_path / "step_0000003.pt")["step"] == 3


def test_formats_of_other_versions(tmp_path):
    newer = {"kind": checkpoint.KIND, "format": checkpoint.FORMAT + 1, "environment": {"segtrain": "9.1"}}
    torch.save(newer, tmp_path / "newer.pt")
    with pytest.raises(DataError, match=r"format 3 \(written by segtrain 9\.1\).*update segtrain"):
        checkpoint.load(tmp_path / "newer.pt")
    torch.save({"kind": checkpoint.KIND, "format": 1, "step": 5}, tmp_path / "older.pt")
    assert checkpoint.load(tmp_path / "older.pt")["step"] == 5


def test_a_run_of_the_first_format_goes_on(segtrain, words):
    """As 0.1.0 wrote it: without the options, averages and histories that came later."""
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    content = state("r/last.pt") | {"format": 1}
    for key in ("recent", "scaler", "elapsed", "environment"):
        del content[key]
    del content["best"]["since"]
    options = content["config"]
    for key in ("accumulation", "hours", "patience", "precision", "compile", "deterministic", "ema_decay", "parallel",
                "sync_group", "keep_last", "overfit", "on_bad_step", "spike_factor"):  # fmt: skip
        del options["trainer"][key]
    options["loss"] = {key: options["loss"][key] for key in ("name", "hardest")}
    options["schedule"] = {"power": options["schedule"]["power"]}
    options["optimizer"] = {key: options["optimizer"][key] for key in ("lr", "momentum", "nesterov", "weight_decay")}
    options["augmentation"] = {key: options["augmentation"][key] for key in ("crop_size", "scale", "flip", "color")}
    shutil.rmtree("r")
    Path("r").mkdir()
    torch.save(content, "r/last.pt")
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=3")
    assert answer.status == 0, answer
    assert "going on at step 2" in answer.out
    assert segtrain("evaluate", "run=r", "device=cpu", "output=o").status == 0


def test_defaults_of_todays_options_fill_an_older_configuration():
    full = with_defaults({"dataset": {"name": "kitti"}, "trainer": {"seed": 3}})
    assert full["trainer"]["seed"] == 3
    assert full["trainer"]["on_bad_step"] == "stop"
    assert full["dataset"]["val_list"] == "mseg_150_50"


# ------------------------------------------------------------------------------------------------ going on


def test_a_second_process_in_the_same_run_is_refused(segtrain, words):
    first = launch(1, *words, "run=r", "trainer.max_steps=100000")
    until(first, "step 1/")
    refused(
        segtrain("train", *words, "run=r", "trainer.max_steps=100000"), "another process is training in r", status=1
    )
    first.terminate()
    ended(first, 75)


def test_restart_does_not_move_a_run_away_under_its_process(segtrain, words):
    first = launch(1, *words, "run=r", "trainer.max_steps=100000")
    until(first, "step 1/")
    refused(segtrain("train", *words, "run=r", "restart=true"), "another process is training in r", status=1)
    assert json.loads(Path("r/state.json").read_text())["state"] == "running"
    assert not Path("r.old-1").exists()
    first.terminate()
    ended(first, 75)


def test_restart_is_of_the_first_start_of_a_job(segtrain, words, monkeypatch):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=3", "restart=true")
    assert "a requeued one goes on" in answer.out
    assert "going on at step 2" in answer.out


def test_a_run_that_was_trained_on_meanwhile_is_not_overwritten(segtrain, words, monkeypatch):
    """Another process saved, and ended, between our reading of last.pt and our claim of the folder."""
    from segtrain.engine import run
    from segtrain.tasks.segmentation import Segmentation

    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    check = Segmentation.check
    monkeypatch.setattr(Segmentation, "check", lambda self: (os.utime("r/last.pt"), check(self)))
    refused(segtrain("train", *words, "run=r", "trainer.max_steps=3"), "trained on meanwhile", status=1)
    assert run.modified(Path("r/none.pt")) is None


def test_an_early_end_without_its_evaluation_is_not_trained_on(segtrain, words):
    """Killed between the last save and the table."""
    options = [
        *words,
        "run=r",
        "trainer.max_steps=40",
        "trainer.validate_every=1",
        "trainer.patience=2",
        "optimizer.lr=1e-9",
    ]
    assert segtrain("train", *options).status == 0
    before = state("r/last.pt")
    Path("r/evaluation.json").unlink()
    assert segtrain("train", *options).status == 0
    after = state("r/last.pt")
    for key in ("step", "best", "model", "recent"):
        assert same(before[key], after[key]), key
    assert Path("r/evaluation.json").exists()


def test_other_pictures_are_refused_and_a_moved_run_is_not(segtrain, words, folder_data):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    shutil.move("r", "elsewhere")
    assert "going on at step 2" in segtrain("train", *words, "run=elsewhere", "trainer.max_steps=3").out
    for path in (folder_data[0] / "train/images/p3.png", folder_data[0] / "train/labels/p3.png"):
        path.unlink()
    refused(segtrain("train", *words, "run=elsewhere", "trainer.max_steps=4"), "trained on 4 pictures", status=1)


def test_resuming_takes_no_longer_however_far_the_run_is(segtrain, words, monkeypatch):
    """Of the million steps before, not one sample is read again."""
    from segtrain.data import loader

    assert segtrain("train", *words, "run=r", "trainer.max_steps=1").status == 0
    far = 10**6
    checkpoint.save(Path("r/last.pt"), state("r/last.pt") | {"step": far, "validated": far})
    read, get = [], loader.TrainingData.__getitem__
    monkeypatch.setattr(loader.TrainingData, "__getitem__", lambda self, n: (read.append(n), get(self, n))[1])
    answer = segtrain("train", *words, "run=r", f"trainer.max_steps={far + 1}")
    assert answer.status == 0, answer
    assert read == [4 * far + place for place in range(4)]


def test_an_early_end_is_found_again_by_the_validation_that_was_cut_off(segtrain, words):
    """Killed between a save and the validation that would have ended the training."""
    options = [
        *words,
        "run=r",
        "trainer.max_steps=40",
        "trainer.validate_every=1",
        "trainer.patience=1",
        "optimizer.lr=1e-9",
    ]
    assert segtrain("train", *options).status == 0
    end = state("r/last.pt")
    before = {"validated": end["step"] - 1, "best": end["best"] | {"since": 0}}
    checkpoint.save(Path("r/last.pt"), end | before)
    Path("r/evaluation.json").unlink()
    answer = segtrain("train", *options)
    assert answer.status == 0, answer
    assert "ending early" in answer.out
    assert same(state("r/last.pt")["model"], end["model"])
    assert state("r/last.pt")["step"] == end["step"]


@pytest.mark.slow
def test_twenty_kills_at_any_moment_lose_no_more_than_a_save_interval(words):
    """Also while files are written, and while the run starts. A constant rate, for the length is not known."""
    options = [*words, "run=r", "trainer.max_steps=2000", "trainer.save_every=3", "trainer.validate_every=500"]
    options += ["loader.workers=1", "schedule=constant"]
    rng = random.Random(0)
    reached = killed = 0
    for _ in range(20):
        process = launch(1, *options)
        if rng.random() < 0.8:  # most of them while it trains
            for line in process.stdout:
                if line.startswith("step "):
                    break
        time.sleep(rng.random() * 1.5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        done = [line["step"] for line in black_box("r")] if Path("r/blackbox/rank0.jsonl").exists() else [0]
        state_now = checkpoint.newest(Path("r"))
        saved = 0 if state_now is None else state_now["step"]
        assert saved >= reached  # nothing that was saved is lost
        assert max(done, default=0) - saved <= 2 * 3  # one interval, and the save that was under way
        reached = saved
    assert killed == 20
    ended(launch(1, *[word for word in options if word != "run=r"], "run=whole", f"trainer.max_steps={reached}"))
    for key in ("model", "optimizer", "recent"):
        assert same(checkpoint.newest(Path("r"))[key], state("whole/last.pt")[key]), key


# ------------------------------------------------------------------------------------------------ verify-resume


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
state = learner.Learner.state
def broken(self):
    content = {key: value for key, value in state(self).items()}
    content = __import__('segtrain.weights.checkpoint', fromlist=['copied']).copied(content)
    %s
    return content
learner.Learner.state = broken
"""
BREAK_POSITION = """
from segtrain.data import loader
start = loader.MicroBatches.__init__
def from_the_beginning(self, batch_size, begin, *more):
    start(self, batch_size, begin, *more)
    self.shift = begin
def positions(self):
    for step, piece in enumerate(whole(self)):
        yield [position - self.shift * self.batch_size for position in piece]
whole = loader.MicroBatches.__iter__
loader.MicroBatches.__init__, loader.MicroBatches.__iter__ = from_the_beginning, positions
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


def test_the_kill_comes_inside_an_epoch_and_between_two_saves():
    for batch, samples in ((4, 24), (3, 4), (16, 2975), (5, 7), (2, 6), (2, 4)):
        every, steps = verify.schedule(batch, samples)
        assert every * batch % samples
        assert any(step * batch % samples for step in range(every + 1, 2 * every))
        assert 2 * every < steps
    assert 2 * verify.schedule(16, 2975)[0] * 16 % 2975
    with pytest.raises(UsageError, match="whole epochs"):
        verify.schedule(8, 4)


def test_digests_tell_bits_apart():
    value = {"a": torch.tensor([0.0]), "b": [1, {"c": torch.ones(2)}]}
    assert verify.digest(value) == verify.digest(checkpoint.copied(value))
    assert verify.digest(value) != verify.digest(value | {"a": torch.tensor([-0.0])})
    assert verify.digest(torch.zeros(2)) != verify.digest(torch.zeros(2, dtype=torch.int32))


# ------------------------------------------------------------------------------------------------ preemption


def test_usr1_saves_within_a_step_and_asks_to_be_requeued(words):
    process = launch(1, *words, "run=r", "trainer.max_steps=100000", "trainer.save_every=100000")
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
    assert ended(launch(1, *words, "run=r", "trainer.max_steps=1"))
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
    from segtrain.engine.run import Preempted, Preemption

    with Preemption() as preemption:
        with pytest.raises(Preempted) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.exit_status == 75
        preemption.status, preemption.stepping = 0, True
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.status == 75
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
    """The job script with srun and scontrol played by scripts: warned before its time is up, requeued, finished."""
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
