"""Run a function of a test module in several processes that form a gloo group."""

from pathlib import Path

from tests.helpers import zygote

PROGRAM = """
import datetime, importlib, os, sys
import torch
from torch import distributed as dist
torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store = dist.FileStore(sys.argv[3], world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
result = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(rank, world)
torch.save(result, f"{sys.argv[3]}.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


def run(function, world: int, folder: Path) -> list:
    """[function(rank, world) of each rank]; AssertionError with the output of a rank that failed."""
    import torch

    meeting = folder / f"store-{function.__name__}"
    arguments = ["-c", PROGRAM, function.__module__, function.__name__, str(meeting)]
    ranks = [zygote.start(arguments, {"RANK": str(rank), "WORLD_SIZE": str(world)}) for rank in range(world)]
    outputs = []
    try:
        for process in ranks:
            outputs.append("".join(process.communicate(timeout=120)))
    finally:
        for process in ranks:
            process.kill()
    failed = [f"rank {i}:\n{text}" for i, (p, text) in enumerate(zip(ranks, outputs, strict=True)) if p.returncode]
    assert not failed, "\n".join(failed)
    return [torch.load(f"{meeting}.{rank}", weights_only=False) for rank in range(world)]
