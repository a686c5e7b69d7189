"""model.frozen and model.frozen_norm: what does not train stays to the bit, and the rest gets the true gradients."""

import copy
import functools

import pytest
import torch
from torch import nn

from segtrain.config import ModelConfig, OptimizerConfig
from segtrain.config.compose import compose_training
from segtrain.engine.optim import build_optimizer
from segtrain.errors import UsageError
from segtrain.models import BACKBONES, from_config
from segtrain.models.frozen import freeze, network_parts
from tests.helpers.rebuilt import Chained, away

FORMS = {
    "inplace": {"norm": "inplace_abn"},
    "variant two": {"norm": "inplace_abn", "norm_variant": "two"},
    "signed": {"norm": "inplace_abn", "scale": "signed"},
    "sync": {"norm": "inplace_abn_sync"},
    "blocks": {"norm": "inplace_abn", "recompute": "blocks"},
    "grouped": {"norm": "inplace_abn", "recompute": "grouped"},
    "identity_input": {"norm": "inplace_abn", "recompute": "identity_input"},
    "both": {"norm": "inplace_abn", "recompute": "both"},
    "norm": {"norm": "abn", "recompute": "norm"},
    "norm_proposed": {"norm": "abn", "recompute": "norm_proposed"},
    "batch_norm": {"norm": "batch_norm"},
    "batch_norm_sync": {"norm": "batch_norm_sync"},
    "8bit": {"norm": "inplace_abn", "keep": "8bit"},
    "4bit": {"norm": "inplace_abn", "keep": "4bit"},
}
FROZEN = {"first": ["0", "1"], "middle": ["2"], "last": ["3"], "backbone": ["backbone"]}


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setitem(BACKBONES, "chained", Chained)

    def make(frozen=(), statistics=True, dtype=torch.float64, **options):
        torch.manual_seed(0)
        config = ModelConfig(backbone="chained", head_channels=4, frozen=list(frozen), **options)
        config.frozen_norm = statistics and bool(frozen)
        model = from_config(config, 3).to(dtype)
        for module in model.modules():
            if hasattr(module, "running_mean"):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model

    return make


def images(dtype=torch.float64):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def stepped(model, dtype=torch.float64):
    """(output, {name: gradient}) of one step in training mode."""
    model.train()
    out = model(images(dtype), upsample=False)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("where", FROZEN)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_frozen_parts_as_by_ordinary_autograd(made, form, where):
    """The reference is the plain layer, with parameters and modes set one by one, not by `freeze`."""
    frozen, options = FROZEN[where], FORMS[form]
    plain = "batch_norm" if options["norm"].startswith("batch_norm") else "abn"
    coded = options.get("keep", "exact") != "exact"
    ours = made(frozen, **options)
    reference = made(norm=plain, scale=options.get("scale", "abs"))
    reference.load_state_dict(ours.state_dict())
    reference.train()
    parts = [reference.body] if frozen == ["backbone"] else [reference.body.get_submodule(name) for name in frozen]
    for part in parts:
        part.eval()
        part.requires_grad_(False)
    reference.train = lambda mode=True: None
    before = copy.deepcopy(ours.state_dict())
    (out, gradients), (expected, true) = stepped(ours), stepped(reference)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == true.keys()
    assert len(true) < len(list(ours.parameters()))
    # Rounded maps: the pooled branch normalises over two values, which rounding can exchange.
    names = [name for name in true if not coded or "pool" not in name]
    found, wanted = (torch.cat([some[name].flatten() for name in names]) for some in (gradients, true))
    assert away(found, wanted) < {"exact": 1e-10, "8bit": 0.05, "4bit": 0.5}[options.get("keep", "exact")]
    prefixes = ("body.",) if where == "backbone" else tuple(f"body.{name}." for name in frozen)
    after = ours.state_dict()
    for key, value in before.items():
        if key.startswith(prefixes):
            assert torch.equal(after[key], value), key
        elif "running" in key:
            assert not torch.equal(after[key], value), key


def test_without_frozen_norm_statistics_move(made):
    model = made(["backbone"], statistics=False, norm="inplace_abn")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stepped(model)
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("body.") and key.endswith("running_mean") for key in moved)
    assert all(parameter.grad is None for parameter in model.body.parameters())


def test_a_frozen_beginning_keeps_nothing_for_backward(made):
    from segtrain.models.memory import kept_bytes

    x = images(torch.float32)
    models = [made(frozen, dtype=torch.float32).train() for frozen in ([], ["0", "1", "2"])]
    some, none = (kept_bytes(functools.partial(model, x, upsample=False)) for model in models)
    assert none < some / 2


def test_a_copy_keeps_its_own_layers_still(made):
    """As the averaged network of trainer.ema_decay is one."""
    twin = copy.deepcopy(made(["2"], norm="inplace_abn"))
    twin.train()
    assert all(not layer.training for layer in twin.still)
    assert {id(layer) for layer in twin.still} <= {id(module) for module in twin.modules()}


def test_the_optimizer_has_no_frozen_parameters(made):
    """And the state of a run without frozen parts is what it was: all parameters, in the model's order."""
    options = OptimizerConfig(backbone_lr_factor=0.1)
    for frozen in ([], ["backbone"], ["head", "0"]):
        model = made(frozen)
        held = [p for group in build_optimizer(model, options).param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
        assert len(held) == len({id(p) for p in held})


@pytest.mark.parametrize(
    ("backbone", "names"),
    [("resnet18", "mod1 mod5 stem layer1 layer4"), ("densenet264", "tra2 bn_out layer4"), ("wider_resnet38", "layer6")],
)
def test_names_of_the_parts(backbone, names):
    with torch.device("meta"):
        model = from_config(ModelConfig(backbone=backbone), 2)
    parts = network_parts(model)
    assert set(names.split()) | {"backbone", "head", "classifier"} <= set(parts)
    stages = [name for name in parts if name == "stem" or name.startswith("layer")]
    inside = [id(p) for name in stages for part in parts[name] for p in part.parameters()]
    assert len(inside) == len(set(inside))
    rest = [id(p) for name, p in model.body.named_parameters() if not name.startswith("bn_out")]
    assert set(inside) == set(rest)


def test_a_classifier_of_images_has_them_too():
    with torch.device("meta"):
        model = from_config(ModelConfig(head="classifier", frozen=["backbone"]), 10)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.fc.weight", "classifier.fc.bias",
    }  # fmt: skip


def test_wrong_names_are_refused_with_the_right_ones(made):
    with pytest.raises(UsageError, match=r"model.frozen=layer5: .*did you mean layer4\? Available: .*stem"):
        from_config(ModelConfig(frozen=["layer5"]), 2)
    with pytest.raises(UsageError, match="leaves nothing to train"):
        freeze(made(), ["backbone", "head", "classifier"], False)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["model.frozen_norm=true"], "no part is frozen"),
        (["model.frozen=[stem]", "trainer.compile=true"], "trainer.compile=false"),
        (["model.frozen=[stem]", "trainer.parallel=fsdp"], "trainer.parallel=ddp"),
    ],
)
def test_impossible_combinations_are_refused(words, text):
    with pytest.raises(UsageError, match=text):
        compose_training("experiment=toy", *words)
