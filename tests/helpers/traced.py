"""A plugin for tests: trainer.compile=true makes graphs and no code."""

from segtrain.models import execution
from tests.helpers.graphs import as_graphs

execution.inductor = as_graphs
