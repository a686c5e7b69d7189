"""Where plugins import the scoring rules from."""

from segtrain.data.rules import PLAIN, Rules
from segtrain.scoring.scores import PositionPrior, Scores

__all__ = ["PLAIN", "PositionPrior", "Rules", "Scores"]
