"""A memory bank: one unit vector for every sample of the data set, the mean of what it was encoded as so far.

The one idea: a sample's index is both its id and its place, so nothing else has to be remembered. A row is
not there before its sample was seen: no random vector ever stands in for it.

Shapes: n = samples of this rank, N = samples of all ranks, D = features, S = seen rows.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.errors import InputError
from clipkit.losses import checks
from clipkit.losses.similarity import full_precision, unit, widen
from clipkit.state.common import dtype_number, fraction, of_all_ranks, positive


class Bank(nn.Module):
    """One L2-normalised row for each sample index, averaged over the visits of the sample.

        v_i ← unit(m v_i + (1 − m) unit(f_i)) where i was seen before,   v_i ← unit(f_i) where not

    Fill the bank in one pass over the data, then update after the loss. A softmax over the whole bank, and
    the paper's NCE over m draws from it:

        rows, ids = bank.valid()
        out = contrast(f, bank.lookup(index), q_id=index, paired=True, negatives=rows, negative_id=ids,
                       scale=1 / 0.07, group=group)

        noise, _ = bank.sample((n, m))
        loss = nce_loss(f, bank.lookup(index), noise, temperature=0.07, log_z=log_z,
                        num_noise_population=len(ids))

        bank.update(index, f, group=group)

    As in the paper, draws may be of the row's own sample; `contrast(own_negative_id=…)` with the ids that
    `sample` returns leaves these out. All results are copies: a backward pass is right after a later
    `update`. Indices and what was seen are checked by value, for which a call waits for an accelerator.
    Where old and new row cancel exactly, the row is zeros until its next update.

    Buffers, all persistent: `rows` (size, dim), zeros where not seen, and `seen` (size,) bool.

    Args:
        size: number of samples; indices are 0 … size − 1.
        dim: D, features of a row.
        momentum: m in [0, 1), the weight of the old row.
        dtype: of the stored rows; an update computes in float32 or wider.

    Raises:
        InputError: an argument is out of its range.

    References:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section
        3.1. The authors' code starts from random rows and averages with momentum 0.5, which stands for the
        paper's proximal term.
    """

    rows: Tensor
    seen: Tensor

    def __init__(
        self, size: int, dim: int, *, momentum: float = 0.5, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        dtype_number(dtype)
        self.momentum = fraction("momentum", momentum, one=False)
        self.register_buffer("rows", torch.zeros(positive("size", size), positive("dim", dim), dtype=dtype))
        self.register_buffer("seen", torch.zeros(size, dtype=torch.bool))

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        return f"size={size}, dim={dim}, momentum={self.momentum}, dtype={self.rows.dtype}"

    @torch.no_grad()
    def lookup(self, index_n: Tensor) -> Tensor:
        """Rows of the given samples.

        Args:
            index_n: (n,) integers.

        Returns:
            (n, D) of the bank's dtype, copies.

        Raises:
            InputError: an index is out of range, or its sample was never seen: `bank.seen[index]` tells.
        """
        index_n = self._in_range(checks.integers("index", index_n, _length(index_n), self.rows.device))
        unseen = index_n[~self.seen[index_n]]
        if unseen.numel():
            raise InputError(
                f"index: {unseen.numel()} of the samples were never seen, the first is {int(unseen[0])}",
                hint="update the bank with them first, or leave them out with bank.seen[index]",
            )
        return self.rows[index_n]

    @torch.no_grad()
    def update(self, index_n: Tensor, features_nD: Tensor, *, group: dist.ProcessGroup | None = None) -> None:
        """Average new features into the rows of their samples.

        Args:
            index_n: (n,) integers. Of an index that occurs several times the last occurrence counts, in the
                order of ranks and of rows: a row is updated once.
            features_nD: (n, D) floating, of any length; taken detached.
            group: update with the samples of all these ranks, so that their banks stay the same bit for
                bit. A collective: every rank calls it, also one without samples.

        Raises:
            InputError: shapes do not fit, an index is out of range on any rank, or the ranks' banks differ.
        """
        checks.fits("features", checks.features("features", features_nD, "nD"), "the bank", self.rows)
        index_n = checks.integers("index", index_n, (features_nD.shape[0],), features_nD.device)
        wide = torch.promote_types(widen(features_nD).dtype, widen(self.rows).dtype)
        state = [*self.rows.shape, dtype_number(self.rows.dtype), dtype_number(wide)]
        what = "banks or features (size, dim, number of the bank's dtype, of the dtype of the update)"
        features_ND, index_N = of_all_ranks(features_nD.to(wide), index_n, state, what, group)
        index_N = self._in_range(index_N)

        with full_precision(features_ND):
            new_ND = unit(features_ND)[_last_occurrence(index_N)]
            mixed_ND = unit(self.momentum * self.rows[index_N].to(wide) + (1 - self.momentum) * new_ND)
        rows_ND = torch.where(self.seen[index_N][:, None], mixed_ND, new_ND)
        self.rows[index_N] = rows_ND.to(self.rows.dtype)  # equal indices write equal rows, in any order
        self.seen[index_N] = True

    @torch.no_grad()
    def sample(
        self, shape: int | Sequence[int], *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Uniform draws, with replacement, of seen rows.

        Args:
            shape: how many, or the shape of the draws, such as (N, m) for `own_negatives`.
            generator: on any device; one on the CPU draws the same samples wherever the bank is.

        Returns:
            (*shape, D) rows, copies, and (*shape) int64 ids of their samples.

        Raises:
            InputError: nothing was seen yet, or the shape is none.
        """
        sizes = list(shape) if isinstance(shape, Sequence) else [shape]
        if any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in sizes):
            raise InputError(f"shape must be an integer >= 0 or several of them, got {shape!r}")
        seen_S = self.seen.nonzero()[:, 0]
        if seen_S.shape[0] == 0:
            raise InputError("the bank has no rows to sample: nothing was seen yet", hint="update it first")
        device = self.rows.device if generator is None else generator.device
        draws = torch.randint(seen_S.shape[0], sizes, generator=generator, device=device)
        ids = seen_S[draws.to(self.rows.device)]
        return self.rows[ids], ids

    @torch.no_grad()
    def valid(self) -> tuple[Tensor, Tensor]:
        """Copies of all seen rows and their ids, in ascending order.

        Returns:
            (S, D) of the bank's dtype, (S,) int64; S = 0 before the first update.
        """
        ids_S = self.seen.nonzero()[:, 0]
        return self.rows[ids_S], ids_S

    def _in_range(self, index: Tensor) -> Tensor:
        size = self.rows.shape[0]
        wrong = ((index < 0) | (index >= size)).nonzero()[:, 0]
        if wrong.numel():
            place = int(wrong[0])
            raise InputError(
                f"index {int(index[place])} (at place {place}) is outside of the bank, whose rows are "
                f"0 to {size - 1}",
                hint="size must be the number of samples in the data set",
            )
        return index


def _length(x: Tensor) -> tuple[int]:
    return (x.numel(),) if isinstance(x, Tensor) else (0,)


def _last_occurrence(index_N: Tensor) -> Tensor:
    """For every place, the last place that holds the same index."""
    order = torch.argsort(index_N, stable=True)
    return order[torch.searchsorted(index_N[order], index_N, right=True) - 1]
