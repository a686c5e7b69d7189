"""The guard of rebuilt maps, blocks that keep their input, and whole networks."""

import pytest
import torch

from segtrain.abn import recomputed_outputs
from segtrain.errors import UsageError
from segtrain.models import build_model, rebuilding
from segtrain.models.blocks import Norm
from segtrain.models.rebuilding import rebuilding_of
from tests.helpers.rebuilt import MODES, Chained, away, gradient, images, made, step

# ------------------------------------------------------------------------------------------------ guard and fallback


def test_the_first_step_reports_how_exact_it_is(capsys):
    model = made("both", torch.float32)
    step(model)
    step(model)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("rebuilt    maps are ") and "from the true ones" in line


def test_an_overflow_is_not_taken_for_drift(capsys):
    """It makes the loss infinite, whatever is rebuilt."""
    model = made("both", torch.float32)
    with torch.no_grad():
        model.body[2].block2.convs.conv3.weight.fill_(1e4)
    step(model, autocast=torch.float16)
    assert model.rebuilding.drift is None
    assert not gradient(model).isfinite().all()


def test_convolutions_are_deterministic_while_the_network_runs():
    """In forward and where backward repeats one."""
    seen, model = [], made("both")
    flags = torch.backends.cudnn
    model.body[2].register_forward_hook(lambda *_: seen.append(flags.deterministic))
    assert not flags.deterministic
    step(model)
    assert seen == [True] and not flags.deterministic


@pytest.mark.parametrize("recompute", MODES)
def test_maps_that_drift_are_kept_from_the_next_pass_on(capsys, monkeypatch, recompute):
    """A convolution that gives other numbers the second time, from the third pass on."""
    from segtrain.abn.rebuilding import Convolution

    monkeypatch.setattr(rebuilding, "CHECK_EVERY", 2)
    model, exact = made(recompute, torch.float32), Convolution.__call__
    step(model)
    step(model)
    monkeypatch.setattr(Convolution, "__call__", lambda self, z: exact(self, z) * 1.001)
    step(model)
    assert "WARNING    rebuilt maps are" in capsys.readouterr().err
    assert 1e-4 < model.rebuilding.drift < 1e-2
    wrong = step(model)
    plain = made("none", torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.train(), model.train()
    torch.testing.assert_close(step(model)[1], step(plain)[1], rtol=1e-4, atol=1e-5)
    assert wrong and "are kept" in str(model.rebuilding)


def test_a_block_with_another_last_convolution_keeps_its_input(capsys):
    """The chain begins again behind it."""
    found = []
    for mode in ("none", "both"):
        model = made(mode)
        model.body[3].block2.convs.conv3.register_forward_hook(lambda conv, _, out: out * 2)
        found.append(step(model)[1])
        step(model)
    assert away(found[1], found[0]) < 1e-12
    assert (
        capsys.readouterr().out.count(
            "WARNING    a block of 16 channels keeps its input: its last convolution has hooks"
        )
        == 1
    )


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_take_a_sum_in_their_own_dtype(dtype):
    """Those of a decoder, which read it without a norm: nobody keeps the narrow copy."""
    body = Chained(Norm(), 8)
    body.keeps = "2"  # the stage
    rebuilding_of(body, "both")
    with recomputed_outputs() as recipes, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _, low = body(images(torch.float32))
        assert low.dtype == dtype and recipes.find(low) is not None


@pytest.mark.parametrize(
    ("backbone", "recompute", "words"),
    [
        ("resnet50", "grouped", "no grouped convolution"),
        ("resnet50", "identity_input", "no blocks whose output is their input plus"),
        ("wider_resnet38", "both", "no grouped convolution"),
        ("densenet264", "identity_input", "no blocks whose output"),
        ("resnext50_32x4d", "both", "no blocks whose output"),
    ],
)
def test_a_backbone_without_such_blocks_is_refused(backbone, recompute, words):
    with torch.device("meta"), pytest.raises(UsageError, match=words):
        build_model(backbone, recompute=recompute)


@pytest.mark.parametrize(
    ("backbone", "recompute", "head"),
    [
        ("resnext50", "both", "deeplabv3plus"),
        pytest.param("resnext50_32x4d", "grouped", "deeplabv3", marks=pytest.mark.slow),
    ],
)
def test_the_networks_train_as_the_plain_one(backbone, recompute, head):
    found = []
    for mode in ("none", recompute):
        torch.manual_seed(0)
        model = build_model(
            backbone, head=head, num_classes=3, head_channels=8, output_stride=32, recompute=mode
        ).double()
        torch.manual_seed(1)
        model(images(size=64), upsample=False).pow(2).sum().backward()
        found.append(gradient(model))
    assert away(found[1], found[0]) < 1e-11
