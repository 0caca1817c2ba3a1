"""The micro-batcher alone: what is batched, who fails, who waits, and what happens when a worker dies."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from clipkit.errors import InputError
from clipkit_service.batcher import Batcher
from clipkit_service.metrics import Metrics
from clipkit_service.problems import Problem

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def started(
    function: Callable[[list[int]], Sequence[int]], **options: Any
) -> AsyncIterator[Batcher[int, int]]:
    with ThreadPoolExecutor(1) as executor:
        settings = {"max_batch": 8, "max_items": 64, "metrics": Metrics(), "restart_s": 0.05} | options
        batcher = Batcher("text", function, executor, **settings)
        batcher.start()
        try:
            yield batcher
        finally:
            await batcher.close()


async def ask(batcher: Batcher[int, int], items: Sequence[int]) -> list[int]:
    with batcher.admit(len(items)) as ticket:
        return await ticket.run(items, [f"/{i}" for i in items])


class Gate:
    """A function that doubles, records its batches, and waits until it is opened."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.entered = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(list(items))
        self.entered.set()
        assert self.open.wait(10)
        return [2 * item for item in items]


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 10)


async def test_what_waits_is_taken_together_and_nothing_lingers() -> None:
    gate = Gate()
    async with started(gate) as batcher:
        first = asyncio.create_task(ask(batcher, [1]))
        await entered(gate)
        others = [asyncio.create_task(ask(batcher, [i, i + 1])) for i in range(2, 14, 2)]
        await asyncio.sleep(0)
        gate.open.set()
        assert await first == [2]
        assert [row for task in others for row in await task] == [2 * i for i in range(2, 14)]
    assert gate.batches == [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13]]


async def test_only_the_culprits_fail() -> None:
    def fragile(items: list[int]) -> list[int]:
        if 13 in items:
            raise ValueError("13 brings bad luck")
        if 99 in items:
            raise InputError("99 is refused")
        if 5 in items:
            raise StopIteration  # no future can hold one
        return [2 * item for item in items]

    async with started(fragile) as batcher:
        asked = [asyncio.create_task(ask(batcher, [i])) for i in (1, 13, 2, 99, 3, 5, 4)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [o for o in outcomes if not isinstance(o, BaseException)] == [[2], [4], [6], [8]]
        problem, refused, odd = (o for o in outcomes if isinstance(o, BaseException))
        assert isinstance(problem, Problem)
        assert problem.errors[0]["pointer"] == "/13"
        assert isinstance(refused, InputError)
        assert isinstance(odd, Problem)
        assert batcher.alive


async def test_wrong_number_of_results_is_a_failure() -> None:
    async with started(lambda items: items[1:]) as batcher:
        with pytest.raises(Problem, match="failed"):
            await ask(batcher, [1, 2])


async def test_full_queue_is_429_with_a_time() -> None:
    gate = Gate()
    async with started(gate, max_items=10) as batcher:
        held = [asyncio.create_task(ask(batcher, [i])) for i in range(10)]
        await entered(gate)
        with pytest.raises(Problem) as refused:
            await ask(batcher, [11])
        assert refused.value.status_code == 429
        assert int((refused.value.headers or {})["Retry-After"]) >= 1
        gate.open.set()
        await asyncio.gather(*held)
        assert batcher.depth == 0
        assert await ask(batcher, [11]) == [22]


async def test_long_requests_pass_in_pieces_and_let_others_in() -> None:
    gate = Gate()
    gate.open.set()
    async with started(gate, max_items=16) as batcher:
        long = asyncio.create_task(ask(batcher, range(100)))
        await asyncio.sleep(0)
        assert batcher.depth == 8
        assert await ask(batcher, [1000]) == [2000]
        assert not long.done()
        assert await long == [2 * i for i in range(100)]


async def test_cancelled_requests_are_skipped() -> None:
    gate = Gate()
    async with started(gate) as batcher:
        first = asyncio.create_task(ask(batcher, [1]))
        await entered(gate)
        gone = asyncio.create_task(ask(batcher, [2, 3]))
        stays = asyncio.create_task(ask(batcher, [4]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert (await first, await stays) == ([2], [8])
        assert batcher.depth == 0
    assert gate.batches == [[1], [4]]


async def test_dead_worker_is_replaced() -> None:
    gate = Gate()
    async with started(gate) as batcher:
        in_hand = asyncio.create_task(ask(batcher, [1]))
        await entered(gate)
        waiting = asyncio.create_task(ask(batcher, [2]))
        await asyncio.sleep(0)
        assert batcher.worker is not None
        batcher.worker.cancel()
        await asyncio.sleep(0.01)
        assert not batcher.alive
        with pytest.raises(Problem) as lost:
            await in_hand
        assert lost.value.status_code == 503
        gate.open.set()
        assert await waiting == [4]
        assert batcher.alive


async def test_closing_refuses_what_waits() -> None:
    gate = Gate()
    async with started(gate) as batcher:
        tasks = [asyncio.create_task(ask(batcher, [i])) for i in range(3)]
        await entered(gate)
        await batcher.close()
        gate.open.set()
        for task in tasks:
            with pytest.raises(Problem, match="shutting down"):
                await task
