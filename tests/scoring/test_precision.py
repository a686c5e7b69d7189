"""inference.precision: half precision inside the network only, never chosen in silence, and float32 as it was."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segtrain.config import InferenceConfig, ModelConfig
from segtrain.data.labels import LabelTable
from segtrain.errors import SegtrainError, UsageError
from segtrain.models import build_model, precision
from segtrain.models.preprocess import normalise_images
from segtrain.scoring.engine import Engine
from segtrain.scoring.predictor import Predictor
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused

CPU = torch.device("cpu")
CLASSES = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def predictor(image):
    """No class has an advantage on the image, so that several are predicted."""
    torch.manual_seed(0)
    network = build_model("resnet18", "deeplabv3", CLASSES, head_channels=16).eval()
    found = Predictor(network, table(), ModelConfig(), CPU)
    last = [module for module in network.modules() if getattr(module, "out_channels", 0) == CLASSES][-1]
    with torch.no_grad():
        last.bias -= found.logits(batch(image)).mean((0, 2, 3))
    return found


def table():
    colors = [[40 * i] * 3 for i in range(CLASSES)]
    names, ids = [f"c{i}" for i in range(CLASSES)], [*range(CLASSES)]
    return LabelTable.from_dict({"names": names, "ids": ids, "colors": colors, "ignored_ids": [], "source": "test"})


@pytest.fixture(scope="module")
def image():
    small = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 255
    return F.interpolate(small, (96, 128), mode="bicubic").clamp(0, 255)[0].byte().permute(1, 2, 0).numpy()


def batch(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None]


@contextlib.contextmanager
def seen_dtypes(network):
    """The dtypes of what the convolutions return inside."""
    found = set()
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def test_float32_is_the_network_itself_to_the_bit(predictor, image):
    ready = normalise_images(batch(image), predictor.options.mean, predictor.options.std)
    with torch.inference_mode():
        assert torch.equal(predictor.logits(batch(image), "fp32"), predictor.network(ready, upsample=False))
    with seen_dtypes(predictor.network) as found:
        predictor.segment(image)
    assert found == {torch.float32}


@pytest.mark.parametrize(("name", "error", "changed"), [("bf16", 0.05, 0.03), ("fp16", 0.008, 0.005)])
def test_half_precision_is_close_to_float32(predictor, image, name, error, changed):
    """`error`: of the logits, a fraction of the largest; a weight is rounded by up to 2^-9 in bf16, 2^-12 in fp16, and
    twenty layers follow each other. `changed`: fraction of the pixels."""
    with torch.inference_mode():
        exact, half = (predictor.logits(batch(image), kind) for kind in ("fp32", name))
    assert half.dtype == torch.float32
    assert 0 < float((half - exact).abs().max() / exact.abs().max()) < error
    plain, rounded = (predictor.segment(image, InferenceConfig(precision=kind)).train_ids for kind in ("fp32", name))
    assert np.bincount(plain.ravel()).min() > plain.size // 20
    assert 0 < (rounded != plain).mean() < changed
    with seen_dtypes(predictor.network) as found:
        predictor.segment(image, InferenceConfig(scales=[1.0, 1.25], flip=True, tile=[64, 64], precision=name))
    assert found == {DTYPES[name]}


def test_logits_are_float32_before_they_are_enlarged(predictor, image):
    """The probabilities are those of the logits in float32, enlarged in float64."""
    with torch.inference_mode():
        logits = predictor.logits(batch(image), "bf16").double()
    expected = F.interpolate(logits, image.shape[:2], mode="bilinear")[0].softmax(0).amax(0)
    found = predictor.segment(image, InferenceConfig(precision="bf16"), probability=True)
    torch.testing.assert_close(torch.from_numpy(found.probability).double(), expected, rtol=0, atol=1e-5)


def test_what_float16_cannot_hold_is_an_error(image):
    class Large(nn.Conv2d):
        def forward(self, x, upsample=False):
            return super().forward(x)

    network = Large(3, CLASSES, 8, 8)
    network.weight.data.fill_(1e4)
    predictor = Predictor(network, table(), ModelConfig(), CPU)
    predictor.segment(image, InferenceConfig(precision="bf16"))
    with pytest.raises(SegtrainError, match=r"inference.precision=fp16: .*65504.*choose bf16 or fp32"):
        predictor.segment(image, InferenceConfig(precision="fp16"))


def test_a_precision_that_torch_does_not_compute_in_is_refused(predictor, image, monkeypatch):
    """Where torch lacks a precision, autocast either raises, or warns and computes in float32."""
    precision.why_not.cache_clear()
    monkeypatch.setattr(precision.torch, "autocast", lambda *arguments: contextlib.nullcontext())
    with pytest.raises(UsageError, match=r"inference.precision=fp16 .* on this CPU: .* float32 instead; choose fp32"):
        predictor.segment(image, InferenceConfig(precision="fp16"))
    precision.why_not.cache_clear()

    def raises(*arguments):
        raise RuntimeError("Current CUDA Device does not support bfloat16.")

    monkeypatch.setattr(precision.torch, "autocast", raises)
    with pytest.raises(UsageError, match=r"inference.precision=bf16 .* does not support bfloat16"):
        predictor.segment(image, InferenceConfig(precision="bf16"))
    precision.why_not.cache_clear()


def test_an_exported_network_has_one_precision():
    engine = Engine(Path("a.onnx"), {"include": ["normalise"]}, lambda images: images)
    engine.refuse(InferenceConfig(flip=True))
    with pytest.raises(UsageError, match=r"inference.precision=bf16 is not possible with a.onnx"):
        engine.refuse(InferenceConfig(precision="bf16"))


def test_what_an_exported_network_cannot_do_is_named():
    logits = Engine(Path("a.onnx"), {"include": ["normalise"]}, lambda images: images)
    labels = logits._replace(metadata={"include": ["argmax", "normalise"]})
    for engine in (logits, labels):
        with pytest.raises(UsageError, match=r"inference.batch_size=2 is not possible .*: leave it out"):
            engine.refuse(InferenceConfig(batch_size=2))
    views = {"scales": [0.5, 1.0], "flip": True}
    for engine in (logits, labels):
        engine.refuse(InferenceConfig(name="other"))
        with pytest.raises(UsageError, match=r"inference.longest_side=64 is not possible .*: leave it out"):
            engine.refuse(InferenceConfig(longest_side=64, **views))
    logits.refuse(InferenceConfig(**views))
    with pytest.raises(UsageError, match=r"inference.flip=true is not possible .*include=\[normalise\]"):
        labels.refuse(InferenceConfig(flip=True))


def test_results_state_a_precision_only_where_it_was_chosen():
    """What earlier versions have written, such as predict.json, is compared with it."""
    assert "precision" not in InferenceConfig().stated()
    assert InferenceConfig(precision="bf16").stated() == {**InferenceConfig().stated(), "precision": "bf16"}


def test_training_evaluation_and_prediction_say_it(segtrain, folder_data):
    words = [*folder_data[1], f"plugins=[{TINY}]", "model.backbone=tiny", "run=run"]
    assert segtrain("train", *words).status == 0
    for path in Path("run").glob("*.pt"):  # as a version without the option has stored it
        saved = torch.load(path, weights_only=True)
        saved["config"]["inference"].pop("precision", None)  # best.pt may be a link to last.pt
        torch.save(saved, path)
    same = segtrain("train", *words, "trainer.max_steps=4")
    assert same.status == 0 and "chosen among" not in same.out, same
    assert "validated" not in same.out
    other = segtrain("train", *words, "trainer.max_steps=6", "inference.precision=bf16")
    assert "validated  inference whole in bf16" in other.out, other
    assert "inference.precision=bf16 instead of fp32" in other.out and "chosen among" in other.out
    common = ["run=run", f"plugins=[{TINY}]", "device=cpu"]  # the inference is the run's
    answer = segtrain("evaluate", *common, "output=half")
    assert "inference whole in bf16, on CPU" in answer.out, answer
    half, own = (json.loads(Path(name, "evaluation.json").read_text()) for name in ("half", "run"))
    assert half["protocol"]["precision"] == own["protocol"]["precision"] == "bfloat16"
    assert half["confusion_matrix"] == own["confusion_matrix"]
    answer = segtrain("evaluate", *common, "inference.precision=fp32", "output=full")
    assert "inference whole in fp32" in answer.out
    assert json.loads(Path("full", "evaluation.json").read_text())["protocol"]["precision"] == "float32"
    answer = segtrain("predict", *common, f"input={folder_data[0]}/val/images", "inference.precision=bf16")
    assert "predicting  2 images, inference whole in bf16" in answer.out, answer
    refused(segtrain("evaluate", *common, "inference.precision=int8"), "inference.precision", "fp32, bf16, fp16")
