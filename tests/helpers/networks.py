"""Networks for tests: without data, as after training, and the bytes that one keeps for backward."""

import copy
import functools

import torch
from torch import nn

from segtrain.models import build_classifier


def meta(build, *arguments, **options):
    with torch.device("meta"):
        return build(*arguments, **options)


@functools.cache
def shapes(backbone):
    """A classifier on the meta device; do not change it."""
    return meta(build_classifier, backbone)


def hollow(model):
    """The state_dict of a network built on the meta device, in a few bytes: every tensor is one number, repeated."""
    return {
        key: (torch.zeros((), dtype=t.dtype) + (i % 7 + 1) / 8).expand(t.shape)
        for i, (key, t) in enumerate(model.state_dict().items())
        if not key.endswith("num_batches_tracked")
    }


def lived_in(model, positive=False):
    """As after training: statistics, weights of both signs, biases. float64, so that every difference is an error."""
    generator = torch.Generator().manual_seed(0)

    def draw(t, low, high):
        t.data.uniform_(low, high, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            draw(module.running_mean, -0.5, 0.5)
            draw(module.running_var, 0.5, 2)
            draw(module.weight, 0.4, 1.2)
            draw(module.bias, -0.3, 0.3)
            if not positive:
                module.weight.data[::3] *= -1
    return model.double()


def with_leaky_relu(model, slope=0.01):
    """The network with a LeakyReLU for every nn.ReLU, the only activation of torchvision's ResNets."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.LeakyReLU(slope, inplace=True))
    return model


def kept_bytes(function) -> int:
    """Bytes that autograd keeps for backward while `function` runs, each storage once, parameters not counted."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(storages.values())
