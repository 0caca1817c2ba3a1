"""The processes that train together: rank, size, device and process group, as torchrun sets them up.

One process without torchrun is a world of size 1 with no group; nothing else in the package asks how many
processes there are in any other way.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipkit.errors import ConfigError

TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other; the first evaluates alone meanwhile."""


@dataclass(frozen=True)
class World:
    """This process among those that train together. `group` is None when it is alone."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """Rank 0's value on every rank, so that clocks cannot make ranks part ways."""
        if self.group is None:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, src=0, group=self.group)
        return float(box.item())

    def sum(self, value: int) -> int:
        """The sum of every rank's value, modulo 2^64, on every rank."""
        box = torch.tensor([value - 2**64 if value >= 2**63 else value], dtype=torch.int64)
        if self.group is not None:
            box = box.to(self.device)
            dist.all_reduce(box, group=self.group)
        return int(box.item()) % 2**64

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for every process."""
        if self.group is not None:
            dist.barrier(group=self.group)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is the GPU of this local rank where there is one, else the CPU."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is no torch device", hint="try auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but torch sees no GPU", hint="try device: auto")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank)
    return device


@contextmanager
def world_from_environment(device: str = "auto") -> Iterator[World]:
    """The world that torchrun describes in the environment; a world of one without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        alone = pick_device(device)
        if alone.type == "cuda":
            torch.cuda.set_device(alone)
        yield World(0, 1, alone, None)
        return
    local = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if local.type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
