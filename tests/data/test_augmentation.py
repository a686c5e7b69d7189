"""Albumentations' transforms from YAML and the command line, and what they may do to labels."""

import inspect
import itertools
import pickle

import albumentations
import cv2
import numpy as np
import pytest
import yaml

from segtrain.config import IGNORE_INDEX, AugmentationConfig
from segtrain.config.compose import compose_training
from segtrain.data.augment import Augmentation
from segtrain.data.extra_transforms import FILL, Extra
from segtrain.data.labels import published_table
from segtrain.data.loader import TrainingData, training_batches
from segtrain.data.order import MicroBatches
from segtrain.data.sample import Sample
from segtrain.errors import DataError, UsageError
from tests.helpers.runs import refused, small_run

SIZE = [32, 48]
NAMES = [
    name
    for name, value in sorted(vars(albumentations).items())
    if inspect.isclass(value) and issubclass(value, albumentations.BasicTransform)
]


def augmentation(*extra, size=SIZE, **options):
    return Augmentation(AugmentationConfig(crop_size=size, scale=[1.0, 1.0], flip=0.0, extra=list(extra), **options))


def picture(size=SIZE, classes=6, seed=3):
    rng = np.random.default_rng(seed)
    labels = cv2.resize(rng.integers(1, classes + 1, (6, 6), np.uint8), tuple(size[::-1]), interpolation=0)
    labels[:2, :5] = IGNORE_INDEX
    return rng.integers(0, 256, (*size, 3), np.uint8), labels


# ------------------------------------------------------------------------------------------------ from YAML to pixels


def composed(*words):
    return compose_training(*words)


def test_presets():
    paper, colour, none = (composed(f"augmentation={name}").augmentation for name in ("paper", "colour", "none"))
    assert (paper.scale, paper.flip, paper.color) == ([0.7, 2.0], 0.5, 0.0)
    assert (colour.scale, colour.flip, colour.color) == ([0.7, 2.0], 0.5, 0.25)
    assert (none.scale, none.flip, none.color) == ([1.0, 1.0], 0.0, 0.0)
    assert paper.extra == colour.extra == none.extra == []


