"""`segtrain replay`: rebuild and draw the batch of any step of a run."""

from pathlib import Path
from typing import Any

from segtrain.config import ReplayConfig, TrainConfig
from segtrain.console import say
from segtrain.engine.blackbox import recorded
from segtrain.engine.start import task_of
from segtrain.errors import DataError
from segtrain.scoring.figures import captioned, write_png
from segtrain.weights import checkpoint


def replay(config: ReplayConfig) -> Path:
    """Rebuild a step's batch from the run's configuration and draw it: image and labels, one row per sample.

    Order and augmentation are functions of (seed, position), so past and future steps can be rebuilt. The black box's
    record of the step is printed; DataError if it names other images. Returns the path of the drawing.
    """
    folder = Path(config.run or "")
    trained = config_of_run(folder, config.root)
    task = task_of(trained)(trained)
    data = task.data()
    size = trained.trainer.images
    records = {
        sample["position"]: (rank, sample) for rank, line in recorded(folder, config.step) for sample in line["samples"]
    }
    for _, line in recorded(folder, config.step)[:1]:
        if "error" in line:
            say(f"recorded   {line['error']}")
            break
        skipped = ", skipped" if line["skipped"] else ""
        loss, norm, lr = line["loss"], line["gradient_norm"], line["lr"]
        say(f"recorded   loss {loss:.6g}, gradient norm {norm:.4g}, lr {lr:.3g}{skipped}")
    rows = []
    for position in range((config.step - 1) * size, config.step * size):
        item = data[position]
        rank, record = records.get(position, (None, None))
        if isinstance(item, DataError):
            raise DataError(f"position {position} of step {config.step}: {item}")
        image, target, name, _, window = item
        if record is not None and record["name"] != name:
            raise DataError(
                f"position {position} is {name}, but was {record['name']} in the run: the data have changed"
            )
        note = "" if record is None or record["loss"] is None else f"  loss {record['loss']:.4g}  rank {rank}"
        drawing, words = task.draw(image, target)
        say(f"position   {position}  {name}  window {window}  {words}{note}")
        rows.append(captioned(drawing, f"{position}  {name}"))
    output = Path(config.output or folder / "replay")
    path = output / f"step_{config.step:07d}.png"
    write_png(path, task.sheet(rows))
    say(str(path))
    return path


def config_of_run(folder: Path, root: str | None) -> TrainConfig:
    """The configuration of a run, from its config.yaml or else its newest checkpoint. root: where the data are now."""
    from segtrain.config import trained
    from segtrain.config.stored import wrong_options
    from segtrain.config.user_files import read_yaml

    path = folder / "config.yaml"
    state = None if path.exists() else checkpoint.newest(folder)
    if state is None and not path.exists():
        raise DataError(
            f"{folder} is no run: it has neither config.yaml nor last.pt (`segtrain runs` lists those that are)"
        )
    content: dict[str, Any] = state["config"] if state is not None else read_yaml(path)
    if faults := list(wrong_options(content)):
        raise DataError(f"{path if state is None else folder} holds no options of a training: {'; '.join(faults[:3])}")
    found = trained(content)
    if root is not None:
        found.dataset.root = root
    return found
