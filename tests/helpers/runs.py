"""Start trainings for tests, and read what they print and write."""

import json
from pathlib import Path

import torch
from torch import distributed

from tests.helpers import zygote

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def refused(answer, *words, status=2):
    """Assert that the answer is one message with these words and without a traceback."""
    assert answer.status == status, answer
    assert "Traceback" not in answer.err
    assert answer.err.startswith("segtrain: ")
    for word in words:
        assert word in answer.err, f"{word!r} not in {answer.err!r}"
    return answer


def small_run(scenes: Path, *more: str) -> list[str]:
    """Overrides for a training of a few seconds on `scenes`."""
    return [
        f"dataset.root={scenes}", "dataset.scenes=6", "dataset.val_scenes=3", "model.output_stride=16",
        "model.head_channels=8", "augmentation.crop_size=[64,96]", "augmentation.scale=[0.3,0.5]",
        "trainer.batch_size=2", "trainer.epochs=null", "trainer.max_steps=4", "trainer.validate_every=4",
        "trainer.save_every=2", "loader.workers=0", "logging.every=1", "logging.pictures=2", "device=cpu", *more,
    ]  # fmt: skip


def launch(*words):
    """A training in a process of its own."""
    return zygote.start(["train", *words], ONE_THREAD)


class Ranks:
    """The processes of one command, as torchrun starts them, but forked: to import torch takes each several seconds.

    `store` stands for torchrun's agent. stdout and stderr are those of rank 0.
    """

    def __init__(self, count, *arguments, own=()):
        """own: further arguments of each rank."""
        self.store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True", **ONE_THREAD}  # fmt: skip
        self.processes = [
            zygote.start(
                [*arguments, *(own[rank] if own else ())], {**launcher, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(count)
        ]
        self.stdout, self.stderr = self.processes[0].stdout, self.processes[0].stderr

    def send_signal(self, number):
        for process in self.processes:
            process.send_signal(number)

    def ended(self, status=0):
        """(stdout, stderr) of all ranks together. Asserts that each has that exit status."""
        texts = [process.communicate(timeout=200) for process in self.processes]
        assert [process.returncode for process in self.processes] == [status] * len(texts), texts
        return tuple("".join(text) for text in zip(*texts, strict=True))


def until(process, text):
    """The lines up to the one that begins with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            return lines
    raise AssertionError(f"no {text!r} in {''.join(lines)}{process.stderr.read()}")


def ended(process, status=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == status, out + err
    return out, err


def black_box(run, rank=0):
    return [json.loads(line) for line in Path(run, f"blackbox/rank{rank}.jsonl").read_text().splitlines()]


def state(path):
    return torch.load(path, weights_only=True)


def same(first, second):
    """Whether two values are equal bit for bit, through nested dicts and lists."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
