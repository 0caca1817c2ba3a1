"""A loader's process that was killed, as an error for people; free of torch, so that it costs no start-up."""

from collections.abc import Iterator
from contextlib import contextmanager

from clipkit.errors import DataError


@contextmanager
def explaining_lost_workers() -> Iterator[None]:
    """Around whatever is done with what workers made: there, too, a worker that was killed is a `DataError`.

    torch raises in a signal handler, so that the error comes out of any line of the main thread.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        raise lost_worker(error) from error


def is_lost_worker(error: RuntimeError) -> bool:
    """Whether this is torch's word for a worker that ended."""
    return "DataLoader worker" in str(error)


def lost_worker(error: Exception) -> DataError:
    """The error for people."""
    return DataError(
        f"a process that reads the data ended unexpectedly: {error or type(error).__name__}",
        hint="often for want of memory: use fewer workers",
    )
