"""Write the checkpoints of a run in the background, while training continues."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from segtrain.console import say
from segtrain.engine.run_folder import link
from segtrain.errors import SegtrainError
from segtrain.files import flush_to_disk, reason_and_remedy, side_file
from segtrain.weights import checkpoint


class Owner(Protocol):
    """An object with a part of the checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...


class CheckpointWriter:
    """last.pt, best.pt and the `keep` newest step_<n>.pt of a run. Only the first process writes.

    A save costs the training a copy in memory, and a wait for the previous save if that is still being written. A full
    disk leaves the previous files, is reported, and ends the training only where it would end anyway. Leaving the
    context waits for the last save.
    """

    def __init__(self, folder: Path, keep: int, main: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.main = main
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.reported = False
        self.best: dict[str, Any] | None = None  # the best weights so far, until best.pt holds them

    def save(self, *owners: Owner, best: bool = False) -> None:
        """Merge the parts of the owners and write them. best: the weights are the best so far.

        Every process calls it, because an owner's `state_dict` may be a collective call.
        """
        content = {key: value for owner in owners for key, value in owner.state_dict().items()}
        if self.main:
            self.submit(content, best)

    def submit(self, content: dict[str, Any], best: bool = False) -> None:
        """Write `content` as it is now; content["step"] names the file."""
        began = time.monotonic()
        self.wait_or_warn()
        waited = time.monotonic() - began
        content = copy_to_cpu(content)
        if not self.reported:
            spent = 1000 * (time.monotonic() - began - waited)
            say(f"saving     step {content['step']}: copied in {spent:.0f} ms, written beside the training")
            self.reported = True
        self.writing = self.thread.submit(self.write, content, best)

    def write(self, content: dict[str, Any], best: bool) -> None:
        """In this order, which run_folder.repair knows."""
        last, own = self.folder / "last.pt", self.folder / f"step_{content['step']:07d}.pt"
        self.best = content if best else self.best
        with side_file(self.folder / "metrics.jsonl"):  # its lines may not be lost with the power where this is not
            flush_to_disk(self.folder / "metrics.jsonl")
        checkpoint.save(last, content)
        link(last, own)
        if best:
            link(last, self.folder / "best.pt")
        elif self.best is not None:  # the disk was full when they were saved
            checkpoint.save(self.folder / "best.pt", self.best)
        self.best = None
        older = [path for path in checkpoint.numbered(self.folder) if path.name < own.name]
        for old in older[self.keep - 1 :]:
            old.unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait until the last save is on the disk. OSError if it could not be written."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def wait_or_warn(self) -> None:
        """As `wait`, where training continues and will save again: a failure is only a warning."""
        try:
            self.wait()
        except OSError as error:
            say(f"WARNING    {not_written(self.folder, error)} It is tried again with the next one.")

    def close(self) -> None:
        """As `wait`, where nothing is saved afterwards: SegtrainError if the last save could not be written."""
        try:
            self.wait()
        except OSError as error:
            raise SegtrainError(not_written(self.folder, error)) from error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SegtrainError:
            if error is None:  # else that error is the one to report
                raise
        finally:
            self.thread.shutdown()


def not_written(folder: Path, error: OSError) -> str:
    return f"cannot write the checkpoint in {folder}: {reason_and_remedy(error)}. What was saved before is untouched."


def copy_to_cpu(value: Any) -> Any:
    """The value with every tensor in it copied to the CPU, so that training may continue while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copy_to_cpu(item) for item in value]
    return value
