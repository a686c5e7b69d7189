"""Checkpoint files that survive a kill, damage and a full disk."""

import threading
from pathlib import Path

import pytest
import torch

from segtrain.engine.checkpoint_writer import CheckpointWriter
from segtrain.errors import DataError, SegtrainError
from segtrain.weights import checkpoint
from tests.helpers import zygote
from tests.helpers.runs import small_run, state


@pytest.fixture(autouse=True)
def _short_contents(monkeypatch):
    """Contents of these tests are a step or two tensors; tests/weights/test_schema.py says what a checkpoint holds."""
    monkeypatch.setattr(checkpoint, "wrong_content", lambda content: ())


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")


def test_the_newest_are_kept_and_the_best(tmp_path):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (1, 2, 3, 4):
            writer.submit({"step": step}, best=step == 2)
    assert kept(tmp_path) == ["best.pt", "last.pt", "step_0000003.pt", "step_0000004.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert (tmp_path / "last.pt").stat().st_ino == (tmp_path / "step_0000004.pt").stat().st_ino  # no second copy


def test_the_log_is_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    """After a power failure no checkpoint may claim steps whose lines are lost."""
    log, done = tmp_path / "metrics.jsonl", []
    log.write_text('{"step": 1}\n')
    monkeypatch.setattr("os.fsync", lambda file: done.append(Path(f"/proc/self/fd/{file}").resolve().name))
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.submit({"step": 1})
    assert done[0] == log.name and len(done) > 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing"])
def test_a_torn_checkpoint_is_replaced_by_the_one_before(tmp_path, damage, capsys):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (10, 20):
            writer.submit({"step": step, "weights": torch.arange(10000.0) + step})
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
    """Training continues while the file is written, and must not change its content."""
    going = threading.Event()
    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (going.wait(10), write(*arguments)))
    weights = torch.zeros(5)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.submit({"step": 1, "model": {"w": weights}, "list": [weights]})
        assert not (tmp_path / "last.pt").exists()  # nobody waited
        weights += 1
        going.set()
    content = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(content["model"]["w"], torch.zeros(5))
    assert torch.equal(content["list"][0], torch.zeros(5))


def test_a_full_disk_in_the_middle_is_told_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    full = True
    write = checkpoint.write_atomically

    def maybe(path, data):
        if full:
            raise OSError(28, "No space left on device")
        write(path, data)

    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.submit({"step": 1})
        writer.wait()
        monkeypatch.setattr(checkpoint, "write_atomically", maybe)
        writer.submit({"step": 2})
        writer.submit({"step": 3})  # says that 2 was not written
        assert "cannot write the checkpoint" in capsys.readouterr().out
        with pytest.raises(
            SegtrainError, match="No space left on device; free some there, or .*. What was saved before is untouched"
        ):
            writer.close()
        assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
        full = False
        writer.submit({"step": 4})
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert not list(tmp_path.glob(".*"))


def test_the_best_weights_outlive_a_disk_that_was_full_for_a_while(tmp_path, monkeypatch, capsys):
    write, full = checkpoint.write_atomically, [2, 3]

    def maybe(path, data):
        if step in full:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", maybe)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        for step, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
            writer.wait_or_warn()
            writer.submit({"step": step}, best)
            writer.wait_or_warn()
    assert capsys.readouterr().out.count("cannot write the checkpoint") == 2
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert kept(tmp_path) == ["best.pt", "last.pt", "step_0000005.pt"]


def test_files_of_a_killed_writer_go(segtrain, words):
    Path("r").mkdir()
    Path("r/.last.pt.123.tmp").write_bytes(b"half")
    assert segtrain("train", *words, "run=r", "trainer.max_steps=1").status == 0
    assert not list(Path("r").glob(".*.tmp"))


def test_a_newer_file_that_is_damaged_does_not_push_out_the_one_it_went_back_to(tmp_path):
    (tmp_path / "step_0000009.pt").write_bytes(b"damaged")
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.submit({"step": 3})
    assert checkpoint.load(tmp_path / "step_0000003.pt")["step"] == 3


def test_formats_of_other_versions(tmp_path):
    newer = {"kind": checkpoint.KIND, "format": checkpoint.FORMAT + 1, "environment": {"segtrain": "9.1"}}
    torch.save(newer, tmp_path / "newer.pt")
    with pytest.raises(DataError, match=r"format 3 \(written by segtrain 9\.1\).*update segtrain"):
        checkpoint.load(tmp_path / "newer.pt")
    torch.save({"kind": checkpoint.KIND, "format": 1, "step": 5}, tmp_path / "older.pt")
    with pytest.raises(DataError, match=r"older\.pt has checkpoint format 1, which no release wrote.*train again"):
        checkpoint.load(tmp_path / "older.pt")


def test_atomic_writes_keep_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segtrain.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


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


def test_a_full_disk_leaves_the_last_checkpoint_whole(scenes, segtrain):
    """A limit on the file size stands for the full disk: writing fails half way."""
    assert segtrain("train", *small_run(scenes, "run=r", "trainer.max_steps=1")).status == 0
    before = Path("r/last.pt").read_bytes()
    program = (
        "import resource, sys; from segtrain.cli import main; size = int(sys.argv[1]); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); main(sys.argv[2:])"
    )
    limit = str(len(before) // 2)
    result = zygote.call(["-c", program, limit, "train", *small_run(scenes, "run=r", "trainer.max_steps=2")])
    assert result.returncode == 1
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.stderr
    assert Path("r/last.pt").read_bytes() == before
    assert not list(Path("r").glob(".*tmp"))
