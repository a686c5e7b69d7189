"""Several processes of one command, started by torchrun."""

import contextlib
import os
from collections.abc import Iterator

import numpy as np

from segtrain.log import process_count


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """(rank, number of processes), (0, 1) without a launcher. Processes talk over gloo while inside."""
    if process_count() == 1:
        yield 0, 1
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def add_up(*arrays: np.ndarray) -> None:
    """Replace each array by its sum over all processes."""
    if process_count() > 1:
        import torch
        from torch import distributed

        for array in arrays:
            distributed.all_reduce(torch.from_numpy(array))
