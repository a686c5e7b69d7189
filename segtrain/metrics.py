"""Where plugins import the scoring rules from."""

from segtrain.scoring.scores import PLAIN, PositionPrior, Rules, Scores

__all__ = ["PLAIN", "PositionPrior", "Rules", "Scores"]
