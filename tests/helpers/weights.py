"""Files of weights for tests, and networks to load them into."""

import torch

from segtrain.models import build_model

PLAIN = {"norm": "batch_norm", "activation": "relu"}


def images(*size):
    return torch.randn(2, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


def saved(path, state):
    torch.save(state, path)
    return path


def network(backbone="resnet18", classes=5, **options):
    return build_model(backbone, num_classes=classes, output_stride=16, head_channels=8, **options)
