"""Networks against published names and shapes (paper and released checkpoints) and against each other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segtrain.abn import ABN, InPlaceABN
from segtrain.errors import UsageError
from segtrain.models import BACKBONES, Segmenter, build_classifier, build_model
from segtrain.models.blocks import NORMS, IdentityResidualBlock, Norm, ResidualBlock, stage
from segtrain.models.deeplabv3 import DeepLabV3
from segtrain.models.densenet import DenseNet
from tests.helpers.networks import kept_bytes


def meta(backbone, **options):
    with torch.device("meta"):
        return build_model(backbone, **options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def tensors(module):
    return [key for key in module.state_dict() if not key.endswith("num_batches_tracked")]


@pytest.mark.parametrize(
    ("backbone", "count", "number", "norms"),
    [
        ("resnet18", 11_689_512, 102, 20),
        ("resnet34", 21_797_672, 182, 36),
        ("resnet50", 25_557_032, 267, 53),
        ("resnet101", 44_549_160, 522, 104),
        ("resnext50", 24_380_200, 261, 51),
        ("resnext101", 42_902_312, 516, 102),
        ("resnext152", 58_159_912, 771, 153),
        ("wider_resnet38", 109_167_912, 193, 37),
        ("wider_resnet38_pooled", 109_167_912, 193, 37),
        ("densenet264", 33_403_880, 1332, 266),
        ("resnext50_32x4d", 25_028_904, 267, 53),  # torchvision's own enumeration
        ("resnext101_32x8d", 88_791_336, 522, 104),
    ],
)
def test_counts_with_the_imagenet_classifier_are_the_published_ones(backbone, count, number, norms):
    with torch.device("meta"):
        model = build_classifier(backbone)
    assert parameters(model) == count
    assert len(tensors(model)) == number
    assert sum(isinstance(module, InPlaceABN) for module in model.modules()) == norms
    assert tensors(model)[-2:] == ["classifier.fc.weight", "classifier.fc.bias"]
    with torch.device("meta"):
        body = BACKBONES[backbone](Norm(), 32)
    assert tensors(model)[:-2] == tensors(body)  # the files' keys, without a prefix
    assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize(
    ("backbone", "convolutions"),
    [("resnext50", 55), ("resnext101", 106), ("resnext152", 157), ("wider_resnet38", 43), ("densenet264", 266)],
)
def test_numbers_of_convolutions(backbone, convolutions):
    with torch.device("meta"):
        body = BACKBONES[backbone](Norm(), 8)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in body.modules()) == convolutions


def test_wider_resnet38_with_head_is_the_released_vistas_model():
    model = build_meta_vistas()
    assert parameters(model.body) == 105_070_912
    assert parameters(model.head) == 30_739_456
    assert len(tensors(model.head)) == 19
    assert parameters(model) == 135_827_073


def build_meta_vistas():
    with torch.device("meta"):
        return build_model(
            backbone="wider_resnet38", head="deeplabv3", num_classes=65, output_stride=8, norm="inplace_abn"
        )


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("body.mod1.conv1.weight", (64, 3, 3, 3)),
        ("body.mod2.block1.proj_conv.weight", (128, 64, 1, 1)),
        ("body.mod5.block1.convs.conv2.weight", (1024, 512, 3, 3)),
        ("body.mod6.block1.convs.conv1.weight", (512, 1024, 1, 1)),
        ("body.mod6.block1.convs.conv2.weight", (1024, 512, 3, 3)),
        ("body.mod7.block1.convs.conv3.weight", (4096, 2048, 1, 1)),
        ("body.bn_out.weight", (4096,)),
        ("head.map_convs.0.weight", (256, 4096, 1, 1)),
        ("head.map_convs.3.weight", (256, 4096, 3, 3)),
        ("head.map_bn.running_var", (1024,)),
        ("head.global_pooling_conv.weight", (256, 4096, 1, 1)),
        ("head.global_pooling_bn.bias", (256,)),
        ("head.red_conv.weight", (256, 1024, 1, 1)),
        ("head.pool_red_conv.weight", (256, 256, 1, 1)),
        ("head.red_bn.weight", (256,)),
        ("cls.weight", (65, 256, 1, 1)),
        ("cls.bias", (65,)),
    ],
)
def test_published_names_and_shapes(key, shape):
    assert tuple(build_meta_vistas().state_dict()[key].shape) == shape


def test_projections_are_where_the_published_network_has_them():
    keys = [key for key in build_meta_vistas().body.state_dict() if key.endswith("proj_conv.weight")]
    assert keys == [f"mod{i}.block1.proj_conv.weight" for i in range(2, 8)]


def test_published_names_of_the_other_backbones():
    assert "mod3.block1.convs.bn3.weight" in meta("resnext101").body.state_dict()
    assert "mod1.conv3.weight" in meta("resnext101").body.state_dict()
    assert meta("resnext101").body.mod4.block1.convs.conv2.weight.shape == (512, 8, 3, 3)  # 64 groups
    assert {"mod1.bn1.weight", "mod3.block1.proj_bn.weight"} <= set(meta("resnet18").body.state_dict())
    dense = meta("densenet264").body
    assert [name for name, _ in dense.named_children()] == [
        "mod1", "mod2", "tra2", "mod3", "tra3", "mod4", "tra4", "mod5", "bn_out"
    ]  # fmt: skip
    expected = {"mod1.conv3.weight", "mod2.convs1.5.bn.weight", "mod2.convs3.5.conv.weight", "tra4.conv.weight"}
    assert expected <= set(dense.state_dict())


# One of each structure, and the deep ones at one stride only: building them takes a second each.
STRIDES = [(backbone, 8) for backbone in BACKBONES if backbone != "wider_resnet38_pooled"]
STRIDES += [(b, stride) for b in ("resnet18", "resnext50", "wider_resnet38", "densenet264") for stride in (16, 32)]


@pytest.mark.parametrize(("backbone", "output_stride"), STRIDES)
def test_strides_and_logits(backbone, output_stride):
    model = meta(backbone, output_stride=output_stride, num_classes=7)
    x = torch.zeros(2, 3, 64, 96, device="meta")
    assert model(x, upsample=False).shape == (2, 7, 64 // output_stride, 96 // output_stride)
    assert model(x).shape == (2, 7, 64, 96)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_the_imagenet_form_of_wider_resnet38_has_one_stride(output_stride):
    with pytest.raises(UsageError, match="max-pools between its modules, which cannot dilate"):
        meta("wider_resnet38_pooled", output_stride=output_stride)


@pytest.mark.parametrize("backbone", ["resnet18", "resnext50", "wider_resnet38", "densenet"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_structure_takes_every_norm(backbone, norm, monkeypatch):
    monkeypatch.setitem(BACKBONES, "densenet", lambda norm, stride: DenseNet((2, 2, 2, 2), norm, stride))
    model = meta(backbone, output_stride=16, norm=norm, num_classes=7)
    assert {type(module) for module in model.modules() if isinstance(module, ABN)} == {NORMS[norm]}
    assert model(torch.zeros(2, 3, 64, 96, device="meta")).shape == (2, 7, 64, 96)


def dilations(body, kernel=3):
    """Name of a module -> dilations of its blocks' kernel x kernel convolutions, in order."""
    found = {}
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (kernel, kernel):
            found.setdefault(name.split(".")[0], []).append(module.dilation[0])
    return found


