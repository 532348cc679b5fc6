# SPDX-License-Identifier: Apache-2.0
"""Several processes (torchrun) that share the windows of a step, each with the whole model.

Gradients are added up once per step, so every process takes the same step, and a checkpoint that
one of them wrote serves all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from seer_cuda.integrations.transformers._corpus import RunError


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def own(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Its share of a step's batches."""
        return parts[self.rank :: self.count]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Every process then holds the sums over all."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started; one by itself without torchrun.

    device: ``"auto"``, ``"cuda"``: a GPU for each process of a machine, or ``"cpu"``.
    RunError: several processes on GPUs that were not started by torchrun.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if "LOCAL_RANK" not in os.environ:
            raise RunError(
                "LOCAL_RANK: expected each process's GPU beside WORLD_SIZE, got no such variable. "
                "Start the processes with torchrun, or unset WORLD_SIZE."
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Ranks(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
