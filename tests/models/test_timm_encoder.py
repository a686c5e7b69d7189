"""model.backbone=timm:NAME: families of encoders with random weights, converted and trained as before."""

import sys

import pytest
import torch
from torch import nn

from segtrain.abn import InPlaceABN
from segtrain.config import ModelConfig
from segtrain.config.compose import compose_training
from segtrain.errors import UsageError
from segtrain.models import from_config
from segtrain.models.frozen import network_parts
from segtrain.models.memory import kept_bytes
from segtrain.models.timm_encoder import TimmEncoder
from tests.helpers.rebuilt import away

SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2}
DENSE = {"growth_rate": 8, "block_config": [2, 2, 2, 2]}
# Name -> (output stride, options, BatchNorm layers that become In-Place ABN without and with replace_relu, of how many)
FAMILIES = {
    "test_resnet": (8, {}, (3, 15, 15)),
    "regnetx_002": (16, {}, (0, 27, 44)),
    "efficientnet_lite0": (16, {}, (16, 16, 48)),
    "mobilenetv3_small_050": (8, {}, (11, 16, 34)),
    "ghostnet_050": (32, {}, (38, 63, 63)),
    "densenet121": (32, DENSE, (0, 21, 21)),
    "darknet17": (16, {}, (16, 16, 16)),
    "dla46_c": (32, {}, (3, 12, 48)),
    "ese_vovnet19b_slim_dw": (32, {}, (0, 22, 22)),
    "mobilevit_xxs": (8, {}, (7, 7, 32)),
    "test_convnext": (16, {}, (0, 0, 0)),
    "pvt_v2_b0": (32, {}, (0, 0, 0)),
    "test_vit": (16, {}, (0, 0, 0)),
    "swin_tiny_patch4_window7_224": (32, SWIN, (0, 0, 0)),
}


def made(name, norm="inplace_abn", head="deeplabv3", **more):
    stride, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=f"timm:{name}", norm=norm, scale="signed", output_stride=stride, head=head, head_channels=4,
        backbone_options={**options, **more},
    )  # fmt: skip
    return from_config(config, 3)


def settle(model):
    """Scales and statistics as after training, away from 0."""
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "running_mean"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)


