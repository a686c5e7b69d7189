"""model.weights=timm: pretrained weights by name, their licence, and what becomes of them; all without a network."""

from pathlib import Path

import pytest
import torch
from torch import nn

from segtrain.config import ModelConfig
from segtrain.errors import DataError
from segtrain.models import from_config, timm_encoder
from segtrain.weights.timm_weights import load_timm
from tests.helpers.runs import refused, same, state

NAME = "timm:test_resnet.r160_in1k"


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A file as the hub has it, of timm's whole classifier; what asks for pretrained weights by name gets it."""
    import timm

    torch.manual_seed(5)
    model = timm.create_model("test_resnet")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    true = timm_encoder.create
    overlay = {"file": str(path), "hf_hub_id": None, "url": ""}

    def create(name, pretrained, options):
        if pretrained and "pretrained_cfg_overlay" not in options:
            options = {**options, "pretrained_cfg_overlay": overlay}
        return true(name, pretrained, options)

    monkeypatch.setattr(timm_encoder, "create", create)
    return path, model.eval(), overlay


def options(**more):
    return ModelConfig(**{
        "backbone": NAME, "scale": "signed", "weights": "timm", "output_stride": 32, "head_channels": 4, **more,
    })  # fmt: skip


@pytest.mark.parametrize("norm", ["inplace_abn", "batch_norm"])
def test_the_encoder_gives_timms_features(published, norm):
    """The published network's own feature map, to rounding; weights of either sign stay as they are."""
    _, model, _ = published
    config = options(norm=norm)
    network = from_config(config, 3).eval()
    report = load_timm(config, network)
    x = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = model.forward_features(x), network.body(x)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert min(module.weight.min() for module in network.body.modules() if hasattr(module, "running_var")) < 0
    text = str(report)
    for line in (f"{NAME}: 75 tensors", "licence of the weights: apache-2.0"):
        assert line in text, text
    assert ("3 of 15 BatchNorm layers became In-Place ABN" in text) == (norm == "inplace_abn")
    assert "WARNING" not in text
    assert report.normalised == ([0.5] * 3, [0.5] * 3)
    assert report.provenance["weights"] == [
        {"file": NAME, "known": None, "licence": "apache-2.0", "noncommercial": None}
    ]  # fmt: skip


def test_a_licence_against_commercial_use_warns(published):
    published[2]["license"] = "cc-by-nc-4.0"
    config = options()
    report = load_timm(config, from_config(config, 3))
    line = f"weights {NAME} (cc-by-nc-4.0)"
    assert f"WARNING    not for commercial use: {line}" in str(report)
    assert report.provenance["noncommercial"] == [line]


@pytest.mark.parametrize("error", [OSError("we couldn't connect\nto the hub"), RuntimeError("No pretrained weights")])
def test_offline_there_is_one_sentence(monkeypatch, error):
    config = options()
    network = from_config(config, 3)
    true = timm_encoder.create

    def create(name, pretrained, more):
        if pretrained:
            raise error
        return true(name, pretrained, more)

    monkeypatch.setattr(timm_encoder, "create", create)
    with pytest.raises(DataError) as caught:
        load_timm(config, network)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"the weights of {NAME} cannot be had ({str(error).splitlines()[0]})")
    assert "https://huggingface.co/timm/test_resnet.r160_in1k" in text and "model.weights=FILE" in text


def test_a_training_stores_where_its_encoder_comes_from(published, folder_data, segtrain):
    """By name, by the downloaded file, resumed, and as the beginning of another run."""
    path, _, overlay = published
    overlay["license"] = "cc-by-nc-4.0"
    words = [*folder_data[1], "model=timm", f"model.backbone={NAME}", "schedule=constant", "model.frozen=[stem,layer1]"]
    answer = segtrain("train", *words, "run=named")
    assert answer.status == 0, answer
    for text in (
        "3 of 15 BatchNorm layers became",
        "WARNING    not for commercial use: weights",
        "model.mean=[0.5, 0.5",
    ):
        assert text in answer.out, answer.out
    first = state("named/last.pt")
    assert first["provenance"]["weights"][0]["licence"] == "cc-by-nc-4.0"
    assert first["config"]["model"]["mean"] == [0.5, 0.5, 0.5]
    stem = next(value for key, value in state(path).items() if key.startswith("conv1."))
    assert any(torch.equal(value, stem) for key, value in first["model"].items() if "conv1" in key)  # frozen
    answer = segtrain("train", *words, f"model.weights={path}", "run=of_a_file")
    assert answer.status == 0, answer
    assert same(state("of_a_file/last.pt")["model"], first["model"])
    answer = segtrain("train", *words, "run=named", "trainer.max_steps=3")
    assert answer.status == 0 and "encoder    3 of 15" in answer.out, answer
    answer = segtrain("train", *words, "model.weights=named/last.pt", "run=again", "trainer.max_steps=1")
    assert answer.status == 0, answer
    assert "tensors matched (100 %)" in answer.out
    answer = segtrain("evaluate", "run=named", "device=cpu", "loader.workers=0")
    assert answer.status == 0, answer


def test_a_file_of_another_network(published, folder_data, segtrain):
    words = [*folder_data[1], "model=timm", "model.backbone=timm:test_convnext", f"model.weights={published[0]}"]
    refused(segtrain("train", *words, "run=r"), "does not fit timm:test_convnext", status=1)
    assert not Path("r/last.pt").exists()
