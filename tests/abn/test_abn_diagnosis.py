"""Error messages for a tensor that was overwritten although something else still needs it."""

import pytest
import torch
from torch import nn

from segtrain.abn import InPlaceABN
from segtrain.abn.diagnosis import is_overwritten_error, overwritten_outputs
from segtrain.models import build_model


class Skips(nn.Module):
    """The square of `conv`'s output is taken before the norm overwrites it."""

    def __init__(self, wrong):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = InPlaceABN(4)
        self.sigmoid = nn.Sigmoid()
        self.wrong = wrong

    def forward(self, x):
        y = self.conv(x)
        squared = y.pow(2) if self.wrong == "conv" else 0
        z = self.norm(y)
        if self.wrong == "norm":
            z = z.mul_(2)
        s = self.sigmoid(z)
        if self.wrong == "sigmoid":
            s.add_(1)
        return self.last(s) + squared


@pytest.mark.parametrize("wrong", ["conv", "norm", "sigmoid"])
def test_the_module_is_named(wrong):
    model, x = Skips(wrong), torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError) as caught:
        model(x).sum().backward()
    assert is_overwritten_error(caught.value)
    assert overwritten_outputs(model, x) == [wrong]


def test_a_sound_network_has_nothing_to_name():
    assert overwritten_outputs(Skips(None), torch.randn(2, 3, 4, 4)) == []
    assert overwritten_outputs(build_model("resnext50", head_channels=8), torch.randn(2, 3, 64, 64)) == []