def stepped(model):
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.manual_seed(3)  # for dropout
    out = model.train()(x, upsample=False)
    out.square().sum().backward()
    gradient = [p.grad for name, p in model.named_parameters() if name.startswith("body.") and p.grad is not None]
    return out.detach(), torch.cat([one.flatten() for one in gradient])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoder_trains_as_timms_own(name):
    """In float64: outputs, gradients and running statistics of the converted encoder are those of BatchNorm's."""
    ours, plain = made(name).double(), made(name, norm="batch_norm").double()
    settle(ours)
    assert ours.body.state_dict().keys() == plain.body.state_dict().keys()
    plain.body.load_state_dict(ours.body.state_dict())
    own = {key: value for key, value in ours.state_dict().items() if not key.startswith("body.")}
    plain.load_state_dict(own, strict=False)
    plain.head, plain.cls = ours.head, ours.cls
    before = {key: value.clone() for key, value in ours.head.state_dict().items()}
    (out, gradient), buffers = stepped(ours), dict(ours.body.named_buffers())
    stride = FAMILIES[name][0]
    assert out.shape == (2, 3, 64 // stride, 96 // stride)
    ours.head.load_state_dict(before)
    plain.zero_grad()
    expected, true = stepped(plain)
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-7)
    assert away(gradient, true) < 1e-6
    for key, value in plain.body.named_buffers():
        torch.testing.assert_close(buffers[key], value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_converted(name):
    plain, replaced, every = FAMILIES[name][2]
    for more, wanted in (({}, plain), *([({"replace_relu": 0.01}, replaced)] if every else [])):
        model = made(name, **more)
        assert sum(isinstance(module, InPlaceABN) for module in model.body.modules()) == wanted
        text = model.body.certificate
        assert text.startswith(f"{wanted} of {every} BatchNorm layers became" if every else "no BatchNorm"), text
        by_option = "cannot be inverted: 'model.backbone_options={replace_relu:0.01}' makes it a LeakyReLU"
        assert ("cannot be inverted" in text) == (by_option in text)


def test_memory_falls_where_relu_is_replaced():
    def kept(**options):
        model = made("test_resnet", **options).train()
        images = torch.zeros(2, 3, 64, 96)
        return kept_bytes(lambda: model.body(images))

    assert kept(replace_relu=0.01) < 0.75 * kept(norm="batch_norm")


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_the_decoder_gets_an_early_map(name):
    model = made(name, head="deeplabv3plus")
    assert model(torch.zeros(2, 3, 64, 96), upsample=False).shape[2:] == (16, 24)
    with pytest.raises(UsageError, match="timm:test_vit, which has no early map"):
        made("test_vit", head="deeplabv3plus")


def test_only_shapes_on_the_meta_device():
    """As composing and planning need them, with the layers of the true network."""
    with torch.device("meta"):
        model = made("test_resnet", replace_relu=0.01)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    wanted = {key: t.shape for key, t in made("test_resnet", replace_relu=0.01).state_dict().items()}
    assert {key: t.shape for key, t in model.state_dict().items()} == wanted


def test_timms_initialisation_stays():
    torch.manual_seed(0)
    assert isinstance(made("test_vit").body, TimmEncoder)
    biases = [p for name, p in made("test_convnext").body.named_parameters() if name.endswith("norm.bias")]
    assert biases and not any(p.any() for p in biases)
    weights = [module.weight for module in made("test_vit").body.modules() if isinstance(module, nn.Linear)]
    assert all(0.01 < weight.std() < 0.03 for weight in weights)  # truncated normal, 0.02


def test_parts_that_can_be_frozen():
    assert {"stem", "layer1", "layer4", "conv1", "backbone"} <= set(network_parts(made("test_resnet")))
    parts = network_parts(made("test_convnext"))
    assert {"stem", "layer1", "layer4", "stages_0"} <= set(parts) and parts["layer1"] == parts["stages_0"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backbone": "timm:resnet5"}, r"timm has no resnet5; did you mean timm:resnet50\?"),
        ({"backbone": "timm:test_resnet.a9"}, "no weights 'a9' of test_resnet; it has r160_in1k"),
        ({"backbone": "timm:test_vit", "output_stride": 8}, "model.output_stride=8 is not possible.*: it can 16"),
        ({"backbone": "timm:pvt_v2_b0", "output_stride": 16}, "it can 32"),
        ({"backbone_options": {"depth": 3}}, r"model.backbone_options=\{'depth': 3\}: .*does not take them"),
        ({"backbone_options": {"replace_relu": -1.0}}, "model.backbone_options.replace_relu=-1.0"),
        (
            {"backbone": "timm:test_convnext", "backbone_options": {"replace_relu": 0.01}},
            "the encoder has no BatchNorm",
        ),
        ({"norm": "inplace_abn_sync"}, "choose inplace_abn, which converts"),
        ({"norm": "abn"}, "choose inplace_abn, which converts"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_by_name(options, text):
    config = ModelConfig(**{"backbone": "timm:test_resnet", "scale": "signed", "output_stride": 16, **options})
    with pytest.raises(UsageError, match=text):
        from_config(config, 2)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["model.weights=timm"], "those of a timm encoder"),
        (["model=timm", "model.scale=abs"], "needs model.scale=signed"),
        (["model=timm", "model.keep=8bit"], "needs model.keep=exact"),
        (["model=timm", "model.recompute=blocks"], "needs model.recompute=none"),
        (["model=timm", "trainer.compile=true"], "trainer.compile=false"),
        (["model.backbone=tim:resnet50"], "timm:NAME"),
    ],
)
def test_impossible_options_are_refused(words, text):
    with pytest.raises(UsageError, match=text):
        compose_training("experiment=toy", *words)


def test_without_timm_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"needs the package timm .*pip install 'segtrain-iabn\[timm\]'"):
        made("test_resnet")
