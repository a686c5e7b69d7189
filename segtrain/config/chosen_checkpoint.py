"""Which checkpoint the options checkpoint= and run= name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segtrain.config.user_files import read_yaml
from segtrain.errors import DataError, UsageError

WORDS = ("last", "best")  # with run=, checkpoint=last is the run's last.pt


def checkpoint_path(checkpoint: Any, run: Any) -> Path:
    """The file that the options name: checkpoint=FILE, or run=FOLDER with checkpoint=last, checkpoint=best or neither.

    The default is last, as the paper's tables report it, and best where trainer.patience ends the training late.
    UsageError unless a file or a run is given.
    """
    if run is None and checkpoint is None:
        raise UsageError("give checkpoint=FILE or run=FOLDER, one of them: a run keeps last.pt and best.pt")
    if run is None:
        if checkpoint in WORDS and not Path(checkpoint).is_file():
            raise UsageError(f"checkpoint={checkpoint} is of a run: add run=FOLDER, or write checkpoint=./{checkpoint}")
        return Path(str(checkpoint))
    if checkpoint is None:
        checkpoint = default_checkpoint(Path(str(run)))
    if checkpoint not in WORDS:
        raise UsageError(
            f"give checkpoint=FILE or run=FOLDER, one of them; with run=FOLDER choose checkpoint=last or "
            f"checkpoint=best, got checkpoint={checkpoint}"
        )
    return Path(str(run)) / f"{checkpoint}.pt"


def default_checkpoint(run: Path) -> str:
    """best if the run has trainer.patience, and a best.pt by now; else last."""
    try:
        content = read_yaml(run / "config.yaml")
    except DataError:  # a folder with checkpoints alone
        return "last"
    trainer = content.get("trainer") if isinstance(content, dict) else None
    patience = trainer.get("patience") if isinstance(trainer, dict) else None
    return "best" if patience is not None and (run / "best.pt").is_file() else "last"


def checkpoint_line(path: Path, run: str | None, content: Mapping[str, Any]) -> str:
    """ "runs/mine/best.pt, step 30, the best on val; ...". content: of the checkpoint; run: the option run=."""
    config, best = content["config"], content.get("best", {})
    text = f"{path}, step {content['step']}"
    if path.name == "best.pt":
        text += f", selected on {config['dataset'].get('val_split')}"
        if run is not None and config.get("trainer", {}).get("patience") is not None:
            text += "; the default of a run with trainer.patience, checkpoint=last takes the last"
    elif path.name == "last.pt" and 0 < best.get("step", 0) < content["step"]:
        text += f"; best.pt is of step {best['step']} ({'' if run else 'run=FOLDER '}checkpoint=best)"
    return text
