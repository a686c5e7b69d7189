"""Where plugins import the scoring rules from, and add metrics of their own."""

from segtrain.data.rules import PLAIN, Rules
from segtrain.scoring.extra_metrics import METRICS
from segtrain.scoring.position_prior import PositionPrior
from segtrain.scoring.scores import Scores

__all__ = ["METRICS", "PLAIN", "PositionPrior", "Rules", "Scores"]
