"""The recipes in configs/experiment, composed, and the rows of the paper's tables that they stand for."""

from functools import cache

from segtrain import compose
from segtrain.data.labels import read_json_table
from tests.helpers.checkout import ROOT

FOLDER = ROOT / "configs" / "experiment"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ROWS = [row for row in read_json_table("paper")["rows"] if row["dataset"] != "imagenet"]


@cache
def composed(recipe):
    """The composed and checked recipe, which takes a third of a second; do not change it."""
    return compose(f"experiment={recipe}")


def header(recipe):
    lines = (FOLDER / f"{recipe}.yaml").read_text().splitlines()
    return " ".join(line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line)
