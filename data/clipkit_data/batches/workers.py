"""Work done by other processes, in order: the one place where torch's DataLoader is set up.

The work is a function of a key (a step number, a range of rows), so the number of workers changes nothing but
speed. An error meant for people arrives as itself and not inside a worker's traceback.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from clipkit.errors import ClipkitError
from clipkit_data.batches.lost_workers import is_lost_worker, lost_worker

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    kind: type[ClipkitError]
    message: str
    hint: str | None


class _Work(Dataset[Any]):
    """What a worker runs: the function, with an error for people turned into a value that can travel."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.make(key)
        except ClipkitError as error:
            return _Failure(type(error), error.message, error.hint)


def in_workers(
    make: Callable[[K], T], keys: Iterable[K], *, workers: int, pin_memory: bool = False
) -> Iterator[T]:
    """`make(key)` for each key, in order, some keys ahead.

    Args:
        make: Runs in the workers; it must not depend on what was made before.
        keys: May be endless.
        workers: Processes; 0 works in this one, nothing ahead.
        pin_memory: Results are moved to page-locked memory by their `pin_memory()`.

    Raises:
        ClipkitError: The one that `make` raised.
        DataError: A worker was killed while it was waited for.
    """
    loader = DataLoader(
        _Work(make),
        batch_size=None,
        sampler=keys,  # pyright: ignore[reportArgumentType] (any iterable will do)
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_same,
        generator=torch.Generator(),  # else each start would draw from the global generator
    )
    try:
        for made in loader:
            if isinstance(made, _Failure):
                error = made.kind.__new__(made.kind)  # some kinds are made from more than a message
                ClipkitError.__init__(error, made.message, made.hint)
                raise error
            yield made
    except (RuntimeError, EOFError, ConnectionError) as error:
        # torch notices a dead worker here (or wherever the program then is, see `explaining_lost_workers`),
        # unless its half-sent message is read first.
        if isinstance(error, RuntimeError) and not is_lost_worker(error):
            raise
        raise lost_worker(error) from error


def _same(made: Any) -> Any:
    return made
