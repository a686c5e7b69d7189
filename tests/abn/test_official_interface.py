"""What users of the official package have: its classes, functions and modules by its name, and its pickled layers."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from segtrain.abn import ABN, BatchNormAct, InPlaceABN, InPlaceABNSync, RecomputedABN, ScaledABN, functional, official
from tests.helpers.checkout import environment

LAYERS = [ABN, BatchNormAct, ScaledABN, InPlaceABN, InPlaceABNSync, RecomputedABN]


def with_weights_of_either_sign(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-1.5, 0.0, 2.0]))
        layer.bias.copy_(torch.tensor([-0.5, 0.2, 0.0]))
        layer.running_mean.copy_(torch.tensor([0.1, -0.4, 2.0]))
        layer.running_var.copy_(torch.tensor([0.5, 1.5, 3.0]))
    return layer


# ------------------------------------------------------------------------------------------------ ABN


@pytest.mark.parametrize("layer", [ABN, BatchNormAct])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("activation", "plain"),
    [
        ("leaky_relu", nn.LeakyReLU(0.2, True)),
        ("elu", nn.ELU(0.2, True)),
        ("relu", nn.ReLU(True)),
        ("identity", nn.Identity()),
    ],
)
def test_abn_multiplies_with_the_weight_itself(layer, training, activation, plain):
    """Bit for bit torch's BatchNorm and the activation after it; a weight of 0 has its gradient."""
    ours = with_weights_of_either_sign(layer(3, activation=activation, activation_param=0.2)).train(training)
    theirs = nn.Sequential(with_weights_of_either_sign(nn.BatchNorm2d(3)), plain).train(training)
    first, second = (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    first.requires_grad_(), second.requires_grad_()
    found, expected = ours(first), theirs(second)
    assert torch.equal(found, expected)
    dz = torch.randn(4, 3, 5, 5)
    found.backward(dz)
    expected.backward(dz)
    assert torch.equal(first.grad, second.grad)
    assert torch.equal(ours.weight.grad, theirs[0].weight.grad) and ours.weight.grad[1] != 0
    assert torch.equal(ours.bias.grad, theirs[0].bias.grad)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs[0].buffers(), strict=True))


def test_scaled_abn_is_in_place_abns_function():
    layer = with_weights_of_either_sign(ScaledABN(3)).eval()
    plain = with_weights_of_either_sign(ABN(3)).eval()
    with torch.no_grad():
        plain.weight.copy_(plain.weight.abs() + 1e-5)
    x = torch.randn(4, 3, 5)
    assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(with_weights_of_either_sign(InPlaceABN(3)).eval()(x.clone()), layer(x))


def test_every_layer_is_an_abn():
    assert all(issubclass(layer, ABN) for layer in LAYERS)
    assert not issubclass(ABN, ScaledABN) and not issubclass(BatchNormAct, ScaledABN)


# ------------------------------------------------------------------------------------------------ all layers


@pytest.mark.parametrize("layer", LAYERS)
def test_statistics_that_are_not_tracked_any_more_stay(layer):
    module = layer(3)
    module.track_running_stats = False
    module(torch.randn(4, 3, 5) + 7)
    assert not module.running_mean.any() and module.num_batches_tracked == 0
    module.track_running_stats = True
    module(torch.randn(4, 3, 5) + 7)
    assert module.running_mean.min() > 0.5 and module.num_batches_tracked == 1
    module.reset_running_stats()
    assert not module.running_mean.any() and (module.running_var == 1).all() and module.num_batches_tracked == 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_input_in_eval_mode(layer, shape):
    module, x = layer(3).eval(), torch.randn(shape, requires_grad=True)
    z = module(x * 1)
    z.sum().backward()
    assert z.shape == x.grad.shape == shape
    assert torch.equal(module.weight.grad, torch.zeros(3))
    with torch.no_grad():
        assert module(torch.randn(shape)).shape == shape


