"""A ring of past keys with their ids: the negatives that MoCo and cross-batch memories add to a batch.

The one idea: a key travels with the id of its sample, so that the loss itself leaves out a row's own key,
stale or fresh, and no order of calls can turn a positive into a negative. Nothing in the ring counts before
it was written: there are no random fillers.

Shapes: n = rows of this rank, N = rows of all ranks, D = features, K = valid rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.losses import checks
from clipkit.state.common import Counter, dtype_number, of_all_ranks, positive


class Queue(nn.Module):
    """The last `size` keys and their ids, first in, first out.

    Enqueue after the loss, and with a symmetric loss after both directions:

        rows, ids = queue.valid()
        out = contrast(q, k, q_id=index, paired=True, negatives=rows, negative_id=ids,
                       scale=1 / 0.07, group=group)
        queue.enqueue(k, index, group=group)

    The other order only costs negatives, since `contrast` leaves out keys with the row's own id. Every rank
    holds the whole queue, so `contrast` needs no gather for it. Keep the queue beside a module that
    `DistributedDataParallel` wraps, not in it: DDP would send all of it around in every forward pass.

    Buffers, all persistent: `rows` (size, dim), `ids` (size,) int64, `cursor` (the slot that is written
    next) and `count` (how many slots are valid), both 0-d int64. A state dict taken at any point and loaded
    into a fresh queue goes on as if nothing had happened, bit for bit. `.to(dtype)` converts the rows alone.

    Args:
        size: how many keys at most.
        dim: D, features of a key.
        dtype: of the stored keys. float16 and bfloat16 halve the memory and what ranks send each other.

    Raises:
        InputError: size or dim is no integer ≥ 1, or dtype is no floating one.

    References:
        He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", section 3.2;
        Wang et al. 2020, "Cross-Batch Memory for Embedding Learning".
    """

    rows: Tensor
    ids: Tensor
    cursor: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        dtype_number(dtype)
        self.register_buffer("rows", torch.zeros(positive("size", size), positive("dim", dim), dtype=dtype))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._cursor, self._count = Counter(), Counter()

    def __len__(self) -> int:
        """How many rows are valid."""
        return self._count.read(self.count)

    def extra_repr(self) -> str:
        return f"size={self.rows.shape[0]}, dim={self.rows.shape[1]}, dtype={self.rows.dtype}"

    @torch.no_grad()
    def enqueue(self, rows_nD: Tensor, ids_n: Tensor, *, group: dist.ProcessGroup | None = None) -> None:
        """Write keys over the oldest ones.

        Args:
            rows_nD: (n, D) floating, kept detached and as they are (`contrast` normalises). Any n: a batch
                wraps around the end, and of one larger than the queue the last `size` rows stay.
            ids_n: (n,) integers, the ids of the keys' samples.
            group: write the keys of all these ranks, in the order of ranks, so that their queues stay the
                same bit for bit. A collective: every rank calls it, also one without rows.

        Raises:
            InputError: shapes, dtype or device do not fit, or the queues of the ranks differ.
        """
        checks.fits("rows", checks.features("rows", rows_nD, "nD"), "the queue", self.rows)
        ids_n = checks.integers("ids", ids_n, (rows_nD.shape[0],), rows_nD.device)
        (size, dim), cursor, count = self.rows.shape, self._cursor.read(self.cursor), len(self)
        state = [size, dim, dtype_number(self.rows.dtype), cursor, count]
        what = "queues (size, dim, number of the dtype, cursor, count)"
        rows_ND, ids_N = of_all_ranks(rows_nD.to(self.rows.dtype), ids_n, state, what, group)

        n = rows_ND.shape[0]
        kept = min(n, size)
        slots = torch.arange(cursor + n - kept, cursor + n, device=self.rows.device) % size
        self.rows[slots] = rows_ND[n - kept :]
        self.ids[slots] = ids_N[n - kept :]
        self._cursor.write(self.cursor, (cursor + n) % size)
        self._count.write(self.count, min(count + n, size))

    @torch.no_grad()
    def valid(self) -> tuple[Tensor, Tensor]:
        """Copies of the valid rows and of their ids, for `contrast(negatives=…, negative_id=…)`.

        They are copies so that the backward pass of a loss is still right after a later `enqueue`, which
        overwrites the ring in place.

        Returns:
            (K, D) of the queue's dtype, (K,) int64; K = 0 for a queue that was never written.
        """
        count = len(self)
        return self.rows[:count].clone(), self.ids[:count].clone()
