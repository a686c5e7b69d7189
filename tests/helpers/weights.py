"""Files of weights for tests, and networks to load them into."""

import torch

from segtrain.data.labels import published_table
from segtrain.models import build_model
from segtrain.weights import checkpoint

PLAIN = {"norm": "batch_norm", "activation": "relu"}


def images(*size):
    return torch.randn(2, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


def saved(path, state):
    torch.save(state, path)
    return path


def network(backbone="resnet18", classes=5, **options):
    return build_model(backbone, num_classes=classes, output_stride=16, head_channels=8, **options)


def write_network_of_vistas(run, path):
    """A checkpoint like that of a run, with random rows for the 65 classes of Vistas."""
    content = checkpoint.load(run)
    content["classes"] = published_table("vistas_v1.2").as_dict()
    channels = content["model"]["cls.weight"].shape[1]
    content["model"] |= {"cls.weight": torch.randn(65, channels, 1, 1), "cls.bias": torch.zeros(65)}
    checkpoint.save(path, content)
