"""What queue, bank and EMA twin share: counters read without waiting, batches of all ranks, checked numbers.

The one idea: buffers are the only truth. What Python remembers of them (`Counter`) is a copy that is dropped
as soon as anybody else writes the buffer, and what one rank writes (`of_all_ranks`) is what all ranks write.

Shapes: n = rows of this rank, N = rows of all ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import exchange, gather_rows, group_rank
from clipkit.errors import InputError

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Counter:
    """Reads a 0-d integer buffer without waiting for its device, unless somebody else has written it.

    Whether somebody has is told by the tensor and its version, which every in-place write raises:
    `load_state_dict`, `.to()` and a plain `buffer.fill_(…)` are all noticed.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._version, self._value = 0, 0

    def __reduce__(self) -> tuple[type["Counter"], tuple[()]]:
        return Counter, ()  # a copy of the module has other buffers: its counters start by reading them

    def read(self, buffer: Tensor) -> int:
        if self._buffer is not buffer or self._version != buffer._version:
            self._remember(buffer, int(buffer))
        return self._value

    def write(self, buffer: Tensor, value: int) -> None:
        buffer.fill_(value)
        self._remember(buffer, value)

    def _remember(self, buffer: Tensor, value: int) -> None:
        self._buffer, self._version, self._value = buffer, buffer._version, value


def of_all_ranks(
    rows: Tensor, ids: Tensor, state: Sequence[int], what: str, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Rows and ids of all ranks, in the order of ranks, on every rank the same, bit for bit.

    Args:
        rows: (n, D) of this rank; n may differ between the ranks.
        ids: (n,) int64.
        state: numbers that must be the same on every rank, such as sizes and pointers.
        what: what these numbers are of, and in brackets what they are, for the message.
        group: the ranks; None for this process alone.

    Returns:
        (N, D), (N,).

    Raises:
        InputError: `state` differs between the ranks (raised on every rank), or this process is not a
            member of the group.
    """
    if group is None:
        return rows, ids
    group_rank(group)  # refuses a process outside of the group, before the others wait for it
    everyone = exchange([rows.shape[0], *state], group, rows.device)
    if any(facts[1:] != everyone[0][1:] for facts in everyone):
        raise InputError(
            f"the ranks of the group hold different {what}: {[tuple(facts[1:]) for facts in everyone]}",
            hint="make them alike and load the same state on every rank",
        )
    sizes = [facts[0] for facts in everyone]
    return gather_rows(rows, sizes, group), gather_rows(ids, sizes, group)


def dtype_number(dtype: torch.dtype) -> int:
    """A number that stands for a dtype among the ranks; a dtype that cannot store rows is refused."""
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    return _DTYPES.index(dtype)


def positive(name: str, x: int) -> int:
    """An integer ≥ 1."""
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise InputError(f"{name} must be an integer >= 1, got {x!r}")
    return x


def fraction(name: str, x: float, *, one: bool) -> float:
    """A number from 0 to 1; exactly 1 only where `one` says so."""
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not (0 <= x < 1 or (one and x == 1)):
        raise InputError(f"{name} must be a number in [0, 1{']' if one else ')'}, got {x!r}")
    return float(x)
