"""Real street photographs, if there is a local copy beside the checkout: configuration alone reads them."""

import pytest

from segtrain.config import FolderConfig
from segtrain.data.loader import evaluation_samples
from segtrain.data.registry import label_table, split_samples
from segtrain.data.verify.files import check_samples
from segtrain.scoring.position_prior import PositionPrior
from segtrain.scoring.scores import Scores
from tests.helpers.checkout import ROOT

PHOTOGRAPHS = ROOT.parent / "shared" / "camvid_small"
NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

pytestmark = pytest.mark.skipif(
    not PHOTOGRAPHS.is_dir(), reason="no local photographs (../shared/camvid_small) beside this checkout"
)


@pytest.fixture
def camvid(tmp_path):
    rows = [f"{i},{name},,false" for i, name in enumerate(NAMES)] + ["11,unlabelled,,true"]
    (tmp_path / "camvid.csv").write_text("id,name,color,ignore\n" + "\n".join(rows) + "\n")
    return FolderConfig(
        name="folder",
        root=str(PHOTOGRAPHS),
        classes=str(tmp_path / "camvid.csv"),
        splits={s: {"images": f"{s}/*.png", "labels": f"{s}annot/*.png"} for s in ("train", "val")},
    )


def test_the_start_up_check_is_content(camvid, tmp_path):
    for split, number in (("train", 72), ("val", 24)):
        samples = split_samples(camvid, split)
        assert len(samples) == number
        assert check_samples(samples, label_table(camvid), tmp_path / "cache", print) == (360, 480)


def test_position_prior(camvid):
    """Another program measured 0.17 for a position prior, the baseline that is printed beside a result."""
    table = label_table(camvid)
    prior = PositionPrior.from_labels(split_samples(camvid, "train"), table)
    scores = Scores(table)
    for item in evaluation_samples(split_samples(camvid, "val"), table, workers=0):
        assert item.image.shape[:2] == item.target.shape
        scores.add(item.ids, table.decode(prior.predict(item.target.shape)))
    assert scores.result()["miou"] == pytest.approx(0.17, abs=0.02)