def test_dilations_of_densenet_and_where_it_halves():
    body = meta("densenet264", output_stride=8).body
    assert {name: set(values) for name, values in dilations(body).items()} == {
        "mod1": {1}, "mod2": {1}, "mod3": {1}, "mod4": {2}, "mod5": {4},
    }  # fmt: skip
    assert [name for name, m in body.named_modules() if isinstance(m, torch.nn.AvgPool2d)] == ["tra2.pool"]
    assert meta("densenet264").body.mod5.out_channels == 2688


def test_torchvision_dilates_a_module_from_its_second_block_on():
    own = dilations(meta("resnet50", output_stride=8).body)
    previous = dilations(meta("resnet50", output_stride=8, backbone_options={"first_dilation": "previous"}).body)
    assert own["mod4"] == [2] * 6 and own["mod5"] == [4] * 3
    assert previous["mod4"] == [1] + [2] * 5 and previous["mod5"] == [2, 4, 4]


def test_both_wider_resnets_have_the_same_keys_and_shapes():
    a2, pooled = (meta(f"wider_resnet38{form}", output_stride=32) for form in ("", "_pooled"))
    shapes = [{key: t.shape for key, t in model.state_dict().items()} for model in (a2, pooled)]
    assert shapes[0] == shapes[1]
    pools = [name for name, module in pooled.body.named_children() if name.startswith("pool")]
    assert pools == ["pool2", "pool3", "pool4", "pool5", "pool6"]
    assert not any(isinstance(m, torch.nn.Dropout2d) for m in pooled.body.modules())
    drops = {n: m.p for n, m in a2.body.named_modules() if isinstance(m, torch.nn.Dropout2d)}
    assert drops == {"mod6.block1.convs.dropout": 0.3, "mod7.block1.convs.dropout": 0.5}
    element = meta("wider_resnet38", backbone_options={"drops": "element"}).body
    assert {n: m.p for n, m in element.named_modules() if isinstance(m, torch.nn.Dropout)} == {
        "mod6.block1.convs.dropout": 0.3, "mod7.block1.convs.dropout": 0.5
    }  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "norm", "norm_proposed", "blocks"])
