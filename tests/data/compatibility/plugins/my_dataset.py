"""A data set: segtrain train dataset=ponds dataset.root=/data/ponds plugins=[my_dataset.py]"""

from segtrain.config import DatasetConfig
from segtrain.data.datasets import DATASETS
from segtrain.data.labels import LabelTable
from segtrain.data.sample import DataSet, Files, by_stem
from segtrain.metrics import PLAIN

LAND = {"id": 0, "name": "land", "color": [90, 60, 20], "train_id": 0}
WATER = {"id": 1, "name": "water", "color": [0, 60, 200], "train_id": 1}


def files(config: DatasetConfig, split: str) -> Files:
    return Files(by_stem(config.folder() / split, "*.jpg"), by_stem(config.folder() / split, "*.png"))


DATASETS["ponds"] = DataSet(lambda config: LabelTable([LAND, WATER], "my_dataset.py"), files, PLAIN)
