"""`segtrain replay`: the batch of any step of a run, as it was given to the network."""

from pathlib import Path
from typing import Any

from segtrain.config import ReplayConfig, TrainConfig
from segtrain.console import say
from segtrain.engine.blackbox import recorded
from segtrain.engine.start import task_of
from segtrain.errors import DataError
from segtrain.scoring import figures as pictures
from segtrain.weights import checkpoint


def replay(config: ReplayConfig) -> Path:
    """Rebuild a step's batch from the run's configuration and draw it (image | labels, a row a picture).

    Order and augmentation are functions of (seed, position), so any step can be rebuilt, whether it is recorded or yet
    to come; what the black box has of it is printed, and must name the same pictures (DataError otherwise). Returns the
    picture's path.
    """
    folder = Path(config.run or "")
    trained = training_config(folder, config)
    task = task_of(trained)(trained)
    data = task.data()
    size = trained.trainer.batch_size
    known = {
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
        rank, was = known.get(position, (None, None))
        if isinstance(item, DataError):
            raise DataError(f"position {position} of step {config.step}: {item}")
        image, target, name, _, window = item
        if was is not None and was["name"] != name:
            raise DataError(f"position {position} is {name}, and was {was['name']} in the run: the data have changed")
        told = "" if was is None or was["loss"] is None else f"  loss {was['loss']:.4g}  rank {rank}"
        drawing, words = task.draw(image, target)
        say(f"position   {position}  {name}  window {window}  {words}{told}")
        rows.append(drawing)
    output = Path(config.output or folder / "replay")
    path = output / f"step_{config.step:07d}.png"
    pictures.write_png(path, task.sheet(rows))
    print(path)
    return path


def training_config(folder: Path, config: ReplayConfig) -> TrainConfig:
    """The configuration that a run was started with, from its newest checkpoint or its config.yaml."""
    import yaml

    from segtrain.config import trained

    path = folder / "config.yaml"
    state = None if path.exists() else checkpoint.newest(folder)
    if state is None and not path.exists():
        raise DataError(
            f"{folder} is no run: it has neither config.yaml nor last.pt (`segtrain runs` lists those that are)"
        )
    content: dict[str, Any] = state["config"] if state is not None else yaml.safe_load(path.read_text())
    found = trained(content)
    if config.root is not None:
        found.dataset.root = config.root
    return found
