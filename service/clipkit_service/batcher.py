"""The micro-batcher: items of many requests go through the model together, and fail alone.

One worker per queue takes whatever waits, up to a full batch, and never lingers for more: a batch grows only
while the one before it runs. Admission is counted in items and refused when the queue is full. An item whose
client is gone is skipped. When a batch fails it is halved until the culprit stands alone, so that the others
succeed. A worker that dies is started again, and `alive` is false meanwhile.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from clipkit.errors import ClipkitError
from clipkit_service import context
from clipkit_service.metrics import Metrics
from clipkit_service.problems import Problem

log = logging.getLogger("clipkit.service")
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Entry(Generic[Item, Result]):
    """One item that waits, and the future of its result."""

    __slots__ = ("done_s", "future", "item", "since", "started_s")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.since = time.perf_counter()
        self.started_s = self.done_s = 0.0
        self.future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()


class Ticket(Generic[Item, Result]):
    """The right of one request to have items in the queue."""

    def __init__(self, batcher: "Batcher[Item, Result]", slots: int) -> None:
        self._batcher = batcher
        self.slots = slots

    async def run(self, items: Sequence[Item], pointers: Sequence[str]) -> list[Result]:
        """The result of each item, in order; never more than `slots` items wait at a time.

        Raises:
            ClipkitError: An item was refused by the library.
            Problem: 500 naming the items on which the model failed, or 503 when the worker died.
        """
        results: list[Result] = []
        for start in range(0, len(items), self.slots):
            chunk = [self._batcher.enqueue(item) for item in items[start : start + self.slots]]
            outcomes = await asyncio.gather(*(entry.future for entry in chunk), return_exceptions=True)
            places = pointers[start : start + self.slots]
            failed = [
                (place, outcome)
                for place, outcome in zip(places, outcomes, strict=True)
                if isinstance(outcome, BaseException)
            ]
            if failed:
                raise self._failure(failed)
            context.spent("queue", max(entry.started_s - entry.since for entry in chunk))
            context.spent("infer", max(entry.done_s - entry.started_s for entry in chunk))
            results.extend(outcome for outcome in outcomes if not isinstance(outcome, BaseException))
        return results

    def _failure(self, failed: Sequence[tuple[str, BaseException]]) -> BaseException:
        for _, error in failed:
            if isinstance(error, ClipkitError | Problem):
                return error
        log.error("request %s: the model failed", context.request_id(), exc_info=failed[0][1])
        return Problem(
            500,
            "inference_failed",
            "the model failed on a part of this request; other requests are not affected",
            pointers=[(pointer, "the model failed here") for pointer, _ in failed],
        )


class Batcher(Generic[Item, Result]):
    """Batches of one kind of item, one after the other.

    Args:
        name: `"image"` or `"text"`, for metrics and messages.
        function: A list of items to as many results; runs on `executor`.
        executor: Where the model runs: one thread, shared by all batchers.
        max_batch: Items in one batch.
        max_items: Items admitted at a time.
        metrics: Where sizes, waits and restarts are counted.
        restart_s: Pause before a dead worker is started again.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[list[Item]], Sequence[Result]],
        executor: Executor,
        *,
        max_batch: int,
        max_items: int,
        metrics: Metrics,
        restart_s: float = 0.5,
    ) -> None:
        self.name, self.function, self.executor = name, function, executor
        self.max_batch, self.max_items, self.restart_s = max_batch, max_items, restart_s
        self.metrics = metrics
        self.alive = False
        self.depth = 0
        self.worker: asyncio.Task[None] | None = None
        self.last_success = self.last_failure = -math.inf
        self._seconds_per_item = 0.05
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._flying: list[_Entry[Item, Result]] = []
        self._arrived = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the worker and what watches over it."""
        self.alive = True
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise(), name=f"{self.name}s")

    async def close(self) -> None:
        """Stop the worker; what still waits is refused with 503."""
        if self._supervisor:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        self._abandon([*self._flying, *self._waiting], "the server is shutting down")

    @contextmanager
    def admit(self, count: int) -> Iterator[Ticket[Item, Result]]:
        """Room in the queue for a request of `count` items, kept until the block ends.

        A request longer than a batch gets room for one batch and passes through it piece by piece, so that
        others come in between.

        Raises:
            Problem: 429 with `Retry-After` when the queue is full.
        """
        slots = max(1, min(count, self.max_batch))
        if self.depth + slots > self.max_items:
            self.metrics.rejected.labels("queue_full").inc()
            wait = max(1, math.ceil(self.depth * self._seconds_per_item))
            raise Problem(
                429,
                "queue_full",
                f"the {self.name} queue is full ({self.depth} of {self.max_items} items): try again later",
                headers={"Retry-After": str(min(wait, 60))},
                limit=self.max_items,
                actual=self.depth + slots,
            )
        self._count(slots)
        try:
            yield Ticket(self, slots)
        finally:
            self._count(-slots)

    def _count(self, change: int) -> None:
        self.depth += change
        self.metrics.queue_depth.labels(self.name).set(self.depth)

    def enqueue(self, item: Item, *, first: bool = False) -> "_Entry[Item, Result]":
        """Put an item in the queue; `first` passes the others (readiness probes do)."""
        entry: _Entry[Item, Result] = _Entry(item)
        self._waiting.appendleft(entry) if first else self._waiting.append(entry)
        self._arrived.set()
        return entry

    async def _supervise(self) -> None:
        while True:
            self.worker = asyncio.get_running_loop().create_task(self._work(), name=f"{self.name}-worker")
            self.alive = True
            try:
                await asyncio.wait([self.worker])
            finally:
                self.alive = False
                self.worker.cancel()
            reason = "cancelled" if self.worker.cancelled() else repr(self.worker.exception())
            log.error("the %s worker ended (%s): starting it again", self.name, reason)
            self.metrics.worker_restarts.labels(self.name).inc()
            self._abandon(self._flying, "the worker that had this request ended; try again")
            self._flying = []
            await asyncio.sleep(self.restart_s)

    def _abandon(self, entries: Sequence[_Entry[Item, Result]], detail: str) -> None:
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(Problem(503, "worker_ended", detail, headers={"Retry-After": "1"}))
                entry.future.exception()  # a client that is gone retrieves nothing: not worth a warning

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._flying = self._take()
            if self._flying:
                await self._compute(self._flying)
                self._flying = []
            else:
                self._arrived.clear()

    def _take(self) -> list[_Entry[Item, Result]]:
        """What waits now, up to a full batch, without the items whose client is gone."""
        batch: list[_Entry[Item, Result]] = []
        now = time.perf_counter()
        while self._waiting and len(batch) < self.max_batch:
            entry = self._waiting.popleft()
            if entry.future.done():
                self.metrics.skipped.labels(self.name).inc()
                continue
            entry.started_s = now
            self.metrics.queue_wait.labels(self.name).observe(now - entry.since)
            batch.append(entry)
        if batch:
            self.metrics.batch_size.labels(self.name).observe(len(batch))
        return batch

    async def _compute(self, batch: list[_Entry[Item, Result]]) -> None:
        """Run a batch; on failure halve it, until the item that fails is alone."""
        start = time.perf_counter()
        outcome = await asyncio.get_running_loop().run_in_executor(
            self.executor, self._guarded, [entry.item for entry in batch]
        )
        now = time.perf_counter()
        if isinstance(outcome, BaseException):
            self.last_failure = now
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._compute(batch[:middle])
                await self._compute(batch[middle:])
            else:
                batch[0].done_s = now
                if not batch[0].future.done():
                    batch[0].future.set_exception(outcome)
            return
        self.last_success = now
        self._seconds_per_item = 0.9 * self._seconds_per_item + 0.1 * (now - start) / len(batch)
        for entry, result in zip(batch, outcome, strict=True):
            entry.done_s = now
            if not entry.future.done():
                entry.future.set_result(result)

    def _guarded(self, items: list[Item]) -> Sequence[Result] | BaseException:
        """The function's results or what it raised: no exception may reach the worker as such."""
        try:
            results = self.function(items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} items gave {len(results)} results")
            return results
        except BaseException as error:
            if isinstance(error, StopIteration | asyncio.CancelledError):
                return RuntimeError(repr(error))  # a future cannot hold these
            return error
