"""Processes of a gloo group: how they begin and end."""

from __future__ import annotations

import os
import socket
import sys
import time
from functools import partial
from multiprocessing.connection import wait
from typing import NoReturn

import torch.distributed as dist
from scripts import Script
from torch.multiprocessing import start_processes

start_ranks = partial(start_processes, start_method="forkserver")  # of a function, as torch's ``spawn``


def run_ranks(code: str, *arguments: object, count: int = 2, seconds: float = 240) -> None:
    """Run a script as torchrun would.

    Raises:
        AssertionError: a process ended with an error, which it holds the end of, or not in time.
    """
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count} if count > 1 else {}
        ranks.append(Script(code, *arguments, **shared, **{name: str(value) for name, value in own.items()}))
    processes, end = [rank.process for rank in ranks], time.monotonic() + seconds
    while all(one.exitcode in (None, 0) for one in processes):
        alive = [one.sentinel for one in processes if one.is_alive()]
        if not alive or not wait(alive, max(end - time.monotonic(), 0)):  # of none it would wait all the time
            break
    codes = [one.exitcode for one in processes]
    said = "\n".join(rank.finish(0).stderr[-4000:] for rank in ranks)
    assert codes == [0] * count, f"{codes}\n{said}"


def leave() -> NoReturn:
    """Gloo's threads may drop their last tensors after ``destroy_process_group``; an interpreter that finalizes under
    them aborts (pytorch pull request 179291), so that it does not finalize here.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
