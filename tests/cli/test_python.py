"""segtrain in Python: what the four functions take, and that help, completion and type checkers see them."""

import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segtrain
from segtrain.config import EvaluateConfig, InferenceConfig, KittiConfig, PredictConfig, TrainConfig
from segtrain.errors import UsageError
from tests.helpers.checkout import ROOT, environment

NAMES = ["compose", "evaluate", "load", "train"]


def test_what_is_there_is_found():
    assert segtrain.__all__ == NAMES and set(NAMES) <= set(dir(segtrain))
    text = pydoc.plain(pydoc.render_doc(segtrain))
    for name in NAMES:
        assert name in text
        documented = inspect.getdoc(getattr(segtrain, name))
        assert ">>> " in documented and "UsageError" in documented, name
    assert ">>> network = segtrain.load" in inspect.getdoc(segtrain.scoring.predictor.Predictor.predict)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        segtrain.lod  # noqa: B018


def test_names_are_found_without_torch():
    code = "import sys, segtrain; assert {'load', 'train'} <= set(dir(segtrain)); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


@pytest.mark.slow
def test_a_type_checker_sees_the_functions(tmp_path):
    """The stub has the names of __init__.py, and a wrong call is found."""
    (tmp_path / "right.py").write_text(
        'import segtrain\nlr: float = segtrain.compose("experiment=toy").optimizer.lr\n'
        'flip: bool = segtrain.compose("evaluate", "a.pt").inference.flip\n'
        'rows: int = segtrain.load("a.pt").predict("b.png").shape[0]\nmiou = segtrain.evaluate("a.pt", split="val")\n'
    )
    (tmp_path / "wrong.py").write_text('import segtrain\nsegtrain.load(3)\nsegtrain.train("toy")\nsegtrain.lod("a")\n')
    assert (ROOT / "segtrain/py.typed").exists()
    call = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    answers = [
        subprocess.run([*call, str(tmp_path / name)], cwd=ROOT, env=environment(), capture_output=True, text=True)
        for name in ("right.py", "wrong.py")
    ]
    assert answers[0].returncode == 0, answers[0].stdout
    assert [answers[1].stdout.count(kind) for kind in ("[arg-type]", "[attr-defined]")] == [2, 1], answers[1].stdout


# ---------------------------------------------------------------------------------------------------- composing


