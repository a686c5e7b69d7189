"""The datasets by name, and their splits: what the labels mean, which samples there are."""

from pathlib import Path

from segtrain.config import DatasetConfig, MixtureConfig
from segtrain.data.classify.samples import ClassificationSpec, ClassImages
from segtrain.data.labels import LabelTable, published_table
from segtrain.data.sample import DatasetSpec, Sample, SplitFiles, Submission
from segtrain.data.sets import cityscapes, cocostuff, folder, imagenet, kitti, mixture, streets, vistas
from segtrain.data.sets.mixture import Mixture, Part
from segtrain.errors import DataError
from segtrain.threads import uncollected

DATASETS: dict[str, DatasetSpec | ClassificationSpec] = {
    "streets": streets.DATASET,
    "cityscapes": cityscapes.DATASET,
    "kitti": kitti.DATASET,
    "vistas": vistas.DATASET,
    "cocostuff": cocostuff.DATASET,
    "folder": folder.DATASET,
    "imagenet": imagenet.DATASET,
}


def target_of(config: DatasetConfig) -> DatasetConfig:
    """The dataset whose classes and rules are used: one part of a mixture, or the dataset itself."""
    return mixture.target_part(config).config if isinstance(config, MixtureConfig) else config


def dataset_spec(config: DatasetConfig) -> DatasetSpec:
    """The facts about a dataset; for a mixture those of its target."""
    spec = DATASETS[target_of(config).name]
    assert isinstance(spec, DatasetSpec), f"{config.name} is a dataset for image classification"
    return spec


def label_table(config: DatasetConfig) -> LabelTable:
    return dataset_spec(config).table(target_of(config))


def submission(config: DatasetConfig) -> Submission | None:
    """What the benchmark's server takes; None if there is no server."""
    return None if isinstance(config, MixtureConfig) else dataset_spec(config).submission


def pixel_labelled() -> dict[str, DatasetSpec]:
    """The datasets with a label for every pixel, by name."""
    return {name: spec for name, spec in DATASETS.items() if isinstance(spec, DatasetSpec)}


def published_tables() -> list[str]:
    """The names of the published label tables of all datasets."""
    return [table for spec in pixel_labelled().values() for table in spec.tables]


def as_published(table: LabelTable) -> LabelTable:
    """The published label table with these classes, which has more of each than a checkpoint; else the table itself."""
    return next((one for one in map(published_table, published_tables()) if one.names == table.names), table)


def dataset_with_classes(names: list[str]) -> str | None:
    """The dataset whose default options lead to these classes, by its published label table; None if there is none."""
    for name, spec in pixel_labelled().items():
        if spec.tables and published_table(spec.tables[0]).names == names:
            return name
    return None


# ---------------------------------------------------------------------------------------------------- samples


def training_mixture(config: DatasetConfig) -> Mixture:
    """The training split of any dataset."""
    if isinstance(config, MixtureConfig):
        return mixture.mixed(config, label_table, split_samples, identities)
    samples = split_samples(config, config.train_split)
    with uncollected():
        return Mixture(samples, identities(config, samples), parts=[(config, samples)])


def parts_of(config: DatasetConfig) -> list[Part]:
    """The parts of a mixture; no parts for any other dataset."""
    return mixture.parts(config) if isinstance(config, MixtureConfig) else []


def is_mixture(config: DatasetConfig) -> bool:
    return isinstance(config, MixtureConfig)


def identities(config: DatasetConfig, samples: list[Sample]) -> list[str]:
    """Which images these are, the same for the same image in any split or version of the data."""
    dataset = dataset_spec(config)
    return [f"{dataset.family}/{dataset.identity(sample)}" for sample in samples]


def split_files(config: DatasetConfig, split: str) -> SplitFiles:
    """The files of a split, or of several, such as train+train_extra; for a mixture those of its target."""
    if isinstance(config, MixtureConfig):
        target = target_of(config)
        return split_files(target, target.val_split if split == config.val_split else split)
    dataset = dataset_spec(config)
    split = dataset.splits.get(split, split)
    names = split.split("+")
    with uncollected():
        several = [dataset.files(config, name) for name in names]
    if len(several) == 1:
        return several[0]
    joined: list[dict[str, Path]] = [{}, {}, {}]
    for name, files in zip(names, several, strict=True):
        if files.labels is None:
            raise DataError(f"the split {name!r} has no labels: it cannot be joined with others")
        for mine, theirs in zip(joined, files[:3], strict=True):
            twice = sorted(mine.keys() & (theirs or {}).keys())
            if twice:
                raise DataError(f"{split}: {len(twice)} images are in more than one of these splits ({twice[0]}, ...)")
            mine |= theirs or {}
    images, labels, instances = joined
    lost = tuple(text for files in several for text in files.lost)
    return several[0]._replace(images=images, labels=labels, instances=instances, lost=lost)


def split_samples(config: DatasetConfig, split: str) -> list[Sample]:
    """The samples of a split, at least one; DataError otherwise."""
    files = split_files(config, split)
    with uncollected():
        samples = files.samples()
    return not_empty(samples, config, split)


def labelled_samples(config: DatasetConfig, split: str) -> list[Sample]:
    """The labelled samples of a split, with or without their images; DataError if there are none."""
    files = split_files(config, split)
    if files.labels is None:
        raise DataError(f"the split {split!r} of dataset={config.name} has no labels to score against")
    return not_empty(files.labelled(), config, split)


def not_empty(samples: list[Sample], config: DatasetConfig, split: str) -> list[Sample]:
    if not samples:
        raise DataError(f"the split {split!r} of dataset={config.name} is empty: no images found in {config.folder()}")
    return samples


# ---------------------------------------------------------------------------------------------------- classification


def classification_spec(config: DatasetConfig) -> ClassificationSpec:
    """The facts about a dataset for image classification."""
    spec = DATASETS[config.name]
    assert isinstance(spec, ClassificationSpec), f"{config.name} has labels of pixels"
    return spec


def list_images(config: DatasetConfig, split: str) -> ClassImages:
    """The images of a split, with one class each; DataError if there are none."""
    return classification_spec(config).images(config, split)
