"""The processes of a run: this one alone, or the group that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from captum_fusion.evaluation.store import write_whole


@dataclass(frozen=True)
class Processes:
    """A process within the group of a run.

    Attributes:
        rank: Its number.
        size: The number of processes.
        local_rank: Its number on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes on the first one, and an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(value, values, dst=0)
        return values or []

    def wait(self) -> None:
        """Wait until every process has called this."""
        self.gather(None)
        self.broadcast(None)

    def stop_together(self, problem: str | None) -> None:
        """Raise a problem of any process on all of them, so that none waits for one that has failed.

        Args:
            problem (str, optional): This process's problem.

        Raises:
            ValueError: With the first problem.
        """
        problems = self.broadcast([text for text in self.gather(problem) if text])
        if problems:
            raise ValueError(problems[0])

    def share_disk(self, folder: Path) -> bool:
        """Whether this process sees the folder that the first one writes to."""
        if self.size == 1:
            return True
        path, token = folder / ".token", self.broadcast(os.urandom(8).hex())
        if self.rank == 0:
            write_whole(path, token.encode())
        self.wait()
        return self.rank == 0 or (path.is_file() and path.read_text() == token)


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, or run alone; a process group that exists already is used as it is.

    Args:
        device (str): The device of the run; ``"cuda"`` adds nccl to gloo.

    Yields:
        Processes: This process. A group that this function has made ends with the block.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not (distributed.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ):
        yield Processes()
        return
    mine = not distributed.is_initialized()
    if mine:
        # If this module is first imported while a group exists (much of torch imports it), the defaults of its
        # functions keep the group: its threads outlive destroy_process_group and may abort the interpreter at exit.
        import_module("torch.distributed.nn.functional")
        # The processes have unequal amounts of work: the first to finish must be able to wait for the last.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo", timeout=timedelta(days=14))
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    finally:
        if mine:
            distributed.destroy_process_group()