def test_transforms_from_the_command_line_and_from_yaml(tmp_path):
    wanted = [{"name": "GaussianBlur", "p": 0.3, "blur_limit": [3, 7]}, {"name": "ToGray"}]
    word = "augmentation.extra=[{name: GaussianBlur, p: 0.3, blur_limit: [3,7]}, {name: ToGray}]"
    typed = composed(word)
    assert typed.augmentation.extra == wanted
    recipes = tmp_path / "mine" / "augmentation"
    recipes.mkdir(parents=True)
    (recipes / "own.yaml").write_text(yaml.safe_dump({"extra": wanted}))
    assert compose_training("augmentation=own", config_dir=str(tmp_path / "mine")).augmentation.extra == wanted
    assert typed.name != composed().name  # it changes the run
    made = Augmentation(typed.augmentation).extra
    assert [type(extra.transform).__name__ for extra in made] == ["GaussianBlur", "ToGray"]
    assert made[0].transform.blur_limit == (3, 7)
    assert made[0].transform.p == 0.3


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "GausianBlur"}, ["no transform GausianBlur", "did you mean GaussianBlur"]),
        ({"name": "Zzz"}, ["no transform Zzz", "there is AdditiveNoise"]),
        ({"name": "BasicTransform"}, ["no transform BasicTransform"]),
        ({"name": "Compose"}, ["no transform Compose"]),
        ({"name": "GaussianBlur", "blurlimit": 3}, ["GaussianBlur", "argument blurlimit", "did you mean blur_limit?",
                                                    "sigma_limit"]),
        ({"name": "HorizontalFlip", "value": 3}, ["HorizontalFlip", "argument value", "Available: p"]),
        ({"name": "GaussianBlur", "blur_limit": "x"}, ["GaussianBlur.blur_limit=x", "valid integer",
                                                       "tuple[int, int] | int"]),
        ({"name": "GaussianBlur", "p": 2}, ["GaussianBlur.p=2", "probability"]),
        ({"name": "HorizontalFlip", "p": 2}, ["HorizontalFlip.p=2", "probability"]),
        ({"name": "MedianBlur", "blur_limit": -5}, ["MedianBlur: blur_limit: Invalid kernel size"]),
        ({"name": "RandomResizedCrop"}, ["RandomResizedCrop needs size"]),
        ({"name": "CropAndPad"}, ["CropAndPad", "px and percent"]),
        ({"name": "Affine", "fill_mask": 0}, ["Affine.fill_mask=0", "class", "255"]),
        ({"name": "PixelDropout", "mask_drop_value": 3}, ["PixelDropout.mask_drop_value=3"]),
        ({"name": "Affine", "mask_interpolation": 1}, ["Affine.mask_interpolation=1", "mix labels"]),
        ({"name": "RandomScale", "scale_limit": [1, 1]}, ["RandomScale", "shape (64, 96, 3)", "(32, 48, 3)"]),
        ({"name": "Transpose"}, ["Transpose", "shape (48, 32, 3)"]),
        ({"name": "RandomRotate90"}, ["RandomRotate90", "shape (48, 32, 3)"]),
        ({"name": "RandomCrop", "height": 500, "width": 500}, ["RandomCrop fails"]),
        ({"name": "Normalize"}, ["Normalize", "float32", "uint8"]),
        ({"name": "ToTensorV2"}, ["ToTensorV2", "Tensor"]),
        ({"name": "Pad3D", "padding": 3}, ["Pad3D is not for images"]),
        ({"name": "FDA"}, ["FDA", "fda_metadata"]),
        ({"name": "OneOf", "transforms": [{"name": "Blurr"}]}, ["no transform Blurr", "did you mean Blur"]),
        ({"name": "OneOf", "transforms": ["Blur"]}, ["OneOf.transforms", "mappings with a name"]),
        ({"name": "OneOf"}, ["OneOf.transforms"]),
        ({"name": "SomeOf", "m": 3, "transforms": [{"name": "Blur"}]}, ["SomeOf", "no argument m"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_transform_argument_and_what_is_allowed(entry, words):
    with pytest.raises(UsageError) as caught:
        augmentation(entry)
    for word in ["augmentation.extra", *words]:
        assert word in str(caught.value)


def test_nothing_is_built_before(segtrain, scenes, tmp_path):
    before = list(tmp_path.glob("*"))
    refused(segtrain("train", *small_run(scenes, "augmentation.extra=[{name: Blurr}]")), "Blurr", "did you mean Blur")
    refused(segtrain("train", "augmentation.extra=[{p: 0.3}]"), "augmentation.extra={'p': 0.3}", "name")
    refused(segtrain("train", "augmentation.extra=[Blur]"), "augmentation.extra=Blur", "mapping")
    refused(segtrain("train", "augmentation.extra=Blur"), "augmentation.extra", "list of values")
    assert list(tmp_path.glob("*")) == before


# ------------------------------------------------------------------------------------------------ rules for labels


def usable():
    """Every transform that needs only an image, without arguments."""
    for name in NAMES:
        try:
            yield Extra({"name": name, "p": 1.0}, SIZE)
        except UsageError:
            continue


@pytest.mark.filterwarnings("ignore::UserWarning")  # of those that find nothing to do
def test_every_transform_is_a_function_of_the_seed_and_keeps_to_the_rules():
    image, labels = picture()
    allowed = {*np.unique(labels), IGNORE_INDEX}
    count = 0
    for extra in usable():
        kept = image.copy(), labels.copy()
        try:
            first = [extra(image, labels, np.random.default_rng(seed)) for seed in (0, 1)]
            other = Extra({"name": extra.name, "p": 1.0}, SIZE)
            again = [other(image, labels, np.random.default_rng(seed)) for seed in (1, 0)][::-1]
        except DataError as error:  # those refuse themselves on real pictures only
            assert extra.name in str(error)
            continue
        for (one, target), (two, same) in zip(first, again, strict=True):
            assert np.array_equal(one, two), extra.name
            assert np.array_equal(target, same), extra.name
            assert set(np.unique(target)) <= allowed, extra.name
            assert one.dtype == target.dtype == np.uint8
            assert one.shape == (*SIZE, 3)
            assert target.shape == tuple(SIZE)
        assert np.array_equal(image, kept[0]), f"{extra.name} wrote into its input"
        assert np.array_equal(labels, kept[1]), f"{extra.name} wrote into its input"
        count += 1
    assert count >= 60


NEAREST = {"p": 1.0, "interpolation": 0, "fill": [255, 255, 255]}


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "HorizontalFlip", "p": 1.0},
        {"name": "VerticalFlip", "p": 1.0},
        {"name": "RandomGridShuffle", "p": 1.0},
        {"name": "Affine", "rotate": [-30, 30], "scale": [0.7, 1.4], "shear": 8, **NEAREST},
        {"name": "Rotate", "limit": 40, **NEAREST},
        {"name": "SafeRotate", **NEAREST},
        {"name": "Perspective", "scale": 0.2, **NEAREST},
        {"name": "ElasticTransform", "alpha": 20, "sigma": 4, **NEAREST},
        {"name": "GridDistortion", **NEAREST},
        {"name": "OpticalDistortion", "distort_limit": 0.4, **NEAREST},
        {"name": "SomeOf", "n": 2, "p": 1.0, "transforms": [{"name": "HorizontalFlip"}, {"name": "Rotate", **NEAREST}]},
        {"name": "RandomResizedCrop", "size": SIZE, "p": 1.0, "interpolation": 6},
    ],
    ids=lambda entry: entry["name"],
)
def test_image_and_label_move_together(entry):
    """The image is the label, so that they stay equal if they are moved together."""
    augment = augmentation(entry)
    _, labels = picture()
    image = np.repeat(labels[..., None], 3, 2)
    moved = 0
    for seed in range(8):
        shown, target = augment(image, labels, (seed,))
        assert np.array_equal(shown, np.repeat(target[..., None], 3, 2)), seed
        moved += not np.array_equal(target, labels)
    assert moved >= 4


