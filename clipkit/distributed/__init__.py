"""Collectives; the loss formulas know nothing of ranks but these few calls."""

from clipkit.distributed.gather import (
    exchange,
    gather_rows,
    group_rank,
    group_size,
    max_over_group,
    reduce_scatter_rows,
    sum_over_group,
    unique_ids,
)
from clipkit.distributed.ring import ring, ring_sum

__all__ = [
    "exchange",
    "gather_rows",
    "group_rank",
    "group_size",
    "max_over_group",
    "reduce_scatter_rows",
    "ring",
    "ring_sum",
    "sum_over_group",
    "unique_ids",
]
