"""torch.compile up to the graphs of forward and backward, which run an operation at a time: no code is made of them."""

from torch._functorch import config

from segtrain.models import execution

inductor = execution.inductor


def as_graphs(graph, inputs):
    """Stands for `segtrain.models.execution.inductor`."""
    with config.patch(enable_autograd_cache=False):  # what it would store is code
        return inductor(graph, inputs, execution.run_as_graph)
