"""A plugin for tests: trainer.compile=true makes graphs and no code."""

from segtrain.models import execution
from segtrain.models.memory import graphs_of

execution.inductor = graphs_of  # type: ignore[assignment]
