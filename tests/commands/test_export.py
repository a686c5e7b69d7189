"""`segtrain export` and `segtrain evaluate engine=`: the exported network predicts what the checkpoint does."""

import hashlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from segtrain import load
from segtrain.abn.convert import fold
from segtrain.commands import export
from segtrain.config import InferenceConfig, ModelConfig
from segtrain.errors import DataError, UsageError
from segtrain.models import build_model
from segtrain.models.deeplabv3 import DeepLabV3, window_means
from segtrain.models.deployed import Deployed, trace
from segtrain.scoring.engine import Engine, read_engine
from segtrain.scoring.inference import Prediction
from segtrain.tasks.exported import EngineEvaluator, in_a_batch
from tests.helpers import pages
from tests.helpers.checkout import TINY
from tests.helpers.networks import lived_in
from tests.helpers.runs import refused

SIZES = (48, 64), (17, 33), (95, 130)


@pytest.fixture
def trained(segtrain, folder_data):
    """The words that name a finished run of two steps; its pooling window is smaller than its images."""
    answer = segtrain(
        "train", *folder_data[1], f"plugins=[{TINY}]", "model.backbone=tiny", "run=run", "model.pooling_size=[32,32]"
    )
    assert answer.status == 0, answer
    return ["run=run", f"plugins=[{TINY}]"]


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))
def test_window_means_are_those_of_the_pooling(height, width, rows, columns):
    head = DeepLabV3.__new__(DeepLabV3)
    torch.nn.Module.__init__(head)
    head.pooling_size = rows, columns
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height))
    torch.testing.assert_close(window_means(x, (rows, columns)), head.eval().pool(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backbone", "head"),
    [("resnet18", "deeplabv3_torchvision"), ("resnext50", "deeplabv3"), ("wider_resnet38", "deeplabv3plus")],
)
def test_every_kind_of_network_can_be_traced(backbone, head):
    """The trace for any size gives the logits of the network itself, at sizes that it has not seen."""
    torch.manual_seed(0)
    network = lived_in(build_model(backbone, head, 3, head_channels=8, pooling_size=(3, 5))).float().eval()
    folded = fold(network, torch.rand(1, 3, 65, 97)).model
    program = trace(Deployed(folded, [0.5] * 3, [0.2] * 3, False, False), 3, None, 8).module()
    for size in SIZES:
        x = torch.rand(3, 3, *size)
        with torch.no_grad():
            expected = network(x, upsample=False)
            torch.testing.assert_close(program(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("format", ["onnx", "torch_export", "state_dict"])
def test_each_format_predicts_what_the_checkpoint_does(segtrain, trained, format):
    output = {"onnx": "a.onnx", "torch_export": "a.pt2", "state_dict": "a.safetensors"}[format]
    answer = segtrain("export", *trained, f"format={format}", f"output={output}")
    assert (answer.status, answer.out.splitlines()[-1]) == (0, output), answer
    assert "of folder val" in answer.out and "0 of 6144 pixels changed, 0 by a batch of two" in answer.out
    engine, predictor = read_engine(export.Path(output)), load("run", device="cpu")
    for size in SIZES:
        image = pixels(*size, 3)
        assert (engine.segment(image, InferenceConfig()).train_ids == predictor.predict(image)).mean() > 0.999
    assert engine.table.names == predictor.table.names
    assert engine.metadata["mean"] == predictor.options.mean
    assert not list(export.Path().glob(".export-*"))
    scored = segtrain("evaluate", f"engine={output}", "checkpoint=run/last.pt", trained[1])
    assert scored.status == 0, scored
    assert "engine      0 of 6144 pixels changed from the checkpoint" in scored.out
    theirs = json.loads(export.Path("run/evaluation.json").read_text())
    ours = json.loads(export.Path(scored.out.splitlines()[-1]).read_text())
    assert ours["miou"] == theirs["miou"] == ours["engine"]["miou_of_checkpoint"]
    assert ours["protocol"]["engine"]["format"] == format


def test_logits_take_tiles_and_a_fixed_size_takes_no_other(segtrain, trained):
    words = [*trained, "format=torch_export"]
    assert segtrain("export", *words, "output=logits.pt2", "include=[normalise]").status == 0
    image, tiled = pixels(70, 100, 3), InferenceConfig(name="tiled", tile=[64, 64])
    predictor = load("run", device="cpu")
    found = read_engine(export.Path("logits.pt2")).segment(image, tiled).train_ids
    assert (found == predictor.predict(image, tiled)).mean() > 0.999
    answer = segtrain("export", *words, "output=fixed.pt2", "size=[48,64]", "include=[]")
    assert answer.status == 0 and "of 48x64 pixels" in answer.out, answer
    fixed = read_engine(export.Path("fixed.pt2"))
    assert fixed.segment(image[:48, :64], InferenceConfig()).train_ids.shape == (48, 64)
    with pytest.raises(ValueError, match=r"takes images of 48x64 .* got 70x100"):
        fixed.segment(image, InferenceConfig())


def test_the_printed_command_scores_the_engine_of_a_run_with_another_scale(segtrain, folder_data):
    """The arg-max is inside, so the engine cannot see images at the scale of the run's validation."""
    words = [*folder_data[1], f"plugins=[{TINY}]", "model.backbone=tiny", "run=run", "inference.scales=[0.5]"]
    answer = segtrain("train", *words)
    assert "validated  inference whole (scales=[0.5]) in fp32" in answer.out, answer
    made = segtrain("export", "run=run", "format=state_dict", "output=a.safetensors", words[-4])
    (used,) = re.findall(r"^use +segtrain (.*)$", made.out, re.MULTILINE)
    assert used == "evaluate engine=a.safetensors checkpoint=run/last.pt inference=whole"
    assert segtrain(*used.split(), words[-4]).status == 0
    refused(segtrain(*used.split()[:-1], words[-4]), "inference.scales=[0.5]", "add inference=whole, or export it")


def test_what_cannot_be_is_refused_before_anything_is_written(segtrain, trained, folder_data):
    refused(segtrain("export", *trained, "output=a.pt"), "output=a.pt", ".onnx")
    refused(segtrain("export", *trained, "include=[softmax]"), "include", "normalise, argmax")
    refused(segtrain("export", "output=a.onnx"), "checkpoint=FILE", "run=FOLDER")
    refused(segtrain("evaluate", "engine=a.onnx"), "engine=FILE alone", "dataset=")
    data = [word for word in folder_data[1] if word.startswith("dataset")]
    for word in ("checkpoint_weights=raw", "taxonomy=own.yaml", "activation=relu", "boundary=true", "device=cuda"):
        refused(segtrain("evaluate", "engine=a.onnx", word, *data), word.partition("=")[0], "leave this out")
    export.Path("a.py").write_text("# mine\n")
    refused(segtrain("export", *trained, "format=state_dict", "output=a.safetensors"), "a.py", "not of an export")
    assert export.Path("a.py").read_text() == "# mine\n" and not export.Path("a.safetensors").exists()


def test_an_engine_that_predicts_otherwise_is_refused(segtrain, trained, scenes, monkeypatch):
    assert segtrain("export", *trained, "format=state_dict", "output=a.safetensors").status == 0
    answer = segtrain("evaluate", "engine=a.safetensors", "dataset=streets", f"dataset.root={scenes}")
    refused(answer, "a.safetensors predicts 2 classes", "dataset=streets has", "or score the checkpoint itself")
    with safe_open("a.safetensors", "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["network.cls.weight"].neg_()
    tensors["network.cls.bias"].neg_()
    save_file(tensors, "a.safetensors", about)
    answer = segtrain("evaluate", "engine=a.safetensors", "checkpoint=run/last.pt", trained[1])
    refused(answer, "otherwise than the checkpoint", "not scored", status=1)
    assert not export.Path("segtrain-out").exists()
    export.Path("a.py").write_text(export.Path("a.py").read_text() + "# of another\n")
    refused(segtrain("evaluate", "engine=a.safetensors", "checkpoint=run/last.pt", trained[1]), "a.py", status=1)
    broken = type("Broken", (torch.nn.Conv2d,), {"forward": lambda self, x, upsample: x[:, :2, ::16, ::16]})(3, 2, 1)
    monkeypatch.setattr(export, "folded", lambda predictor: broken)
    answer = segtrain("export", *trained, "format=torch_export", "output=b.pt2")
    refused(answer, "predicts otherwise", "nothing is written", status=1)
    assert not list(export.Path().glob("b.*")) and not list(export.Path().glob(".export-*"))


def test_a_batch_must_not_change_what_an_engine_predicts(segtrain, trained):
    assert segtrain("export", *trained, "format=state_dict", "output=a.safetensors").status == 0
    with safe_open("a.safetensors", "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    source = export.Path("a.py").read_text() + (
        "\n\nalone = forward\n\n\ndef forward(tensors, images):\n    found = alone(tensors, images)\n"
        "    return found if len(images) == 1 else 1 - found\n"
    )
    export.Path("a.py").write_text(source)
    described = json.loads(about["segtrain"]) | {"source_sha256": hashlib.sha256(source.encode()).hexdigest()}
    save_file(tensors, "a.safetensors", {"segtrain": json.dumps(described)})
    answer = segtrain("evaluate", "engine=a.safetensors", "checkpoint=run/last.pt", trained[1])
    refused(answer, "6144 of 6144 pixels otherwise than itself in a batch of two", "not scored", status=1)


@pytest.mark.parametrize(
    ("counted", "text"),
    [
        ([1000, 2, 10000, 2], "2 of 1000 pixels otherwise than the checkpoint"),
        ([10000, 2, 1000, 2], "2 of 1000 pixels otherwise than itself in a batch of two"),
    ],
)
def test_what_differs_is_named(counted, text):
    evaluator = EngineEvaluator.__new__(EngineEvaluator)
    evaluator.engine = Engine(export.Path("a.onnx"), {}, lambda images: images)
    with pytest.raises(DataError, match=text):
        evaluator.evaluation(SimpleNamespace(pixels=np.array(counted), network=None), [], {}, {})


def test_the_batch_has_the_mirrored_image_first():
    seen = []

    def run(images):
        seen.append(images)
        return torch.arange(len(images), dtype=torch.uint8)[:, None, None].expand(-1, *images.shape[2:])

    about = {"include": ["normalise", "argmax"], "input": {"size": None, "minimum": 5}}
    engine, image = Engine(export.Path("a.onnx"), about, run), pixels(6, 8, 3)
    assert (in_a_batch(engine, image, InferenceConfig()) == 1).all()
    assert (seen[0].numpy() == np.stack([image[:, ::-1], image]).transpose(0, 3, 1, 2)).all()
    with pytest.raises(UsageError, match="at least 5 pixels a side, got 4x8"):
        engine.segment(image[:4], InferenceConfig())


@pytest.mark.parametrize(("changed", "batched", "logits"), [(1, 0, 0), (0, 1, 0), (0, 0, 0.002), (0, 0, 0)])
def test_the_proof_bounds_each_difference(changed, batched, logits):
    """Of 900 pixels one may not differ, and logits may by 0.001 of the largest."""
    scores = torch.full((1, 2, 30, 30), 1.9999)
    scores[:, 0] = 2.0

    def run(images):
        found = scores * (1 + logits)
        if changed or len(images) > 1 and batched:
            found[0, 1, 0, 0] = 2.0001
        return found.expand(len(images), -1, -1, -1)

    about = {"include": ["normalise"], "input": {"size": None, "minimum": 1}}
    predictor = SimpleNamespace(
        segment=lambda image, inference: Prediction(np.zeros((30, 30), np.uint8), None),
        options=ModelConfig(), network=lambda images, upsample: scores,
    )  # fmt: skip
    engine, ends = Engine(export.Path("a.onnx"), about, run), SimpleNamespace(argmax=False)
    if not (changed or batched or logits):
        assert export.prove(engine, predictor, [pixels(30, 30, 3)], ends)[:3] == (900, 0, 0)
        return
    with pytest.raises(DataError, match=f"{changed} of 900 pixels changed, {batched} by a batch of two"):
        export.prove(engine, predictor, [pixels(30, 30, 3)], ends)


def test_what_is_no_engine_gets_one_sentence(segtrain, folder_data):
    export.Path("a.onnx").write_bytes(b"no model")
    export.Path("a.pt2").write_bytes(b"no archive")
    export.Path("a.safetensors").write_bytes(b"no tensors")
    words = [word for word in folder_data[1] if word.startswith("dataset")]
    for name in ("a.onnx", "a.pt2", "a.safetensors"):
        refused(segtrain("evaluate", f"engine={name}", *words), name, "segtrain export", status=1)
    refused(segtrain("evaluate", "engine=missing.onnx", *words), "no such file", "segtrain export")
    refused(segtrain("evaluate", "engine=a.txt", *words), ".onnx, .pt2, .safetensors")


def test_the_examples_run_without_segtrain(segtrain, trained):
    """The three programs of the page draw what the checkpoint predicts, in a process that cannot import segtrain."""
    Image.fromarray(pixels(50, 70, 3)).save("photo.png")
    predictor = load("run", device="cpu")
    expected = predictor.table.colorize(predictor.predict("photo.png"))
    blocks = [block for block in pages.blocks("configs/README.md", "python") if "toy" in block and "photo.png" in block]
    assert len(blocks) == 3
    for format, suffix in (("onnx", ".onnx"), ("torch_export", ".pt2"), ("state_dict", ".safetensors")):
        answer = segtrain("export", *trained, f"format={format}", f"output=toy{suffix}")
        assert answer.status == 0, answer
    program = "\n".join(["import sys", "sys.modules['segtrain'] = None", "sys.path.insert(0, '.')", *blocks])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    for name in ("onnx", "torch_export", "state_dict"):
        drawn = np.asarray(Image.open(f"{name}.png"))
        assert (drawn == expected).all(-1).mean() > 0.999, name