class Derived(InPlaceABN):
    """A layer of a user's own, as written for the official package."""

    def forward(self, x):
        momentum, training = self._get_momentum_and_training()
        running_mean, running_var = self._get_running_stats()
        return nn.functional.batch_norm(
            x, running_mean, running_var, self.weight.abs() + self.eps, self.bias, training, momentum, self.eps
        )


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
def test_layers_derived_from_the_official_ones(options):
    derived, ours = Derived(3, activation="identity", **options), InPlaceABN(3, activation="identity", **options)
    for _ in range(3):
        x = torch.randn(4, 3, 5)
        torch.testing.assert_close(derived(x), ours(x.clone()), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(derived.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    derived.eval(), ours.eval()
    torch.testing.assert_close(derived(x), ours(x.clone()), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ pickles


def pickled_by_the_official_package(layer, without=()):
    """What pickle.dumps gives there: class and module of that name, without what only our layers have."""
    twin = copy.deepcopy(layer)
    for name in ("scale", "overwrite", "variant"):
        vars(twin).pop(name, None)
    for name in without:
        twin._buffers.pop(name, None)
        vars(twin).pop(name, None)
    found = pickle.dumps(twin, protocol=2)
    assert b"csegtrain.abn.modules" in found
    return found.replace(b"csegtrain.abn.modules", b"cinplace_abn.abn")


@pytest.mark.parametrize("layer", [ABN, InPlaceABN, InPlaceABNSync])
@pytest.mark.parametrize("without", [(), ("num_batches_tracked", "track_running_stats")])  # 1.1, and before it
def test_whole_layers_that_the_official_package_pickled(layer, without, monkeypatch):
    from segtrain.abn import install_as_inplace_abn

    for name in ("inplace_abn", "inplace_abn.abn", "inplace_abn.functions", "inplace_abn.group"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    install_as_inplace_abn()
    ours = with_weights_of_either_sign(layer(3))
    found = pickle.loads(pickled_by_the_official_package(ours, without))
    assert type(found) is layer
    for mode in (True, False):
        x = torch.randn(4, 3, 5)
        assert torch.equal(found.train(mode)(x.clone()), ours.train(mode)(x.clone()))
    assert torch.equal(found.running_var, ours.running_var)
    for name in list(sys.modules):  # as before the test
        if name.partition(".")[0] == "inplace_abn":
            monkeypatch.delitem(sys.modules, name)


def test_an_abn_that_segtrain_pickled_keeps_its_function():
    """Before ABN was the published layer, it multiplied with |weight| + eps, which its pickle tells."""
    ours = with_weights_of_either_sign(ScaledABN(3)).eval()
    old = pickle.dumps(ours, protocol=2).replace(b"ScaledABN", b"ABN")
    found = pickle.loads(old)
    x = torch.randn(4, 3, 5)
    assert type(found) is ScaledABN and torch.equal(found(x), ours(x))
    buffer = io.BytesIO()
    torch.save(nn.Sequential(ABN(3)), buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)[0]) is ABN


# ------------------------------------------------------------------------------------------------ import inplace_abn

PROGRAM = """
import importlib.util, sys
import torch
import segtrain.abn
segtrain.abn.install_as_inplace_abn()
segtrain.abn.install_as_inplace_abn()  # once more changes nothing
import inplace_abn
import inplace_abn.abn, inplace_abn.functions, inplace_abn.group
from inplace_abn import ABN, InPlaceABN, InPlaceABNSync, active_group, set_active_group
from inplace_abn.abn import InPlaceABN as again
from inplace_abn.functions import InPlaceABN as function
from inplace_abn.group import active_group as group
assert inplace_abn.abn.ABN is ABN is segtrain.abn.ABN and again is InPlaceABN and group is active_group
assert inplace_abn.functions.inplace_abn is inplace_abn.inplace_abn is segtrain.abn.inplace_abn
names = {}
exec("from inplace_abn.functions import *", names)
assert {"inplace_abn", "inplace_abn_sync"} <= names.keys() and "InPlaceABN" not in names
assert inplace_abn.__version__ == "1.1.0" and importlib.util.find_spec("inplace_abn") is not None
layer = InPlaceABN(3)
x = torch.randn(4, 3, 5)
for training in (True, False):
    arguments = layer.weight, layer.bias, layer.running_mean.clone(), layer.running_var.clone(), training, 0.1, 1e-5
    expected = inplace_abn.functions.inplace_abn(x.clone(), *arguments)
    assert torch.equal(function.apply(x.clone(), *arguments, "leaky_relu", 0.01, None, 1), expected)
assert callable(segtrain.abn.abn)  # the function of that name stays where it was
print("OK")
"""


def test_the_modules_of_the_official_package():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment())
    assert done.stdout == "OK\n", done.stderr


def test_the_function_class_synchronises_over_several_processes(monkeypatch):
    """As the official one: by world_size, over the group that is given."""
    called = []
    for name in ("inplace_abn", "inplace_abn_sync"):
        monkeypatch.setattr(functional, name, lambda *arguments, name=name: called.append((name, arguments[-1])))
    for world_size in (1, 2):
        official.InPlaceABN.apply(torch.zeros(1, 3), None, None, None, None, group="mine", world_size=world_size)
    assert called == [("inplace_abn", 0.01), ("inplace_abn_sync", "mine")]


def test_another_package_of_that_name_is_not_replaced(monkeypatch):
    import types

    from segtrain.abn import install_as_inplace_abn

    monkeypatch.setitem(sys.modules, "inplace_abn", types.ModuleType("inplace_abn"))
    with pytest.raises(RuntimeError, match="inplace_abn is imported already"):
        install_as_inplace_abn()


TIMM = """
import torch
import segtrain.abn
segtrain.abn.install_as_inplace_abn()
from timm.layers import InplaceAbn
from timm.layers.inplace_abn import inplace_abn, inplace_abn_sync
assert inplace_abn is segtrain.abn.inplace_abn and inplace_abn_sync is segtrain.abn.inplace_abn_sync
for options in ({}, {"act_layer": "elu", "act_param": 0.7}, {"apply_act": False}):
    torch.manual_seed(0)
    theirs = InplaceAbn(8, **options).double()
    ours = segtrain.abn.ScaledABN(8, activation=theirs.act_name, activation_param=theirs.act_param).double()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for train in (True, False):
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(theirs.train(train)(x.clone()), ours.train(train)(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(theirs.running_var, ours.running_var)
print("OK")
"""


def test_timms_layer_runs_on_ours():
    """In a process of its own: `inplace_abn` is to be our package before timm looks for it."""
    done = subprocess.run([sys.executable, "-c", TIMM], capture_output=True, text=True, env=environment())
    assert done.stdout == "OK\n", done.stderr
