"""Collectives with exact gradients; the loss formulas above know nothing of ranks but these few calls."""

from clipkit.distributed.gather import (
    exchange,
    gather_features,
    gather_rows,
    group_rank,
    group_size,
    sum_over_group,
    unique_ids,
)

__all__ = [
    "exchange",
    "gather_features",
    "gather_rows",
    "group_rank",
    "group_size",
    "sum_over_group",
    "unique_ids",
]