def test_what_comes_in_from_outside_is_ignored():
    augment = augmentation({"name": "Affine", "translate_px": {"x": [16, 16], "y": [0, 0]}, "p": 1.0})
    image, labels = picture()
    shown, target = augment(image, labels, (0,))
    assert (target[:, :16] == IGNORE_INDEX).all()
    assert (shown[:, :16] == FILL).all()
    assert np.array_equal(target[:, 16:], labels[:, :-16])


def test_dropped_regions_keep_their_label_unless_told_otherwise():
    image, labels = picture()
    _, target = augmentation({"name": "CoarseDropout", "p": 1.0})(image, labels, (0,))
    assert np.array_equal(target, labels)
    _, target = augmentation({"name": "CoarseDropout", "p": 1.0, "fill_mask": 255})(image, labels, (0,))
    assert (target == IGNORE_INDEX).sum() > (labels == IGNORE_INDEX).sum()


class Rogue:
    """A transform that breaks the rules on a real image only."""

    def __init__(self, change):
        self.change = change

    def set_random_state(self, rng, python):
        pass

    def __call__(self, image, mask):
        return self.change(image, mask.copy())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image, mask: {"image": image, "mask": np.full_like(mask, 77)}, "labels that were not there: 77"),
        (lambda image, mask: {"image": image, "mask": mask[1:]}, r"a label of shape \(31, 48\)"),
        (lambda image, mask: {"image": image, "mask": mask.astype(np.int32)}, "a label of type int32"),
        (lambda image, mask: {"image": image / 255, "mask": mask}, "an image of type float64"),
    ],
)
def test_a_violation_on_a_real_picture_names_the_transform(change, words):
    augment = augmentation({"name": "Blur"})
    augment.extra[0].transform = Rogue(change)
    with pytest.raises(DataError, match=f"Blur gives {words}"):
        augment(*picture(), (0,))


# ------------------------------------------------------------------------------------------------ random numbers

SOME = [
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "VerticalFlip", "p": 0.5},
    {"name": "OneOf", "p": 0.7, "transforms": [{"name": "GaussNoise"}, {"name": "Affine", "rotate": 20}]},
]


def test_transforms_draw_independently():
    """With albumentations' own seeding, two transforms of the same p would act both or neither."""
    augment = augmentation({"name": "HorizontalFlip"}, {"name": "VerticalFlip"}, {"name": "InvertImg"})
    image, labels = picture()
    counts = dict.fromkeys(itertools.product((False, True), repeat=3), 0)
    labels[:] = np.arange(labels.size, dtype=np.uint16).reshape(labels.shape) % 251
    for seed in range(200):
        shown, target = augment(image, labels, (seed,))
        flips = [
            np.array_equal(np.flip(target, [axis for axis, on in ((1, h), (0, v)) if on]), labels)
            for h, v in itertools.product((False, True), repeat=2)
        ]
        h, v = list(itertools.product((False, True), repeat=2))[flips.index(True)]
        plain = np.flip(image, [axis for axis, on in ((1, h), (0, v)) if on])
        counts[h, v, not np.array_equal(shown, plain)] += 1
    assert min(counts.values()) >= 10  # 25 expected of each; 10 or fewer once in 3000


def test_samples_do_not_depend_on_workers_or_on_what_came_before(scenes):
    folder = scenes / "leftImg8bit" / "train"
    images = sorted(folder.rglob("*.png"))[:3]
    labels = [
        next((scenes / "gtFine" / "train").rglob(path.name.replace("leftImg8bit", "gtFine_labelIds")))
        for path in images
    ]
    samples = [Sample(image.stem, image, label) for image, label in zip(images, labels, strict=True)]
    table = published_table("cityscapes")

    def shown(start, workers):
        data = TrainingData(samples, table, augmentation(*SOME, color=0.2), 0)
        return [
            (batch.images.numpy(), batch.targets.numpy())
            for (batch,) in training_batches(data, MicroBatches(2, start, 4), workers, False)
        ]

    here = shown(0, 0)
    for other in (shown(0, 2), shown(2, 1)):
        for (image, target), (same, equal) in zip(here[-len(other) :], other, strict=True):
            assert np.array_equal(image, same)
            assert np.array_equal(target, equal)
    assert not np.array_equal(here[0][0], here[3][0])


def test_a_loader_that_starts_processes_anew_can_have_it():
    augment = augmentation(*SOME)
    copy = pickle.loads(pickle.dumps(augment))
    for one, two in zip(augment(*picture(), (5,)), copy(*picture(), (5,)), strict=True):
        assert np.array_equal(one, two)