def test_densenet_is_the_same_in_place_and_recomputed(recompute):
    """An in-place layer overwrites its input, and the input of a dense layer is needed by others."""

    def gradients(norm, recompute):
        torch.manual_seed(0)
        body = DenseNet((2, 2, 2, 2), Norm(norm, recompute=recompute), 8, growth=4).double()
        model = small_segmenter(body, recompute)
        x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        before = x.detach().clone()
        model(x).pow(2).mean().backward()
        assert torch.equal(x.detach(), before)
        return [x.grad, *(parameter.grad for parameter in model.parameters())]

    expected = gradients("abn", "none")
    found = gradients("inplace_abn" if recompute in ("none", "blocks") else "abn", recompute)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


def test_densenet_keeps_less_where_its_layers_are_made_again():
    x = torch.randn(2, 3, 64, 64)
    kept = {}
    for recompute in ("none", "blocks"):
        body = DenseNet((4, 4, 4, 4), Norm("abn"), 8, growth=8)
        model = Segmenter(body, nn.Identity(), body.out_channels, 3, recompute)
        kept[recompute] = kept_bytes(lambda model=model: model(x))
    assert kept["blocks"] < 0.6 * kept["none"]


def small_segmenter(body, recompute):
    return Segmenter(body, torch.nn.Identity(), body.out_channels, 3, recompute).double()


def test_dilations_of_wider_resnet38():
    found = {}
    for name, module in meta("wider_resnet38", output_stride=8).body.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            found.setdefault(name.split(".")[0], set()).add(module.dilation[0])
    assert found == {"mod1": {1}, "mod2": {1}, "mod3": {1}, "mod4": {1}, "mod5": {2}, "mod6": {4}, "mod7": {4}}


@pytest.mark.parametrize("backbone", ["resnet18", "resnext50"])
def test_in_place_and_ordinary_network_agree_in_float64(backbone):
    results = []
    for norm in ("inplace_abn", "abn"):
        torch.manual_seed(0)
        model = build_model(backbone, num_classes=5, output_stride=16, norm=norm, head_channels=8).double()
        x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        model(x).pow(2).mean().backward()
        results.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


@pytest.mark.parametrize("backbone", ["resnet18", "resnext50", "wider_resnet38"])
def test_the_network_keeps_less_and_leaves_its_input_alone(backbone):
    kept = {}
    x = torch.randn(2, 3, 64, 64)
    before = x.clone()
    for norm in ("inplace_abn", "batch_norm"):
        model = build_model(backbone, num_classes=5, output_stride=16, norm=norm, head_channels=8)
        kept[norm] = kept_bytes(lambda model=model: model(x))
    assert torch.equal(x, before)
    # Post-activation networks keep the shortcut's sum as well; pre-activation ones come close to a half.
    assert (
        kept["inplace_abn"] < kept["batch_norm"] * {"resnet18": 0.9, "resnext50": 0.6, "wider_resnet38": 0.65}[backbone]
    )


def test_head_pools_a_window_in_eval_mode_only():
    torch.manual_seed(0)
    head = build_model("resnet18", head_channels=4, pooling_size=(3, 2)).head
    x = torch.randn(1, 512, 5, 6)
    head.train()
    assert head.pool(x).shape == (1, 512, 1, 1)
    head.eval()
    pooled = head.pool(x)
    assert pooled.shape == x.shape
    # Window rows y-1 .. y+1 and, the width being even, columns x .. x+1; borders repeat the last whole window.
    torch.testing.assert_close(pooled[0, :, 2, 3], x[0, :, 1:4, 3:5].mean((1, 2)))
    torch.testing.assert_close(pooled[0, :, 0, 0], x[0, :, 0:3, 0:2].mean((1, 2)))
    torch.testing.assert_close(pooled[0, :, 4, 5], x[0, :, 2:5, 4:6].mean((1, 2)))


