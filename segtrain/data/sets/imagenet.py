"""ImageNet-1k, or any tree of its layout: one class for each image, a folder for each class."""

import re

from segtrain.config import DatasetConfig
from segtrain.data.classify.samples import ClassificationSpec, ClassImages, class_folders
from segtrain.errors import DataError

TREE = """{root}/train/n01440764/n01440764_10026.JPEG   (a folder for each class)
{root}/val/n01440764/ILSVRC2012_val_00000293.JPEG"""
# Sorts the images of the validation archive into folders; the script that is commonly used for this.
SORTING = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"
PUBLISHED = {"train": 1281167, "val": 50000}  # images of ImageNet-1k
SYNSET = re.compile(r"n\d{8}")
FILE_NAME = re.compile(r"(n\d{8}|ILSVRC2012_(val|test))_\d+\.JPEG")


def images(config: DatasetConfig, split: str) -> ClassImages:
    """The images of a split. DataError with the expected tree, or with what to do about images outside the folders."""
    root = config.folder()
    folder = root / split
    if not folder.is_dir():
        tree = TREE.format(root=root).replace("\n", "\n  ")
        raise DataError(
            f"no {folder} (set dataset.root=FOLDER, or SEGTRAIN_DATA to its parent folder). Expected:\n  {tree}\n"
            "ImageNet-1k is available, after registration, from https://image-net.org/download.php"
        )
    return class_folders(
        folder,
        "ImageNet's validation archive is packed like this. Sort them into folders named as those in "
        f"{root / 'train'}; for ImageNet-1k:\n  cd {folder} && curl -fsSL {SORTING} | bash",
    )


def is_imagenet_1k(images: ClassImages) -> bool:
    """Whether these are the 1000 classes of ImageNet-1k."""
    return len(images.classes) == 1000 and all(SYNSET.fullmatch(name) for name in images.classes)


def identity(images: ClassImages) -> list[str]:
    """ImageNet's images by their file names, in any folder; others by their place in a split."""
    files = ((name, name.rpartition("/")[2]) for name in images.names)
    return [f"imagenet/{file}" if FILE_NAME.fullmatch(file) else f"{images.folder.name}/{name}" for name, file in files]


DATASET = ClassificationSpec(
    images, PUBLISHED, is_imagenet_1k, identity, licence="non-commercial research and education (https://image-net.org)"
)
