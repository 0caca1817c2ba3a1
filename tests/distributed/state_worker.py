"""One of two gloo ranks that keep a queue, a bank and a twin over unequal batches, and save what they hold.

The test imports this file too, to do the same in one process with the ranks' batches under one another.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.errors import InputError
from clipkit.losses import contrast
from clipkit.state import Bank, Ema, Queue, cosine_decay
from tests.distributed.support import launch

Group = dist.ProcessGroup | None
D, SAMPLES, STEPS = 4, 9, 6
BATCHES = [(3, 2), (0, 4), (9, 1), (5, 0), (0, 0), (1, 1)]  # rows of rank 0 and of rank 1 in every step
DTYPES = (torch.float32, torch.bfloat16)


def batches(rank: int | None, *shape: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and sample indices of every step, those of one rank or of both."""
    g = torch.Generator().manual_seed(3)
    for sizes in BATCHES:
        total = sum(sizes)
        rows = torch.randn(total, *shape, generator=g, dtype=torch.float64)
        index = torch.randint(0, SAMPLES, (total,), generator=g)
        start = 0 if rank is None else sum(sizes[:rank])
        part = slice(start, total if rank is None else start + sizes[rank])
        yield rows[part], index[part]


def queue_states(rank: int | None, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    """A queue after every step."""
    queue, found = Queue(7, D, dtype=dtype), {}
    for step, (rows, index) in enumerate(batches(rank, D)):
        queue.enqueue(rows, index, group=group)
        found |= {f"{step}.{name}": value.clone() for name, value in queue.state_dict().items()}
    return found


def bank_states(rank: int | None, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    """A bank after every step."""
    bank, found = Bank(SAMPLES, D, dtype=dtype), {}
    for step, (rows, index) in enumerate(batches(rank, D)):
        bank.update(index, rows.float(), group=group)
        found |= {f"{step}.{name}": value.clone() for name, value in bank.state_dict().items()}
    return found


def moco(rank: int | None, group: Group, interrupted: bool) -> dict[str, Tensor]:
    """Queue, twin and encoder after a short MoCo run; `interrupted` reloads everything half-way."""

    def start() -> nn.ModuleDict:
        torch.manual_seed(1)
        encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()
        twin, queue = Ema(encoder, cosine_decay(0.5, STEPS)), Queue(10, D, dtype=torch.float64)
        return nn.ModuleDict({"encoder": encoder, "twin": twin, "queue": queue})

    def wrapped(module: nn.Module) -> nn.Module:
        return module if group is None else DistributedDataParallel(module, process_group=group)

    state = start()
    encode, twin, queue = wrapped(state["encoder"]), state["twin"], state["queue"]
    for step, (views, index) in enumerate(batches(rank, 2, D)):
        if interrupted and step == STEPS // 2:
            stopped, state = save(state.state_dict()), start()
            state.load_state_dict(load(stopped))
            encode, twin, queue = wrapped(state["encoder"]), state["twin"], state["queue"]
        assert isinstance(twin, Ema)
        assert isinstance(queue, Queue)
        if sum(BATCHES[step]) == 0:
            continue
        twin.update(state["encoder"])
        q, k = encode(views[:, 0]), twin(views[:, 1])
        rows, ids = queue.valid()
        out = contrast(q, k, q_id=index, paired=True, negatives=rows, negative_id=ids, scale=5.0, group=group)
        encode.zero_grad()
        out.loss.backward()
        with torch.no_grad():
            for p in state["encoder"].parameters():
                assert p.grad is not None
                p -= 0.5 * p.grad
        queue.enqueue(k, index, group=group)
    return state.state_dict()


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def refusals(rank: int, group: dist.ProcessGroup, only_rank_0: Any) -> dict[str, str]:
    """What this rank is told where the ranks do not fit together."""
    rows, index = torch.ones(2, D), torch.arange(2)
    ahead, bank = Queue(7, D), Bank(SAMPLES, D)
    if rank == 0:
        ahead.enqueue(rows, index)
    found = {"ahead": refusal(lambda: ahead.enqueue(rows, index, group=group))}
    sizes = Queue(7 + rank, D)
    found["sizes"] = refusal(lambda: sizes.enqueue(rows, index, group=group))
    wrong = index + rank * SAMPLES
    found["index"] = refusal(lambda: bank.update(wrong, rows, group=group))
    wide = rows.to(torch.float64 if rank == 0 else torch.float32)
    found["dtype"] = refusal(lambda: bank.update(index, wide, group=group))
    assert not bank.seen.any()
    found["outside"] = refusal(lambda: Queue(7, D).enqueue(rows, index, group=only_rank_0))
    return found


def work(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    only_rank_0: Any = dist.new_group([0])  # in a process outside of it, a number
    results: dict[str, Any] = {
        "queue": {str(dtype): queue_states(rank, group, dtype) for dtype in DTYPES},
        "bank": {str(dtype): bank_states(rank, group, dtype) for dtype in DTYPES},
        "moco": moco(rank, group, interrupted=False),
        "resumed": moco(rank, group, interrupted=True),
        "refusals": refusals(rank, group, only_rank_0),
    }
    return results


if __name__ == "__main__":
    launch(work, 2)
