"""The processes of a run: this one alone, or those that torchrun started."""

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
    """This process among those of a run.

    Attributes:
        rank: Its number.
        size: How many there are.
        local_rank: Its number on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def broadcast(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process has, on the first; nothing on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(value, found, dst=0)
        return found or []

    def wait(self) -> None:
        """Go on when every process has come here."""
        self.gather(None)
        self.broadcast(None)

    def stop_together(self, problem: str | None) -> None:
        """Raise the first problem that any process has on all of them, so that none waits for one that has failed.

        Raises:
            ValueError: With the problem.
        """
        problems = self.broadcast([each for each in self.gather(problem) if each])
        if problems:
            raise ValueError(problems[0])

    def share_disk(self, folder: Path) -> bool:
        """Whether the first process writes to the very folder that this one sees."""
        if self.size == 1:
            return True
        path, token = folder / ".token", self.broadcast(os.urandom(8).hex())
        if self.rank == 0:
            write_whole(path, token.encode())
        self.wait()
        return self.rank == 0 or (path.is_file() and path.read_text() == token)


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone; an existing process group is used as it is.

    Args:
        device (str): ``"cuda"`` adds nccl to gloo.

    Yields:
        Processes: Communicating until the end of the block.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not (distributed.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ):
        yield Processes()
        return
    mine = not distributed.is_initialized()
    if mine:
        # Imported while a group exists (by much of torch), this module keeps the group in its functions' defaults:
        # its threads then outlive destroy_process_group and may abort the interpreter as it ends.
        import_module("torch.distributed.nn.functional")
        # Shares differ in length: the first to finish must be allowed to wait for the last.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo", timeout=timedelta(days=14))
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    finally:
        if mine:
            distributed.destroy_process_group()
