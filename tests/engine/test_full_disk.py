"""A full disk costs what is written beside the checkpoints, with a warning that names the file, never the training."""

import contextlib
import errno
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segtrain import console, files
from segtrain.engine.learner import Learner
from tests.helpers.runs import black_box, state


@pytest.fixture
def disk(monkeypatch):
    """disk.full while the steps in `disk.steps` are under way: whatever is no checkpoint cannot be written."""

    class Disk:
        steps: tuple[int, ...] = ()
        full = False

    disk, write, step = Disk(), Path.open, Learner.step

    def opened(path, mode="r", *more, **options):
        if disk.full and set(mode) & set("wax") and ".pt" not in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, mode, *more, **options)

    def stepped(self, batches, divisor, number, progress):
        disk.full = number + 1 in disk.steps
        return step(self, batches, divisor, number, progress)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Learner, "step", stepped)
    monkeypatch.setattr(files, "warned", {})
    return disk


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_pictures(segtrain, words, disk, folder_data):
    disk.steps = (2, 3, 4)
    answer = segtrain("train", *words, "run=r", "trainer.validate_every=3", "trainer.save_every=1")
    assert answer.status == 0, answer
    assert "Traceback" not in answer.err
    warnings = [line for line in answer.out.splitlines() if line.startswith("WARNING")]
    for name in ("r/blackbox/rank0.jsonl", "r/tensorboard/events.out", "r/pictures/val_0000003.png"):
        told = [line for line in warnings if name in line]
        assert len(told) == 1, warnings
        assert "No space left on device; free some there, or choose a folder on another disk" in told[0]
        assert told[0].endswith("the training goes on without it")
    assert state("r/last.pt")["step"] == 6
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [line["step"] for line in black_box("r")] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator("r/tensorboard").Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in events.Scalars("val/miou")] == [3, 6]
    assert json.loads(Path("r/state.json").read_text())["state"] == "finished"
    assert [path.name for path in Path("r/pictures").iterdir()] == ["val_0000006.png"]
    assert not list(Path("r").rglob(".*.tmp"))


def test_a_disk_that_is_full_at_the_end_names_the_scores_and_the_remedy(segtrain, words, disk):
    disk.steps = (6,)
    answer = segtrain("train", *words, "run=r")
    assert answer.status == 1
    assert "r/confusion.png: No space left on device; free some there" in answer.err, answer
    disk.full, disk.steps = False, ()
    assert state("r/last.pt")["step"] == 6
    answer = segtrain("train", *words, "run=r")
    assert answer.status == 0 and Path("r/summary.txt").exists(), answer


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log"
    files.append(path, b"first\n")

    class Half:
        def __init__(self, file):
            self.file, self.written = file, 0

        def write(self, data):
            if self.written:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written = self.file.write(data[:3])
            return self.written

        def __getattr__(self, name):
            return getattr(self.file, name)

    @contextlib.contextmanager
    def opened(path, *more, **options):
        with write(path, *more, **options) as file:
            yield Half(file)

    write = Path.open
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left on device: .*log"):
        files.append(path, b"second\n")
    monkeypatch.undo()
    assert path.read_bytes() == b"first\n"


def test_a_screen_that_cannot_be_written_ends_no_training(monkeypatch):
    def gone(*text, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    console.say("nobody reads this")

    def closed(*text, **options):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):  # `segtrain runs | head` ends
        console.say("nobody reads this")


def test_names_of_temporary_files_are_unique_and_fit(tmp_path):
    """Containers that share a folder have the same process numbers, and a name may be as long as the system allows."""
    path = tmp_path / ("\u540d" * 84 + "ab")
    names = {files.temporary_beside(path).name for _ in range(100)}
    assert len(names) == 100
    files.write_atomically(path, b"content")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
