"""The end of a process of a gloo group."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


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
