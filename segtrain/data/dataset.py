"""The data sets by name: what their labels mean and which files each split has."""

from pathlib import Path

from segtrain.config import DatasetConfig, MixtureConfig, StreetsCommandConfig, StreetsConfig
from segtrain.console import Progress, say
from segtrain.data.labels import LabelTable, published_table
from segtrain.data.rules import CITYSCAPES
from segtrain.data.sample import DatasetSpec, Sample, SplitFiles
from segtrain.data.scenes.layouts import write_scenes
from segtrain.data.sets import cityscapes, cocostuff, folder, kitti, vistas
from segtrain.data.sets.mixture import Mixture, mixed, target_part
from segtrain.errors import DataError


def street_files(config: StreetsConfig, split: str) -> SplitFiles:
    """The built-in scenes, drawn where they are missing. Folders may hold more scenes than asked for."""
    wanted = {"train": config.scenes, "val": config.val_scenes, "night": config.night_scenes}
    if split not in wanted:
        raise DataError(f"no split {split!r} in the street scenes: there is {', '.join(wanted)}")
    draw_streets(config.folder(), "cityscapes", wanted, config.seed, config.size, None)
    found = cityscapes.layout_files(config.folder(), split)
    names = sorted(found.images)[: wanted[split]]
    return SplitFiles(
        *({name: kind[name] for name in names} for kind in (found.images, found.labels or {}, found.instances))
    )


def streets(config: StreetsCommandConfig) -> Path:
    """`segtrain streets`: write the scenes in the layout of a published data set. Returns the folder."""
    root = Path(config.output or "segtrain-out/streets")
    scenes = {"train": config.scenes, "val": config.val_scenes}
    if config.layout == "cityscapes":
        scenes["night"] = config.night_scenes
    if not draw_streets(root, config.layout, scenes, config.seed, config.size, config.workers):
        say("all scenes were there already")
    print(root)
    return root


def draw_streets(
    root: Path, layout: str, scenes: dict[str, int], seed: int, size: list[int], workers: int | None
) -> int:
    """Draw what is missing, saying so. Returns how many scenes that were."""
    progress: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            say(f"drawing {total} street scenes into {root}")
            progress = Progress("drawing scenes", total)
        if done:
            progress.show(done)

    return write_scenes(root, layout, scenes, seed, (size[0], size[1]), workers, show)


DATASETS: dict[str, DatasetSpec] = {
    "streets": DatasetSpec(
        lambda config: published_table("cityscapes", "cityscapes"), street_files, CITYSCAPES,
        answer=cityscapes.answer, family="streets", identity=cityscapes.identity,
    ),
    "cityscapes": cityscapes.DATASET,
    "kitti": kitti.DATASET,
    "vistas": vistas.DATASET,
    "cocostuff": cocostuff.DATASET,
    "folder": folder.DATASET,
}  # fmt: skip


def label_table(config: DatasetConfig) -> LabelTable:
    if isinstance(config, MixtureConfig):
        return label_table(target_part(config).config)
    return DATASETS[config.name].table(config)


def dataset_spec(config: DatasetConfig) -> DatasetSpec:
    """How this data set's benchmark scores; of a mixture: that of the part whose classes it has."""
    return DATASETS[target_part(config).config.name if isinstance(config, MixtureConfig) else config.name]


def training_mixture(config: DatasetConfig) -> Mixture:
    """The training split of any data set."""
    if isinstance(config, MixtureConfig):
        return mixed(config, label_table, split_samples, identities)
    samples = split_samples(config, config.train_split)
    return Mixture(samples, identities(config, samples))


def identities(config: DatasetConfig, samples: list[Sample]) -> list[str]:
    """Which pictures these are, whatever split or version of the data they were read from."""
    dataset = dataset_spec(config)
    return [f"{dataset.family}/{dataset.identity(sample)}" for sample in samples]


def split_files(config: DatasetConfig, split: str) -> SplitFiles:
    """The files of a split, or of several: train+train_extra. Of a mixture: those of the part whose classes it has."""
    if isinstance(config, MixtureConfig):
        target = target_part(config).config
        return split_files(target, target.val_split if split == config.val_split else split)
    if split == "trainval" and config.name not in ("kitti", "folder"):  # which may have one of their own
        split = "train+val"
    parts = [DATASETS[config.name].files(config, part) for part in split.split("+")]
    if len(parts) == 1:
        return parts[0]
    found: list[dict[str, Path]] = [{}, {}, {}]
    for part, name in zip(parts, split.split("+"), strict=True):
        if part.labels is None:
            raise DataError(f"the split {name!r} has no labels: it cannot be joined with others")
        for mine, theirs in zip(found, part, strict=True):
            twice = sorted(mine.keys() & (theirs or {}).keys())
            if twice:
                raise DataError(
                    f"{split}: {len(twice)} pictures are in more than one of these splits ({twice[0]}, ...)"
                )
            mine |= theirs or {}
    return SplitFiles(*found)


def split_samples(config: DatasetConfig, split: str) -> list[Sample]:
    """The samples of a split, at least one; DataError otherwise."""
    return some(split_files(config, split).samples(), config, split)


def labelled_samples(config: DatasetConfig, split: str) -> list[Sample]:
    """What of a split can be scored, its pictures present or not; DataError if that is nothing."""
    files = split_files(config, split)
    if files.labels is None:
        raise DataError(f"the split {split!r} of dataset={config.name} has no labels to score against")
    return some(files.labelled(), config, split)


def some(samples: list[Sample], config: DatasetConfig, split: str) -> list[Sample]:
    if not samples:
        raise DataError(
            f"the split {split!r} of dataset={config.name} is empty: no pictures found in {config.folder()}"
        )
    return samples
