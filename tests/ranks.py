"""Processes of one gloo group, for the tests over ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(check: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> None:
    """Run ``check(rank, *arguments)`` in every one of ``ranks`` processes; an exception in one is raised here."""
    mp.spawn(_work, (check, ranks, folder, arguments), nprocs=ranks)


def _work(rank: int, check: Callable[..., None], ranks: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in places.items()}  # as torchrun does, for the Trainer
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    check(rank, *arguments)
    dist.destroy_process_group()
    # A device mesh keeps the group's threads past destroy_process_group. One that lets go of a tensor while the
    # interpreter shuts down aborts the process (pytorch/pytorch#179291), so it does not shut down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
