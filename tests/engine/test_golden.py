"""Training follows its recorded course, five faults leave it, and all forms of the layer train alike."""

import numpy as np
import pytest
import torch

import segtrain
from segtrain import losses
from segtrain.abn import ABN
from segtrain.config import IGNORE_INDEX
from segtrain.data import augment as transforms
from segtrain.data.loader import Batch
from segtrain.distributed.group import World
from segtrain.engine import learner
from segtrain.engine.learner import Learner
from segtrain.losses import build_loss
from segtrain.models import from_config
from tests.helpers import golden

NEW = "trainer.seed=100"  # is not in the record

# ------------------------------------------------------------------------------------------------ the golden curve


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Folder in which the first training draws the scenes for all."""
    return tmp_path_factory.mktemp("golden") / "streets"


def left(streets, tmp_path, fault=lambda patch: None):
    """The figures outside the band of a new training with a fault."""
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        config = golden.train(streets, tmp_path / "run", NEW)
    return golden.outside(golden.figures(config), golden.band(list(golden.recorded().values())))


def test_training_follows_the_recorded_course(streets, tmp_path):
    assert left(streets, tmp_path) == {}


def test_every_recorded_seed_is_inside_the_band_of_the_others():
    seeds = golden.recorded()
    assert len(seeds) >= 8
    for own in seeds:
        others = [figures for seed, figures in seeds.items() if seed != own]
        assert golden.outside(seeds[own], golden.band(others)) == {}, own


def threefold_rate(patch):
    rate = learner.learning_rate
    patch.setattr(learner, "learning_rate", lambda *arguments: 3 * rate(*arguments))


def pictures_flipped_without_labels(patch):
    flip = transforms.cv2.flip
    patch.setattr(transforms.cv2, "flip", lambda array, axis: array if array.ndim == 2 else flip(array, axis))


def moved_labels(down, right):
    def fault(patch):
        augment = transforms.Augmentation.__call__

        def moved(self, *arguments, **more):
            image, target = augment(self, *arguments, **more)
            result = np.full_like(target, IGNORE_INDEX)
            result[down:, right:] = target[: target.shape[0] - down, : target.shape[1] - right]
            return image, result

        patch.setattr(transforms.Augmentation, "__call__", moved)

    return fault


def ignored_pixels_counted(patch):
    """Count ignored pixels as the first class, the index that the loss has there before it masks them."""
    kind = losses.CrossEntropy
    call = kind.__call__
    patch.setattr(
        kind, "__call__", lambda self, logits, target: call(self, logits, target.where(target != IGNORE_INDEX, 0))
    )
    patch.setattr(kind, "count", lambda self, target: target.numel())


def frozen_running_statistics(patch):
    """Keep the running statistics at 0 and 1."""
    found = ABN.statistics
    patch.setattr(ABN, "statistics", lambda self: (*found(self)[:3], 0.0))


FAULTS = {  # and a figure that tells it from all others
    "learning rate x 3": (threefold_rate, "weight norm"),
    "pictures flipped without labels": (pictures_flipped_without_labels, "labels mirrored"),
    "labels 2 px to the right": (moved_labels(0, 2), "labels to the right"),
    "labels 2 px down": (moved_labels(2, 0), "labels down"),
    "ignored pixels counted": (ignored_pixels_counted, "road where ignored"),
    "frozen running statistics": (frozen_running_statistics, "val loss"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_the_band(streets, tmp_path, name):
    fault, figure = FAULTS[name]
    outside = left(streets, tmp_path, fault)
    print(name, {what: round(distance, 2) for what, distance in outside.items()})
    assert figure in outside


# ------------------------------------------------------------------------------------------------ exactly alike

SIZE, STEPS = (32, 32), 200


def made_up_batches():
    """Eight batches of four images, squares whose colour gives the class."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        targets = rng.integers(0, 19, (4, SIZE[0] // 8, SIZE[1] // 8)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        images = 12 * targets[:, None] + rng.integers(0, 40, (4, 3, *SIZE))
        targets[:, :4] = IGNORE_INDEX
        yield Batch(torch.tensor(images.astype(np.uint8)), torch.tensor(targets), [""] * 4, [0] * 4, [[0] * 5] * 4)


def losses_in_float64(*overrides):
    """The losses of all steps of a training that starts with scales of both signs.

    A batch has four images, because the pooled branch normalises one value per image: of two values only the sign
    remains, and rounding differences then grew to 1e-4 in 30 steps, in float64 too.
    """
    with golden.narrow():
        config = segtrain.compose(
            *golden.RECIPE, "model.head=deeplabv3", "optimizer.lr=0.002", f"trainer.max_steps={STEPS}", *overrides
        )
        torch.manual_seed(0)
        network = from_config(config.model, 19).double()
    norms = [module for module in network.modules() if isinstance(module, ABN)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, norm.weight.shape) * 2 - 1)
            norm.bias.uniform_(-0.5, 0.5)
    network.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    training = Learner(network, build_loss(config.loss, 19), config, World(), torch.device("cpu"))
    batches = list(made_up_batches())
    counts = [training.loss.count(batch.targets) for batch in batches]
    found = [training.step([batches[step % 8]], counts[step % 8], step, step / STEPS).loss for step in range(STEPS)]
    assert found[-1] < 0.7 * found[0]
    return np.array([*found, *(float(norm.running_var.sum()) for norm in norms)])


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["signed", "abs"])
def test_all_forms_of_the_layer_train_alike_in_float64(scale):
    """Losses agree to 1e-9 over 200 steps. The scale is signed, as BatchNorm's is."""
    found = {}
    for name, overrides in golden.VARIANTS.items():
        batch_norm = "model.norm=batch_norm" in overrides
        if scale == "signed" or not batch_norm:
            found[name] = losses_in_float64(*overrides, *([] if batch_norm else [f"model.scale={scale}"]))
    reference = found["ABN"]
    for name, values in found.items():
        difference = np.abs(values / reference - 1).max()
        print(f"{scale}, {name}: {difference:.1e}")
        assert difference < 1e-9, name