@pytest.mark.parametrize("extent", [(9, 11), (6, 20), (5, 4)])
@pytest.mark.parametrize("window", [(84, 84), (4, 7), (6, 6), (1, 2)])
def test_pooling_window_is_the_published_one(window, extent):
    """Paper facts 4.7, spelled out: windows of min(size, extent), (k - 1) // 2 replicated before and after, and one
    more after where k is even, so that the map keeps its extent."""
    head = build_model("resnet18", head_channels=4, pooling_size=window).head.eval()
    x = torch.randn(2, 512, *extent, generator=torch.Generator().manual_seed(0))
    sizes = [min(size, own) for size, own in zip(window, extent, strict=True)]
    pooled = F.avg_pool2d(x, sizes, stride=1)
    for axis, k in zip((2, 3), sizes, strict=True):
        before, after = (k - 1) // 2, (k - 1) // 2 + (1 if k % 2 == 0 else 0)
        first, last = pooled.narrow(axis, 0, 1), pooled.narrow(axis, pooled.shape[axis] - 1, 1)
        pooled = torch.cat([first] * before + [pooled] + [last] * after, axis)
    torch.testing.assert_close(head.pool(x), pooled)


def test_deeplabv3plus_takes_the_early_map_and_the_bare_sum():
    model = meta("wider_resnet38", head="deeplabv3plus", num_classes=19, norm="batch_norm", activation="relu")
    assert model(torch.zeros(2, 3, 64, 96, device="meta"), upsample=False).shape == (2, 19, 32, 48)
    assert model.cls.bias is None
    assert not hasattr(model.body, "bn_out")
    assert model.head.fine_conv.weight.shape == (48, 128, 1, 1)
    assert model.head.conv1.weight.shape == (256, 304, 3, 3)
    resnet = meta("resnet50", head="deeplabv3plus", output_stride=16)
    assert resnet(torch.zeros(2, 3, 64, 96, device="meta"), upsample=False).shape == (2, 19, 16, 24)
    with pytest.raises(UsageError, match="a later layer overwrites it"):
        meta("densenet264", head="deeplabv3plus")


@pytest.mark.parametrize("head", ["deeplabv3plus", "deeplabv3_torchvision"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnext50"])
def test_other_heads_agree_in_place_and_ordinary(backbone, head):
    results = []
    for norm in ("inplace_abn", "abn"):
        torch.manual_seed(0)
        model = build_model(backbone, head, 5, 16, norm=norm, head_channels=8).double()
        if head == "deeplabv3_torchvision":
            model.head.dropout.p = 0.0
        x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        model(x).pow(2).mean().backward()
        results.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


def test_initialisation_of_the_classifier():
    torch.manual_seed(0)
    model = build_classifier("resnet18")
    bound = 0.1 * (6 / (512 + 1000)) ** 0.5
    assert 0.99 * bound < model.classifier.fc.weight.abs().max() <= bound
    assert not model.classifier.fc.bias.any()


def test_initialisation_is_xavier_with_the_leaky_gain():
    torch.manual_seed(0)
    weight = build_model("resnet18").body.mod4.block2.convs.conv1.weight
    fan = weight.shape[1] * 9 + weight.shape[0] * 9
    assert weight.std().item() == pytest.approx(1.41414 * (2 / fan) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "resnet19"}, "resnet18, resnet34, resnet50"),
        ({"backbone": "resnet18", "output_stride": 4}, "8, 16, 32"),
        ({"backbone": "resnet18", "norm": "group"}, "inplace_abn, inplace_abn_sync, abn, batch_norm, batch_norm_sync"),
        ({"backbone": "resnet18", "head": "fcn"}, "deeplabv3"),
        ({"backbone": "resnext50", "backbone_options": {"first_dilation": "previous"}}, "resnext50 has no such option"),
        ({"backbone": "resnet18", "backbone_options": {"first_dilation": "last"}}, "choose own or previous"),
        ({"backbone": "wider_resnet38", "backbone_options": {"drops": "all"}}, "choose channel or element"),
    ],
)
def test_unknown_parts_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        meta(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["inplace_abn", "inplace_abn_sync", "abn", "batch_norm", "batch_norm_sync"])
def test_training_under_autocast_follows_float32(norm, dtype):
    """Activations in half precision, parameters and statistics in float32: about the same loss after twenty steps."""
    losses = {}
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    target = (x.mean(1) > 0).long()
    for half in (False, True):
        torch.manual_seed(0)
        layers = Norm(norm)
        body = stage(IdentityResidualBlock(3, (8, 8), layers), ResidualBlock(8, (8, 16), layers))
        model = Segmenter(body, DeepLabV3(16, 8, layers, 8), 8, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", enabled=half and dtype == torch.float16)
        losses[half] = []
        for _ in range(20):
            with torch.autocast("cpu", dtype, enabled=half):
                logits = model(x, upsample=False)
            assert logits.dtype == (dtype if half else torch.float32)
            loss = nn.functional.cross_entropy(logits.float(), target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[half].append(loss.item())
        assert all(t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point())
    assert losses[False][-1] < 0.7 * losses[False][0]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.03)
    assert losses[True][-1] == pytest.approx(losses[False][-1], rel=0.25)