def test_compose_makes_options_of_every_command(trained):
    run, root = trained
    assert isinstance(segtrain.compose("experiment=toy"), TrainConfig)
    assert segtrain.compose("train", "experiment=toy") == segtrain.compose("experiment=toy")
    made = segtrain.compose("evaluate", str(run / "last.pt"), "inference=multiscale", "split=train")
    assert isinstance(made, EvaluateConfig)
    assert (made.inference.flip, made.split, made.dataset.root) == (True, "train", str(root))
    assert segtrain.compose("evaluate", f"run={run}", "checkpoint=best").checkpoint == str(run / "best.pt")
    assert isinstance(segtrain.compose("predict", f"run={run}", "input=a.png"), PredictConfig)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evalute", "x.pt"], "there is no command 'evalute'; did you mean evaluate?"),
        (["toy"], "'toy' is not an override: options are given as key=value"),
        ([3], "segtrain.compose takes words, as \"experiment=toy\", got int"),
        (["evaluate", "a.pt", "-m"], "but no flags"),
        (["evaluate", "a.pt"], "no checkpoint file a.pt"),
        (["evaluate"], "give checkpoint=FILE or run=FOLDER"),
        (["evaluate", "split=val", "activation=mish"], "give checkpoint=FILE"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_sentence(words, sentence):
    with pytest.raises(UsageError) as error:
        segtrain.compose(*words)
    assert sentence in str(error.value)


# ---------------------------------------------------------------------------------------------------- evaluating


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """A run of one step, and the folder of its data; read only."""
    from tests.helpers.runs import small_run

    run = tmp_path_factory.mktemp("python") / "run"
    words = ["model.norm=batch_norm", "trainer.max_steps=1", f"run={run}"]
    assert segtrain.train(segtrain.compose(*small_run(scenes, *words))) == run
    return run, scenes


def test_evaluate_takes_a_path_a_run_and_options_alike(trained, tmp_path):
    run, root = trained
    quick = {"device": "cpu", "loader": {"workers": 0}, "position_prior": False, "pictures": 0}
    words = ["device=cpu", "loader.workers=0", "position_prior=false", "pictures=0"]
    calls = [
        segtrain.evaluate(run / "last.pt", **quick, output="a"),
        segtrain.evaluate(str(run), *words, "output=b"),
        segtrain.evaluate(segtrain.compose("evaluate", str(run / "last.pt"), *words, "output=c")),
    ]
    assert calls[0]["miou"] == calls[1]["miou"] == calls[2]["miou"]
    assert json.loads(Path("b/evaluation.json").read_text())["miou"] == calls[0]["miou"]
    assert calls[0] == calls[2]
    scales = InferenceConfig(scales=[0.25], flip=True, name="quarter")
    found = segtrain.evaluate(
        run, **quick, inference=scales, dataset={"name": "streets", "root": str(root)}, output="d"
    )
    assert (found["inference"]["scales"], found["inference"]["flip"]) == ([0.25], True)


def test_an_evaluation_that_cannot_be_is_one_sentence(trained):
    run, _ = trained
    wrong = [
        ((3,), {}, "segtrain.evaluate takes a checkpoint, a run folder or composed options, got int"),
        ((EvaluateConfig(str(run)),), {}, 'segtrain.compose("evaluate", "checkpoint=FILE")'),
        ((EvaluateConfig(str(run)),), {"split": "val"}, "takes words beside a path"),
        (("nowhere.pt",), {}, "no checkpoint file nowhere.pt"),
        ((run,), {"splt": "val"}, "there is no option splt; did you mean split?"),
        ((run,), {"dataset": "kiti"}, "dataset=kiti does not exist; did you mean dataset=kitti?"),
        ((run,), {"dataset": KittiConfig("kitti", root="elsewhere")}, "KITTI"),
    ]
    for arguments, options, sentence in wrong:
        with pytest.raises((UsageError, segtrain.errors.DataError)) as error:
            segtrain.evaluate(*arguments, **options)
        assert sentence in str(error.value)
    with pytest.raises(UsageError, match=r"segtrain.train takes what segtrain.compose\(...\) returns, got str"):
        segtrain.train("experiment=toy")


# ---------------------------------------------------------------------------------------------------- predicting


def test_predict_takes_a_path_an_image_an_array_and_a_tensor(trained):
    run, root = trained
    network = segtrain.load(run, device="cpu")
    path = next((root / "leftImg8bit/val").rglob("*.png"))
    image = Image.open(path)
    array = np.asarray(image.convert("RGB"))
    expected = network.predict(array)
    assert expected.dtype == np.uint8 and expected.shape == array.shape[:2]
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (path, str(path), image, image.convert("RGBA"), tensor, tensor.contiguous()):
        assert (network.predict(form) == expected).all(), type(form)
    grey = image.convert("L")
    grey.save("grey.png")
    assert (network.predict(grey) == network.predict("grey.png")).all()
    assert network.classes == network.table.names and len(network.classes) == 19
    assert (network.palette[expected] == network.table.colorize(expected)).all()
    assert (network.to("cpu").predict(array) == expected).all()


def test_predict_sees_images_at_the_scale_of_the_validation(trained, monkeypatch):
    network = segtrain.load(trained[0], device="cpu")
    stored = network.metadata["config"]
    validated = stored["inference"] | {"scales": [0.5], "flip": True}
    network = network._replace(metadata=network.metadata | {"config": stored | {"inference": validated}})
    seen, segment = [], type(network).segment

    def watched(self, image, options):
        seen.append((options.scales, options.flip))
        return segment(self, image, options)

    monkeypatch.setattr(type(network), "segment", watched)
    image = np.zeros((64, 96, 3), np.uint8)
    network.predict(image)
    network.predict(image, InferenceConfig(scales=[0.75]))
    assert seen == [([0.5], True), ([0.75], False)]
    halved = network._replace(metadata={"config": stored | {"inference": validated | {"precision": "fp16"}}})
    monkeypatch.setattr("segtrain.models.precision.why_not", lambda precision, device: "it cannot")
    with pytest.raises(UsageError, match="inference.precision=fp16 is not possible on this CPU"):
        halved.predict(image)


def test_what_predict_and_load_cannot_take(trained):
    network = segtrain.load(trained[0] / "best.pt", device="cpu")
    for form, sentence in (
        (3, "predict takes a path, a PIL image, an array or a tensor, got int"),
        (np.zeros((4, 5, 3)), "predict takes an array uint8 (H, W, 3), got float64 (4, 5, 3): for values from 0 to 1"),
        (torch.zeros(3, 4, 5), "predict takes a tensor uint8 (3, H, W), got float32 (3, 4, 5)"),
        (np.zeros((4, 5), np.uint8), "in the order red, green, blue, got uint8 (4, 5)"),
        (np.zeros((3, 4, 5), np.uint8), "an array uint8 (H, W, 3)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), "a tensor uint8 (3, H, W)"),
    ):
        with pytest.raises(UsageError) as error:
            network.predict(form)
        assert sentence in str(error.value)
    with pytest.raises(UsageError, match=r"segtrain.load takes the path of a checkpoint or run folder, got Predictor"):
        segtrain.load(network)
    with pytest.raises(segtrain.errors.DataError, match="nowhere.png cannot be read as an image"):
        network.predict("nowhere.png")
